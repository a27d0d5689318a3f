"""Feature detectors: uint8 images in, one row of features for each image out. A new one is one row of `DETECTORS`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from dnnlib.errors import UserError, unknown_choice
from metrics.dino import DinoDetector
from metrics.inception import InceptionDetector


class Detector(Protocol):
    """A map uint8 [N, C, H, W] -> float32 [N, F].

    Attributes:
        identity: Name and everything that the features depend on (sizes, scaling, hash of weights). It goes into
            reference files, and only features of equal identity are compared.
        published: Whether its weights are those that published reference statistics are made with; None: not known.
    """

    identity: str
    published: bool | None

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """F for images of `image_shape` = (C, H, W), known before the first image is seen."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of uint8 [N, C, H, W] images: float32 [N, F] on the same device."""


class PixelDetector:
    """The pixels themselves on a grid of at most 8x8: needs no download, sees layout and stroke, no texture.

    Sides of more than 8 pixels are average-pooled to 8, others stay; uint8 0..255 becomes 0..1; F = C * h * w with
    h = min(H, 8), w = min(W, 8): 64 for grayscale, 192 for RGB. Where 8 does not divide a side, window i covers the
    pixels from floor(i * H / 8) to ceil((i + 1) * H / 8), so that neighbours share a pixel.
    """

    GRID = 8
    published = True
    identity = f'pixels (average-pooled to at most {GRID}x{GRID}, 0..1)'

    def __init__(self, device: torch.device | str = 'cpu'):
        del device  # nothing to place there: features are made where the images are

    def num_features(self, image_shape: tuple[int, int, int]) -> int:
        """C * min(H, 8) * min(W, 8)."""
        channels, *size = image_shape
        height, width = self._grid(size)
        return channels * height * width

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled pixels in 0..1: uint8 [N, C, H, W] -> float32 [N, C * h * w]."""
        assert images.dtype == torch.uint8 and images.ndim == 4, f'uint8 [N, C, H, W] expected, got {images.dtype}'
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), self._grid(images.shape[2:]))
        return (pooled / 255).flatten(1)  # [N, C, h, w] -> [N, C * h * w]

    def _grid(self, size) -> tuple[int, int]:
        height, width = size
        return min(height, self.GRID), min(width, self.GRID)


@dataclass(frozen=True)
class DetectorOptions:
    """Where detectors find their weights.

    Args:
        inception: File of the Inception weights; None: $EDM2PLUS_INCEPTION, else the published one, downloaded once.
        dinov2: Folder of the DINOv2 model; None: $EDM2PLUS_DINOV2, else the published one, downloaded once.
        any_weights: Accept other weights than the published ones; results are then comparable among themselves only.
        offline: Download nothing; what was downloaded before is used.
    """

    inception: str | None = None
    dinov2: str | None = None
    any_weights: bool = False
    offline: bool = False


DETECTORS: dict[str, Callable[[torch.device | str, DetectorOptions], Detector]] = {
    'pixels': lambda device, options: PixelDetector(device),
    'inception': lambda device, options: InceptionDetector(
        device, options.inception, options.any_weights, options.offline
    ),
    'dinov2': lambda device, options: DinoDetector(device, options.dinov2, options.any_weights, options.offline),
}


def load_detector(name: str, device: torch.device | str = 'cpu', options: DetectorOptions | None = None) -> Detector:
    """The detector of that name, ready for images on `device`.

    Raises:
        UserError: where there is no such detector (near names are given), or its weights are not to be had.
    """
    if name not in DETECTORS:
        raise UserError(unknown_choice('detector', name, DETECTORS))
    return DETECTORS[name](device, options or DetectorOptions())


def load_detectors(
    names: Iterable[str], device: torch.device | str = 'cpu', options: DetectorOptions | None = None
) -> dict[str, Detector]:
    """Several detectors, each once.

    Raises:
        UserError: with the problems of all of them.
    """
    loaded, problems = {}, []
    for name in dict.fromkeys(names):
        try:
            loaded[name] = load_detector(name, device, options)
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    return loaded
