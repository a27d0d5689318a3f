"""DDPM++, NCSN++ and ADM against the numbers of the reference formulation, and layer by layer."""

import json
import re

import pytest
import torch

from networks.edm.adm import ADM, ADMConfig
from networks.edm.layers import Conv2d, Init, positional_embedding
from networks.edm.song import SongConfig, SongUNet
from networks.interface import Interface
from tests.conftest import ROOT

INTERFACE = Interface((16, 16), 3, 3, label_dim=4, augment_dim=9)
TINY = {'channel_mult': (1, 2), 'num_blocks': 1, 'attn_resolutions': (8,)}
FOURIER = {'embedding': 'fourier', 'channel_mult_noise': 2, 'taps': (1, 3, 3, 1)}
NCSNPP = {'encoder': 'residual', **FOURIER}
CONFIGS = {
    'ddpmpp': SongConfig(model_channels=32, **TINY),
    'ncsnpp': SongConfig(model_channels=32, **TINY, **NCSNPP),
    'skipskip': SongConfig(model_channels=32, **TINY, **FOURIER, encoder='skip', decoder='skip'),
    'adm': ADMConfig(model_channels=64, **TINY),
}


@pytest.fixture(scope='module')
def golden():
    """Numbers of the reference formulation of EDM."""
    return json.loads((ROOT / 'tests/golden/edm.json').read_text())


def build(config, interface: Interface):
    return (SongUNet if isinstance(config, SongConfig) else ADM)(config, interface)


def golden_net(name: str):
    """A tiny network whose every tensor is a formula of its name."""
    net = build(CONFIGS[name], INTERFACE)
    net.reset_parameters(torch.Generator().manual_seed(0))
    for tensor_name, t in net.state_dict().items():
        if tensor_name.endswith('resample_filter'):
            continue
        i = torch.arange(t.numel(), dtype=torch.float64)
        s = torch.sin(sum(map(ord, tensor_name)) % 997 + 0.731 * i + 0.0173 * i**2).reshape(t.shape)
        if t.ndim > 1:
            s = s * (2 / t[0].numel()) ** 0.5
        elif tensor_name.endswith('freqs'):
            s = 16 * s
        else:
            s = 0.1 * s + tensor_name.endswith('weight')
        t.copy_(s)
    return net.eval()


def golden_inputs():
    x = torch.cos(0.37 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)).float().reshape(2, 3, 16, 16)
    labels = torch.nn.functional.one_hot(torch.tensor([1, 3]), 4).float()
    return x, labels, 0.1 * torch.outer(torch.tensor([1.0, 2.0]), torch.arange(1.0, 10.0))


