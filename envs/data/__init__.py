"""Labelled images: scanned digits, folders of image files, and timm's data sets."""
