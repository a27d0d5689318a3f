"""Networks against the golden numbers, and what must hold for any network."""

import math
from dataclasses import replace

import pytest
import torch

from dnnlib.configs import replaced
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.dropout import Dropout, seed_dropout
from networks.edm2.branches import BRANCHES
from networks.edm2.unet import CLIP_ACTIVATIONS, Block
from tests.golden_networks import golden_evaluation, golden_inputs, golden_net, golden_training
from tests.helpers import edm2_network

# The golden values come from another order of float32 operations: a few units in the last place after some
# thirty layers. The constants of the spec change them by at least 1e-4.
RTOL, ATOL = 2e-5, 1e-5


def close(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), torch.tensor(expected).float(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize('name', BRANCHES)
def test_golden_forward(golden, name):
    expected = golden['nets'][name]
    net = golden_net(name).eval()
    assert sum(p.numel() for p in net.parameters()) == expected['params']
    for what, value in golden_evaluation(net).items():
        close(value, expected[what])


@pytest.mark.parametrize('name', BRANCHES)
def test_golden_training(golden, name):
    expected = dict(golden['nets'][name]['train'])
    net = golden_net(name)
    found = golden_training(net, torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-8))
    for parameter, norm in expected.pop('grad_norm_step0').items():
        assert found['grad_norm_step0'][parameter] == pytest.approx(norm, rel=1e-4), parameter
    assert found['total_grad_norm_step0'] == pytest.approx(expected.pop('total_grad_norm_step0'), rel=1e-4)
    for what, values in expected.items():
        close(found[what], values)


def test_parameter_names_are_those_of_published_edm2(golden):
    shapes = {name: list(t.shape) for name, t in golden_net('A').state_dict().items()}
    assert shapes == golden['nets']['A']['param_shapes']


def test_initial_network_only_scales_its_input(tiny_config):
    net = Denoiser(tiny_config, seed=1).eval()
    x, sigma = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1.0, 10.0])
    c_skip = 0.25 / (sigma**2 + 0.25)
    torch.testing.assert_close(net(x, sigma), c_skip[:, None, None, None] * x)


def test_seed_gives_the_weights(tiny_config):
    a, b, c = (Denoiser(tiny_config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a['unet.out_conv.weight'], c['unet.out_conv.weight'])


def test_forced_normalization_in_training_only(tiny_config):
    net = Denoiser(tiny_config)
    x, sigma = torch.zeros(1, 1, 8, 8), torch.ones(1)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    net.eval()(x, sigma)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    net.train()(x, sigma)
    weight = net.unet.out_conv.weight
    assert not torch.equal(before['unet.out_conv.weight'], weight)
    rms = weight.square().flatten(1).mean(dim=1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), rtol=2e-4, atol=0)


def test_activations_are_clipped(tiny_config):
    block = Block(16, 16, 32, tiny_config.architecture, 'dec').eval()
    for p in block.parameters():
        torch.nn.init.ones_(p)
    out = block(torch.full((1, 16, 4, 4), 1e6), torch.ones(1, 32))
    assert CLIP_ACTIVATIONS == 256 and out.max() == 256


def test_one_noise_level_for_all_images(tiny_config):
    net = golden_net('G*').eval()
    x, _, labels = golden_inputs()
    torch.testing.assert_close(net(x, torch.tensor(0.7), labels), net(x, torch.tensor([0.7, 0.7]), labels))


@pytest.mark.parametrize('shape', [(16, 32), (24, 8)])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_height_and_width_may_differ(shape, channels):
    config = edm2_network(shape, channels, 0, 16, (1, 2), 1, (4,), 16)
    x = torch.ones(2, channels, *shape)
    assert Denoiser(config)(x, torch.ones(2)).shape == x.shape


