"""Noise levels against the published list and closed forms."""

import json
import math

import pytest
import torch

from diffusion import levels, noise_schedules, preconditioning, schedules, weightings
from diffusion.levels import LogNormal
from diffusion.preconditioning import PRECONDITIONINGS
from diffusion.schedules import edm_sigmas
from tests.conftest import ROOT

# Measured from the published sampler at N = 18.
N18 = (
    '80, 57.58598472, 40.7855738, 28.3745846, 19.35245298, 12.91008238, 8.400935309, 5.315194522, 3.25682152, '
    '1.923339837, 1.088170637, 0.5853481232, 0.2964422845, 0.1395164687, 0.05994731124, 0.02293451837, '
    '0.007528019963, 0.002, 0'
)


def test_edm_sigmas_published():
    expected = torch.tensor([float(s) for s in N18.split(',')], dtype=torch.float64)
    torch.testing.assert_close(edm_sigmas(18), expected, rtol=1e-9, atol=0)


def test_edm_sigmas_one_step():
    assert edm_sigmas(1).tolist() == pytest.approx([80, 0])


def test_edm_sigmas_rho_one_is_linear():
    assert edm_sigmas(3, 1, 5, rho=1).tolist() == pytest.approx([5, 3, 1, 0])


def test_lognormal():
    levels = LogNormal(-0.8, 1.6)
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ln = levels.from_normal(z).log()
    assert ln.mean().item() == pytest.approx(-0.8, abs=0.02) and ln.std().item() == pytest.approx(1.6, abs=0.02)


@pytest.fixture(scope='module')
def edm_golden():
    """Numbers of the reference formulation of EDM."""
    return json.loads((ROOT / 'tests/golden/edm.json').read_text())


@pytest.mark.parametrize('schedule', [noise_schedules.VP(), noise_schedules.VP(5.0, 1.0), noise_schedules.VE()])
def test_noise_schedules(schedule):
    """time() is the inverse, derivative() the derivative."""
    t = torch.linspace(0.001, 1, 50, dtype=torch.float64, requires_grad=True)
    sigma = schedule.sigma(t)
    torch.testing.assert_close(schedule.time(sigma), t, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(sigma.sum(), t)[0], schedule.derivative(t))


def test_vp_of_range():
    schedule = noise_schedules.VP.of_range(0.002, 80, 1e-3)
    assert [schedule.level(1e-3), schedule.level(1.0)] == pytest.approx([0.002, 80])
    exact = noise_schedules.VP()
    again = noise_schedules.VP.of_range(exact.level(1e-3), exact.level(1.0), 1e-3)
    assert [again.beta_d, again.beta_min] == pytest.approx([19.9, 0.1])


def test_iddpm_levels(edm_golden):
    levels = preconditioning.IDDPM().levels
    assert len(levels) == 1001
    for j, expected in edm_golden['iddpm_u'].items():
        assert levels[int(j)] == pytest.approx(expected, rel=5e-6)
    known = schedules.IDDPM()
    assert known.sigmas(18)[0].item() == pytest.approx(80.203676, rel=1e-7)
    assert known.sigmas(18)[17].item() == pytest.approx(0.00642247, rel=1e-6)
    assert known.sigmas(992).unique().numel() == 993


@pytest.mark.parametrize('name', ['vp', 've', 'edm', 'iddpm'])
def test_c_noise(edm_golden, name):
    """The reference computes VP's in float32 without care for small sigma: 5e-4 of 999 at sigma = 0.002."""
    sigma = torch.tensor(edm_golden['c_noise']['sigma'], dtype=torch.float32)
    c_noise = PRECONDITIONINGS[name]().coefficients(sigma)[3]
    expected = torch.tensor(edm_golden['c_noise'][name]).float()
    torch.testing.assert_close(c_noise, expected, rtol=2e-6, atol=6e-4 if name == 'vp' else 1e-5)


