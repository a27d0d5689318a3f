"""The same network in other precisions, compiled, in other memory layouts; attention against its formula."""

import contextlib
import math

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from networks.denoiser import Denoiser
from networks.edm2.branches import BRANCHES
from networks.edm2.magnitude import MPConv, normalize
from networks.edm2.unet import Block, cosine_attention
from networks.folding import settled
from tests.golden_networks import RELATIVE, golden_inputs, golden_net
from tests.helpers import edm2_network, needs_compiler
from training.presets.table import get_preset


@pytest.mark.parametrize('precision', RELATIVE)
@pytest.mark.parametrize('name', BRANCHES)
def test_sixteen_bits_agree_with_float32(name, precision):
    net = golden_net(name).eval()
    x, sigma, labels = golden_inputs()
    with torch.no_grad():
        exact = net(x, sigma, labels)
        net.precision = precision
        rounded = net(x, sigma, labels)
    error = (rounded - exact).norm() / exact.norm()
    assert rounded.dtype == torch.float32 and 1e-5 < error < RELATIVE[precision], error


def test_casting_rules(tiny_config):
    """Features are 16 bit; embedding, uncertainty and the final combination are float32 (spec/edm2.md section 4)."""
    net = Denoiser(tiny_config, precision='bf16').eval()
    dtypes = {}

    def remember(name):
        def hook(module, args, out):
            dtypes[name] = out.dtype

        return hook

    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_hook(remember(name))
    net(torch.ones(1, 1, 8, 8), torch.ones(1), torch.eye(10)[:1])
    net.logvar(torch.ones(1))
    for name, dtype in dtypes.items():
        in_float32 = name.rpartition('.')[2].startswith('emb_') or name.startswith('logvar')
        assert dtype == (torch.float32 if in_float32 else torch.bfloat16), name
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_combination_is_in_float32(tiny_config):
    """A new network has F = 0: what is left is c_skip x, exact to float32; and F sees c_in x, rounded once."""
    net = Denoiser(tiny_config, seed=0, precision='bf16').eval()
    seen = []
    net.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, sigma = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 2.0])
    D = net(x, sigma)
    s = sigma[:, None, None, None]
    torch.testing.assert_close(D, 0.25 / (s**2 + 0.25) * x, rtol=1e-6, atol=1e-7)
    exact = x * (1 / (s**2 + 0.25).sqrt())
    assert torch.equal(seen[0], exact.bfloat16())


