"""Noise levels: how they are spaced when sampling and drawn when training."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """Training noise levels: ln sigma ~ N(P_mean, P_std^2) (EDM table 1, EDM2 table 6)."""

    P_mean: float
    P_std: float

    def from_normal(self, z: torch.Tensor) -> torch.Tensor:
        """Map standard normal draws to noise levels, elementwise."""
        return (z * self.P_std + self.P_mean).exp()
