"""The ViT runtime: runs a timm model from stage to stage on the tokens that survive.

It knows nothing of reinforcement learning.
"""
