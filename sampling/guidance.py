"""Guidance as a wrapper: denoisers in, denoiser out."""

import math
from collections.abc import Callable

import torch

from sampling.samplers import Denoise

Both = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Guided:
    """D_weaker + weight (D - D_weaker) at noise levels in (low, high], elsewhere D.

    Where it is D, `weaker` is not evaluated. A sampler asks `of_step` once for each step, so that the interval is
    snapped to steps: all evaluations of a step are guided or none (as in the guidance interval's paper).

    Args:
        denoise: D, the main denoiser.
        both: (x, sigma) -> D and D_weaker, that of the guiding one.
        weight: w; 1 gives D.
        interval: (low, high] of sigma.
    """

    def __init__(self, denoise: Denoise, both: Both, weight: float, interval: tuple[float, float]):
        self.denoise = denoise
        self.both = both
        self.weight = weight
        self.interval = interval

    def of_step(self, sigma: float) -> Denoise:
        """The denoiser for all evaluations of a step that begins at `sigma`."""
        low, high = self.interval
        return self._extrapolate if low < sigma <= high else self.denoise

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """D_w(x; sigma), [N, C, H, W]; sigma scalar."""
        return self.of_step(float(sigma))(x, sigma)

    def _extrapolate(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        # Not lerp: what it rounds depends on where in a batch an image stands.
        D, weaker = self.both(x, sigma)
        return weaker + self.weight * (D - weaker)


def guide(denoise: Denoise, weaker: Denoise, weight: float, interval: tuple[float, float] = (0.0, math.inf)) -> Denoise:
    """Guide `denoise` by `weaker`: classifier-free guidance with an unconditional `weaker`, or autoguidance.

    D_weaker + weight (D - D_weaker) for sigma in (interval[0], interval[1]], elsewhere D. With weight 1 it is `denoise`
    itself, and `weaker` is never evaluated.
    """
    return guide_both(denoise, lambda x, sigma: (denoise(x, sigma), weaker(x, sigma)), weight, interval)


def guide_both(denoise: Denoise, both: Both, weight: float, interval: tuple[float, float] = (0.0, math.inf)) -> Denoise:
    """`guide`, where one call can give D and D_weaker."""
    return denoise if weight == 1 else Guided(denoise, both, weight, interval)
