"""Augmentations of batches of images, and what a network is told of them."""