def test_attention_is_the_written_formula(tiny_config):
    block = Block(32, 32, 32, tiny_config.architecture, 'dec', attention=True).double().eval()
    generator = torch.Generator().manual_seed(0)
    for p in block.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 32, 3, 5, generator=generator, dtype=torch.float64)
    n, c, h, w, heads = 2, 32, 3, 5, 2
    qkv = block.attn_qkv(x).reshape(n, heads, c // heads, 3, h * w)
    q, k, v = normalize(qkv, dims=(2,)).unbind(3)  # [N, heads, d, H W]
    weights = torch.einsum('nhdq,nhdk->nhqk', q, k / math.sqrt(c // heads)).softmax(dim=3)
    y = torch.einsum('nhqk,nhdk->nhdq', weights, v).reshape(n, c, h, w)
    torch.testing.assert_close(cosine_attention(block.attn_qkv(x), c // heads), y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('preset', ['edm2plus-digits', 'edm-digits', 'sid2-digits'])
def test_attention_is_one_kernel(preset):
    """Where nothing but fused attention is allowed, it is not refused: it wants q, k and v without gaps."""
    net = Denoiser(get_preset(preset).network).eval()
    x = torch.ones(2, *net.config.image_shape)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        assert net(x, torch.ones(2)).shape == x.shape


@pytest.mark.parametrize('name', BRANCHES)
def test_features_stay_in_channels_last(name):
    net = golden_net(name).eval()
    seen = []

    def hook(module, args, out):
        if out.ndim == 4 and min(out.shape[1:]) > 1:
            seen.append(out.is_contiguous(memory_format=torch.channels_last))

    for module in net.modules():
        module.register_forward_hook(hook)
    net(*golden_inputs())
    assert len(seen) > 30 and all(seen[:-1])  # the denoised image itself is as the input


@pytest.mark.parametrize('name', BRANCHES)
def test_magnitudes_at_initialisation(name):
    """Feature maps of a new network have unit magnitude, give or take (EDM2 figure 15, appendix B)."""
    config = edm2_network((32, 32), 3, 10, 64, (1, 2), 2, (16,), 32, block=name)
    net = Denoiser(config, seed=0).eval()
    seen = {}

    def remember(block_name):
        def hook(module, args, out):
            seen[block_name] = out.square().mean().sqrt().item()

        return hook

    for side, modules in (('enc', net.unet.enc), ('dec', net.unet.dec)):
        for block_name, module in modules.items():
            module.register_forward_hook(remember(f'{side}.{block_name}'))
    generator = torch.Generator().manual_seed(0)
    x, sigma = torch.randn(4, 3, 32, 32, generator=generator), torch.full((4,), 0.5)
    with torch.no_grad():
        net(x * 2**-0.5, sigma, torch.eye(10)[:4])
    assert len(seen) == 15
    # The assumption of independent inputs holds up to the sums of correlated branches: within a third everywhere.
    assert all(0.67 < magnitude < 1.33 for magnitude in seen.values()), seen


def test_evaluating_and_copying_change_no_weight(tiny_config):
    import copy

    net = Denoiser(tiny_config, seed=2).eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    copied = copy.deepcopy(net)
    net(torch.ones(1, 1, 8, 8), torch.ones(1))
    copied(torch.ones(1, 1, 8, 8), torch.ones(1))
    for other in (net, copied):
        assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def check_compiled(name: str, backend: str, tolerance: float) -> None:
    """One graph without breaks, used again for another sigma, with the eager network's values."""
    net = golden_net(name).eval()
    x, sigma, labels = golden_inputs()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    with torch.no_grad(), dynamo_config.patch(error_on_recompile=True):
        for s in (sigma, sigma * 3):
            torch.testing.assert_close(compiled(x, s, labels), net(x, s, labels), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('name', ['A', pytest.param('G*', marks=pytest.mark.slow)])
def test_one_graph(name):
    check_compiled(name, backend='aot_eager', tolerance=1e-6)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # inductor's own deprecations, other ones in each version
@pytest.mark.parametrize('name', BRANCHES)
def test_compiled_network_agrees(name, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    check_compiled(name, backend='inductor', tolerance=1e-4)


def test_training_is_one_graph(name='G*'):
    net = golden_net(name).train()
    x, sigma, labels = golden_inputs()
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    with settled(net):
        compiled(x, sigma, labels).square().mean().backward()
    gradient = net.unet.out_conv.weight.grad.clone()
    other = golden_net(name).train()
    with settled(other):
        other(x, sigma, labels).square().mean().backward()
    torch.testing.assert_close(gradient, other.unet.out_conv.weight.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net.state_dict(), other.state_dict())
    with settled(net), dynamo_config.patch(error_on_recompile=True):  # whatever the noise level
        compiled(x, 2 * sigma, labels).square().mean().backward()


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('once', [False, True])
def test_compiled_layers_overwrite_their_weights(once, tmp_path, monkeypatch):
    """By itself, or before the step: inductor made other weights and gradients of it, several times as large."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch.compiler.reset()
    found = []
    for how in (torch.compile, lambda layer: layer):
        layer = MPConv(8, 8, kernel=3).train()
        layer.reset_parameters(torch.Generator().manual_seed(0))
        x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
        with settled(layer) if once else contextlib.nullcontext():
            (how(layer)(x) * torch.linspace(-1, 1, 8)).square().sum().backward()
        found.append((layer.weight.detach(), layer.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def test_picture_of_the_branches_is_that_of_the_table():
    from PIL import Image

    from docs.draw_branches import fingerprint
    from tests.conftest import ROOT

    with Image.open(ROOT / 'docs/branches.png') as picture:
        assert picture.text['Description'] == fingerprint(), 'draw it again: python -m docs.draw_branches'
