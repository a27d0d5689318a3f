"""Random Fourier features of the noise level, which EDM2, its ladder and SiD2 share."""

import math

import torch
from torch import nn


class FourierFeatures(nn.Module):
    """Random Fourier features of a scalar (EDM2 eq. 75): gain cos(freqs x + phases), in float32.

    freqs ~ 2 pi N(0, 1) and phases ~ 2 pi U(0, 1) are constant buffers.

    Args:
        channels: Number of features.
        gain: sqrt(2) makes their magnitude 1; before config G it is 1 (EDM2 eq. 35).
    """

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, channels: int, gain: float = math.sqrt(2)):
        super().__init__()
        self.gain = gain
        self.register_buffer('freqs', torch.empty(channels))
        self.register_buffer('phases', torch.empty(channels))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw frequencies and phases (on the CPU, whatever the device, so that a seed means one network)."""
        self.freqs.copy_(2 * math.pi * torch.randn(self.freqs.shape, generator=generator))
        self.phases.copy_(2 * math.pi * torch.rand(self.phases.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [N] -> float32 [N, channels]."""
        return self.gain * (x[:, None] * self.freqs + self.phases).cos()