@pytest.mark.parametrize('name', CONFIGS)
def test_golden_forward(golden, name):
    expected, net = golden['networks'][name], golden_net(name)
    x, labels, augment = golden_inputs()
    assert sum(p.numel() for p in net.parameters()) == expected['params']
    for case, inputs in (('F', (labels, augment)), ('F0', (labels,))):
        with torch.no_grad():
            F = net(x, torch.tensor([-0.2, 0.3]), *inputs)
        numbers = [F.mean(), F.std(), *F[0, 0, 0, :4], *(F[1, 2, 15, 12:] if case == 'F' else [])]
        want = expected[case]
        want = [want['mean'], want['std'], *want['first4'], *want.get('last4', [])]
        torch.testing.assert_close(torch.stack(numbers), torch.tensor(want), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
def test_names_and_their_order(golden, name):
    shapes = {key: list(t.shape) for key, t in golden_net(name).state_dict().items()}
    if name == 'skipskip':
        assert golden['networks'][name]['shapes'].items() <= shapes.items()
    else:
        assert list(shapes.items()) == list(golden['networks'][name]['shapes'].items())


def preset_config(name: str):
    """The network and resolution of a row of the golden sizes."""
    if 'ADM' in name:
        return ADMConfig(), 64
    mult = (2, 2, 2) if 'CIFAR' in name else (1, 2, 2, 2)
    return SongConfig(model_channels=128, channel_mult=mult, **(NCSNPP if 'NCSN' in name else {})), (
        64 if 'FFHQ' in name else 32
    )


def test_sizes(golden):
    for row in golden['sizes']:
        config, side = preset_config(row['name'])
        out_channels = 6 if 'iDDPM' in row['name'] else 3
        interface = Interface((side, side), 3, out_channels, row['label_dim'], row['augment_dim'])
        assert config.problems(interface) == []
        with torch.device('meta'):
            net = build(config, interface)
        parameters = [p.numel() for p in net.parameters()]
        assert (sum(parameters), len(parameters)) == (row['parameters'], row['tensors']), row['name']
        buffers = [b.numel() for b in net.buffers()]
        table = [1001, 1] if 'iDDPM' in row['name'] else [0, 0]  # of its noise levels, which is no tensor here
        assert [sum(buffers) + table[0], len(buffers) + table[1]] == row['buffers'], row['name']


def test_parameters_of_every_block(golden):
    for name, rows in golden['block_parameters'].items():
        config, side = preset_config(name)
        with torch.device('meta'):
            net = build(config, Interface((side, side), 3, 3, 0))
        counts = {key: sum(p.numel() for p in net.get_submodule(key).parameters()) for key in rows if '+' not in key}
        assert counts == {key: count for key, count in rows.items() if '+' not in key}
        assert next(name for name, _ in net.stages()) == f'enc {side}x{side}_conv'


@pytest.mark.parametrize('name', CONFIGS)
def test_initial_weights(name):
    """Deviations of section 1.1's rules: the layers that begin near zero do, and F does, too."""
    config = CONFIGS[name]
    net = build(config, INTERFACE)
    net.reset_parameters(torch.Generator().manual_seed(3))
    song = isinstance(config, SongConfig)
    weights = dict(net.named_parameters())
    for key, fans in (('map_layer1.weight', (1, 1)), ('enc.8x8_block0.conv0.weight', (9, 9))):
        out, inputs = weights[key].shape[:2]
        fan = (inputs * fans[0] + out * fans[1]) / 2 if song else 3 * inputs * fans[0]
        assert weights[key].std().item() == pytest.approx(fan**-0.5, rel=0.03), key
        assert weights[key].abs().max() <= (3 / fan) ** 0.5
    assert weights['map_layer1.bias'].abs().max() == 0 if song else weights['map_layer1.bias'].std() > 0.01
    qkv = weights['dec.8x8_in0.qkv.weight']
    fan = 2 * qkv.shape[1] * 5 if song else 3 * qkv.shape[1]  # sqrt(0.2 / (2 C)): the mean of C and 3 C
    assert qkv.std().item() == pytest.approx(fan**-0.5, rel=0.03)
    if not song:
        assert weights['map_label.weight'].std().item() == pytest.approx(1, rel=0.1)
        assert weights['map_augment.weight'].abs().max() == 0
    x, labels, augment = golden_inputs()
    assert net.eval()(x, torch.zeros(2), labels, augment).abs().max() < 1e-3
    other = build(config, INTERFACE)
    other.reset_parameters(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_missing_classes_are_zeros():
    x, labels, _ = golden_inputs()
    for name in CONFIGS:
        net, c_noise = golden_net(name), torch.tensor([-0.2, 0.3])
        with torch.no_grad():
            assert torch.equal(net(x, c_noise, None), net(x, c_noise, torch.zeros(2, 4), torch.zeros(2, 9)))
            assert not torch.equal(net(x, c_noise, None), net(x, c_noise, labels))


def test_low_precision_is_near():
    x, labels, _ = golden_inputs()
    for name in CONFIGS:
        net, c_noise = golden_net(name), torch.tensor([-0.2, 0.3])
        with torch.no_grad():
            exact, rough = net(x, c_noise, labels), net(x.bfloat16(), c_noise, labels)
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - exact).square().mean().sqrt() < 0.05 * exact.std()


def test_rectangles_and_other_depths():
    net = build(
        SongConfig(model_channels=16, channel_mult=(1, 1, 2), num_blocks=1, **NCSNPP), Interface((8, 16), 1, 2, 0)
    )
    net.reset_parameters(torch.Generator().manual_seed(0))
    assert net.eval()(torch.ones(2, 1, 8, 16), torch.zeros(2), None).shape == (2, 2, 8, 16)


def test_positional_embedding():
    values = {
        True: [0.877583, 0.99973, 1, 1, 0.479426, 0.023206, 0.0010772, 5e-5],
        False: [0.877583, 0.99875, 0.99999, 1, 0.479426, 0.049979, 0.005, 0.0005],
    }
    for endpoint, expected in values.items():
        found = positional_embedding(torch.tensor([0.5]), 8, endpoint)[0]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1)])
def test_resampling(taps):
    """Constants stay away from the border, (1, 1) is mean and nearest neighbour, up is 4 times the adjoint of down."""
    generator = torch.Generator().manual_seed(0)
    layers = {mode: Conv2d(2, 2, 0, Init('in'), mode, taps) for mode in ('up', 'down')}
    for layer in layers.values():
        layer.reset_parameters(generator)
    x, y = torch.randn(1, 2, 8, 8, generator=generator), torch.randn(1, 2, 4, 4, generator=generator)
    torch.testing.assert_close((layers['down'](x) * y).sum() * 4, (x * layers['up'](y)).sum())
    for mode, layer in layers.items():
        inner = layer(torch.ones(1, 2, 8, 8))[..., 1:-1, 1:-1]
        torch.testing.assert_close(inner, torch.ones_like(inner), msg=mode)
    if taps == (1, 1):
        torch.testing.assert_close(layers['down'](x), torch.nn.functional.avg_pool2d(x, 2))
        assert torch.equal(layers['up'](y), torch.nn.functional.interpolate(y, scale_factor=2))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (SongConfig(model_channels=32, encoder='residul'), 'did you mean residual'),
        (SongConfig(model_channels=32, taps=(1, 2, 1)), 'taps must be'),
        (SongConfig(model_channels=18), 'groups of at least 4'),
        (SongConfig(model_channels=32, channel_mult=(1, 2, 2, 2, 2, 2)), r'divisible by 32, not 16 \(try 32\)'),
        (SongConfig(model_channels=32, dropout=1.0), 'dropout'),
        (ADMConfig(model_channels=32), 'heads of 64 channels do not divide'),
        (ADMConfig(num_blocks=0, channels_per_head=0), 'num_blocks'),
        (ADMConfig(channel_mult=()), 'channel_mult'),
    ],
)
def test_problems(config, message):
    assert any(re.search(message, problem) for problem in config.problems(INTERFACE)), config.problems(INTERFACE)
