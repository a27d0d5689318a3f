"""How training draws noise levels, a frozen dataclass for each.

Every one has

    from_normal(z)   standard normal draws -> noise levels sigma, elementwise (torch.special.ndtr(z) is uniform)
    density(sigma)   p(lambda) of lambda = -2 ln sigma, for losses that are written as expectations over another one
    problems()       everything that is wrong with it, in words

A new one is a class and a row of LEVELS.
"""

import dataclasses
import math

import torch

from diffusion.logsnr import Cosine


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(P_mean, P_std^2) (EDM table 1, EDM2 table 6)."""

    P_mean: float
    P_std: float

    def from_normal(self, z: torch.Tensor) -> torch.Tensor:
        """Map standard normal draws to noise levels, elementwise."""
        return (z * self.P_std + self.P_mean).exp()

    def density(self, sigma: torch.Tensor) -> torch.Tensor:
        """p(lambda), the density of N(-2 P_mean, (2 P_std)^2)."""
        z = (sigma.log() - self.P_mean) / self.P_std
        return (-0.5 * z**2).exp() / (2 * self.P_std * math.sqrt(2 * math.pi))

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [f'{name} must be a finite number, not {v}' for name, v in vars(self).items() if not math.isfinite(v)]
        return found + ([] if self.P_std > 0 else [f'P_std must be positive, not {self.P_std}'])


LEVELS = {'lognormal': LogNormal, 'cosine': Cosine}
