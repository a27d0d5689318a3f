"""Solvers of the probability flow ODE and SDE, all of the signature (denoise, x, sigmas, ...) -> x."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [N,C,H,W], sigma scalar) -> D [N,C,H,W]
Noise = Callable[[torch.Tensor], torch.Tensor]  # x -> standard normal noise like x


@dataclasses.dataclass(frozen=True)
class Churn:
    """Noise added at every step (EDM algorithm 2); S_churn = 0 is the deterministic sampler.

    Args:
        S_churn: Amount over the whole trajectory.
        S_min, S_max: Noise levels at which it is added, ends included.
        S_noise: Standard deviation of the added noise relative to the exact one.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def gamma(self, sigma: float, num_steps: int) -> float:
        """Relative increase of the noise level before a step that begins at `sigma`."""
        if not self.S_min <= sigma <= self.S_max:
            return 0.0
        return min(self.S_churn / num_steps, math.sqrt(2) - 1)


def heun(
    denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor, noise: Noise | None = None, churn: Churn | None = None
) -> torch.Tensor:
    """Heun's second-order method in sigma (EDM algorithms 1 and 2): 2 N - 1 evaluations for N steps.

    Args:
        denoise: The denoiser.
        x: [N, C, H, W] of standard deviation sigmas[0]; its dtype is that of the arithmetic.
        sigmas: [N + 1] decreasing noise levels, the last one 0.
        noise: Source of fresh noise, needed with churn.
        churn: Stochasticity; None is the deterministic sampler.

    Returns:
        [N, C, H, W], the state at noise level 0.
    """
    churn = churn or Churn()
    num_steps = len(sigmas) - 1
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        gamma = churn.gamma(sigma, num_steps)
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            assert noise is not None, 'churn needs a source of noise'
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * churn.S_noise * noise(x)
        slope = _slope(denoise, x, sigma_hat)
        x_next = x + (sigma_next - sigma_hat) * slope
        if i < num_steps - 1:
            slope_next = _slope(denoise, x_next, sigma_next)
            x_next = x + (sigma_next - sigma_hat) * (0.5 * slope + 0.5 * slope_next)
        x = x_next
    return x


def _slope(denoise: Denoise, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """dx/dsigma = (x - D(x; sigma)) / sigma (EDM eq. 3 with sigma(t) = t)."""
    return (x - denoise(x, torch.full((), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)) / sigma
