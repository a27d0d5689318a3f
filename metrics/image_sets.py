"""What a set of images is, and a batch of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class ImageSet:
    """What a set of images is, known before its first image is read.

    Attributes:
        name: The data set's name, for people.
        count: Number of images in the whole set, over all ranks; None where published statistics do not say.
        image_shape: (C, H, W) of every image; None likewise.
        num_classes: Number of classes, 0 where the images have no labels.
        fingerprint: Changes with names and sizes of files, as the data set reader says; None for images being made.
        jpegs: How many of the files are JPEGs.
        made_with: What the data set notes of how it was made (`transform`, ...); {} where it notes nothing.
    """

    name: str
    count: int | None
    image_shape: tuple[int, int, int] | None
    num_classes: int
    fingerprint: str | None = None
    jpegs: int = 0
    made_with: dict[str, Any] = field(default_factory=dict)


class ImageBatch(NamedTuple):
    """Some images of a set.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: Class numbers int64 [N], or None.
        indices: Place of each image in the whole set, int64 [N] in 0..count-1; each occurs once over all ranks.
        names: What messages call each image; None calls it by its place.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    indices: torch.Tensor
    names: list[str] | None = None


def format_shape(image_shape: Iterable[int]) -> str:
    """Write (C, H, W) for people: `3x64x64 (channels x height x width)`."""
    return 'x'.join(map(str, image_shape)) + ' (channels x height x width)'
