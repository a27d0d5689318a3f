"""The Residual U-ViT of SiD2."""

import dataclasses
import math

import pytest
import torch

from networks.interface import Interface
from networks.sid2.config import UViTConfig
from networks.sid2.uvit import TransformerBlock, UViT, positions, turn

TINY = UViTConfig(
    channels=(16, 32, 32),
    down_blocks=(1, 1),
    up_blocks=(2, 1),
    mid_blocks=2,
    res_levels=1,
    dropout=(0.0, 0.0, 0.1),
    emb_channels=32,
    channels_per_head=16,
)
IMAGES = Interface(img_resolution=(8, 16), in_channels=3, out_channels=3, label_dim=4, augment_dim=2)
PAPER = Interface(img_resolution=(512, 512), in_channels=3, out_channels=3, label_dim=1000)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(config=TINY, interface=IMAGES, random=True):
    """A network in evaluation mode; `random`: with all weights drawn, also those that begin at zero."""
    assert not config.problems(interface)
    net = UViT(config, interface).eval()
    net.reset_parameters(generator())
    if random:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator(1))
    return net


def inputs(n=2, interface=IMAGES, dtype=torch.float32):
    x = torch.randn(n, interface.in_channels, *interface.img_resolution, generator=generator(2)).to(dtype)
    labels = torch.eye(interface.label_dim)[torch.arange(n) % interface.label_dim]
    return x, torch.linspace(-1, 1, n), labels, torch.ones(n, interface.augment_dim)


def test_body_is_the_identity_at_first():
    net = build(random=False)
    with torch.no_grad():
        for layer in (*net.shrink, *net.grow):
            layer.weight.normal_(std=10, generator=generator(5))
    x, c_noise, labels, augment = inputs()
    h = net.patch_in(x)
    assert torch.equal(net.body(h, net.embed(c_noise, labels, augment)), h)
    assert not net(x, c_noise, labels, augment).any()


def test_only_the_change_is_enlarged():
    # One block in the middle that adds a constant: the output gains U of it everywhere, whatever D is.
    net = build(dataclasses.replace(TINY, mid_blocks=1), random=False)
    with torch.no_grad():
        net.mid[0].mlp_out.bias.fill_(1.0)
    x, c_noise, labels, _ = inputs()
    h = net.patch_in(x)
    change = net.grow[0].weight.flatten(1) @ net.grow[1].weight.flatten(1).sum(dim=1)
    expected = h + change[:, None, None]
    torch.testing.assert_close(net.body(h, net.embed(c_noise, labels)), expected)


def test_a_level_is_equation_5():
    net = build()
    x, c_noise, labels, _ = inputs()
    emb = net.embed(c_noise, labels)
    h = net.down[0][0](net.patch_in(x), emb)
    inner = net.shrink[0](h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5)))
    change = net.grow[0](net.body(inner, emb, level=1) - inner)
    expected = h + change.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    for block in net.up[0]:
        expected = block(expected, emb)
    torch.testing.assert_close(net.body(net.patch_in(x), emb), expected)


def test_transformer_block_of_one_pixel():
    # Attention to itself alone is v.
    block, x, emb = build().mid[0], *torch.randn(2, 3, 32, generator=generator(3))
    scale0, shift0, scale1, shift1 = block.film(emb).chunk(4, dim=1)
    y = x + block.attn_out(block.qkv(torch.nn.functional.rms_norm(x, (32,)) * (1 + scale0) + shift0)[:, 64:])
    hidden = block.mlp_in(torch.nn.functional.rms_norm(y, (32,)) * (1 + scale1) + shift1)
    y = y + block.mlp_out(torch.nn.functional.gelu(hidden))
    torch.testing.assert_close(block(x[:, :, None, None], emb)[:, :, 0, 0], y, rtol=1e-4, atol=1e-5)  # eps of norms


@pytest.mark.parametrize('patch', [1, 2])
@pytest.mark.parametrize('kernel', [1, 3])
def test_forward(patch, kernel):
    net = build(dataclasses.replace(TINY, patch=patch, resample_kernel=kernel))
    x, *conditions = inputs()
    out = net(x, *conditions)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.std() > 0
    half = net(x.bfloat16(), *conditions)
    assert half.dtype == torch.bfloat16
    assert (half.float() - out).std() < 0.05 * out.std()  # bfloat16 keeps 8 bits
    torch.testing.assert_close(net(x[:1], *(c[:1] for c in conditions)), out[:1])


