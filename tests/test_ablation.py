"""EDM's general sampler on a denoiser whose ODE has a closed form: images of N(0, 0.5^2)."""

import itertools
import json
import math
import unittest.mock

import pytest
import torch

from diffusion.schedules import DISCRETIZATIONS
from dnnlib.errors import UserError
from sampling.ablation import SCALINGS, SCHEDULES, Ablation
from sampling.samplers import Heun
from tests.conftest import ROOT

STOCHASTIC = {'S_churn': 40, 'S_min': 0.05, 'S_max': 50, 'S_noise': 1.003}


def denoise(x, sigma):
    return x * 0.25 / (sigma**2 + 0.25)


def final(sampler, disc='edm', num_steps=18, **kwargs) -> float:
    """Where the latent 1 ends, with every noise 1."""
    sigmas = DISCRETIZATIONS[disc]().sigmas(num_steps)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64) * sigmas[0]
    return sampler(denoise, x, sigmas, torch.ones_like, **kwargs).item()


def test_all_combinations():
    rows = json.loads((ROOT / 'tests/golden/edm.json').read_text())['ablation']
    assert len(rows) == 48
    for row in rows:
        sampler = Ablation(solver=row['solver'], schedule=row['schedule'], scaling=row['scaling'])
        disc = DISCRETIZATIONS[row['disc']]()
        path = sampler.path(disc.sigma_min, disc.sigma_max)  # iDDPM's levels do not reach the ends of its range
        assert final(sampler, row['disc'], path=path) == pytest.approx(row['x'], abs=1e-9), row
        if row['disc'] != 'iddpm':
            assert final(sampler, row['disc']) == pytest.approx(row['x'], abs=1e-9), row


@pytest.mark.parametrize(
    ('sampler', 'num_steps', 'x'),
    [
        (Ablation(alpha=0.5), 18, 0.4977746122),
        (Ablation(alpha=2 / 3), 18, 0.5060942335),
        (Ablation(schedule='vp', scaling='vp', **STOCHASTIC), 18, 1.5249588197),
        *((cls(), 40, 0.5048768647) for cls in (Heun, Ablation)),
        *((cls(), 256, 0.5000954247) for cls in (Heun, Ablation)),
        *((cls(**STOCHASTIC), 18, 1.6933846062) for cls in (Heun, Ablation)),
        *((cls(**STOCHASTIC), 256, 3.7559039029) for cls in (Heun, Ablation)),
        *((cls(S_churn=30, S_min=0.01, S_max=1, S_noise=1.007), 18, 1.1013733986) for cls in (Heun, Ablation)),
        *((cls(S_churn=4), 18, 1.9151586171) for cls in (Heun, Ablation)),
    ],
)
def test_golden(sampler, num_steps, x):
    assert final(sampler, num_steps=num_steps) == pytest.approx(x, abs=1e-9)


@pytest.mark.parametrize('solver', ['heun', 'euler'])
def test_order(solver):
    """The error falls with the order's power of the step; without the part below sigma_min, which no step refines."""
    sigma_min, sigma_max = 0.1, 10.0
    exact = sigma_max * math.sqrt((sigma_min**2 + 0.25) / (sigma_max**2 + 0.25))

    def error(sampler, n):
        sigmas = DISCRETIZATIONS['edm'](sigma_min, sigma_max).sigmas(n + 1)
        reached = []  # by the n steps down to sigma_min, told by the denoised estimate of the one after them
        x = torch.full((1, 1, 1, 1), sigma_max, dtype=torch.float64)
        path = sampler.path(0.001, sigma_max)
        sampler(denoise, x, sigmas, observe=lambda i, sigma, D: reached.append(D.item()), path=path)
        return abs(reached[-1] * (sigma_min**2 + 0.25) / 0.25 - exact)

    for schedule, scaling, alpha in itertools.product(SCHEDULES, SCALINGS, (0.5, 2 / 3, 1.0)):
        sampler = Ablation(solver=solver, schedule=schedule, scaling=scaling, alpha=alpha)
        rate = math.log2(error(sampler, 128) / error(sampler, 256))
        # The midpoint happens to be of order 3 on this ODE.
        assert rate > sampler.order - 0.1 and (alpha == 0.5 or rate < sampler.order + 0.2), (schedule, scaling, alpha)


def test_evaluations():
    for solver, expected in (('heun', 35), ('euler', 18)):
        counted, sampler = unittest.mock.Mock(side_effect=denoise, spec=denoise), Ablation(solver=solver)
        sampler(counted, torch.ones(1, 1, 1, 1), DISCRETIZATIONS['vp']().sigmas(18))
        assert counted.call_count == sampler.evaluations(18) == expected


def test_problems():
    found = Ablation(solver='huen', schedule='vb', alpha=0, S_churn=-1).problems()
    assert len(found) == 4 and 'did you mean heun' in found[1]
    with pytest.raises(UserError, match='no VP schedule has the noise levels 80 at time 1 and 1 at'):
        Ablation(schedule='vp').path(1.0, 80.0)
