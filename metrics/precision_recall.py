"""Improved precision and recall: how much of each set lies within the other's manifold of nearest neighbours."""

from typing import Any

import torch

from metrics.collectors import MOST_FEATURES, FeatureSample

NEIGHBOURS = 3
MOST_REAL = 10_000  # with 50,000 generated images the usual protocol
BLOCK = 2**24  # distances at a time
ROUNDING = 1e-12  # what float64 leaves of the distance of equal vectors, relative to their squared lengths


def precision_recall(real: FeatureSample, images: FeatureSample) -> dict[str, Any]:
    """Share of images within the real manifold (precision), and of real ones within that of the images (recall).

    A set's manifold is the union of a ball around each of its vectors that reaches to its 3rd nearest neighbour in the
    set (Kynkäänniemi et al., Improved Precision and Recall Metric, 2019). Of the real images 10,000 at random are
    used, of the others 50,000. `memory` tells what that takes beside the features.

    Returns:
        `precision` and `recall` in 0..1, `value` (the precision: every metric has one), `neighbours`, `real_used`,
        `images_used`.
    """
    shift = images.features.mean(dim=0, dtype=torch.float64)  # short vectors make exact distances
    x, y = real.features[:MOST_REAL] - shift, images.features - shift  # float64, as the shift is
    k = min(NEIGHBOURS, len(x) - 1, len(y) - 1)
    precision = _within(y, x, _radii2(x, k))
    return {
        'value': precision,
        'precision': precision,
        'recall': _within(x, y, _radii2(y, k)),
        'neighbours': k,
        'real_used': len(x),
        'images_used': len(y),
    }


def memory(num_real: int | None, num_images: int, num_features: int) -> int:
    """Bytes that `precision_recall` takes beside the features: these in float64, and three blocks of distances."""
    rows = min(num_real or MOST_REAL, MOST_REAL) + min(num_images, MOST_FEATURES)
    return 8 * (rows * num_features + 3 * min(BLOCK, rows**2))


def _radii2(x: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance [N] of each row of x [N, F] to its k-th nearest other row."""
    radii = []
    for rows in _blocks(x, x):
        # The row itself is at 0, the smallest there is: it takes the first place.
        radii.append(_distances2(rows, x).topk(k + 1, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _within(x: torch.Tensor, centres: torch.Tensor, radii2: torch.Tensor) -> float:
    """Share of the rows of x that lie in at least one ball."""
    inside = sum((_distances2(rows, centres) <= radii2).any(dim=1).sum().item() for rows in _blocks(x, centres))
    return inside / len(x)


def _blocks(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of x in parts, each with at most BLOCK distances to y."""
    return x.split(max(BLOCK // len(y), 1))


def _distances2(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances [M, N] between the rows of x [M, F] and y [N, F]; exactly 0 where rows are equal."""
    lengths = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = torch.addmm(lengths, x, y.T, alpha=-2)
    return distances.masked_fill_(distances < lengths.mul_(ROUNDING), 0)
