"""EDM2's configs A to G: sizes, magnitudes and behaviour as measured once, what the steps change, training."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import networks.ladder
from dnnlib.configs import replaced, tag_of
from dnnlib.errors import UserError
from ema.reconstruct import Plan, Wanted, find_snapshots
from networks.complexity import complexity
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.edm.adm import ADM, ADMConfig
from networks.edm.layers import GroupNorm
from networks.edm2.magnitude import MPConv
from networks.families import ARCHITECTURES
from networks.files import build_network
from networks.folding import folded
from networks.ladder import Block, LadderConfig, PlainConv, rms_group_norm
from sampling.config import SamplerConfig
from sampling.pipeline import generate
from tests.helpers import assert_same_tensors, state_tensors
from training.methods.denoising import DenoisingLoss
from training.presets.ladder import NETWORKS
from training.presets.table import get_preset

RUNGS = 'abcdefg'
NORMALIZED = 'defg'


def full(rung: str, **changes) -> NetworkConfig:
    """The network of a preset."""
    return dataclasses.replace(get_preset(f'edm2-ladder-{rung}').network, **changes)


def tiny(rung: str) -> NetworkConfig:
    """The small network of the check values."""
    attention = (16, 8) if rung == 'a' else (8,)
    small = {'model_channels': 64, 'channel_mult': (1, 2), 'num_blocks': 1, 'attn_resolutions': attention}
    small |= {'channel_mult_emb': 2} if rung == 'f' else {}
    architecture = dataclasses.replace(NETWORKS[rung], **small)
    return dataclasses.replace(full(rung), img_resolution=(16, 16), label_dim=10, architecture=architecture)


def awake(rung: str, seed: int = 0) -> Denoiser:
    """The tiny network with random values in place of zeros, without dropout."""
    net = Denoiser(replaced(tiny(rung), {'architecture.dropout': 0.0}), seed).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith('_gain'):
                p.fill_(0.5)
            elif not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel() if p.ndim > 1 else 100))
    return net


def inputs(count: int = 16, side: int = 16, sigma_range: tuple[float, float] = (-2.4, 1.6)) -> tuple:
    """Clean images, noise levels, noise and labels, where the check values are measured."""
    generator = torch.Generator().manual_seed(0)
    y, noise = (torch.randn(count, 4, side, side, generator=generator) for _ in range(2))
    labels = nn.functional.one_hot(torch.arange(count) % 10, 10).float()
    return 0.5 * y, torch.linspace(*sigma_range, count).exp(), noise, labels


@torch.no_grad()
def F_of(net: Denoiser, count: int = 4) -> torch.Tensor:
    """F at some noise levels."""
    y, sigma, noise, labels = inputs(count)
    _, _, c_in, c_noise = net.config.preconditioning.coefficients(sigma)
    x = (y + sigma[:, None, None, None] * noise) * c_in[:, None, None, None]
    return net.unet(x, c_noise, labels)


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((b - a).norm() / a.norm()).item()


# --- Sizes -----------------------------------------------------------------------------------------------------------

# Parameters without u: total, with 3 channels; embedding, first convolution, encoder, decoder, output; attention,
# layers of the blocks that see the embedding; tensors with u, group norms; totals at widths 64, 128, 256; tiny.
COUNTS = {
    'a': (295902724, 295899267, 1506816, 7104, 90293184, 204088320, 7300, 32370048, 27462528, 541, 95,
          '33.11 131.74 525.59', 3347396),
    'b': (291757828, 291754371, 1506816, 7104, 88516800, 201719808, 7300, 28225152, 27462528, 501, 88,
          '32.64 129.89 518.23', 3297092),
    'c': (277816512, 277813056, 1505280, 8640, 83128320, 193167360, 6912, 28164096, 13713408, 163, 73,
          '31.04 123.65 493.55', 3022400),
    'f': (280212672, 280209216, 915456, 8640, 86114304, 193167360, 6912, 28164096, 13713408, 162, 0,
          '31.31 124.71 497.81', 2890048),
    'g': (280212709, 280209253, 915456, 8640, 86114319, 193167381, 6913, 28164096, 13713408, 199, 0,
          '31.31 124.71 497.81', 2890059),
}  # fmt: skip
COUNTS['d'] = COUNTS['e'] = COUNTS['c']


def meta(config: NetworkConfig) -> Denoiser:
    with torch.device('meta'):
        return Denoiser(config).eval()


def size(net: Denoiser, *parts: str) -> int:
    """Parameters whose name has one of these after `unet.`; u is none of them."""
    names = {name.removeprefix('unet.'): p.numel() for name, p in net.named_parameters() if name.startswith('unet.')}
    return sum(n for name, n in names.items() if not parts or any(part in f'.{name}' for part in parts))


@pytest.mark.parametrize('rung', RUNGS)
def test_counts(rung, monkeypatch):
    net = meta(full(rung))
    found = [size(net), size(meta(full(rung, img_channels=3))), size(net, '.map_', '.emb_noise', '.emb_label')]
    found += [size(net, '64x64_conv'), size(net, '.enc.') - size(net, '64x64_conv'), size(net, '.dec.')]
    found += [size(net, '.out_'), size(net, '.norm2', '.qkv', '.proj', '.attn_'), size(net, '.affine', '.emb_linear')]
    found.append(len(list(net.parameters())))
    calls = []
    monkeypatch.setattr(networks.ladder, 'rms_group_norm', lambda x: calls.append(x) or x)
    net(*(torch.empty(shape, device='meta') for shape in ((1, 4, 64, 64), (1,), (1, 1000))))
    found.append(len(calls) + sum(isinstance(module, GroupNorm) for module in net.modules()))
    widths = (replaced(full(rung), {'architecture.model_channels': width}) for width in (64, 128, 256))
    found.append(' '.join(f'{size(meta(config)) / 1e6:.2f}' for config in widths))
    assert (*found, size(meta(tiny(rung)))) == COUNTS[rung]
    assert size(meta(full(rung))) + (0 if rung == 'a' else 129 if rung == 'b' else 128) == sum(
        p.numel() for p in net.parameters()
    )


# Gigaflops: convolutions, matrix products, all.
COSTS = {
    'a': (103.4483, 6.2449, 110.1299), 'b': (99.2205, 0.6077, 100.1163), 'c': (99.2276, 0.5940, 100.0508),
    'd': (99.2276, 0.5940, 100.8844), 'e': (99.2276, 0.5940, 100.8844), 'f': (100.2360, 0.5934, 101.8473),
    'g': (100.2360, 0.5934, 101.9179),
}  # fmt: skip


@pytest.mark.parametrize('rung', RUNGS)
def test_costs(rung):
    cost = complexity(full(rung))
    resampling = {'resampling', 'avg_pool2d', 'upsample_nearest2d'}
    convolutions = sum(n for kind, n in cost.by_kind.items() if kind.endswith('convolution') or kind in resampling)
    products = cost.macs - sum(n for kind, n in cost.by_kind.items() if kind.endswith('convolution'))
    found = (convolutions / 1e9, products / 1e9, cost.operations / 1e9)
    assert found == pytest.approx(COSTS[rung], abs=6e-5)


# --- Magnitudes of new networks --------------------------------------------------------------------------------------

# F, embedding, last blocks of encoder and decoder, lambda (D - y)^2, 1 + F^2: lowest and highest of 8 seeds; where one
# number is known, with its last digit as the margin.
INITIAL = {
    'a': ((0, 0), (0.59, 0.61), (0.17, 0.19), (0.24, 0.26), (0.97, 1.03)),
    'b': ((0, 0), (0.57, 0.61), (0.18, 0.20), (0.24, 0.26), (0.97, 1.03)),
    'c': ((0.28, 0.43), (0.30, 0.32), (0.53, 0.62), (0.46, 0.51), (1.07, 1.20)),
    'd': ((0.54, 0.63), (0.63, 0.66), (1.30, 1.60), (1.67, 1.84), (1.27, 1.42)),
    'f': ((1.47, 2.10), (0.68, 0.76), (1.23, 1.28), (1.66, 1.81), (3.1, 5.5)),
    'g': ((0, 0), (0.90, 1.01), (0.91, 0.95), (0.88, 0.95), (0.97, 1.03)),
}
INITIAL['e'] = INITIAL['d']


@pytest.mark.parametrize('rung', RUNGS)
def test_magnitudes_of_a_new_network(rung):
    y, sigma, noise, labels = inputs()
    weighting = get_preset(f'edm2-ladder-{rung}').method.weighting
    found = []
    for seed in range(4):
        net = Denoiser(tiny(rung), seed).eval()
        seen = {}  # the last of each half stays
        for name, part in net.unet.stages():
            keep = functools.partial(seen.__setitem__, name.partition(' ')[0])
            part.register_forward_hook(lambda _, __, out, keep=keep: keep(out))
        x = y + sigma[:, None, None, None] * noise
        with torch.no_grad():
            D = net(x, sigma, labels)
            c_noise = sigma.log() / 4
            emb = net.unet.embed(c_noise, labels, None) if rung in 'ab' else net.unet.embed(c_noise, labels)
        loss = (weighting(D - y, sigma, None, 0) / y[0].numel()).mean().item()
        found.append([rms(seen['output']), rms(emb), rms(seen['enc']), rms(seen['dec']), loss])
        if not seen['output'].any():  # D = c_skip x to the bit
            assert torch.equal(D, net.config.preconditioning.coefficients(sigma)[0][:, None, None, None] * x)
        assert (rung in 'abg') == (not seen['output'].any())
        assert loss == pytest.approx(1 + rms(seen['output']) ** 2, rel=0.03)
    means = torch.tensor(found).mean(dim=0).tolist()
    for mean, (lowest, highest) in zip(means, INITIAL[rung], strict=True):
        assert lowest - 0.005 <= mean <= highest + 0.005, (means, INITIAL[rung])


# At full size, of another seed and two images: F, the last block of the encoder, the largest of any block.
FULL = {'a': (0, 0.04, 0.58), 'c': (0.31, 1.31, 1.52), 'd': (0.49, 3.26, 3.68), 'f': (1.61, 1.44, 2.84)}
FULL |= {'b': FULL['a'], 'e': FULL['d'], 'g': (0, 0.95, 1.02)}


@pytest.mark.slow
@pytest.mark.parametrize('rung', FULL)
def test_magnitudes_of_a_new_network_of_full_size(rung):
    y, sigma, noise, _ = inputs(2, 64)
    net, seen = Denoiser(full(rung)).eval(), {}
    for name, part in net.unet.stages():
        part.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, rms(out)))
    with torch.no_grad():
        net(y + sigma[:, None, None, None] * noise, sigma, nn.functional.one_hot(torch.tensor([1, 2]), 1000).float())
    blocks = {name: value for name, value in seen.items() if not name.endswith(('_conv', 'output'))}
    found = (seen['output'], blocks['enc 8x8_block2'], max(blocks.values()))
    assert found == pytest.approx(FULL[rung], rel=0.12, abs=0)


# What the equations say of the magnitude of u: features of sqrt(1/2) (G: 1), weights of 1 or sqrt(1/3), and B's bias.
UNCERTAINTY = {
    'b': 0.41,
    'c': math.sqrt(1 / 6),
    'd': math.sqrt(0.5),
    'e': math.sqrt(0.5),
    'f': math.sqrt(0.5),
    'g': 1.0,
}


@pytest.mark.parametrize('rung', UNCERTAINTY)
def test_magnitude_of_a_new_uncertainty(rung):
    config, sigma = full(rung), torch.linspace(-2.4, 1.6, 16).exp()
    with torch.device('meta'):
        net = Denoiser(config)
    net.logvar_fourier.to_empty(device='cpu')
    net.logvar_linear.to_empty(device='cpu')
    u, generator = [], torch.Generator().manual_seed(0)
    for _ in range(200):
        net.logvar_fourier.reset_parameters(generator)
        net.logvar_linear.reset_parameters(generator)
        u.append(net.logvar(sigma).detach())
    # The standard deviation of 200 values that are each as one draw at 16 close noise levels is 5 % or less.
    assert rms(torch.stack(u)) == pytest.approx(UNCERTAINTY[rung], rel=0.15)
    assert (rung == 'b') == (getattr(net.logvar_linear, 'bias', None) is not None)
    assert full('a').uncertainty == 0


def test_plain_weights_are_uniform():
    layer = PlainConv(96, 64, kernel=3)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(9 * 96)
    assert 0.999 * bound < layer.weight.abs().max() <= bound
    assert rms(layer.weight) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    x = torch.ones(1, 96, 3, 3)
    before = layer.eval()(x)
    with torch.no_grad(), folded([layer]):
        assert all(torch.equal(layer(x), before) for _ in range(2))
    assert torch.equal(layer.used_weight(), layer.weight) and len(list(layer.parameters())) == 1


# --- Behaviour -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def scaled(net: Denoiser, names: list[str], factor: float, before: torch.Tensor) -> float:
    """How much F changes when these parameters are multiplied by a factor."""
    tensors = [net.get_parameter(name) for name in names]
    saved = [t.clone() for t in tensors]
    for t in tensors:
        t *= factor
    found = change(before, F_of(net))
    for t, old in zip(tensors, saved, strict=True):
        t.copy_(old)
    return found


@pytest.mark.slow
@pytest.mark.parametrize('rung', RUNGS)
def test_scale_of_a_weight(rung):
    """Of no consequence where weights are normalized; before, of that of layers in front of a norm."""
    net = awake(rung)
    before = F_of(net)
    weights = [name for name, p in net.unet.named_parameters(prefix='unet') if name.endswith('weight') and p.ndim > 1]
    if rung in NORMALIZED:
        assert max(scaled(net, [name], 3, before) for name in weights) < 3e-4
        assert max(scaled(net, [name], 0.2, before) for name in weights) < 2e-3
    else:
        assert scaled(net, ['unet.out_conv.weight'], 3, before) == pytest.approx(2.0, abs=0.2)  # A and B have a bias
        assert scaled(net, ['unet.out_conv.weight'], 0.2, before) == pytest.approx(0.8, abs=0.08)
    attention, conv = ('qkv', 'conv0') if rung in 'ab' else ('attn_qkv', 'conv_res0')
    found = []
    for layer in (attention, conv):
        names = [f'unet.enc.8x8_block0.{layer}.{kind}' for kind in ('weight', 'bias')]
        found.append(scaled(net, [name for name in names if name in dict(net.named_parameters())], 3, before))
    assert found[1] < 1e-3
    assert 0.1 < found[0] < 0.8 if rung in 'ab' else found[0] < 5e-4


@pytest.mark.parametrize('rung', RUNGS)
@torch.no_grad()
def test_scale_of_features(rung):
    """Group norms leave the main path its scale; pixel norm at the head of an encoder block takes it away."""
    net, generator = awake(rung), torch.Generator().manual_seed(0)
    emb = torch.randn(2, 128 if rung in 'fg' else 256, generator=generator)
    h = torch.randn(2, 64, 8, 8, generator=generator)
    encoder = net.unet.enc['8x8_block0']
    found = change(encoder(h, emb), encoder(5 * h, emb))
    assert found < 3e-4 if rung in 'fg' else found > 0.1
    decoder, h = net.unet.dec['8x8_in1'], torch.randn(2, 128, 8, 8, generator=generator)
    found = change(decoder(h, emb) - h, decoder(5 * h, emb) - 5 * h)
    assert found > 0.1 if rung in 'fg' else found < 1e-4


def trained(rung: str, steps: int) -> tuple[Denoiser, float]:
    """The tiny network after steps of Adam, and the largest |cos| between a row of weights and its gradient."""
    net = awake(rung).train()
    y, sigma, noise, labels = inputs(4)
    loss = DenoisingLoss(net, get_preset(f'edm2-ladder-{rung}').method)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.9, 0.99))
    largest = 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        loss(y, sigma, noise, labels)[1].mean().backward()
        for p in (p for p in net.unet.parameters() if p.ndim > 1):
            cos = nn.functional.cosine_similarity(p.detach().flatten(1), p.grad.flatten(1), dim=1)
            largest = max(largest, cos.abs().max().item())
        optimizer.step()
    return net, largest


def off_unit(net: Denoiser) -> float:
    """Largest distance of the magnitude of a row of a stored weight from 1."""
    rows = [p.detach().flatten(1).square().mean(dim=1).sqrt() for p in net.unet.parameters() if p.ndim > 1]
    return (torch.cat(rows) - 1).abs().max().item()


@pytest.mark.parametrize('rung', RUNGS)
def test_training_mode_forces_weights(rung):
    net = awake(rung)
    before = copy.deepcopy(net.state_dict())
    F_of(net)
    assert_same_tensors(before, net.state_dict())
    F_of(net.train())
    changed = [name for name, t in net.state_dict().items() if not torch.equal(t, before[name])]
    if rung in 'efg':
        layers = [name for name, module in net.unet.named_modules(prefix='unet') if isinstance(module, MPConv)]
        assert set(changed) == {f'{name}.weight' for name in layers}
        assert off_unit(net) < 4e-4
    else:
        assert not changed


@pytest.mark.parametrize('rung', 'cdefg')
def test_steps_are_along_the_sphere(rung):
    """Gradients of normalized weights are at right angles to them (EDM2 section 2.3); E lets them grow no more."""
    net, cos = trained(rung, steps=5)
    assert cos > 0.3 if rung == 'c' else cos < 1e-3
    if rung in 'efg':
        assert off_unit(net) < 0.01
    else:
        assert off_unit(net) > 0.1


# --- From rung to rung -----------------------------------------------------------------------------------------------


def test_a_is_the_network_of_edm():
    """Weights of EDM's ADM, by their names, give the same image; A has no uncertainty and clips nothing here."""
    edm = awake('a')
    network = dataclasses.replace(tiny('a'), architecture=dataclasses.replace(tiny('a').architecture, clip=None))
    assert type(edm.unet) is ADM and network.architecture == ADMConfig(
        model_channels=64, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(16, 8)
    )
    plain = build_network(network, edm.state_dict(), torch.device('cpu'))
    a = build_network(tiny('a'), plain.state_dict(), torch.device('cpu'))
    y, sigma, noise, labels = inputs(4)
    with torch.no_grad():
        assert torch.equal(a(y + noise, sigma, labels), plain(y + noise, sigma, labels))
        huge = a.unet.enc['16x16_block0'](1e6 * torch.ones(1, 64, 16, 16), torch.zeros(1, 256))
        assert huge.abs().max() == 256


