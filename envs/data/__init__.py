"""Labelled images: digits, folders, timm's datasets."""