def test_dropout_sits_behind_the_modulation(tiny_config, monkeypatch):
    """Right after the SiLU that follows the modulation, and with the configured share."""
    dropped = []
    monkeypatch.setattr(Dropout, 'forward', lambda self, y: dropped.append((tuple(y.shape), self.p)) or y)
    tiny_config = tiny_config.architecture
    # In C the modulated features are six times as wide as the block; in G* as wide as it.
    for name, width in (('C', 96), ('G*', 16)):
        block = Block(16, 16, 32, replace(tiny_config, block=name, dropout=0.3), 'enc').train()
        for p in block.parameters():
            torch.nn.init.ones_(p)
        dropped.clear()
        block(torch.ones(1, 16, 4, 4), torch.ones(1, 32))
        assert dropped == [((1, width, 4, 4), 0.3)]
    calls = []
    monkeypatch.setattr('networks.edm2.unet.silu', lambda y: calls.append('silu') or y)
    monkeypatch.setattr(Dropout, 'forward', lambda self, y: calls.append('dropout') or y)
    Block(16, 16, 32, replace(tiny_config, block='C', dropout=0.3), 'enc').train()(
        torch.ones(1, 16, 4, 4), torch.ones(1, 32)
    )
    assert calls == ['silu'] * 4 + ['dropout']


def test_dropout_acts_in_training_only(tiny_config):
    net = Denoiser(replaced(tiny_config, {'architecture.dropout': 0.5}))
    torch.nn.init.ones_(net.unet.out_gain)
    x, sigma = torch.ones(1, 1, 8, 8), torch.ones(1)
    outputs = []
    for number in (0, 1):
        seed_dropout(net, 0, [number])
        outputs.append(net.train()(x, sigma))
    assert not torch.equal(*outputs)
    net.eval()
    assert torch.equal(net(x, sigma), net(x, sigma)) and not torch.equal(net(x, sigma), outputs[0])


def test_dropout_belongs_to_images():
    layer, x = Dropout(0.25), torch.ones(3, 1000)
    net = torch.nn.Sequential(layer, torch.nn.Sequential(Dropout(0.25)))
    seed_dropout(net, 7, [10, 11, 12])
    masks = layer(x)
    assert masks.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (masks == 0).float().mean() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 3000) ** 0.5)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks, net[1](x))
    seed_dropout(net, 7, [12, 10])
    assert torch.equal(layer(x[:2]), masks[[2, 0]]) and torch.equal(layer.eval()(x), x)


def test_attention_follows_the_shorter_side():
    config = edm2_network((24, 8), 1, 0, 16, (1, 2), 1, (8,), 16).architecture
    assert [config.has_attention(*size) for size in ((24, 8), (12, 4))] == [True, False]


def replaced_json(values: dict, field: str, value) -> dict:
    """A config as plain values with one field changed, wherever it is."""
    return {
        name: value if name == field else replaced_json(v, field, value) if isinstance(v, dict) else v
        for name, v in values.items()
    }


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        *(('img_resolution', (8,)), ('img_resolution', (8, 8, 8)), ('num_blocks', 1.5), ('channel_mult', (1, 2.0))),
        *(('sigma_data', math.nan), ('model_channels', '64'), ('block', 3), ('dropout', None), ('label_dim', True)),
    ],
)
def test_values_of_the_wrong_type_are_named(field, value):
    config = edm2_network((8, 8), 1, 0, 16, (1, 2), 1, (4,), 16)
    with pytest.raises(UserError, match=f'{field} must be'):
        NetworkConfig.from_json(replaced_json(config.to_json(), field, value))


def test_all_problems_of_a_config_are_told_at_once():
    with pytest.raises(UserError) as error:
        edm2_network((16, 16), 3, 4, 32, dropout=1.5, block='G**').check()
    assert len(error.value.problems) == 2 and 'G*' in str(error.value)
    with pytest.raises(UserError, match='heads of 64 do not divide'):
        edm2_network((16, 16), 3, 4, 40, (1, 2), attn_resolutions=()).check()
    with pytest.raises(UserError, match='height divisible by 8, not 36'):
        edm2_network((36, 64), 3, 4, 64).check()
    with pytest.raises(UserError, match='unknown precision'):
        Denoiser(edm2_network((8, 8), 1, 0, 64, (1, 2)), precision='fp61')
