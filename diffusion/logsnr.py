"""Schedules in the logarithm of the signal-to-noise ratio, lambda = -2 ln sigma.

Variance-preserving papers write z = alpha x + s eps with alpha^2 = sigmoid(lambda), s^2 = sigmoid(-lambda). Here it is
z / alpha = x + sigma eps, with sigma = s / alpha = e^(-lambda / 2): one noise level for both.
"""

import dataclasses
import math

import torch

from dnnlib.configs import option


def sigma_of(logsnr: torch.Tensor) -> torch.Tensor:
    """e^(-lambda / 2)."""
    return (-logsnr / 2).exp()


def logsnr_of(sigma: torch.Tensor) -> torch.Tensor:
    """-2 ln sigma."""
    return -2 * sigma.log()


@dataclasses.dataclass(frozen=True)
class Cosine:
    """The cosine schedule, shifted and interpolated for resolutions (simple diffusion sections 3.1 and 3.2, SiD2).

    lambda(t) = -2 ln tan(A t + B) + (1 - t) s0 + t s1, t from 0 (data) to 1,
    with shifts s0 = 2 ln(noise_high / resolution) and s1 = 2 ln(noise_low / resolution).

    It has the noise for a side of `noise_high` near the data and for `noise_low` near pure noise: with 32 and 512 it is
    SiD2's `cosine_interpolated_low_32_high_512`, with equal ones the shifted schedule, with both = resolution the plain
    one. In training t ~ U(0, 1); samplers step uniformly in t.

    Args:
        resolution: Side of the images.
        noise_low, noise_high: Sides between which it is interpolated.
        sigma_min, sigma_max: Noise levels at t = 0 and t = 1; the defaults are lambda = 15 and -15.
    """

    resolution: int = option(64, 'Side of the images, for the cosine schedule.')
    noise_low: int = option(64, 'Side whose noise it has near pure noise.')
    noise_high: int = option(64, 'Side whose noise it has near the data.')
    sigma_min: float = option(math.exp(-7.5), 'Lowest noise level.')
    sigma_max: float = option(math.exp(7.5), 'Highest noise level.')

    @classmethod
    def interpolated(cls, resolution: int, noise_low: int, noise_high: int, logsnr: float = 15.0) -> 'Cosine':
        """The schedule whose ends are -logsnr and logsnr before they are shifted, as papers give it."""
        ends = (math.exp(-logsnr / 2) * resolution / noise_high, math.exp(logsnr / 2) * resolution / noise_low)
        return cls(resolution, noise_low, noise_high, *ends)

    @property
    def _angles(self) -> tuple[float, float]:
        """A and B."""
        B = math.atan(self.sigma_min * self.noise_high / self.resolution)
        return math.atan(self.sigma_max * self.noise_low / self.resolution) - B, B

    @property
    def _shifts(self) -> tuple[float, float]:
        """s0 and s1."""
        return 2 * math.log(self.noise_high / self.resolution), 2 * math.log(self.noise_low / self.resolution)

    def logsnr(self, t: torch.Tensor) -> torch.Tensor:
        """lambda(t), elementwise in float64."""
        (A, B), (s0, s1), t = self._angles, self._shifts, t.double()
        return -2 * (A * t + B).tan().log() + (1 - t) * s0 + t * s1

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        """lambda'(t) < 0, elementwise in float64."""
        (A, B), (s0, s1) = self._angles, self._shifts
        return -4 * A / (2 * (A * t.double() + B)).sin() + s1 - s0

    def inverse(self, logsnr: torch.Tensor) -> torch.Tensor:
        """t where lambda(t) = logsnr, elementwise in float64; t = 0 and 1 for what lies beyond the ends.

        Newton's method in u = -2 ln tan(A t + B), where lambda = u + (1 - t(u)) s0 + t(u) s1 is almost a straight line:
        its slope is between 1 and 1 + (s0 - s1) / (4 A).
        """
        (A, B), (s0, s1), logsnr = self._angles, self._shifts, logsnr.double()
        u, t = logsnr, torch.zeros_like(logsnr)
        for _ in range(1 if s0 == s1 else 10):
            t = ((-u / 2).exp().atan() - B) / A
            slope = 1 + (s0 - s1) * (2 * (A * t + B)).sin() / (4 * A)
            u = u - (u + (1 - t) * s0 + t * s1 - logsnr) / slope
        return (((-u / 2).exp().atan() - B) / A).clamp(0, 1)

    def from_normal(self, z: torch.Tensor) -> torch.Tensor:
        """Map standard normal draws to noise levels, elementwise: t is their distribution function."""
        return sigma_of(self.logsnr(torch.special.ndtr(z.double()))).to(z.dtype)

    def density(self, sigma: torch.Tensor) -> torch.Tensor:
        """Density of lambda in training at noise levels, elementwise: -1 / lambda'(t)."""
        return (-1 / self.derivative(self.inverse(logsnr_of(sigma.double())))).to(sigma.dtype)

    def sigmas(self, num_steps: int) -> torch.Tensor:
        """Noise levels of a sampler with t = 1, 1 - 1 / N, ..., 1 / N, then 0: float64 [N + 1]."""
        t = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
        return torch.cat([sigma_of(self.logsnr(t)), t.new_zeros(1)])

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = []
        if not 1 <= self.noise_low <= self.noise_high <= min(1024 * self.noise_low, 2**20):
            found.append(
                f'1 <= noise_low <= noise_high <= 1024 noise_low is needed, not {self.noise_low} and {self.noise_high}'
            )
        if not 1 <= self.resolution <= 2**20:
            found.append(f'resolution must be at least 1, not {self.resolution}')
        if not found and not 1e-12 <= self.sigma_min < self.sigma_max * self.noise_low / self.noise_high <= 1e12:
            found.append(
                f'0 < sigma_min < sigma_max noise_low / noise_high is needed, not {self.sigma_min} and {self.sigma_max}'
            )
        return found