def test_b_is_a_without_its_finest_attention():
    a, b = awake('a'), awake('b')
    missing = a.load_state_dict({n: t for n, t in b.state_dict().items() if n.startswith('unet.')}, strict=False)
    assert not missing.unexpected_keys
    names = missing.missing_keys
    assert names and all('16x16' in name and name.split('.')[-2] in ('norm2', 'qkv', 'proj') for name in names)
    for name in names:
        if '.proj.' in name:
            nn.init.zeros_(a.get_parameter(name))
    # x + 0 is x to the bit, but has another memory layout, for which convolutions add up in another order.
    torch.testing.assert_close(F_of(a), F_of(b), rtol=1e-4, atol=1e-5)


def test_d_and_e_differ_in_training_alone():
    d, e = awake('d'), awake('e')
    e.load_state_dict(d.state_dict())
    assert torch.equal(F_of(d), F_of(e))
    y, sigma, noise, labels = inputs(4)
    losses = [DenoisingLoss(net.train(), get_preset('edm2-ladder-d').method)(y, sigma, noise, labels) for net in (d, e)]
    for _, loss, _ in losses:
        loss.mean().backward()
    # Both see the same normalized weights, but the gradient shrinks with the magnitude of the stored one.
    assert not torch.equal(d.unet.out_conv.weight, e.unet.out_conv.weight)
    ratio = d.unet.out_conv.weight.grad.norm() / e.unet.out_conv.weight.grad.norm()
    assert ratio != 1 and not torch.equal(d.logvar_linear.weight, e.logvar_linear.weight)


