"""What is in a source or a dataset: shape, mean and standard deviation, and some of its images."""

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tqdm

from dataset.making.convert import CHUNK, other_shape
from dataset.making.transforms import normalize, to_uint8
from dataset.reader import ImageDataset
from dataset.sources.source import Source
from networks.encoders import SIGMA_DATA, sample_latents
from torch_utils.parallel import in_order

FAR_OFF = 0.3  # of sigma_data: by how much latents may miss mean 0 and their standard deviation without a warning


@dataclass(frozen=True)
class PixelStatistics:
    """Statistics of all pixels of all images.

    Attributes:
        shape: (H, W, C) of each image.
        mean, std: On the scale 0-255.
        kept: The images that were asked for, by index.
    """

    shape: tuple[int, int, int]
    mean: float
    std: float
    kept: dict[int, np.ndarray]


def pixel_statistics(source: Source, keep: Collection[int] = (), workers: int = 0) -> PixelStatistics:
    """Read all images of a source.

    Args:
        source: At least one image.
        keep: Indices of images to return.
        workers: Processes beside this one.
    """
    count, first, total, squares, kept = len(source), None, 0, 0, {}
    sums = in_order(functools.partial(_sums, source, frozenset(keep)), range(count), workers, CHUNK)
    for index, (shape, add, add_squares, image) in enumerate(
        tqdm.tqdm(sums, 'info', total=count, unit='img', disable=None)
    ):
        first = first or shape
        if shape != first:
            raise other_shape(source.names[index], shape, source.names[0], first)
        total, squares = total + add, squares + add_squares
        if image is not None:
            kept[index] = image
    numbers = count * math.prod(first)
    mean = total / numbers
    return PixelStatistics(first, mean, max(squares / numbers - mean**2, 0) ** 0.5, kept)


def _sums(source: Source, keep: Collection[int], index: int) -> tuple[tuple, int, int, np.ndarray | None]:
    """Shape of an image, sum of its pixels and of their squares, and the image itself where it is to be kept."""
    image = to_uint8(normalize(source.read(index), source.names[index], source.color))
    squares = int((image.astype(np.int64) ** 2).sum())
    return image.shape, int(image.sum(dtype=np.int64)), squares, image if index in keep else None


class LatentStatistics:
    """Mean and standard deviation of each channel of normalised latents, as training draws them.

    Of a draw x = a + b n with n standard normal, E[x] = E[a] and Var[x] = E[a^2 + b^2] - E[a]^2; nothing is drawn.

    Args:
        sums: What to continue from, a value of `sums`.

    Attributes:
        sums: Number of pixels, sum of a by channel, sum of a^2 + b^2 by channel: all there is to keep.
    """

    def __init__(self, sums: Sequence | None = None):
        self.sums = sums or [0, [0.0] * 4, [0.0] * 4]

    def add(self, moments: torch.Tensor) -> None:
        """Take in latents as stored, float32 [N, 8, H, W]."""
        moments = moments.double()
        zeros = torch.zeros_like(moments[:, :4])
        a = sample_latents(moments, zeros).double()
        b = sample_latents(moments, zeros + 1).double() - a
        count, total, squares = self.sums
        first, second = a.sum(dim=(0, 2, 3)), (a.square() + b.square()).sum(dim=(0, 2, 3))
        self.sums = [
            count + a[:, 0].numel(),
            [x + y for x, y in zip(total, first.tolist(), strict=True)],
            [x + y for x, y in zip(squares, second.tolist(), strict=True)],
        ]

    def lines(self) -> list[str]:
        """What to print: a line, and another where the latents are far from what networks expect."""
        count, total, squares = self.sums
        means = np.array(total) / count
        stds = np.sqrt(np.maximum(np.array(squares) / count - means**2, 0))
        mean, std = means.mean(), np.sqrt((stds**2 + means**2).mean() - means.mean() ** 2)
        numbers = [' '.join(f'{x:.3f}' for x in values) for values in (means, stds)]
        lines = [
            f'normalised latents: mean {mean:.3f}, std {std:.3f} (sigma_data {SIGMA_DATA}); '
            f'by channel mean {numbers[0]}, std {numbers[1]}'
        ]
        if max(abs(means).max(), abs(stds - SIGMA_DATA).max()) > FAR_OFF * SIGMA_DATA:
            lines.append(
                f'warning: these are far from mean 0 and std {SIGMA_DATA}; are the VAE and the images those that the '
                'normalisation is for (stabilityai/sd-vae-ft-mse, natural images)?'
            )
        return lines


def latent_statistics(
    dataset: ImageDataset, keep: Collection[int] = ()
) -> tuple[LatentStatistics, dict[int, np.ndarray]]:
    """Read all latents of a dataset.

    Returns:
        Their statistics, and pictures of those whose indices are in `keep`: three channels of the mean as colours,
        uint8 [H, W, 3].
    """
    statistics, kept = LatentStatistics(), {}
    for index in tqdm.trange(len(dataset), desc='info', unit='img', disable=None):
        moments = torch.from_numpy(dataset.read(index))[None]
        statistics.add(moments)
        if index in keep:
            x = sample_latents(moments, torch.zeros_like(moments[:, :4]))[0, :3]
            kept[index] = ((x / (4 * SIGMA_DATA) + 0.5).clip(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return statistics, kept
