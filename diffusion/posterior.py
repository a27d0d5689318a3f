"""The posterior of a less noisy image, given a noisier one and the clean image."""

import torch

Number = float | torch.Tensor


def posterior(x: torch.Tensor, clean: torch.Tensor, sigma: Number, sigma_next: Number) -> tuple[torch.Tensor, Number]:
    """q(x_next | x, clean) = N(r x + (1 - r) clean, (1 - r) sigma_next^2) with r = sigma_next^2 / sigma^2.

    It is DDPM's posterior (eq. 7) in the variance-exploding scale.

    Args:
        x: [N, C, H, W], of noise level `sigma`.
        clean: [N, C, H, W].
        sigma: > 0; a number, or a tensor that broadcasts with x.
        sigma_next: From 0 to `sigma`, likewise.

    Returns:
        Its mean [N, C, H, W], and its variance, as the noise levels are.
    """
    r = (sigma_next / sigma) ** 2
    return r * x + (1 - r) * clean, sigma_next**2 * (1 - r)
