"""Feature detectors: uint8 images in, rows of features for each image out. A new one is an entry of `DETECTORS`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from dnnlib.errors import UserError, unknown_choice
from metrics.dino import DinoDetector
from metrics.inception import InceptionDetector


class Detector(Protocol):
    """A map from uint8 [N, C, H, W] to named features [N, F].

    Attributes:
        identity: Name and everything that the features depend on (sizes, scaling, hash of weights). It goes into
            reference files, and only features of equal identity are compared.
        standard: Whether its weights are those that published statistics are made with; None: not known.
    """

    identity: str
    standard: bool | None

    def num_features(self, image_shape: tuple[int, int, int]) -> dict[str, int]:
        """F of each of its features for images of `image_shape` = (C, H, W), known before the first image is seen."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of uint8 [N, C, H, W] images: float [N, F] each, on the same device."""


class PixelDetector:
    """The pixels themselves on a grid of at most 8x8: needs no download, sees layout and stroke, no texture.

    Sides of more than 8 pixels are average-pooled to 8, others stay; uint8 0..255 becomes 0..1; F = C * h * w with
    h = min(H, 8), w = min(W, 8): 64 for grayscale, 192 for RGB. Where 8 does not divide a side, window i covers the
    pixels from floor(i * H / 8) to ceil((i + 1) * H / 8), so that neighbours share a pixel.
    """

    GRID = 8
    standard = True
    identity = f'pixels (average-pooled to at most {GRID}x{GRID}, 0..1)'

    def num_features(self, image_shape: tuple[int, int, int]) -> dict[str, int]:
        """C * min(H, 8) * min(W, 8)."""
        channels, height, width = image_shape
        return {'pixels': channels * min(height, self.GRID) * min(width, self.GRID)}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pooled pixels in 0..1: uint8 [N, C, H, W] -> float32 [N, C * h * w]."""
        assert images.dtype == torch.uint8 and images.ndim == 4, f'uint8 [N, C, H, W] expected, got {images.dtype}'
        grid = [min(side, self.GRID) for side in images.shape[2:]]
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), grid)
        return {'pixels': (pooled / 255).flatten(1)}  # [N, C, h, w] -> [N, C * h * w]


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
    'pixels': lambda device, options: PixelDetector(),
    'inception': lambda device, options: InceptionDetector(
        device, options.inception, options.any_weights, options.offline
    ),
    'dinov2': lambda device, options: DinoDetector(device, options.dinov2, options.any_weights, options.offline),
}
# Features that metrics may ask for, and the detector that gives them.
FEATURES = {
    'pixels': 'pixels',
    'inception': 'inception',
    'spatial': 'inception',
    'classes': 'inception',
    'dinov2': 'dinov2',
}


def load_detectors(
    names: Iterable[str], device: torch.device | str = 'cpu', options: DetectorOptions | None = None
) -> dict[str, Detector]:
    """The detectors of those names, each once, ready for images on `device`."""
    loaded, problems = {}, []
    for name in dict.fromkeys(names):
        if name not in DETECTORS:
            problems.append(unknown_choice('detector', name, DETECTORS))
            continue
        try:
            loaded[name] = DETECTORS[name](device, options or DetectorOptions())
        except UserError as error:
            problems.extend(error.problems)
    if problems:
        raise UserError(problems)
    return loaded
