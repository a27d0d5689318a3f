"""Orthonormal Haar transform of images."""

from collections.abc import Iterator

import torch


def haar_bands(x: torch.Tensor, levels: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Bands of `levels` times halved images, and the number of low passes behind each (SiD2 appendix A.1).

    A pass makes of pairs of pixels their sum and difference over sqrt(2), first along rows, then along columns; the
    band of two low passes is halved again. All squares of all bands sum to those of x.

    Args:
        x: [N, C, H, W], H and W divisible by 2^levels.
        levels: 0 gives x itself.
    """
    assert not x.shape[2] % 2**levels and not x.shape[3] % 2**levels, 'images must halve evenly'
    for level in range(levels):
        low, high = _passes(x, dim=3)
        (x, lh), (hl, hh) = _passes(low, dim=2), _passes(high, dim=2)
        yield lh, 2 * level + 1
        yield hl, 2 * level + 1
        yield hh, 2 * level
    yield x, 2 * levels


def _passes(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return (a + b) / 2**0.5, (a - b) / 2**0.5
