"""Precision, recall, density and coverage: how sets of features overlap, by balls around their nearest neighbours."""

from collections.abc import Iterator
from typing import Any

import torch

from dnnlib.progress import progress
from metrics.collectors import MOST_FEATURES, Sample

NEIGHBOURS = 3  # of precision and recall
DENSITY_NEIGHBOURS = 5  # of density and coverage
MOST_REAL = 10_000  # with 50,000 generated images the usual protocol
BLOCK = 2**24  # distances at a time
ROUNDING = 1e-12  # what float64 leaves of the distance of equal vectors, relative to their squared lengths


def manifold_overlap(real: Sample, images: Sample) -> dict[str, Any]:
    """Precision, recall, density and coverage of images y_1..N against real ones x_1..M.

    B_k(x) is the ball around x that reaches to its k-th nearest neighbour in its own set.

        precision = share of y in any B_3(x)     recall = share of x in any B_3(y)
        density = sum over x, y of [y in B_5(x)] / (5 N)     coverage = share of x with any y in B_5(x)

    (Kynkäänniemi et al., Improved Precision and Recall Metric, 2019; Naeem et al., Reliable Fidelity and Diversity
    Metrics, 2020.) Of the real images 10,000 at random are used, of the others 50,000; `overlap_memory` tells what that
    takes beside the features.

    Returns:
        `precision`, `recall` and `coverage` in 0..1, `density` (1 for equal distributions), `value` (the precision:
        every metric has one), `neighbours`, `density_neighbours`, `real_used`, `images_used`.
    """
    shift = images.features.mean(dim=0, dtype=torch.float64)  # short vectors make exact distances
    x, y = real.features[:MOST_REAL] - shift, images.features - shift  # float64, as the shift is
    k, dense_k = (min(count, len(x) - 1, len(y) - 1) for count in (NEIGHBOURS, DENSITY_NEIGHBOURS))
    radii, dense_radii = _radii2(x, (k, dense_k))
    (image_radii,) = _radii2(y, (k,))
    covered = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    precise = dense = 0
    for distances in _distances_in_blocks(y, x, 'precision, density, coverage'):
        precise += (distances <= radii).any(dim=1).sum().item()
        inside = distances <= dense_radii
        dense += inside.sum().item()
        covered |= inside.any(dim=0)
    recalled = sum((d <= image_radii).any(dim=1).sum().item() for d in _distances_in_blocks(x, y, 'recall'))
    return {
        'value': precise / len(y),
        'precision': precise / len(y),
        'recall': recalled / len(x),
        'density': dense / (dense_k * len(y)),
        'coverage': covered.sum().item() / len(x),
        'neighbours': k,
        'density_neighbours': dense_k,
        'real_used': len(x),
        'images_used': len(y),
    }


def overlap_memory(num_real: int | None, num_images: int, num_features: int) -> int:
    """Bytes that it takes beside the features: these in float64, and three blocks of distances."""
    rows = min(num_real or MOST_REAL, MOST_REAL) + min(num_images, MOST_FEATURES)
    return 8 * (rows * num_features + 3 * min(BLOCK, rows**2))


def _radii2(x: torch.Tensor, neighbours: tuple[int, ...]) -> list[torch.Tensor]:
    """Squared distances [N] of each row of x [N, F] to its k-th nearest other row, for each k."""
    # The row itself is at 0, the smallest there is: it takes the first place.
    nearest = [
        distances.topk(max(neighbours) + 1, dim=1, largest=False).values
        for distances in _distances_in_blocks(x, x, 'nearest neighbours')
    ]
    # A little more, so that rounding never leaves that neighbour out of its own ball.
    return [torch.cat(nearest)[:, k] * (1 + 1e-9) for k in neighbours]


def _distances_in_blocks(x: torch.Tensor, y: torch.Tensor, title: str) -> Iterator[torch.Tensor]:
    """Squared distances of the rows of x to all of y, in parts of at most BLOCK of them."""
    with progress(len(x), title, 'rows') as advance:
        for rows in x.split(max(BLOCK // len(y), 1)):
            yield _distances2(rows, y)
            advance(len(rows))


def _distances2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances [M, N] between the rows of x [M, F] and y [N, F]; exactly 0 where rows are equal."""
    lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = torch.addmm(lengths, x, y.T, alpha=-2)
    return distances.masked_fill_(distances < lengths.mul_(ROUNDING), 0)
