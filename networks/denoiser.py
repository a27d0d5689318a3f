"""The preconditioned denoiser D(x; sigma) with its uncertainty head (EDM2 eq. 1 to 4, 14 and 17)."""

import torch
from torch import nn

from dnnlib.errors import UserError, unknown_choice
from networks.config import NetworkConfig
from networks.edm2.magnitude import MPConv, MPFourier
from networks.edm2.unet import UNet

LOGVAR_CHANNELS = 128
PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

    Args:
        config: What to build.
        seed: Of the initial weights.
        precision: Of F's features: `fp32`, `bf16` or `fp16`. Weights, embedding, normalization sums and the final
            combination are float32 always.

    Raises:
        UserError: where the config cannot be built or the precision is unknown.
    """

    def __init__(self, config: NetworkConfig, seed: int = 0, precision: str = 'fp32'):
        super().__init__()
        if precision not in PRECISIONS:
            raise UserError(unknown_choice('precision', precision, PRECISIONS))
        self.config = config.check()
        self.precision = precision
        self.unet = UNet(config)
        self.logvar_fourier = MPFourier(LOGVAR_CHANNELS)
        self.logvar_linear = MPConv(LOGVAR_CHANNELS, 1, kernel=0)
        if self.logvar_linear.weight.device.type != 'meta':
            self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw all weights anew: N(0, 1), gains 0, so that at first F = 0 and D(x) = c_skip x."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith('_gain'):
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, MPConv | MPFourier):
                module.reset_parameters(generator)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Estimate the clean image.

        Args:
            x: float [N, C, H, W], image plus noise of standard deviation sigma.
            sigma: float [N] or scalar, > 0.
            labels: float [N, label_dim], one-hot; None means none of the classes.

        Returns:
            float32 [N, C, H, W].
        """
        x = x.float()
        sigma = sigma.float().reshape(-1).expand(len(x))
        c_noise = sigma.log() / 4
        sigma = sigma[:, None, None, None]
        sigma_data = self.config.sigma_data
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
        labels = None if labels is None or not self.config.label_dim else labels.float()
        F = self.unet((c_in * x).to(PRECISIONS[self.precision]), c_noise, labels)
        return c_skip * x + c_out * F.float()

    def logvar(self, sigma: torch.Tensor) -> torch.Tensor:
        """Uncertainty u(sigma), the log variance of the denoising error (EDM2 eq. 21): [N] or scalar -> float32 [N]."""
        c_noise = sigma.float().reshape(-1).log() / 4
        return self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.unet.out_gain.device
