"""The Fréchet distance between two normal distributions."""

import torch


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
    mean1, cov1, mean2, cov2 = (tensor.detach().to('cpu', torch.float64) for tensor in (mean1, cov1, mean2, cov2))
    assert mean1.shape == mean2.shape and cov1.shape == cov2.shape == (len(mean1), len(mean1)), 'shapes differ'
    coupling = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * coupling
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
