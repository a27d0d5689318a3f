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

from diffusion.logsnr import Cosine
from dnnlib.configs import option


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


DISCRETIZATIONS = {'edm': EDM, 'cosine': Cosine}
