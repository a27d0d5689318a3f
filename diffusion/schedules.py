"""Noise levels of samplers."""

import torch


def edm_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Noise levels of the EDM sampler (EDM eq. 5), from `sigma_max` down to `sigma_min`, then 0.

    Args:
        num_steps: N >= 1, number of sampling steps; N = 1 steps from `sigma_max` to 0.
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        rho: Exponent; larger puts more steps near `sigma_min`.

    Returns:
        float64 [N + 1], the last one 0.
    """
    assert num_steps >= 1 and 0 < sigma_min < sigma_max and rho > 0
    position = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (start + position * (end - start)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])
