"""What a denoising error costs, by noise level: a frozen dataclass for each.

Every one is called as `weighting(error, sigma, levels, nimg)`:

    error    D(y + n; sigma) - y, float32 [N, C, H, W]
    sigma    float32 [N]
    levels   the distribution that sigma is drawn from, of `diffusion.levels`
    nimg     images trained on so far

and returns float32 [N], the loss of each image, summed over C, H and W. Most are lambda(sigma) times the squared error
and define `weight` alone. A new one is a class and a row of WEIGHTINGS.
"""

import dataclasses
import functools
import math
from typing import Any

import torch

from diffusion.haar import haar_bands
from diffusion.levels import LogNormal


class Weighting:
    """lambda(sigma) ||D - y||^2."""

    def weight(self, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """lambda(sigma): float32 [N] -> [N]."""
        raise NotImplementedError

    def __call__(self, error: torch.Tensor, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """Loss of each image, see the module."""
        return self.weight(sigma, levels, nimg) * error.square().flatten(1).sum(dim=1)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return []


@dataclasses.dataclass(frozen=True)
class EDM(Weighting):
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, 1 / c_out^2 of EDM's preconditioning (EDM table 1).

    Args:
        sigma_data: Expected standard deviation of the training data.
    """

    sigma_data: float = 0.5

    def weight(self, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """lambda(sigma): float32 [N] -> [N]."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return [] if self.sigma_data > 0 else [f'sigma_data must be positive, not {self.sigma_data}']


@dataclasses.dataclass(frozen=True)
class Sigmoid(Weighting):
    """SiD2's loss, E_t[-lambda'(t) sigmoid(b - lambda) ||eps - eps_hat||^2] (SiD2 eq. 4), whatever the levels.

    In terms of the image, weight = 1 / (p(lambda) (sigma^2 + e^-b)): errors count alike below sigma = e^(-b / 2), and
    fall as 1 / sigma^2 above. The paper's b falls with the resolution: 0 or 1 at 128, -1 at 256, -3 at 512.

    Args:
        bias: b.
        bias_start: b at first, from where it goes to `bias` in a straight line (SiD2 appendix B.1); None for no change.
        bias_images: Training images until then.
    """

    bias: float = 0.0
    bias_start: float | None = None
    bias_images: int = 0

    def bias_at(self, nimg: int) -> float:
        """b after so many training images."""
        if self.bias_start is None:
            return self.bias
        return self.bias_start + (self.bias - self.bias_start) * min(nimg / self.bias_images, 1)

    def weight(self, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """lambda(sigma): float32 [N] -> [N]."""
        return 1 / (levels.density(sigma) * (sigma**2 + math.exp(-self.bias_at(nimg))))

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [f'{name} must be from -30 to 30, not {b}' for name, b in _biases(self) if not -30 <= b <= 30]
        if (self.bias_start is None) != (self.bias_images == 0) or self.bias_images < 0:
            found.append('bias_start and bias_images, at least 1, are needed together')
        return found


def _biases(weighting: Any) -> list[tuple[str, float]]:
    values = ((name, getattr(weighting, name, None)) for name in ('bias', 'bias_start'))
    return [(name, value) for name, value in values if value is not None]


@dataclasses.dataclass(frozen=True)
class Power(Weighting):
    """SiD2's power loss: the sigmoid loss with a bias for each band of a Haar transform (SiD2 appendix A.1).

    A low pass raises lambda by ln 2: the weight of a band that l of them made is 1 / (p(lambda) (2^-l sigma^2 + e^-b)),
    up to a constant as in the paper. With 0 levels it is the sigmoid loss.

    Args:
        bias: b.
        haar_levels: Times that the image is halved.
    """

    bias: float = 0.0
    haar_levels: int = 2

    def __call__(self, error: torch.Tensor, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """Loss of each image, see the module."""
        loss = torch.zeros_like(sigma)
        for band, low_passes in haar_bands(error, self.haar_levels):
            loss += band.square().flatten(1).sum(dim=1) / (2**-low_passes * sigma**2 + math.exp(-self.bias))
        return loss / levels.density(sigma)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [f'{name} must be from -30 to 30, not {b}' for name, b in _biases(self) if not -30 <= b <= 30]
        return found + (
            [] if 0 <= self.haar_levels <= 16 else [f'haar_levels must be from 0 to 16, not {self.haar_levels}']
        )


@dataclasses.dataclass(frozen=True)
class EDMLogSNR(Weighting):
    """EDM's loss whatever the levels: what EDM's weighting and its log-normal levels give together (VDM++ section 5).

    w(lambda) = N(lambda; -2 P_mean, (2 P_std)^2) (e^-lambda + sigma_data^2) / sigma_data^2 on ||eps - eps_hat||^2.

    Args:
        P_mean, P_std: Of ln(sigma) in EDM's training.
        sigma_data: Expected standard deviation of the training data.
        shift: Of the curve towards higher lambda; 2 ln(64 / d) moves it from 64 pixels to d.
        monotonic: Whether it stays at its maximum for the lambda below it (VDM++ `EDM-monotonic`).
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5
    shift: float = 0.0
    monotonic: bool = False

    def epsilon_weight(self, logsnr: torch.Tensor) -> torch.Tensor:
        """w(lambda), elementwise."""
        logsnr = logsnr - self.shift
        if self.monotonic:
            logsnr = logsnr.clamp(min=_peak(dataclasses.replace(self, shift=0.0, monotonic=False)))
        sigma = (-logsnr / 2).exp()
        return LogNormal(self.P_mean, self.P_std).density(sigma) * (sigma**2 / self.sigma_data**2 + 1)

    def weight(self, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """lambda(sigma): float32 [N] -> [N]."""
        return self.epsilon_weight(-2 * sigma.log()) / (levels.density(sigma) * sigma**2)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = LogNormal(self.P_mean, self.P_std).problems()
        return found + ([] if self.sigma_data > 0 else [f'sigma_data must be positive, not {self.sigma_data}'])


@functools.cache
def _peak(weighting: EDMLogSNR) -> float:
    """The lambda where w is largest."""
    mean, variance = -2 * weighting.P_mean, (2 * weighting.P_std) ** 2
    grid = torch.linspace(mean - variance, mean, 100_001, dtype=torch.float64)  # ln w has slopes 1 and 0 at its ends
    return grid[weighting.epsilon_weight(grid).argmax()].item()


@dataclasses.dataclass(frozen=True)
class EpsilonMSE(Weighting):
    """||eps - eps_hat||^2 of the levels as they are drawn: the loss of DDPM, VP and VE, and of simple diffusion."""

    def weight(self, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """lambda(sigma): float32 [N] -> [N]."""
        return 1 / sigma**2


@dataclasses.dataclass(frozen=True)
class Multiscale(Weighting):
    """||eps - eps_hat||^2 of the levels as they are drawn, at several scales (simple diffusion section 3.3).

    The sum over sides s = d, d / 2, ..., `smallest` of (d / s)^3 ||pool_s(eps - eps_hat)||^2, where pool_s is the mean
    of squares of pixels: at d alone it is `epsilon-mse`.

    Args:
        smallest: Least shorter side that counts.
    """

    smallest: int = 32

    def __call__(self, error: torch.Tensor, sigma: torch.Tensor, levels: Any, nimg: int) -> torch.Tensor:
        """Loss of each image, see the module."""
        loss, scale = error.square().flatten(1).sum(dim=1), 1
        while min(error.shape[2:]) >= 2 * self.smallest:
            error, scale = torch.nn.functional.avg_pool2d(error, 2), 2 * scale
            loss = loss + scale**3 * error.square().flatten(1).sum(dim=1)
        return loss / sigma**2

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        return [] if self.smallest >= 1 else [f'smallest must be at least 1, not {self.smallest}']


WEIGHTINGS: dict[str, type[Weighting]] = {
    'edm': EDM,
    'sigmoid': Sigmoid,
    'power': Power,
    'edm-logsnr': EDMLogSNR,
    'epsilon-mse': EpsilonMSE,
    'multiscale': Multiscale,
}
