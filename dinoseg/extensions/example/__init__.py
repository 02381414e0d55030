"""Segmentation by example: masks of a concept from a few images with masks, without training."""
