"""How the noise level depends on time: sigma(t), its derivative and its inverse (EDM table 1), and iDDPM's levels.

All take and return float tensors of any shape, where they do not say otherwise.
"""

import dataclasses
import functools
import math

import torch

from dnnlib.errors import UserError

MOST_BETA = 100  # sigma(1) shall be a float32 number
MOST_LEVELS = 10_000  # of iDDPM's table, which may come from a file that nobody vouches for


@dataclasses.dataclass(frozen=True)
class VP:
    """Variance preserving: sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def of_range(cls, sigma_min: float, sigma_max: float, epsilon_s: float) -> 'VP':
        """The one with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max."""
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        if low >= epsilon_s * high:
            raise UserError(
                f'no VP schedule has the noise levels {sigma_max:g} at time 1 and {sigma_min:g} at time {epsilon_s:g}'
            )
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - beta_d / 2)

    def level(self, t: float) -> float:
        """Noise level at time t in (0, 1], as a Python float."""
        return math.sqrt(math.expm1(self.beta_d / 2 * t**2 + self.beta_min * t))

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level at time t in (0, 1]."""
        return torch.expm1(self.beta_d / 2 * t**2 + self.beta_min * t).sqrt()

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / dt."""
        sigma = self.sigma(t)
        return (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma) / 2

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The inverse of `sigma`."""
        return ((self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt() - self.beta_min) / self.beta_d


class VE:
    """Variance exploding: sigma(t) = sqrt(t)."""

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level at time t > 0."""
        return t.sqrt()

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / dt."""
        return 0.5 / t.sqrt()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The inverse of `sigma`."""
        return sigma**2


class Linear:
    """EDM's own: sigma(t) = t."""

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Noise level at time t > 0."""
        return t

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / dt."""
        return torch.ones_like(t)

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The inverse of `sigma`."""
        return sigma


@functools.cache
def iddpm_sigmas(C_1: float, C_2: float, M: int, dtype: torch.dtype) -> tuple[float, ...]:
    """The M + 1 noise levels that iDDPM knows, falling to 0 (EDM table 1).

        u_M = 0,   u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1),
        abar_j = sin^2(pi/2 j / (M (C_2 + 1)))

    Args:
        dtype: Of the recursion. abar is float32 always: published networks are trained with what that leaves, which
            changes the lowest levels by 0.05 %.
    """
    j = torch.arange(M + 1, device='cpu')
    abar = (0.5 * math.pi * j / M / (C_2 + 1)).sin() ** 2
    u = [torch.zeros((), dtype=dtype, device='cpu')]
    for i in range(M, 0, -1):
        u.append(((u[-1] ** 2 + 1) / (abar[i - 1] / abar[i]).clamp(min=C_1) - 1).sqrt())
    return tuple(level.item() for level in reversed(u))


def range_problems(sigma_min: float, sigma_max: float) -> list[str]:
    """What is wrong with a range of noise levels, in words."""
    if 0 < sigma_min < sigma_max < math.inf:
        return []
    return [f'0 < sigma_min < sigma_max is needed, not {sigma_min} and {sigma_max}']


def vp_problems(beta_d: float, beta_min: float, epsilon_t: float) -> list[str]:
    """What is wrong with a variance-preserving schedule, in words."""
    found = []
    if not (0 < beta_d <= MOST_BETA and 0 <= beta_min <= MOST_BETA):
        found.append(f'beta_d and beta_min must be positive and at most {MOST_BETA}, not {beta_d} and {beta_min}')
    if not 0 < epsilon_t < 1:
        found.append(f'the earliest time must be between 0 and 1, not {epsilon_t}')
    return found


def iddpm_problems(C_1: float, C_2: float, M: int) -> list[str]:
    """What is wrong with the numbers of `iddpm_sigmas`, in words."""
    found = [f'{name} must be between 0 and 1, not {v}' for name, v in (('C_1', C_1), ('C_2', C_2)) if not 0 < v < 1]
    return found + ([] if 2 <= M <= MOST_LEVELS else [f'M must be between 2 and {MOST_LEVELS}, not {M}'])
