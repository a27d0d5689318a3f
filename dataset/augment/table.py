"""Augmentations that the network is told of, as a table: a new one is a class and a row of AUGMENTS.

Every one is a frozen dataclass with

    dim                                   numbers that tell the network how an image was augmented
    __call__(images, seed, numbers)       float32 [N, C, H, W] -> augmented images and labels, float32 [N, dim],
                                          zeros for an image that stays as it is; draws belong to (seed, image number)
    problems()                            everything that is wrong with it, in words
"""

from dataset.augment.distribution import DistributionAugment
from dataset.augment.edm import EDMAugment

AUGMENTS: dict[str, type] = {'distribution': DistributionAugment, 'edm': EDMAugment}
