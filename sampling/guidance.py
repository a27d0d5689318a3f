"""Guidance as a wrapper: denoisers in, denoiser out."""

import torch

from sampling.samplers import Denoise


def guide(denoise: Denoise, weaker: Denoise, weight: float) -> Denoise:
    """D_weaker + weight (D - D_weaker): classifier-free guidance with an unconditional `weaker`, or autoguidance.

    With weight 1 it is `denoise` itself, and `weaker` is never evaluated.
    """
    if weight == 1:
        return denoise

    def guided(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return weaker(x, sigma).lerp(denoise(x, sigma), weight)

    return guided
