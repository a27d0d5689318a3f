"""Post-hoc EMA: golden numbers, the definition by numerical integration, reconstruction of known averages."""

import math
import re

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ema.power import PowerEMA, combine, correlation, ema_beta, exp_to_std, solve, std_to_exp
from tests.conftest import ROOT

lengths = st.floats(0.01, 0.28)


def test_golden_exponents(golden):
    for std, exp in golden['phema']['std_to_exp'].items():
        assert std_to_exp(float(std)) == pytest.approx(exp, rel=1e-12)


def test_golden_betas(golden):
    for case in golden['phema']['beta']:
        assert ema_beta(case['std'], case['t_next'], case['t_delta']) == pytest.approx(case['beta'], rel=1e-12)


def test_golden_coefficients(golden):
    case = golden['phema']['solve']
    for column, out_std in enumerate(case['out_std']):
        solution = solve(case['in_t'], case['in_std'], case['out_t'], out_std)
        np.testing.assert_allclose(solution.coefficients, np.array(case['coefs'])[:, column], atol=2e-9)


@given(lengths)
def test_lengths_and_exponents_are_inverse(std):
    assert exp_to_std(std_to_exp(std)) == pytest.approx(std, rel=1e-10)


@given(lengths)
@settings(max_examples=20)
def test_length_is_the_standard_deviation_of_the_profile(std):
    exp = std_to_exp(std)
    density = lambda t: (exp + 1) * t**exp  # noqa: E731
    mean = scipy.integrate.quad(lambda t: t * density(t), 0, 1)[0]
    variance = scipy.integrate.quad(lambda t: (t - mean) ** 2 * density(t), 0, 1)[0]
    assert math.sqrt(variance) == pytest.approx(std, rel=1e-6)


@given(st.floats(0.1, 1), lengths, st.floats(0.1, 1), lengths)
@settings(max_examples=50)
def test_correlation_is_the_integral_of_the_product(t_a, std_a, t_b, std_b):
    exp_a, exp_b = std_to_exp(std_a), std_to_exp(std_b)

    def product(t):
        return (exp_a + 1) * (t / t_a) ** exp_a / t_a * (exp_b + 1) * (t / t_b) ** exp_b / t_b

    end = min(t_a, t_b)
    integral = scipy.integrate.quad(product, 0, end, points=[0.9 * end], epsabs=0, epsrel=1e-10)[0]
    arrays = (np.float64(v) for v in (t_a, exp_a, t_b, exp_b))
    assert float(correlation(*arrays)) == pytest.approx(integral, rel=1e-7)


def test_tracking_weighs_the_past_by_the_power_function():
    # Of theta(t) = t the average with density (g + 1) tau^g / t^(g + 1) is t (g + 1) / (g + 2), up to the steps' width.
    theta = {'w': torch.zeros(1, dtype=torch.float64)}
    ema = PowerEMA(theta, [0.05, 0.10])
    steps = 2000
    for step in range(1, steps + 1):
        theta['w'][:] = step / steps
        ema.update(theta, step * 64, 64)
    for std in (0.05, 0.10):
        exp = std_to_exp(std)
        assert ema.averages[std]['w'].item() == pytest.approx((exp + 1) / (exp + 2), abs=1 / steps)


def test_first_update_forgets_the_start():
    ema = PowerEMA({'w': torch.full((2,), 100.0)}, [0.1])
    ema.update({'w': torch.ones(2)}, 128, 128)
    assert ema.averages[0.1]['w'].tolist() == [1, 1]


def test_updates_of_any_interval_compose():
    constant = {'w': torch.ones(1, dtype=torch.float64)}
    results = []
    for interval in (64, 256):
        ema = PowerEMA({'w': torch.zeros(1, dtype=torch.float64)}, [0.1])
        ema.update({'w': torch.zeros(1, dtype=torch.float64)}, 1024, 1024)
        for nimg in range(1024 + interval, 2048 + 1, interval):
            ema.update(constant, nimg, interval)
        results.append(ema.averages[0.1]['w'].item())
    assert results[0] == pytest.approx(results[1], rel=1e-12)


LENGTHS = [0.015, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.25]


