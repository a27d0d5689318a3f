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


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {'edm': EDM}
