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

from diffusion import noise_schedules
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


@dataclasses.dataclass(frozen=True)
class VP:
    """The noise level at a uniform time in [epsilon_t, 1] of a variance-preserving schedule (EDM table 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    @property
    def schedule(self) -> noise_schedules.VP:
        """sigma(t)."""
        return noise_schedules.VP(self.beta_d, self.beta_min)

    def from_normal(self, z: torch.Tensor) -> torch.Tensor:
        """Map standard normal draws to noise levels, elementwise."""
        return self.schedule.sigma(self.epsilon_t + torch.special.ndtr(z) * (1 - self.epsilon_t))

    def density(self, sigma: torch.Tensor) -> torch.Tensor:
        """p(lambda) = |dt / dlambda| / (1 - epsilon_t) within the range, 0 outside."""
        t = self.schedule.time(sigma)
        inside = (t >= self.epsilon_t) & (t <= 1)
        return inside * sigma / (2 * self.schedule.derivative(t) * (1 - self.epsilon_t))

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return noise_schedules.vp_problems(self.beta_d, self.beta_min, self.epsilon_t)


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """ln sigma is uniform between two noise levels, as VE trains (EDM table 1)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def from_normal(self, z: torch.Tensor) -> torch.Tensor:
        """Map standard normal draws to noise levels, elementwise."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** torch.special.ndtr(z)

    def density(self, sigma: torch.Tensor) -> torch.Tensor:
        """p(lambda): constant within the range, 0 outside."""
        inside = (sigma >= self.sigma_min) & (sigma <= self.sigma_max)
        return inside / (2 * math.log(self.sigma_max / self.sigma_min))

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return noise_schedules.range_problems(self.sigma_min, self.sigma_max)


LEVELS = {'lognormal': LogNormal, 'vp': VP, 'loguniform': LogUniform, 'cosine': Cosine}
