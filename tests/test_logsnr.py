"""Schedules and losses in the logarithm of the signal-to-noise ratio."""

import dataclasses
import math

import pytest
import torch

from diffusion.haar import haar_bands
from diffusion.levels import LogNormal
from diffusion.logsnr import Cosine, logsnr_of, sigma_of
from diffusion.weightings import EDM, EDMLogSNR, EpsilonMSE, Multiscale, Power, Sigmoid

SCHEDULES = [
    Cosine(),
    Cosine.interpolated(512, 32, 512),
    Cosine.interpolated(64, 32, 512),
    Cosine(64, 16, 16),
    Cosine(128, 1, 1024, 0.003, 400.0),
]
T = torch.linspace(0, 1, 1001, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_derivative_and_inverse(schedule):
    t = T[1:-1]
    h = 1e-6
    finite = (schedule.logsnr(t + h) - schedule.logsnr(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.derivative(t), finite, rtol=1e-5, atol=0)  # h^2 lambda''' / 6 at the ends
    torch.testing.assert_close(schedule.inverse(schedule.logsnr(T)), T, rtol=0, atol=1e-14)
    beyond = torch.stack([schedule.logsnr(T[0]) + 1, schedule.logsnr(T[-1]) - 1])
    assert schedule.inverse(beyond).tolist() == [0, 1]


def test_cosine_closed_forms():
    assert Cosine() == Cosine.interpolated(64, 64, 64) and Cosine().logsnr(T[[0, 500, -1]]).tolist() == pytest.approx(
        [15, 0, -15], abs=1e-12
    )
    # With wide ends it is the cosine schedule itself, alpha = cos(pi t / 2).
    wide = Cosine(sigma_min=1e-12, sigma_max=1e12)
    torch.testing.assert_close(wide.logsnr(T[1:-1]).sigmoid().sqrt(), (T[1:-1] * math.pi / 2).cos(), rtol=0, atol=1e-9)
    shifted = Cosine.interpolated(256, 64, 64)
    torch.testing.assert_close(shifted.logsnr(T), Cosine().logsnr(T) + 2 * math.log(64 / 256))


@pytest.mark.parametrize(
    ('resolution', 'high', 'low'), [(64, 4.16, -1.39), (128, 2.77, -2.77), (256, 1.39, -4.16), (512, 0, -5.55)]
)
def test_interpolated_shifts(resolution, high, low):
    shift = Cosine.interpolated(resolution, 32, 512).logsnr(T) - Cosine().logsnr(T)
    assert shift[[0, -1]].tolist() == pytest.approx([high, low], abs=0.005)
    torch.testing.assert_close(shift, shift[0] + T * (shift[-1] - shift[0]))


def test_interpolated_range_at_512():
    ends = Cosine.interpolated(512, 32, 512).logsnr(T[[0, 500, -1]])
    assert ends.tolist() == pytest.approx([15, -2.77, -20.55], abs=0.005)


@pytest.mark.parametrize('levels', [*SCHEDULES, LogNormal(-1.2, 1.2), LogNormal(-0.4, 1.0)])
def test_density_is_that_of_the_draws(levels):
    # p(lambda) |d lambda| = the density of z times |d z|.
    z = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
    h = 1e-4
    slope = (logsnr_of(levels.from_normal(z + h)) - logsnr_of(levels.from_normal(z - h))) / (2 * h)
    expected = (-(z**2) / 2).exp() / math.sqrt(2 * math.pi) / slope.abs()
    torch.testing.assert_close(levels.density(levels.from_normal(z)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ('P_mean', 'P_std', 'mean', 'std'), [(-1.2, 1.2, 2.4, 2.4), (-0.4, 1.0, 0.8, 2), (-0.8, 1.6, 1.6, 3.2)]
)
def test_edm_levels_in_logsnr(P_mean, P_std, mean, std):
    logsnr = torch.linspace(-9, 12, 50, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(logsnr).exp()
    torch.testing.assert_close(LogNormal(P_mean, P_std).density(sigma_of(logsnr)), expected)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_sampling_schedule(schedule):
    sigmas = schedule.sigmas(8)
    assert sigmas.dtype == torch.float64 and len(sigmas) == 9 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    torch.testing.assert_close(
        schedule.inverse(logsnr_of(sigmas[:-1])), torch.arange(8, 0, -1, dtype=torch.float64) / 8
    )
    assert sigmas[0].item() == pytest.approx(schedule.sigma_max) and sigmas[7] >= schedule.sigma_min


def test_draws_in_float32_are_finite():
    z = torch.tensor([-40.0, -5, 0, 5, 40])
    for schedule in SCHEDULES:
        sigma = schedule.from_normal(z)
        assert sigma.dtype == torch.float32 and sigma.isfinite().all() and (sigma > 0).all()
        assert (schedule.density(sigma) > 0).all()


def identities(sigma):
    """alpha, sigma of the variance-preserving form, and errors of x, eps and v for some v_hat."""
    logsnr = logsnr_of(sigma)[:, None, None, None]
    alpha, s = logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
    x, eps, v_hat = (normal(len(sigma), 3, 8, 8, seed=i) for i in range(3))
    z = alpha * x + s * eps
    return x - (alpha * z - s * v_hat), eps - (s * z + alpha * v_hat), alpha * eps - s * x - v_hat


def test_losses_of_x_eps_and_v_are_one():
    schedule = Cosine.interpolated(128, 32, 512)
    t = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    logsnr, b = schedule.logsnr(t), -1.5
    sigma = sigma_of(logsnr)
    dx, deps, dv = identities(sigma)
    squares = [d.square().flatten(1).sum(dim=1) for d in (dx, deps, dv)]
    of_eps = -schedule.derivative(t) * (b - logsnr).sigmoid() * squares[1]
    of_x = -schedule.derivative(t) * math.exp(b) * (logsnr - b).sigmoid() * squares[0]
    of_v = -schedule.derivative(t) * (b - logsnr).sigmoid() * logsnr.sigmoid() * squares[2]
    torch.testing.assert_close(of_eps, of_x)
    torch.testing.assert_close(of_eps, of_v)
    torch.testing.assert_close(Sigmoid(b)(dx, sigma, schedule, 0), of_eps)
    torch.testing.assert_close(Power(b, haar_levels=0)(dx, sigma, schedule, 0), of_eps)
    torch.testing.assert_close(EpsilonMSE()(dx, sigma, schedule, 0), squares[1])


def test_loss_does_not_depend_on_the_levels():
    # The expectation over two distributions of noise levels is one integral over lambda.
    sigma = sigma_of(torch.linspace(-30, 30, 20001, dtype=torch.float64))
    error = (sigma / (1 + sigma)).reshape(-1, 1, 1, 1)
    for weighting in (Sigmoid(1.0), EDMLogSNR(), Power(0.5, haar_levels=0)):
        first, second = (
            weighting(error, sigma, levels, 0) * levels.density(sigma) for levels in (LogNormal(0, 3), LogNormal(-1, 2))
        )
        keep = LogNormal(-1, 2).density(sigma) > 0
        torch.testing.assert_close(first[keep], second[keep])


def test_edm_weighting_in_terms_of_epsilon():
    levels, sigma = LogNormal(-1.2, 1.2), sigma_of(torch.linspace(-9, 13, 99, dtype=torch.float64))
    torch.testing.assert_close(EDMLogSNR().weight(sigma, levels, 0), EDM(0.5).weight(sigma, levels, 0))
    expected = torch.distributions.Normal(2.4, 2.4).log_prob(logsnr_of(sigma)).exp() * (sigma**2 + 0.25) / 0.25
    torch.testing.assert_close(EDMLogSNR().epsilon_weight(logsnr_of(sigma)), expected)


def test_edm_monotonic():
    logsnr = torch.linspace(-12, 12, 241, dtype=torch.float64)
    plain, held = EDMLogSNR().epsilon_weight(logsnr), EDMLogSNR(monotonic=True).epsilon_weight(logsnr)
    assert logsnr[plain.argmax()].item() == pytest.approx(-3.3, abs=0.06)  # -3.31 on a grid of 0.1
    assert (held.diff() <= 0).all() and torch.equal(held[logsnr > -3.2], plain[logsnr > -3.2])
    assert held[0].item() == pytest.approx(plain.max().item(), rel=1e-4)
    shifted = EDMLogSNR(monotonic=True, shift=2 * math.log(64 / 512))
    torch.testing.assert_close(shifted.epsilon_weight(logsnr + 2 * math.log(64 / 512)), held)


def test_sigmoid_with_a_bias_that_moves():
    weighting = Sigmoid(-3.0, bias_start=-8.0, bias_images=1000)
    sigma = torch.tensor([0.1, 1.0, 10.0])
    for nimg, b in ((0, -8.0), (500, -5.5), (1000, -3.0), (5000, -3.0)):
        assert torch.equal(weighting.weight(sigma, Cosine(), nimg), Sigmoid(b).weight(sigma, Cosine(), 0))


def test_haar_is_orthonormal():
    x = normal(2, 3, 16, 8)
    bands = list(haar_bands(x, 2))
    assert [(tuple(band.shape[2:]), passes) for band, passes in bands] == [
        *[((8, 4), 3 - 2)] * 2, ((8, 4), 0), *[((4, 2), 3)] * 2, ((4, 2), 2), ((4, 2), 4)
    ]  # fmt: skip
    torch.testing.assert_close(sum(band.square().sum() for band, _ in bands), x.square().sum())
    rows = torch.cat(
        [band.flatten(1) for band, _ in haar_bands(torch.eye(64, dtype=x.dtype).reshape(64, 1, 8, 8), 2)], 1
    )
    torch.testing.assert_close(rows @ rows.T, torch.eye(64, dtype=x.dtype))
    mean = list(haar_bands(x, 3))[-1][0]
    torch.testing.assert_close(mean, 8 * torch.nn.functional.avg_pool2d(x, 8))


def test_power_loss_by_band():
    schedule, sigma, b = Cosine.interpolated(64, 32, 512), torch.tensor([0.3, 2.0], dtype=torch.float64), -1.0
    error = normal(2, 3, 8, 8)
    logsnr = logsnr_of(sigma)
    expected = 0
    for band, passes in haar_bands(error, 2):  # SiD2 appendix A.1, times the constant e^b
        w = (logsnr + math.log(2) * passes - b).sigmoid() * -schedule.derivative(schedule.inverse(logsnr)) * math.exp(b)
        expected = expected + w * band.square().flatten(1).sum(dim=1)
    torch.testing.assert_close(Power(b, haar_levels=2)(error, sigma, schedule, 0), expected)


def test_multiscale():
    error, sigma = normal(2, 3, 128, 128), torch.tensor([0.5, 2.0], dtype=torch.float64)
    expected = 0
    for side in (32, 64, 128):  # simple diffusion: (1 / s) times the mean over pixels, here times d^3
        pooled = torch.nn.functional.avg_pool2d(error, 128 // side)
        expected = expected + 128**3 / side / side**2 * pooled.square().flatten(1).sum(dim=1) / sigma**2
    torch.testing.assert_close(Multiscale(32)(error, sigma, Cosine(), 0), expected)
    torch.testing.assert_close(Multiscale(128)(error, sigma, Cosine(), 0), EpsilonMSE()(error, sigma, Cosine(), 0))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (Cosine(64, 128, 64), '1 <= noise_low <= noise_high'),
        (Cosine(64, 1, 4096), 'noise_high <= 1024 noise_low'),
        (Cosine(0, 32, 64), 'resolution must be at least 1, not 0'),
        (Cosine(sigma_min=3.0, sigma_max=2.0), '0 < sigma_min < sigma_max'),
        (Cosine(64, 1, 512, 0.002, 0.8), 'sigma_max noise_low / noise_high'),
        (Sigmoid(99.0), 'bias must be from -30 to 30, not 99.0'),
        (Sigmoid(-3.0, bias_start=-8.0), 'bias_start and bias_images'),
        (Power(haar_levels=-1), 'haar_levels must be from 0 to 16, not -1'),
        (EDMLogSNR(P_std=0.0), 'P_std must be positive'),
        (EDMLogSNR(sigma_data=-1.0), 'sigma_data must be positive'),
        (Multiscale(0), 'smallest must be at least 1, not 0'),
    ],
)
def test_problems(config, message):
    assert any(message in line for line in config.problems())
    assert not dataclasses.replace(type(config)()).problems()
