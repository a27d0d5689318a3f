"""Ancestral sampling against the posterior, its bounds, and data whose distribution is known."""

import itertools
import math

import pytest
import torch

from diffusion.logsnr import Cosine
from sampling.samplers import Ancestral


def one_step(sampler, sigma, sigma_next, x, denoised, n):
    """State after a step from `sigma` to `sigma_next`: what the next step is asked to denoise."""
    seen = []

    def denoise(x, sigma):
        seen.append(x)
        return denoised

    sampler(denoise, x, torch.tensor([sigma, sigma_next, 0.0], dtype=torch.float64), noise=lambda x: n)
    return seen[1]


@pytest.mark.parametrize(('sigma', 'sigma_next'), [(80.0, 40.0), (1.0, 0.5), (0.01, 0.009)])
@pytest.mark.parametrize('f', [0.0, 0.3, 1.0])
def test_step_is_that_of_the_variance_preserving_form(sigma, sigma_next, f):
    x, D, n = torch.randn(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * sigma
    a2_t, a2_s = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    s2_t, s2_s = 1 - a2_t, 1 - a2_s
    a_ts = math.sqrt(a2_t / a2_s)
    s2_ts = s2_t - a_ts**2 * s2_s  # of q(z_t | z_s): the upper bound
    posterior = s2_ts * s2_s / s2_t  # of q(z_s | z_t, x): the lower one
    mean = a_ts * s2_s / s2_t * (math.sqrt(a2_t) * x) + math.sqrt(a2_s) * s2_ts / s2_t * D
    expected = mean + math.sqrt(s2_ts**f * posterior ** (1 - f)) * n
    got = one_step(Ancestral(variance=f, clip=0), sigma, sigma_next, x, D, n)
    torch.testing.assert_close(math.sqrt(a2_s) * got, expected)


def output_variance(f, num_steps, std):
    """Variance of samples where the data is N(0, std^2): all steps are linear, so noises are told apart by an axis."""
    sigmas = Cosine.interpolated(64, 64, 64, logsnr=10).sigmas(num_steps)
    x = torch.zeros(1, 1, 1, num_steps + 1, dtype=torch.float64)
    x[..., 0], used = sigmas[0], [0]

    def noise(x):
        used.append(used[-1] + 1)
        return torch.zeros_like(x).index_fill_(3, torch.tensor([used[-1]]), 1)

    def denoise(x, sigma):
        return x * std**2 / (std**2 + sigma**2)

    return Ancestral(variance=f, clip=0)(denoise, x, sigmas, noise).square().sum().item()


@pytest.mark.parametrize('f', [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize('std', [0.5, 1.0])
def test_variance_of_gaussian_data(f, std):
    errors = [abs(output_variance(f, n, std) / std**2 - 1) for n in (64, 128, 256, 512)]
    assert errors[-1] < 0.02
    if (f, std) == (1.0, 1.0):  # the upper bound is that of data of unit variance: only the last step errs
        assert errors[0] < 1.1e-3
    else:  # order 1
        assert all(1.7 < a / b < 2.2 for a, b in itertools.pairwise(errors))


def test_clipping_and_the_last_step():
    sigmas, seen = torch.tensor([2.0, 1.0, 0.0]), []
    x = torch.full((1, 1, 2, 2), 3.0)
    out = Ancestral()(lambda x, sigma: x, x, sigmas, torch.zeros_like, lambda *step: seen.append(step))
    assert torch.equal(out, torch.ones_like(x))  # D itself, without noise
    assert [(i, sigma, D.max().item()) for i, sigma, D in seen] == [(0, 2.0, 1.0), (1, 1.0, 1.0)]
    assert torch.equal(Ancestral(clip=0)(lambda x, sigma: x, x, sigmas, torch.zeros_like), x)


def test_problems():
    assert Ancestral(variance=1.5, clip=-1).problems() == [
        'variance must be from 0 to 1, not 1.5',
        'clip must be at least 0, not -1',
    ]
    assert not Ancestral().problems() and Ancestral().evaluations(512) == 512
