"""EDM's augmentation against its published numbers and closed forms."""

import json
import math

import pytest
import torch

from dataset.augment import warp
from dataset.augment.edm import TRANSFORMS, EDMAugment, apply
from dnnlib.errors import UserError
from tests.conftest import ROOT

EVERY = EDMAugment(p=1.0, **{name: 1.0 for name in TRANSFORMS if name != 'xflip'})
GOLDEN = json.loads((ROOT / 'tests/golden/edm.json').read_text())['augment']


def forced(count: int = 1, **parameters: float | tuple[float, ...]):
    """Neutral parameters but for the given ones."""
    found = EDMAugment().neutral(count)
    for name, values in parameters.items():
        values = values if isinstance(values, tuple) else (values,)
        found[name] = [torch.full((count,), float(value), dtype=torch.float64) for value in values]
    return found


FORCED = [
    forced(),
    forced(scale=0.5),
    forced(scale=-1.5),
    forced(rotate_frac=0.3 * math.pi),
    forced(aniso=(1, 0.25 * math.pi)),
    forced(aniso=(1, 0)),
    forced(translate_frac=(0.4, -0.3)),
    forced(scale=0.5, rotate_frac=0.3 * math.pi, aniso=(1, 0.25 * math.pi), translate_frac=(0.4, -0.3)),
    forced(xflip=1, yflip=1),
]


def wave(height: int = 32, width: int = 32) -> torch.Tensor:
    c, y, x = torch.meshgrid(*(torch.arange(float(side)) for side in (3, height, width)), indexing='ij')
    return torch.sin(0.15 * x + 0.1 * y + c)[None]


@pytest.mark.parametrize(('expected', 'parameters'), list(zip(GOLDEN, FORCED, strict=True)))
def test_golden(expected, parameters):
    out = apply(wave(), parameters)[0]
    numbers = [out.mean(), out.std(), out[0, 16, 16], out[1, 5, 20], out[2, 31, 0]]
    want = [expected['mean'], expected['std'], *expected['pixels']]
    torch.testing.assert_close(torch.stack(numbers), torch.tensor(want), rtol=0, atol=1e-5)
    labels = EDMAugment().labels(parameters)[0]
    torch.testing.assert_close(labels, torch.tensor(expected['labels']), rtol=0, atol=5e-6)


def test_identity_warp():
    """The filters are orthonormal: white noise comes back."""
    x = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    torch.testing.assert_close(warp.warp(x, eye), x, rtol=0, atol=2e-5)


def test_draws_belong_to_images():
    """Neither batch nor order nor the other images matter, to the bit."""
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, labels = EVERY(images, 3, range(10, 16))
    for part in ([0], [4, 2], [5, 0, 1]):
        out, told = EVERY(images[part], 3, [10 + i for i in part])
        assert torch.equal(out, whole[part]) and torch.equal(told, labels[part])
    assert not torch.equal(EVERY(images, 4, range(10, 16))[1], labels)
    # Another probability changes which transforms are done, not how.
    some = EDMAugment(p=0.5).draw(3, range(10, 16))
    for name, values in EVERY.draw(3, range(10, 16)).items():
        for value, other in zip(values, some[name], strict=True):
            assert ((other == value) | (other == 0)).all(), name


def test_how_often():
    count = 20_000
    parameters = EDMAugment(p=0.12).draw(0, range(count))
    done = {name: (torch.stack(values) != 0).any(dim=0) for name, values in parameters.items()}
    expected = {'xflip': 0.5, 'yflip': 0.06, **dict.fromkeys(('scale', 'rotate_frac', 'aniso', 'translate_frac'), 0.12)}
    for name, share in done.items():
        p = expected.get(name, 0)
        assert share.double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / count)), name
    unchanged = ~torch.stack([done[name] for name in TRANSFORMS if name != 'xflip']).any(dim=0)
    assert unchanged.double().mean().item() == pytest.approx(0.88**4 * 0.94, abs=0.014)


