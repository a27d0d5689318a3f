"""Noise levels against the published list and closed forms."""

import pytest
import torch

from diffusion.levels import LogNormal
from diffusion.schedules import edm_sigmas

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
