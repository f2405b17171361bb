"""Policies: heuristics, learned ones, DynamicViT's and an oracle."""
