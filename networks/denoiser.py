"""The denoiser D(x; sigma): a preconditioned architecture of any family (EDM eq. 7)."""

import platform

import torch
from torch import nn

from dnnlib.configs import tag_of
from dnnlib.errors import choose
from networks.config import NetworkConfig
from networks.families import ARCHITECTURES, FAMILIES

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}

EMULATED = 'this CPU emulates bf16, which is very slow: --precision=fp32 is faster'


def is_emulated(precision: str, device: torch.device) -> bool:
    """Whether an x86 CPU has no units for such features, and takes many times as long as for float32."""
    probes = [getattr(torch.cpu, name, None) for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported')]
    known = device.type == 'cpu' and platform.machine() in ('x86_64', 'AMD64') and None not in probes
    return known and precision == 'bf16' and not any(probe() for probe in probes)


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

    Args:
        config: What to build.
        seed: Of the initial weights.
        precision: Of F's features: `fp32`, `bf16` or `fp16`. Weights, embedding and the final combination are float32
            always.
    """

    def __init__(self, config: NetworkConfig, seed: int = 0, precision: str = 'fp32'):
        super().__init__()
        choose('precision', precision, PRECISIONS)
        self.config = config.check()
        self.precision = precision
        family = FAMILIES[tag_of(config.architecture, ARCHITECTURES)]
        with torch.random.fork_rng(devices=[]):  # PyTorch's layers draw weights of their own, which do not stay
            self.unet = family.build(config.architecture, config.interface)
        if config.uncertainty:
            self.logvar_fourier, self.logvar_linear = family.head(config.architecture, config.uncertainty)
        if self.device.type != 'meta':
            self.reset_parameters(seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw new weights; at first F is 0, or nearly, and D(x) = c_skip x."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(torch.nan)
            self.unet.reset_parameters(generator)
        if self.config.uncertainty:
            self.logvar_fourier.reset_parameters(generator)
            self.logvar_linear.reset_parameters(generator)
        undrawn = [name for name, parameter in self.named_parameters() if parameter.isnan().any()]
        assert not undrawn, f'reset_parameters must draw {", ".join(undrawn)}'

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor | None = None,
        augment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Estimate the clean image.

        Args:
            x: float [N, C, H, W], image plus noise of standard deviation sigma.
            sigma: float [N] or scalar, > 0.
            labels: float [N, label_dim], one-hot; None means none of the classes.
            augment: float [N, augment_dim], how the images were augmented; None means not at all.

        Returns:
            float32 [N, C, H, W].
        """
        x = x.float()
        sigma = self.config.preconditioning.round(sigma.float().reshape(-1)).expand(len(x))
        c_skip, c_out, c_in, c_noise = self.config.preconditioning.coefficients(sigma)
        c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
        labels = None if labels is None or not self.config.label_dim else labels.float()
        augment = None if augment is None or not self.config.augment_dim else augment.float()
        F = self.unet((c_in * x).to(PRECISIONS[self.precision]), c_noise, labels, augment)
        return c_skip * x + c_out * F[:, : x.shape[1]].float()

    def logvar(self, sigma: torch.Tensor) -> torch.Tensor:
        """Uncertainty u(sigma), the log variance of the denoising error (EDM2 eq. 21): [N] or scalar -> float32 [N]."""
        assert self.config.uncertainty, 'this network has no uncertainty head'
        c_noise = sigma.float().reshape(-1).log() / 4
        return self.logvar_linear(self.logvar_fourier(c_noise))[:, 0]

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return next(self.parameters()).device
