"""What a source of images is: images that can be read one by one, from any process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one. It goes to other processes, so what it holds must be picklable.

    Attributes:
        name: Short, for notes of where a dataset came from.
        names: What messages call each image.
        labels: Class indices, int64 [N], or None.
        read: Gives an image by its index, in any mode that `transforms.normalize` takes.
        class_names: Name of each class, where the source has such names.
        bytes_on_disk: Size of the files, 0 for an embedded source.
        file: Gives the image's file by its index, where it has one of its own.
        color: What images become unless the user says otherwise, see `transforms.COLORS`.
        made_with: How the images were made, where the source is a dataset that says so.
    """

    name: str
    names: Sequence[str]
    labels: np.ndarray | None
    read: Callable[[int], PIL.Image.Image]
    class_names: list[str] | None = None
    bytes_on_disk: int = 0
    file: Callable[[int], bytes] | None = None
    color: str = 'keep'
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class InMemory:
    """Reads images from one array.

    Attributes:
        pixels: [N, H, W] or [N, H, W, 3], uint8, or float32 on the scale 0-255.
    """

    pixels: np.ndarray

    def __call__(self, index: int) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.pixels[index])