@pytest.mark.parametrize('rung', 'cdefg')
def test_no_biases_but_a_channel_of_ones(rung):
    net = awake(rung)
    assert not any(name.endswith('bias') for name, _ in net.named_parameters())
    scalars = [name for name, p in meta(full(rung)).named_parameters() if p.ndim < 2]
    assert len(scalars) == (37 if rung == 'g' else 0)
    x, c_noise = torch.zeros(1, 4, 16, 16), torch.zeros(1)
    with torch.no_grad():
        assert net.unet(x, c_noise, None).any()
        net.unet.enc['16x16_conv'].weight[:, -1] = 0
        assert not net.unet(x, c_noise, None).any()


def test_norms_of_a_constant():
    """The group norm of C to E keeps its sign; the one of ADM takes the mean away and leaves the bias."""
    x = torch.tensor([3.0, -0.5]).repeat_interleave(32)[None, :, None, None].expand(2, 64, 4, 4)
    torch.testing.assert_close(rms_group_norm(x), x.sign(), rtol=3e-4, atol=0)  # eps / 0.25 / 2
    norm = GroupNorm(64, 1e-5)
    norm.reset_parameters(torch.Generator())
    nn.init.constant_(norm.bias, 0.7)
    torch.testing.assert_close(norm(x), torch.full_like(x, 0.7), rtol=0, atol=1e-4)  # rounding over sqrt(eps)


