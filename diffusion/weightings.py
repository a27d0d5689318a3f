"""What a denoising error costs, by noise level: a frozen dataclass for each.

Every one is called as `weighting(error, sigma, levels, nimg)`:

    error    D(y + n; sigma) - y, float32 [N, C, H, W]
    sigma    float32 [N]
    levels   the distribution that sigma is drawn from, of `diffusion.levels`
    nimg     images trained on so far

and returns float32 [N], the loss of each image, summed over C, H and W. Most are lambda(sigma) times the squared error
and define `weight` alone. A new one is a class and a row of WEIGHTINGS.
"""

import dataclasses
from typing import Any

import torch


class Weighting:
    """lambda(sigma) ||D - y||^2."""

    def weight(self, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """lambda(sigma): float32 [N] -> [N]."""
        raise NotImplementedError

    def __call__(self, error: torch.Tensor, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """Loss of each image, see the module."""
        return self.weight(sigma, levels, nimg) * error.square().flatten(1).sum(dim=1)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return []


@dataclasses.dataclass(frozen=True)
class EDM(Weighting):
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, 1 / c_out^2 of EDM's preconditioning (EDM table 1).

    Args:
        sigma_data: Expected standard deviation of the training data.
    """

    sigma_data: float = 0.5

    def weight(self, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """lambda(sigma): float32 [N] -> [N]."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return [] if self.sigma_data > 0 else [f'sigma_data must be positive, not {self.sigma_data}']


WEIGHTINGS: dict[str, type[Weighting]] = {'edm': EDM}
