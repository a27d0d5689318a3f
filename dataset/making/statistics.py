"""What is in a source or a dataset: shape, mean and standard deviation, and some of its images."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import tqdm

from dataset.making.convert import CHUNK, Recipe, other_shape, read_image
from dataset.reader import ImageDataset
from dataset.sources.source import Source
from dnnlib.errors import UserError
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


@dataclass
class _Sums:
    first: tuple[str, tuple[int, int, int]] | None = None
    total: int = 0
    squares: int = 0
    kept: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sum:
    """The work of one process: sums over the pixels of some images."""

    source: Source
    keep: Collection[int]

    def __call__(self, indices: Sequence[int]) -> _Sums | UserError | OSError:
        sums = _Sums()
        try:
            for index in indices:
                image = read_image(self.source, index, Recipe(color=self.source.color))
                _check_shape(sums, self.source.names[index], image.shape)
                sums.total += int(image.sum(dtype=np.int64))
                sums.squares += int((image.astype(np.int64) ** 2).sum())
                if index in self.keep:
                    sums.kept[index] = image
        except (UserError, OSError) as error:
            return error
        return sums


def _check_shape(sums: _Sums, name: str, shape: tuple[int, int, int]) -> None:
    sums.first = sums.first or (name, shape)
    if shape != sums.first[1]:
        raise other_shape(name, shape, *sums.first)


def pixel_statistics(source: Source, keep: Collection[int] = (), workers: int = 0) -> PixelStatistics:
    """Read all images of a source.

    Args:
        source: At least one image.
        keep: Indices of images to return.
        workers: Processes beside this one.

    Raises:
        UserError: naming an image that is broken, or not like the first.
        OSError: where one cannot be read.
    """
    count = len(source)
    whole = _Sums()
    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    with tqdm.tqdm(desc='info', total=count, unit='img', disable=None) as bar:
        for sums, chunk in zip(in_order(_Sum(source, frozenset(keep)), chunks, workers), chunks, strict=True):
            if isinstance(sums, Exception):
                raise sums
            _check_shape(whole, *sums.first)
            whole.total += sums.total
            whole.squares += sums.squares
            whole.kept.update(sums.kept)
            bar.update(len(chunk))
    shape = whole.first[1]
    mean = whole.total / (count * math.prod(shape))
    variance = whole.squares / (count * math.prod(shape)) - mean**2
    return PixelStatistics(shape, mean, max(variance, 0) ** 0.5, whole.kept)


class LatentStatistics:
    """Mean and standard deviation of each channel of normalised latents, as training draws them.

    Of a draw x = a + b n with n standard normal, E[x] = E[a] and Var[x] = E[a^2 + b^2] - E[a]^2; nothing is drawn.

    Args:
        sums: Where to go on from, a value of `sums`.

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

    Raises:
        UserError: naming a file that is broken, or not like the first.
        OSError: where one cannot be read.
    """
    statistics, kept = LatentStatistics(), {}
    for index in tqdm.trange(len(dataset), desc='info', unit='img', disable=None):
        moments = torch.from_numpy(dataset.read(index))[None]
        statistics.add(moments)
        if index in keep:
            x = sample_latents(moments, torch.zeros_like(moments[:, :4]))[0, :3]
            kept[index] = ((x / (4 * SIGMA_DATA) + 0.5).clip(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return statistics, kept
