"""Preconditioning: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM eq. 7 and table 1).

Every one is a frozen dataclass with

    coefficients(sigma)         float32 [N] -> c_skip, c_out, c_in, c_noise, float32 [N] each
    round(sigma)                noise levels that the network knows, the nearest to those given
    sigma_min, sigma_max        what a sampler may ask for
    out_channels(img_channels)  of F; what is more than the image's is ignored
    problems()                  everything that is wrong with it, in words

A new one is a class and a row of PRECONDITIONINGS.
"""

import dataclasses
import math
from typing import ClassVar

import torch

from diffusion import noise_schedules

LARGEST = 2**20  # its square must be a number, too
Coefficients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Preconditioning:
    """What most have in common: every noise level is known, F makes images alone."""

    sigma_min: ClassVar[float] = 0.0
    sigma_max: ClassVar[float] = math.inf

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        """c_skip, c_out, c_in, c_noise: float32 [N] -> four of [N]."""
        raise NotImplementedError

    def round(self, sigma: torch.Tensor) -> torch.Tensor:
        """The nearest noise levels that the network knows."""
        return sigma

    def out_channels(self, img_channels: int) -> int:
        """Channels of F."""
        return img_channels

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return []


@dataclasses.dataclass(frozen=True)
class EDM(Preconditioning):
    """EDM's (EDM table 1); of sigma_data = 1 it is v-prediction with F = -v (SiD2).

    Args:
        sigma_data: Expected standard deviation of the training data.
    """

    sigma_data: float = 0.5

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        """c_skip, c_out, c_in, c_noise: float32 [N] -> four of [N]."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        if 1 / LARGEST <= self.sigma_data <= LARGEST:
            return []
        return [f'sigma_data must be between {1 / LARGEST:.0e} and {LARGEST:.0e}, not {self.sigma_data}']


@dataclasses.dataclass(frozen=True)
class VP(Preconditioning):
    """That of Song et al.'s variance-preserving networks (EDM table 1).

    Args:
        beta_d, beta_min: Of the noise schedule.
        M: c_noise is time times M - 1.
        epsilon_t: Earliest time trained on.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    @property
    def schedule(self) -> noise_schedules.VP:
        """sigma(t)."""
        return noise_schedules.VP(self.beta_d, self.beta_min)

    @property
    def sigma_min(self) -> float:
        """The noise level at epsilon_t."""
        return self.schedule.level(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        """The noise level at time 1."""
        return self.schedule.level(1.0)

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        """c_skip, c_out, c_in, c_noise: float32 [N] -> four of [N]."""
        c_noise = (self.M - 1) * self.schedule.time(sigma)
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [] if self.M >= 2 else [f'M must be at least 2, not {self.M}']
        return found + noise_schedules.vp_problems(self.beta_d, self.beta_min, self.epsilon_t)


@dataclasses.dataclass(frozen=True)
class VE(Preconditioning):
    """That of Song et al.'s variance-exploding networks (EDM table 1).

    Args:
        sigma_min, sigma_max: Noise levels trained on.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        """c_skip, c_out, c_in, c_noise: float32 [N] -> four of [N]."""
        one = torch.ones_like(sigma)
        return one, sigma, one, (sigma / 2).log()

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return noise_schedules.range_problems(self.sigma_min, self.sigma_max)


@dataclasses.dataclass(frozen=True)
class IDDPM(Preconditioning):
    """That of improved DDPM (EDM table 1): it knows M noise levels, and the second half of F is a learned variance.

    Args:
        C_1, C_2, M: Of the noise levels, see `diffusion.noise_schedules.iddpm_sigmas`.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    @property
    def levels(self) -> tuple[float, ...]:
        """The known noise levels, float32, falling; the last one is 0."""
        return noise_schedules.iddpm_sigmas(self.C_1, self.C_2, self.M, torch.float32)

    @property
    def sigma_min(self) -> float:
        """The lowest noise level above 0."""
        return self.levels[-2]

    @property
    def sigma_max(self) -> float:
        """The highest noise level."""
        return self.levels[0]

    def _nearest(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Known levels nearest to those given, and their numbers."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=sigma.device)
        index = (sigma.float()[..., None] - levels).abs().argmin(dim=-1)
        return levels[index].to(sigma.dtype), index

    def round(self, sigma: torch.Tensor) -> torch.Tensor:
        """The nearest noise levels that the network knows."""
        return self._nearest(sigma)[0]

    def coefficients(self, sigma: torch.Tensor) -> Coefficients:
        """c_skip, c_out, c_in, c_noise: float32 [N] -> four of [N]."""
        c_noise = (self.M - 1 - self._nearest(sigma)[1]).to(sigma.dtype)
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def out_channels(self, img_channels: int) -> int:
        """Channels of F: an image and its variance."""
        return 2 * img_channels

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = noise_schedules.iddpm_problems(self.C_1, self.C_2, self.M)
        if not found and not math.isfinite(self.sigma_max):
            found.append(f'the noise levels of C_1 = {self.C_1} and M = {self.M} grow without bounds')
        return found


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {'edm': EDM, 'vp': VP, 've': VE, 'iddpm': IDDPM}
