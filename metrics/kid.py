"""Kernel inception distance: the squared maximum mean discrepancy with a polynomial kernel."""

import math
from typing import Any

import torch

from dnnlib.progress import progress
from metrics.collectors import Sample

MOST_BLOCK = 1000
FEWEST_BLOCKS = 10


def mmd2_unbiased(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased estimate of the squared MMD between the distributions of x [M, F] and y [N, F]; it may be negative.

        MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
        k(x, y) = (x . y / F + 1)^3

    (Binkowski et al., Demystifying MMD GANs, 2018.) In float64: 8 * (M + N) * max(M, N) bytes.
    """
    x, y = x.double(), y.double()

    def within(a: torch.Tensor) -> torch.Tensor:
        kernel = _kernel(a, a)
        return (kernel.sum() - kernel.trace()) / (len(a) * (len(a) - 1))

    return (within(x) + within(y) - 2 * _kernel(x, y).mean()).item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(real: Sample, images: Sample) -> dict[str, Any]:
    """KID: the mean over blocks of at most 1000 images, which share none, with its standard error.

    n = min(50000, number of real images, number of images) of each set make at least ten blocks, or as many as n / 2.
    Block i of the images meets block i + 1 of the real ones: both sets are shuffled alike, and where image i of both
    belong together (reconstructions, sets sorted by class) they would meet, and the estimate were biased.

    Returns:
        `value`, `standard_error` (None for a single block), `blocks`, `block_size`.
    """
    n = min(len(real.features), len(images.features))
    size = min(MOST_BLOCK, max(n // FEWEST_BLOCKS, 2))
    blocks = n // size
    x, y = (kept.features[: blocks * size].split(size) for kept in (real, images))
    estimates = torch.zeros(blocks, dtype=torch.float64)
    with progress(blocks, 'kernel distance', 'blocks') as advance:
        for i in range(blocks):
            estimates[i] = mmd2_unbiased(x[(i + 1) % blocks], y[i])
            advance(1)
    error = estimates.std().item() / math.sqrt(blocks) if blocks > 1 else None
    return {'value': estimates.mean().item(), 'standard_error': error, 'blocks': blocks, 'block_size': size}