@pytest.fixture(scope='module')
def trajectory():
    """A random walk with a trend: exactly tracked averages, 64 pairs of snapshots, the last weights."""
    generator = torch.Generator().manual_seed(0)
    dim, batch, snapshots, per = 200, 64, 64, 25
    walk = torch.randn(snapshots * per, dim, generator=generator, dtype=torch.float64).cumsum(0) / 10
    trend = 4 * torch.arange(1, snapshots * per + 1)[:, None] / (snapshots * per)
    exact = PowerEMA({'w': torch.zeros(dim, dtype=torch.float64)}, LENGTHS)
    stored = PowerEMA({'w': torch.zeros(dim, dtype=torch.float64)}, [0.05, 0.10])
    times, stds, saved = [], [], []
    for step, w in enumerate(walk + trend, start=1):
        for ema in (exact, stored):
            ema.update({'w': w}, step * batch, batch)
        if step % per == 0:
            for std, average in stored.averages.items():
                times.append(step * batch)
                stds.append(std)
                saved.append(average['w'].clone())
    return exact, w, times, stds, saved


def reconstruction_error(trajectory, std: float, dtype: torch.dtype) -> float:
    """Distance from the exactly tracked average, relative to that one's distance from the last weights."""
    exact, last, times, stds, saved = trajectory
    solution = solve(times, stds, times[-1], std)
    assert solution.coefficients.sum() == pytest.approx(1)
    got = combine([w.to(dtype) for w in saved], solution.coefficients)
    return float((got - exact.averages[std]['w']).norm() / (exact.averages[std]['w'] - last).norm())


@pytest.mark.parametrize('std', LENGTHS)
def test_reconstruction_of_a_known_trajectory(trajectory, std):
    assert reconstruction_error(trajectory, std, torch.float32) < 0.01


def test_rounded_snapshots_cost_what_the_amplification_says(trajectory):
    """FP16 snapshots: the error of docs/phema.md; short lengths suffer, for their coefficients are large."""
    exact, last, times, stds, saved = trajectory
    for std in LENGTHS:
        error, rounded = (reconstruction_error(trajectory, std, d) for d in (torch.float32, torch.float16))
        amplification = solve(times, stds, times[-1], std).amplification
        largest = max(w.abs().max() for w in saved)
        bound = amplification * largest * 2**-11 * len(last) ** 0.5 / (exact.averages[std]['w'] - last).norm()
        assert rounded <= error + bound
        assert rounded < {0.015: 0.15, 0.02: 0.07, 0.03: 0.02}.get(std, 0.005), (std, rounded)


def test_independent_library_tracks_the_same():
    """ema-pytorch counts updates, not images; with an update for every step its averages are ours."""
    ema_pytorch = pytest.importorskip('ema_pytorch')
    with torch.random.fork_rng():
        model = torch.nn.Linear(3, 2)
    theirs = ema_pytorch.PostHocEMA(
        model, sigma_rels=(0.05, 0.10), update_every=1, checkpoint_every_num_steps=10**9, checkpoint_folder='/tmp/none'
    )
    ours = PowerEMA(model.state_dict(), [0.05, 0.10])
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 301):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) / 10)
        theirs.update()
        ours.update(model.state_dict(), step, 1)
    for ema, std in zip(theirs.ema_models, (0.05, 0.10), strict=True):
        for name, t in ema.ema_model.state_dict().items():
            # Its first update copies the weights, and it counts that one as 0: one step in 300 of a difference.
            torch.testing.assert_close(t, ours.averages[std][name], rtol=0, atol=0.005)


def test_stored_profile_is_returned_as_it_is():
    times, stds = [1, 1, 2, 2, 3, 3], [0.05, 0.10] * 3
    solution = solve(times, stds, 3, 0.05)
    np.testing.assert_allclose(solution.coefficients, [0, 0, 0, 0, 1, 0], atol=1e-10)
    assert solution.error < 1e-6 and solution.amplification == pytest.approx(1)


def test_snapshots_too_far_away_give_the_last_one():
    # 900^-gamma is 0 in float64; the coefficients must not become 0/0.
    solution = solve([512, 1024], [0.05, 0.05], 900 * 1024, 0.005)
    assert solution.coefficients.tolist() == [0, 1]
    assert solution.error > 1 and solution.amplification == 1


def test_error_is_the_distance_of_the_profiles():
    # One snapshot for another length: by hand from the correlations of the two profiles.
    solution = solve([1], [0.1], 1, 0.2)
    a, b = std_to_exp(0.1), std_to_exp(0.2)
    aa, ab, bb = (a + 1) ** 2 / (2 * a + 1), (a + 1) * (b + 1) / (a + b + 1), (b + 1) ** 2 / (2 * b + 1)
    assert solution.error == pytest.approx(math.sqrt((aa - 2 * ab + bb) / bb), rel=1e-9)


def test_example_of_the_documentation(tmp_path, monkeypatch, capsys):
    text = (ROOT / 'docs/phema.md').read_text()
    (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(code, 'docs/phema.md', 'exec'), {})
    assert re.fullmatch(r'profile error 0\.0\d+, amplification 1\.\d+\n', capsys.readouterr().out)
