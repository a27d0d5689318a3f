"""Noise levels that a sampler steps through, a frozen dataclass for each discretization.

Every one has

    sigmas(num_steps)      float64 [num_steps + 1], falling, the last one 0
    sigma_min, sigma_max   its ends, > 0
    problems()             everything that is wrong with it, in words

A new one is a class and a row of DISCRETIZATIONS; its fields become command-line options.
"""

import dataclasses
import math

import torch

from diffusion import noise_schedules
from diffusion.logsnr import Cosine
from dnnlib.configs import option
from dnnlib.errors import UserError


def edm_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Noise levels of the EDM sampler (EDM eq. 5), from `sigma_max` down to `sigma_min`, then 0.

    Args:
        num_steps: N >= 1, number of sampling steps; N = 1 steps from `sigma_max` to 0.
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        rho: Exponent; larger puts more steps near `sigma_min`.

    Returns:
        float64 [N + 1], the last one 0.
    """
    assert num_steps >= 1 and 0 < sigma_min < sigma_max and rho > 0
    position = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (start + position * (end - start)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@dataclasses.dataclass(frozen=True)
class EDM:
    """EDM's noise levels (EDM eq. 5), see `edm_sigmas`."""

    sigma_min: float = option(0.002, 'Lowest noise level.')
    sigma_max: float = option(80.0, 'Highest noise level.')
    rho: float = option(7.0, 'Spacing of the noise levels.')

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """float64 [num_steps + 1], the last one 0."""
        return edm_sigmas(num_steps, self.sigma_min, self.sigma_max, self.rho)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [f'{name} must be a finite number, not {v}' for name, v in vars(self).items() if not math.isfinite(v)]
        if not 0 < self.sigma_min < self.sigma_max:
            found.append(f'0 < sigma_min < sigma_max is needed, not {self.sigma_min} and {self.sigma_max}')
        if self.rho <= 0:
            found.append(f'rho must be positive, not {self.rho}')
        return found


@dataclasses.dataclass(frozen=True)
class VP:
    """Uniform steps in the time of the variance-preserving schedule that has this range (EDM table 1)."""

    sigma_min: float = option(noise_schedules.VP().level(1e-3), 'Lowest noise level.')
    sigma_max: float = option(noise_schedules.VP().level(1.0), 'Highest noise level.')
    epsilon_s: float = option(1e-3, 'Time of the lowest noise level; that of the highest is 1.')

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """float64 [num_steps + 1], the last one 0."""
        schedule = noise_schedules.VP.of_range(self.sigma_min, self.sigma_max, self.epsilon_s)
        return _then_zero(schedule.sigma(1 + _positions(num_steps) * (self.epsilon_s - 1)))

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = noise_schedules.range_problems(self.sigma_min, self.sigma_max)
        if not 0 < self.epsilon_s < 1:
            found.append(f'epsilon_s must be between 0 and 1, not {self.epsilon_s}')
        if not found:
            try:
                noise_schedules.VP.of_range(self.sigma_min, self.sigma_max, self.epsilon_s)
            except UserError as error:
                found = error.problems
        return found


@dataclasses.dataclass(frozen=True)
class VE:
    """Noise levels that fall by a constant factor (EDM table 1)."""

    sigma_min: float = option(0.02, 'Lowest noise level.')
    sigma_max: float = option(100.0, 'Highest noise level.')

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """float64 [num_steps + 1], the last one 0."""
        factors = (self.sigma_min**2 / self.sigma_max**2) ** _positions(num_steps)
        return _then_zero((self.sigma_max**2 * factors).sqrt())

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return noise_schedules.range_problems(self.sigma_min, self.sigma_max)


@dataclasses.dataclass(frozen=True)
class IDDPM:
    """Uniform steps through the noise levels that iDDPM knows within a range (EDM table 1)."""

    sigma_min: float = option(0.002, 'Lowest noise level.')
    sigma_max: float = option(81.0, 'Highest noise level.')
    C_1: float = option(0.001, 'Of the levels.')
    C_2: float = option(0.008, 'Of the levels.')
    M: int = option(1000, 'Number of levels, of which those in the range are used.')

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """float64 [num_steps + 1], the last one 0."""
        known = self._known()
        return _then_zero(known[((len(known) - 1) * _positions(num_steps)).round().long()])

    def _known(self) -> torch.Tensor:
        known = torch.tensor(
            noise_schedules.iddpm_sigmas(self.C_1, self.C_2, self.M, torch.float64), dtype=torch.float64
        )
        return known[(known >= self.sigma_min) & (known <= self.sigma_max)]

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = noise_schedules.range_problems(self.sigma_min, self.sigma_max)
        found += noise_schedules.iddpm_problems(self.C_1, self.C_2, self.M)
        if not found and not len(self._known()):
            found.append(f'iDDPM knows no noise level between {self.sigma_min} and {self.sigma_max}')
        return found


def _positions(num_steps: int) -> torch.Tensor:
    """i / (N - 1) for i = 0 .. N - 1, float64; 0 alone for one step."""
    return torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)


def _then_zero(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


DISCRETIZATIONS = {'edm': EDM, 'vp': VP, 've': VE, 'iddpm': IDDPM, 'cosine': Cosine}
