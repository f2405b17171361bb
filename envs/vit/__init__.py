"""The ViT runtime: a timm model run stage by stage on the tokens that survive.

It knows nothing of RL.
"""
