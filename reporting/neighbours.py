"""The training image nearest to each generated one: does a network remember what it was trained on?"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from dnnlib.errors import UserError
from dnnlib.progress import progress
from metrics.detectors import load_detectors

BATCH = 64
Features = Callable[[torch.Tensor], torch.Tensor]  # uint8 [N, C, H, W] -> float [N, F]


class Images(Protocol):
    """A set of images, such as a `dataset.reader.ImageDataset`."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> np.ndarray:
        """uint8 [C, H, W]."""


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A generated image and the training image that is nearest to it.

    Args:
        sample, nearest: uint8 [C, H, W].
        index: Of the nearest among the training images.
        ratio: Distance, in units of the median distance between a training image and the nearest other one. A copy has
            0; new images of the same distribution have about 1.
    """

    sample: np.ndarray
    nearest: np.ndarray
    index: int
    ratio: float


def features_of(name: str, device: torch.device | str = 'cpu') -> Features:
    """What images are compared by: `pixels`, all of them, or the features of a detector such as `dinov2`."""
    if name == 'pixels':
        return lambda images: images.flatten(1).float() / 255
    detector = load_detectors([name], device)[name]
    return lambda images: next(iter(detector(images.to(device)).values())).float().cpu()


def find_neighbours(samples: Images, data: Images, count: int, features: Features) -> list[Neighbour]:
    """The nearest training image of the first `count` samples, in one pass over the training images."""
    count = min(count, len(samples))
    pictures, first = [samples.read(i) for i in range(count)], data.read(0)
    if pictures[0].shape != first.shape or first.dtype != np.uint8 or len(data) < 2:
        raise UserError(f'images of shape {pictures[0].shape} cannot be compared with {len(data)} of {first.shape}')
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int).tolist()  # to know the scale
    queries = features(torch.from_numpy(np.stack([*pictures, *(data.read(i) for i in chosen)])))
    best = torch.full((len(queries),), torch.inf)
    where = torch.zeros(len(queries), dtype=torch.int64)
    own = torch.tensor([-1] * count + chosen)  # a training image is not its own neighbour
    with progress(len(data), 'neighbours') as advance:
        for start, batch in _batches(data):
            distances = torch.cdist(queries, features(batch), compute_mode='donot_use_mm_for_euclid_dist')
            columns = start + torch.arange(len(batch))
            distances[own[:, None] == columns] = torch.inf
            nearest, place = distances.min(dim=1)
            where = torch.where(nearest < best, columns[place], where)
            best = torch.minimum(nearest, best)
            advance(len(batch))
    scale = max(best[count:].median().item(), 1e-12)
    return [
        Neighbour(picture, data.read(index), index, distance / scale)
        for picture, index, distance in zip(pictures, where[:count].tolist(), best[:count].tolist(), strict=True)
    ]


def _batches(data: Images) -> Iterator[tuple[int, torch.Tensor]]:
    """All images with the number of the first of each batch."""
    for start in range(0, len(data), BATCH):
        yield start, torch.from_numpy(np.stack([data.read(i) for i in range(start, min(start + BATCH, len(data)))]))