def test_distributions():
    parameters = EVERY.draw(1, range(4000))
    for name in ('scale', 'brightness', 'contrast', 'saturation'):
        (w,) = parameters[name]
        assert abs(w.mean()) < 0.07 and w.std().item() == pytest.approx(1, abs=0.05)
    for name in ('rotate_frac', 'hue'):
        (w,) = parameters[name]
        assert w.abs().max() <= math.pi and w.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.05)
    stretch, axis = parameters['aniso']
    assert (axis == 0).double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert axis[axis != 0].std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.06) and stretch.std() > 0.9
    assert set(parameters['rotate_int'][0].tolist()) == {0, 1, 2, 3}
    assert all(-1 <= w.min() < -0.99 and 0.99 < w.max() <= 1 for w in parameters['translate_int'])


def test_labels():
    assert EDMAugment().dim == 9 and EVERY.dim == 9 + 2 + 2 + 6
    assert EDMAugment(p=0.1, yflip=0, scale=0, rotate_frac=0, aniso=0, translate_frac=0).dim == 1
    assert EVERY.labels(forced()).abs().max() == 0
    turns = [EVERY.labels(forced(rotate_int=k))[0, 2:4].tolist() for k in range(4)]
    assert turns == [[0, 0], [1, 0], [1, 1], [0, 1]]


def test_whole_pixels():
    image = torch.arange(48.0).reshape(1, 1, 6, 8)
    moved = apply(image, forced(translate_int=(1.0, -1.0)))  # an eighth: one pixel each way
    assert torch.equal(moved[..., :-1, 1:], image[..., 1:, :-1])
    assert torch.equal(moved[..., :-1, 0], image[..., 1:, 1]) and torch.equal(moved[..., -1, 1:], image[..., -2, :-1])
    square = wave(8, 8)
    assert torch.equal(apply(square, forced(rotate_int=1)), square.rot90(1, dims=(2, 3)))
    # The same way round as any other angle.
    turned = warp.warp(wave(), warp.rotation(torch.tensor([math.pi / 2], dtype=torch.float64)))
    torch.testing.assert_close(turned, wave().rot90(1, dims=(2, 3)), rtol=0, atol=0.03)
    with pytest.raises(UserError, match='square'):
        apply(image, forced(rotate_int=1))


def test_colors():
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    gray = x.mean(dim=1, keepdim=True)
    cases = {
        'brightness': x + 0.2 * 0.7,
        'contrast': x * 2 ** (0.5 * 0.7),
        'saturation': gray + (x - gray) * 2**0.7,
    }
    for name, expected in cases.items():
        torch.testing.assert_close(apply(x, forced(**{name: 0.7})), expected)
    torch.testing.assert_close(apply(x, forced(lumaflip=1)), x - 2 * gray)
    torch.testing.assert_close(apply(x, forced(hue=2 * math.pi / 3)), x.roll(1, dims=1))
    torch.testing.assert_close(apply(x, forced(brightness=1, contrast=1)), (x + 0.2) * 2**0.5)
    # A gray image stays one, and is what an image of three equal channels becomes.
    settings = forced(brightness=0.3, contrast=-1, lumaflip=1, hue=1, saturation=1)
    torch.testing.assert_close(apply(gray, settings).expand(-1, 3, -1, -1), apply(gray.expand(-1, 3, -1, -1), settings))
    with pytest.raises(UserError, match='1 or 3 channels, not 4'):
        apply(torch.ones(1, 4, 4, 4), forced(hue=1))


def test_problems():
    assert EDMAugment().problems() == EVERY.problems() == []
    assert 'at most 1' in EDMAugment(p=1.5).problems()[0]
    assert 'scale must be' in EDMAugment(scale=-1).problems()[0]
    assert 'does nothing' in EDMAugment(p=0.0).problems()[0]
