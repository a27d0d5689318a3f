"""Fréchet distances: of two normal distributions, of sets of images, and extrapolated to infinitely many images."""

from typing import Any

import torch

from dnnlib.progress import progress
from metrics.collectors import Sums
from metrics.statistics import FeatureStatistics


def frechet_distance(mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor) -> float:
    """Squared 2-Wasserstein distance of N(m1, S1) and N(m2, S2), in squared units of the features.

        d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2

    The last trace is the sum of the roots of the eigenvalues of a symmetric matrix, hence always real. With
    S1 = A A^T and S2 = B B^T those eigenvalues are, zeros aside, the squares of the singular values of A^T B. Taking
    these instead never roots a number that rounding made of a zero, which would cost half of the digits wherever a
    covariance is singular (fewer images than features, pixels that never change).

    Args:
        mean1, mean2: [F].
        cov1, cov2: [F, F], symmetric and positive semidefinite, of any rank.

    Returns:
        The distance, at least 0, computed in float64 on the CPU.
    """
    return _distance(mean1, _factor(_exact(cov1)), mean2, _factor(_exact(cov2)))


def fd(real: Sums, images: Sums) -> dict[str, Any]:
    """Fréchet distance of the images to the real ones; where these are in halves, of one half to the other too."""
    found = {'value': frechet_distance(*_normal(real.union()), *_normal(images.union()))}
    if len(real.groups) == 2:
        a, b = real.groups
        found['real_halves'] = frechet_distance(*_normal(a), *_normal(b))
        found['real_halves_counts'] = [a.count, b.count]
    return found


def fd_infinity(real: Sums, images: Sums) -> dict[str, Any]:
    """Fréchet distance of infinitely many such images to the real ones, with its standard error.

    The distance of n images is d + c / n + O(1 / n^2) (Chong and Forsyth, Effectively Unbiased FID, 2020). A jackknife
    takes c from the images in G random groups, of n_i each: with d_N of all of them and d_i of all but group i,

        p_i = (N d_N - (N - n_i) d_i) / n_i,  value = mean p_i,  standard error = std p_i / sqrt(G)

    Returns:
        `value`, which may be negative; `standard_error`; `groups`; `finite`: the distance d_N itself.
    """
    mean, covariance = _normal(real.union())
    factor, total = _factor(_exact(covariance)), images.union()

    def distance(statistics: FeatureStatistics) -> float:
        return _distance(mean, factor, statistics.mean, _factor(_exact(statistics.covariance())))

    finite, estimates = distance(total), []
    with progress(len(images.groups), 'extrapolating', 'distances') as advance:
        for i, group in enumerate(images.groups):
            rest = images.union(without=i)
            estimates.append((total.count * finite - rest.count * distance(rest)) / group.count)
            advance(1)
    values = torch.tensor(estimates, dtype=torch.float64)
    error = values.std().item() / len(values) ** 0.5
    return {'value': values.mean().item(), 'standard_error': error, 'groups': len(values), 'finite': finite}


def _normal(statistics: FeatureStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    return statistics.mean, statistics.covariance()


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to('cpu', torch.float64)


def _distance(mean1: torch.Tensor, factor1: torch.Tensor, mean2: torch.Tensor, factor2: torch.Tensor) -> float:
    """As `frechet_distance`, of the factors A [F, R1] and B [F, R2]."""
    assert mean1.shape == mean2.shape and len(factor1) == len(factor2) == len(mean1), 'shapes differ'
    coupling = torch.linalg.svdvals(factor1.T @ factor2).sum()
    traces = factor1.square().sum() + factor2.square().sum()
    distance = (_exact(mean1) - _exact(mean2)).square().sum() + traces - 2 * coupling
    return max(distance.item(), 0.0)  # equal distributions may come out as -1e-16


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    """A [F, R] with A A^T = covariance [F, F] and R its numerical rank."""
    # What eigh leaves of a zero eigenvalue is about this large; its root would be 1e8 times too visible.
    rounding = len(covariance) * torch.finfo(torch.float64).eps
    triangle, failed = torch.linalg.cholesky_ex(covariance)  # in a hundredth of the time, where no eigenvalue is zero
    if not failed and _lowest_eigenvalue(triangle) > rounding * covariance.norm():
        return triangle
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    tolerance = rounding * eigenvalues[-1].clamp(min=0)
    kept = eigenvalues > tolerance
    return eigenvectors[:, kept] * eigenvalues[kept].sqrt()


def _lowest_eigenvalue(triangle: torch.Tensor) -> float:
    """A lower bound of the eigenvalues of L L^T: 1 / |L^-1|^2 in the Frobenius norm."""
    eye = torch.eye(len(triangle), dtype=triangle.dtype)
    return 1 / torch.linalg.solve_triangular(triangle, eye, upper=False).square().sum().item()
