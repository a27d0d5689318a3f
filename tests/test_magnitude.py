"""Magnitude-preserving operations against their definitions."""

import math

import pytest
import torch

from networks.edm2.magnitude import MPConv, NormalizedWeight, mp_cat, mp_silu, mp_sum, normalize
from networks.fourier import FourierFeatures


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def test_normalize_by_hand():
    # Norm 5 of two elements: divide by 1e-4 + 5 / sqrt(2).
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(normalize(x), x / (1e-4 + 5 / math.sqrt(2)), rtol=1e-12, atol=0)
    assert torch.equal(normalize(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_normalize_dims(g):
    x = torch.randn(4, 6, 5, 5, generator=g)
    pixel = normalize(x, dims=(1,)).square().mean(dim=1)
    torch.testing.assert_close(pixel, torch.ones_like(pixel), rtol=2e-3, atol=0)  # eps against the smallest norms
    weight = normalize(x).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=3e-4, atol=0)


def test_normalize_takes_the_norm_in_float32():
    x = torch.full((1, 2**20), 100.0, dtype=torch.float16)  # a norm of 102400 overflows float16
    torch.testing.assert_close(normalize(x), torch.ones_like(x), rtol=1e-3, atol=0)


def test_normalize_gradient(g):
    x = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalize, (x,))


@pytest.mark.parametrize('shape', [(5, 3, 3, 3), (4, 1, 3, 3), (6, 7)])
def test_normalized_weight_and_its_gradient(g, shape):
    """In float64 against differences, in float32 against autograd's way, of which it is the closed form."""
    x = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: NormalizedWeight.apply(x, 0.7), (x,))
    x, G = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    x[0], found = 0, []  # the norm has no derivative there; autograd takes 0
    for way in (lambda x: NormalizedWeight.apply(x, 0.7), lambda x: normalize(x) * 0.7):
        leaf = x.clone().requires_grad_()
        y = way(leaf)
        y.backward(G.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else G)
        found.append((y.detach(), leaf.grad))
    (ours, gradient), (theirs, expected) = found
    assert torch.equal(ours, theirs) and gradient.stride() == x.stride()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


def test_mp_silu(g):
    x = torch.randn(10**6, generator=g)
    assert rms(mp_silu(x)) == pytest.approx(1, abs=3e-3)
    assert mp_silu(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(
        1 / (1 + math.exp(-1)) / 0.596, rel=1e-12
    )


@pytest.mark.parametrize('t', [0.0, 0.3, 0.5, 1.0])
def test_mp_sum(g, t):
    a, b = torch.randn(2, 10**6, generator=g)
    assert rms(mp_sum(a, b, t)) == pytest.approx(1, abs=5e-3)
    ends = torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
    assert mp_sum(*ends, t).item() == pytest.approx((1 + t) / math.hypot(1 - t, t), rel=1e-12)


def test_mp_cat(g):
    a, b = torch.randn(1, 3, 200, 200, generator=g), torch.randn(1, 12, 200, 200, generator=g)
    y = mp_cat(a, b)
    assert rms(y) == pytest.approx(1, abs=5e-3)
    # Both inputs contribute the same sum of squares, however many channels they have.
    assert rms(y[:, :3]) * math.sqrt(3) == pytest.approx(rms(y[:, 3:]) * math.sqrt(12), rel=1e-2)
    torch.testing.assert_close(y[:, :3], a * math.sqrt(15 / 0.5) * 0.5 / math.sqrt(3))


def test_fourier_features(g):
    layer = FourierFeatures(4096)
    layer.reset_parameters(g)
    y = layer(torch.tensor([0.0, 0.3]))
    assert y.dtype == torch.float32 and rms(y) == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(y[0], math.sqrt(2) * layer.phases.cos())
    assert layer.freqs.std().item() == pytest.approx(2 * math.pi, rel=0.05)
    assert layer.phases.min() >= 0 and layer.phases.max() <= 2 * math.pi


@pytest.mark.parametrize(('kernel', 'groups'), [(3, 1), (1, 1), (3, 32), (7, 32)])
def test_mp_conv_keeps_magnitude(g, kernel, groups):
    layer = MPConv(32, 32, kernel, groups)
    layer.reset_parameters(g)
    y = layer(torch.randn(8, 32, 48, 48, generator=g))
    margin = kernel // 2  # zero padding lowers the border
    inner = y[..., margin : 48 - margin, margin : 48 - margin]
    assert rms(inner) == pytest.approx(1, abs=0.03)


def test_mp_conv_linear_by_hand():
    layer = MPConv(2, 1, 0)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    w = torch.tensor([3.0, 4.0]) / (1e-4 + 5 / math.sqrt(2)) / math.sqrt(2)
    layer.eval()
    torch.testing.assert_close(layer(torch.tensor([[1.0, 10.0]]), gain=2.0), (2 * (w[0] + 10 * w[1])).reshape(1, 1))


@pytest.mark.parametrize(('h', 'w'), [(1, 1), (3, 4), (8, 8)])
def test_convolution_of_upsampled_pixels(h, w, g):
    layer = MPConv(5, 7, kernel=3).double()
    layer.reset_parameters(g)
    layer.eval()
    x = torch.randn(2, 5, h, w, generator=g, dtype=torch.float64)
    upsampled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer.of_upsampled(x, 0.7), layer(upsampled, 0.7), rtol=1e-12, atol=1e-12)