def test_group_norm_by_formula():
    x = torch.randn(2, 64, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in range(2):
        for group in range(16):  # of 4 channels
            part = x[n, 4 * group : 4 * group + 4]
            expected = part / (part.square().mean() + 1e-4).sqrt()
            torch.testing.assert_close(rms_group_norm(x)[n, 4 * group : 4 * group + 4], expected)
    half = rms_group_norm(100 * x.half())  # sums of squares beyond float16
    torch.testing.assert_close(half.double(), rms_group_norm(100 * x), rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_block_by_hand():
    """Config C's decoder block without attention, step by step (EDM2 figure 18)."""
    block = awake('c').unet.dec['8x8_block0']
    block.attn_qkv = None
    generator = torch.Generator().manual_seed(0)
    x, emb = torch.randn(2, 256, 8, 8, generator=generator), torch.randn(2, 256, generator=generator)
    conv, silu = nn.functional.conv2d, nn.functional.silu
    y = conv(silu(rms_group_norm(x)), block.conv_res0.weight, padding=1)
    y = rms_group_norm(y) * (1 + emb @ block.emb_linear.weight.T)[:, :, None, None]
    expected = conv(silu(y), block.conv_res1.weight, padding=1) + conv(x, block.conv_skip.weight)
    torch.testing.assert_close(block(x, emb), expected)
    assert isinstance(block, Block) and block(1e6 * x, emb).abs().max() == 256


def test_problems():
    config = dataclasses.replace(full('c'), architecture=LadderConfig(weights='forcd', clip=-1.0), augment_dim=3)
    with pytest.raises(UserError) as error:
        config.check()
    assert len(error.value.problems) == 3 and 'forced' in error.value.problems[0]


# --- Recipes ---------------------------------------------------------------------------------------------------------

# EDM2 appendix B: batch, lr, decay, beta2, P_mean, P_std, loss scaling, dropout, FID.
RECIPES = {
    'a': (4096, 0.0001, 0, 0.999, -1.2, 1.2, 100, 0.1, '8.00'),
    'b': (2048, 0.0002, 0, 0.99, -0.4, 1.0, 100, 0.1, '7.24'),
    'c': (2048, 0.0002, 0, 0.99, -0.4, 1.0, 100, 0.1, '6.96'),
    'd': (2048, 0.0100, 0, 0.99, -0.4, 1.0, 1, 0.1, '3.75'),
    'e': (2048, 0.0100, 70000, 0.99, -0.4, 1.0, 1, 0.1, '3.02'),
    'f': (2048, 0.0100, 70000, 0.99, -0.4, 1.0, 1, 0.1, '2.71'),
    'g': (2048, 0.0100, 70000, 0.99, -0.4, 1.0, 1, 0.0, '2.56'),
}


@pytest.mark.parametrize('rung', RUNGS)
def test_presets_are_those_of_the_paper(rung):
    preset, digits = get_preset(f'edm2-ladder-{rung}'), get_preset(f'ladder-{rung}-digits')
    optimizer, levels = preset.optimizer, preset.method.levels
    row = (preset.batch, optimizer.lr, optimizer.decay, optimizer.beta2, levels.P_mean, levels.P_std)
    row += (preset.loss_scaling, preset.network.architecture.dropout, preset.result.split()[1])
    assert row == RECIPES[rung] and (optimizer.beta1, optimizer.eps, optimizer.clip) == (0.9, 1e-8, None)
    assert preset.duration == 2**31 and optimizer.rampup == 10_000_000 and preset.sampler == SamplerConfig()
    assert preset.ema.stds == (0.05, 0.1) and preset.ema.halflife == (50_000_000 if rung == 'a' else None)
    assert tag_of(preset.network.architecture, ARCHITECTURES) == tag_of(digits.network.architecture, ARCHITECTURES)
    if rung in 'efg':
        rates = [optimizer.at(n, preset.batch) for n in (5 * 10**6, 10**7, 2**28, 2**30, 2**31)]
        assert rates == pytest.approx([0.005, 0.01, 0.00730792, 0.00365396, 0.00258374], rel=1e-6)
    if rung == 'g':
        other = get_preset('edm2-img512-s')
        assert preset == dataclasses.replace(other, preset=preset.preset, precision='fp16')


@pytest.mark.parametrize('rung', ['a', 'f', *(pytest.param(rung, marks=pytest.mark.slow) for rung in 'bcdeg')])
def test_trains_resumes_reconstructs_and_generates(rung, config, run):
    preset = get_preset(f'ladder-{rung}-digits')
    network = replaced(preset.network, {'architecture.model_channels': 8, 'architecture.channels_per_head': 8})
    config = dataclasses.replace(config, network=network, **{name: getattr(preset, name) for name in (
        'preset', 'method', 'ema', 'loss_scaling')}, batch=128)  # fmt: skip
    config = dataclasses.replace(config, status=128, optimizer=dataclasses.replace(preset.optimizer, rampup=512))
    whole = run('whole', config)
    run('halves', dataclasses.replace(config, slice=1024))
    halves = run('halves', config)
    assert_same_tensors(state_tensors(whole), state_tensors(halves))
    assert len(list(halves.glob('network-ema-*'))) == (2 if rung == 'a' else 0)
    plan = Plan.make(find_snapshots(halves), [Wanted.of_length(0.08)])
    ((_, info, weights),) = plan.reconstruct()
    assert info.config == network
    net = build_network(info.config, weights, torch.device('cpu'))
    (images,) = generate(net, range(2), SamplerConfig(steps=2))
    assert images.images.shape == (2, 1, 8, 8) and images.images.dtype == torch.uint8