def test_conditions_matter():
    net = build()
    x, c_noise, labels, augment = inputs()
    out = net(x, c_noise, labels, augment)
    for other in ((c_noise + 0.1, labels, augment), (c_noise, labels.roll(1, 1), augment), (c_noise, labels, None)):
        assert not torch.allclose(net(x, *other), out)
    torch.testing.assert_close(net(x, c_noise, None, augment), net(x, c_noise, 0 * labels, augment))


def test_weights_come_from_the_seed_alone():
    a = build(random=False).state_dict()
    net = UViT(TINY, IMAGES)
    for tensor in net.state_dict().values():
        tensor.fill_(math.nan)
    net.reset_parameters(generator())
    assert all(torch.equal(value, a[name]) for name, value in net.state_dict().items())


def test_parameters_do_not_depend_on_the_resolution():
    larger = dataclasses.replace(IMAGES, img_resolution=(32, 16))
    state = build().state_dict()
    net = UViT(TINY, larger).eval()
    net.load_state_dict(state)
    assert net(*inputs(interface=larger)).shape == (2, 3, 32, 16)


def test_dropout_is_off_in_evaluation():
    net = build(dataclasses.replace(TINY, dropout=(0.5, 0.5, 0.5)))
    given = inputs()
    assert torch.equal(net(*given), net(*given))
    assert all(block.dropout.p == 0.5 for block in (*net.down[0], *net.up[1], *net.mid))


def test_stages():
    names = [name for name, _ in build().stages()]
    assert names == [
        *('8x16_in', '8x16_down0', '4x8_shrink', '4x8_down0', '2x4_shrink', '2x4_mid0', '2x4_mid1'),
        *('4x8_grow', '4x8_up0', '8x16_grow', '8x16_up0', '8x16_up1', '8x16_out'),
    ]
    order, net = [], build()
    for name, module in net.stages():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    net(*inputs())
    assert order == names


def test_rotary_embedding_knows_distances_alone():
    angles = positions(6, 5, 16, 'cpu').double()
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=generator())
    scores = (turn(q.expand(30, 16), angles) @ turn(k.expand(30, 16), angles).T).reshape(6, 5, 6, 5)
    torch.testing.assert_close(scores[0, 0, 2, 1], scores[3, 3, 5, 4])
    torch.testing.assert_close(scores[4, 0, 1, 2], scores[5, 2, 2, 4])
    assert not torch.isclose(scores[0, 0, 2, 1], scores[0, 0, 1, 2])
    torch.testing.assert_close(turn(q.expand(30, 16), angles).norm(dim=1), q.norm().expand(30))


def test_attention_sees_positions():
    block = TransformerBlock(32, 0.0, TINY)
    for module in (m for m in block.modules() if hasattr(m, 'reset_parameters')):
        module.reset_parameters(generator())
    torch.nn.init.eye_(block.attn_out.weight)
    x, emb = torch.randn(1, 32, 4, 4, generator=generator()), torch.zeros(1, 32)
    assert not torch.allclose(block(x.flip(2), emb), block(x, emb).flip(2), atol=1e-3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'patch': 4}, 'need a height divisible by 16, not 8 (try 16)'),
        ({'down_blocks': (1,)}, '3 levels need 2 numbers of down_blocks, not 1'),
        ({'dropout': (0.0, 0.0, 1.0)}, 'dropout must be in [0, 1)'),
        ({'channels': (16, 32, 40)}, 'heads of 16 do not divide the 40 channels of level 2'),
        ({'channels': (18, 32, 32)}, '18 channels do not divide into 4 groups'),
        ({'channels_per_head': 2}, 'channels_per_head must be from 4'),
        ({'resample_kernel': 2}, 'resample_kernel must be 1 or 3'),
        ({'mid_blocks': 10**9}, 'mid_blocks must be from 1 to 64'),
        ({'channels': ()}, 'channels needs a width'),
    ],
)
def test_problems(change, message):
    found = dataclasses.replace(TINY, **change).problems(IMAGES)
    assert any(message in line for line in found), found


@pytest.mark.parametrize(
    ('config', 'millions'),
    [(UViTConfig(patch=4), 317), (UViTConfig((256, 512, 1024), (3, 3), (3, 3), 16, 1, (0.0, 0.1, 0.1), 1), 315)],
)
def test_parameters_of_the_paper(config, millions):
    # 229.05 M in the blocks without conditioning, 317 M with two films in a transformer block and an embedding of 1024.
    with torch.device('meta'):
        net = UViT(config, PAPER)
    blocks = [*net.mid, *(block for level in (*net.down, *net.up) for block in level)]
    inner = sum(
        p.numel() for block in blocks for name, p in block.named_parameters() if p.ndim > 1 and 'film' not in name
    )
    assert inner / 1e6 == pytest.approx({317: 229.05, 315: 227.3}[millions], abs=0.2)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=3)