@pytest.mark.parametrize('name', ['vp', 've', 'iddpm'])
def test_coefficients(name):
    """D = x + c_out F where F predicts the noise; x enters F with variance about 1, but for VE."""
    sigma = torch.tensor([0.05, 1.0, 50.0])
    c_skip, c_out, c_in, _ = PRECONDITIONINGS[name]().coefficients(sigma)
    assert torch.equal(c_skip, torch.ones(3)) and torch.equal(c_out, sigma if name == 've' else -sigma)
    torch.testing.assert_close(c_in, torch.ones(3) if name == 've' else 1 / (1 + sigma**2).sqrt())


def test_ranges():
    ranges = {name: (cls().sigma_min, cls().sigma_max) for name, cls in PRECONDITIONINGS.items()}
    assert ranges['edm'] == (0, math.inf) and ranges['ve'] == (0.02, 100)
    assert ranges['vp'] == pytest.approx((0.0010004976, 152.16698), rel=1e-6)
    assert ranges['iddpm'] == pytest.approx((0.00642234, 20291.17), rel=1e-6)


def test_iddpm_rounds_to_what_it_knows():
    known = preconditioning.IDDPM()
    sigma = torch.tensor([1e5, 80.0, 1.0, 0.0065, 0.002])
    rounded = known.round(sigma)
    assert torch.equal(known.round(rounded), rounded)
    assert rounded.tolist() == pytest.approx([known.levels[j] for j in (0, 8, 504, 999, 1000)])
    assert known.round(torch.tensor(0.5, dtype=torch.float64)).dtype == torch.float64
    assert [cls().out_channels(3) for cls in PRECONDITIONINGS.values()] == [3, 3, 3, 6]


@pytest.mark.parametrize('levels', [levels.LogNormal(-1.2, 1.2), levels.VP(), levels.LogUniform()])
def test_density_of_levels(levels):
    """It integrates to 1 over lambda = -2 ln sigma, and the draws have its mean."""
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = -2 * levels.from_normal(z).log()
    line = torch.linspace(drawn.min() - 1, drawn.max() + 1, 100_000, dtype=torch.float64)
    density = levels.density((-line / 2).exp())
    assert torch.trapezoid(density, line).item() == pytest.approx(1, abs=1e-3)
    mean = torch.trapezoid(density * line, line).item()
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * drawn.std().item() / 300)


def test_weightings():
    error, sigma = torch.ones(2, 3, 4, 4), torch.tensor([0.5, 2.0])
    assert weightings.EpsilonMSE()(error, sigma, None, 0).tolist() == [48 / 0.25, 48 / 4]
    expected = (48 / preconditioning.EDM().coefficients(sigma)[1] ** 2).tolist()
    assert weightings.EDM()(error, sigma, None, 0).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ('disc', 'ends'),
    [('vp', (152.16697, 0.010485993)), ('ve', (100, 0.02)), ('iddpm', (80.203676, 0.00642247)), ('edm', (80, 0.002))],
)
def test_discretizations(disc, ends):
    sigmas = schedules.DISCRETIZATIONS[disc]().sigmas(18)
    assert sigmas.dtype == torch.float64 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert (sigmas[0].item(), sigmas[-2].item()) == pytest.approx(ends, rel=1e-6)
    assert schedules.DISCRETIZATIONS[disc]().sigmas(1).tolist() == pytest.approx([ends[0], 0], rel=1e-6)
    if disc == 've':
        ratios = sigmas[1:-1] / sigmas[:-2]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize(
    ('value', 'problem'),
    [
        (preconditioning.VP(M=1), 'M must'),
        (preconditioning.VP(beta_d=-1), 'beta_d'),
        (preconditioning.VE(sigma_min=0), 'sigma_min'),
        (preconditioning.IDDPM(M=10**9), 'M must be between 2'),
        (preconditioning.IDDPM(C_1=0.0), 'C_1'),
        (levels.VP(epsilon_t=2.0), 'earliest time'),
        (levels.LogUniform(sigma_max=0.01), 'sigma_min < sigma_max'),
        (schedules.VP(sigma_min=1.0), 'no VP schedule'),
        (schedules.VP(epsilon_s=0), 'epsilon_s'),
        (schedules.VE(sigma_min=200), 'sigma_min < sigma_max'),
        (schedules.IDDPM(sigma_min=20300, sigma_max=20400), 'knows no noise level'),
    ],
)
def test_problems(value, problem):
    (found,) = value.problems()
    assert problem in found
