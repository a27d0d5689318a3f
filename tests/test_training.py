"""Loss, learning rate, random draws, configs, and a whole run in small: exact, resumable, the same on two ranks."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.order import BatchOrder
from dataset.reader import ImageDataset
from diffusion.levels import LogNormal
from dnnlib.configs import from_json, replaced
from dnnlib.errors import UserError
from ema.power import std_to_exp
from networks.denoiser import Denoiser
from networks.encoders import decode_pixels, encode_pixels
from networks.files import load_network
from tests.helpers import assert_same_tensors, state_tensors
from torch_utils import finite
from torch_utils.tensor_files import TensorFile, save_tensors
from training.config import Averages, TrainConfig, refuse_differences
from training.inputs import training_draws
from training.loop import train
from training.methods.denoising import DenoisingConfig, DenoisingLoss
from training.monitor.log import read_stats
from training.optimizer import Optimizer, clean_gradients
from training.presets.table import PRESETS, get_preset
from training.state import TrainState, state_files

CPU = torch.device('cpu')


def test_learning_rate_golden(golden):
    schedule = Optimizer(0.01, 70000, 10_000_000)
    for case in golden['lr']:
        assert schedule.at(case['cur_nimg'], case['batch']) == pytest.approx(case['lr'], rel=1e-12)


def test_loss_by_hand(tiny_config):
    net = Denoiser(tiny_config, seed=0).eval()  # D = c_skip x
    y, noise = torch.full((2, 1, 8, 8), 0.3), torch.full((2, 1, 8, 8), -1.0)
    sigma = torch.tensor([0.5, 2.0])
    _, losses, errors = DenoisingLoss(net, DenoisingConfig())(y, sigma, noise, None)
    for i, s in enumerate((0.5, 2.0)):
        D = 0.25 / (s**2 + 0.25) * (0.3 - s)
        error = 64 * (s**2 + 0.25) / (s * 0.5) ** 2 * (D - 0.3) ** 2
        u = net.logvar(sigma)[i].item()
        assert errors[i].item() == pytest.approx(error, rel=1e-5)
        assert losses[i].item() == pytest.approx(error / math.exp(u) + 64 * u, rel=1e-5)


def test_uncertainty_is_best_at_the_log_of_the_error(tiny_config):
    net = Denoiser(tiny_config, seed=0).eval()
    y, noise, sigma = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.7), torch.tensor([0.5])
    _, _, error = DenoisingLoss(net, DenoisingConfig())(y, sigma, noise, None)
    best = (error / 64).log()
    net.logvar = lambda sigma: u  # a free variable in its place
    u = best.detach().clone().requires_grad_()
    DenoisingLoss(net, DenoisingConfig())(y, sigma, noise, None)[1].sum().backward()
    assert abs(u.grad.item()) < 1e-3 * 64


def test_draws_depend_on_image_numbers_alone():
    levels = LogNormal(-0.8, 1.6)
    sigma, noise = training_draws(7, list(range(10)), (1, 4, 4), levels, CPU)
    for part in ([0, 1, 2], [9, 4]):
        s, n = training_draws(7, part, (1, 4, 4), levels, CPU)
        assert torch.equal(s, sigma[part]) and torch.equal(n, noise[part])
    other, _ = training_draws(8, [0], (1, 4, 4), levels, CPU)
    assert other[0] != sigma[0]


def test_draws_are_normal():
    sigma, noise = training_draws(0, list(range(4000)), (1, 4, 4), LogNormal(-0.8, 1.6), CPU)
    assert sigma.log().mean().item() == pytest.approx(-0.8, abs=0.1)
    assert sigma.log().std().item() == pytest.approx(1.6, abs=0.1)
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(torch.stack([sigma.log(), noise[:, 0, 0, 0]]))[0, 1].abs() < 0.06


def test_pixels_survive_encoding():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(decode_pixels(encode_pixels(images)), images)
    # trunc(clip(127.5 x + 128, 0, 255)): 128 in the middle, cut and not rounded.
    assert decode_pixels(torch.tensor([-5.0, 0.0, 0.0059, 0.0158, 5.0])).tolist() == [0, 128, 128, 130, 255]


def test_non_finite_gradients_become_zero_and_are_counted(tiny_config):
    net = Denoiser(tiny_config)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    grad = net.unet.out_conv.weight.grad.view(-1)
    grad[:4] = torch.tensor([math.nan, math.inf, -math.inf, 3.0])
    counts, norm = clean_gradients(list(net.parameters()))
    by_name = dict(zip([name for name, _ in net.named_parameters()], counts.tolist(), strict=True))
    assert by_name.pop('unet.out_conv.weight') == 3 and not any(by_name.values())
    assert norm == 3 and grad[:4].tolist() == [0, 0, 0, 3]


@pytest.mark.parametrize(('policy', 'infinite'), [('zero', 0.0), ('clamp', 1e5)])
def test_gradients_are_cleaned_together_as_one_by_one(policy, infinite, monkeypatch):
    monkeypatch.setattr(finite, 'SMALL', 100)
    draw = torch.Generator().manual_seed(0)
    shapes = [(), (2, 4, 3, 3), (5, 4, 3, 3), (7,), (10, 10), (101,), (5, 4, 1, 1)]  # joined or large
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    for i, p in enumerate(parameters):
        layout = torch.channels_last if p.ndim == 4 else torch.contiguous_format
        p.data = p.data.to(memory_format=layout)
        p.grad = torch.randn(p.shape, generator=draw).to(memory_format=layout)
        for value in (math.nan, math.inf, -math.inf):
            p.grad[torch.rand(p.shape, generator=draw) < 0.1 * i] = value
    parameters[3].grad = None
    expected = [None if p.grad is None else p.grad.nan_to_num(0, infinite, -infinite) for p in parameters]
    bad = [0 if p.grad is None else int((~p.grad.isfinite()).sum()) for p in parameters]
    counts, norm = clean_gradients(parameters, policy)
    assert counts.tolist() == bad and sum(n > 0 for n in bad) == 5
    assert all(a is b is None or torch.equal(a, b) for a, b in zip((p.grad for p in parameters), expected, strict=True))
    assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in expected if g is not None)))


class Launches(TorchDispatchMode):
    """Counts operations that are more than views, and those that make the host wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not str(operation).startswith(('aten._local_scalar', 'aten.index')), operation
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


def test_small_gradients_take_no_operation_each():
    """On a device that has to be waited for; the count is that of joined tensors, 3 for each large one."""
    counts = []
    for small, large in ((10, 0), (100, 0), (100, 2)):
        sizes = [64] * small + [finite.SMALL + 1] * large
        parameters = [nn.Parameter(torch.empty(n, device='meta')) for n in sizes]
        for p in parameters:
            p.grad = torch.empty_like(p)
        with Launches() as launches:
            clean_gradients(parameters)
        counts.append(launches.count)
    assert counts[0] < 25 and counts[1] == counts[0] and counts[2] <= counts[0] + 2 * 4


@pytest.mark.parametrize('micro_batch', [None, 64])
def test_resumed_run_is_bit_exact(config, run, micro_batch):
    config = replace(config, micro_batch=micro_batch, held_out=0.1)
    whole = run('whole', config)
    run('halves', replace(config, slice=1024))
    assert state_files(run('halves', replace(config, duration=1024)))[-1].name == 'training-state-0000001.safetensors'
    halves = run('halves', config)
    a, b = state_tensors(whole), state_tensors(halves)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a['net/unet.out_gain'], torch.zeros(()))
    timed = ('images_per_second', 'memory_gib', 'seconds')
    a, b = ([{k: v for k, v in r.items() if k not in timed} for r in read_stats(f)] for f in (whole, halves))
    assert a == b and [record['nimg'] for record in a] == list(range(256, 2049, 256))
    a, b = ((folder / 'metrics.jsonl').read_text() for folder in (whole, halves))
    assert a == b and len(a.splitlines()) == 4  # two snapshots, two averages


def test_steps_by_hand(config, run):
    """Three steps against Adam, learning rate, loss average and EMA written out (spec/edm2.md section 5)."""
    config = replace(
        config,
        batch=512,
        duration=1536,
        checkpoint=1536,
        snapshot=1536,
        status=512,
        preview=1536,
        optimizer=Optimizer(0.01, 2, 1024),
    )
    config = replace(
        config, network=replaced(config.network, {'architecture.dropout': 0.0}), ema=Averages((0.05, 0.25))
    )
    got, records = state_tensors(run('hand', config)), read_stats(run('hand', config))

    dataset = ImageDataset(config.data)
    net = Denoiser(config.network, seed=config.seed).train()
    parameters = dict(net.named_parameters())
    first, second, average = ({n: torch.zeros_like(p) for n, p in parameters.items()} for _ in range(3))
    for step in range(3):
        nimg = step * 512
        pairs = next(iter(BatchOrder(len(dataset), config.seed, 512, 512, start_nimg=nimg)))
        images, labels = zip(*(dataset[index] for _, index in pairs), strict=True)
        y = encode_pixels(torch.stack(images))
        one_hot = torch.eye(10)[torch.tensor(labels)]
        sigma, noise = training_draws(
            config.seed, [number for number, _ in pairs], (1, 8, 8), config.method.levels, CPU
        )
        net.zero_grad()
        loss = DenoisingLoss(net, DenoisingConfig())(y, sigma, noise, one_hot)[1].sum() / 512
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
        assert records[step]['grad_norm'] == pytest.approx(norm.item(), rel=1e-4)
        assert records[step]['loss'] == pytest.approx(loss.item() / 64, rel=1e-5)
        rate = 0.01 / math.sqrt(max(nimg / (2 * 512), 1)) * min(nimg / 1024, 1)
        assert records[step]['learning_rate'] == pytest.approx(rate)
        gamma, t_next = std_to_exp(0.25), nimg + 512
        with torch.no_grad():
            for name, p in parameters.items():
                first[name] = 0.9 * first[name] + 0.1 * p.grad
                second[name] = 0.99 * second[name] + 0.01 * p.grad**2
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.99 ** (step + 1))
                p -= rate * m / (v.sqrt() + 1e-8)
                beta = (1 - 512 / t_next) ** (gamma + 1)
                average[name] = beta * average[name] + (1 - beta) * p
    for name, p in parameters.items():
        torch.testing.assert_close(got[f'net/{name}'], p.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[f'ema/0.25/{name}'], average[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[f'optimizer/net/{name}/exp_avg_sq'], second[name], rtol=1e-3, atol=1e-6)


def test_previews_show_the_shortest_average(config, tmp_path):
    seen = []
    train(config, ImageDataset(config.data), tmp_path, CPU, preview=lambda net, nimg: seen.append((net, nimg)))
    net, nimg = seen[-1]
    assert nimg == 2048 and not net.training
    average = state_tensors(tmp_path)
    assert all(torch.equal(average[f'ema/0.05/{name}'], t) for name, t in net.state_dict().items())


def test_snapshots_are_float16(finished):
    with TensorFile(finished('half') / 'network-snapshot-0000002-0.100.safetensors') as file:
        assert file.get('unet.out_conv.weight').dtype == torch.float16
        assert file.get('unet.emb_fourier.freqs').dtype == torch.float32


def test_broken_newest_state_falls_back_to_the_one_before(config, run, finished, capsys):
    whole, broken = finished('whole'), finished('broken')
    newest = state_files(broken)[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    run('broken', config)
    assert newest.with_suffix('.unreadable').exists() and newest.exists()
    text = capsys.readouterr().out
    assert f'warning: {newest} is not a training state' in text and 'at 1024 images' in text
    a, b = state_tensors(whole), state_tensors(broken)
    assert_same_tensors(a, b)
    for path in state_files(broken):
        path.write_bytes(b'')
    before = sorted(broken.iterdir())
    with pytest.raises(UserError, match='no training state in'):
        run('broken', config)
    assert sorted(broken.iterdir()) == before


def test_states_that_lack_something_are_passed_over(config, run, capsys):
    folder = run('lacking', replace(config, duration=1024, preview=1024))
    path = state_files(folder)[-1]
    with TensorFile(path, 'training state') as file:
        header, tensors = file.header | {'nimg': 9 * 1024}, dict(file.items())
    lacking = {
        'nimg': ({k: v for k, v in header.items() if k != 'nimg'}, tensors),
        'ema/0.1/unet.out_gain': (header, {k: v for k, v in tensors.items() if k != 'ema/0.1/unet.out_gain'}),
        'optimizer/net/unet.out_conv.weight/exp_avg': (
            header, tensors | {'optimizer/net/unet.out_conv.weight/exp_avg': torch.zeros(3)}
        ),
        'stats/sums': (header, {k: v for k, v in tensors.items() if k != 'stats/sums'}),
    }  # fmt: skip
    for what, (some_header, some_tensors) in lacking.items():
        save_tensors(folder / 'training-state-0000009.safetensors', some_tensors, some_header)
        run('lacking', config if what == 'nimg' else replace(config, duration=2048))
        text = capsys.readouterr().out
        assert 'warning: ' in text and (what in text or what == 'nimg'), (what, text)
        assert (folder / 'training-state-0000009.unreadable').exists()


def test_stopping_between_status_lines_changes_no_line(config, run):
    """The statistics of the steps since the last line belong to the state."""
    config = replace(config, duration=1024, batch=64, status=256, preview=1024)
    whole = read_stats(run('whole', config))
    for stop in (320, 384, 64):
        run('halves', replace(config, slice=stop))
    halves = read_stats(run('halves', config))
    timed = ('images_per_second', 'memory_gib', 'seconds')
    a, b = ([{k: v for k, v in r.items() if k not in timed} for r in records] for records in (whole, halves))
    assert a == b and len(a) == 4


def test_another_config_is_refused_before_the_first_state(config, run):
    for path in state_files(run('early', replace(config, duration=1024))):
        path.unlink()
    with pytest.raises(UserError, match='seed is 1, was 0'):
        run('early', replace(config, seed=1))


def test_accumulation_is_exact(config, run):
    """One step: gradients (a tenth of which is Adam's first moment) are equal to rounding, and so is the update."""
    config = replace(
        config,
        duration=1024,
        batch=1024,
        status=1024,
        preview=1024,
        network=replaced(config.network, {'architecture.dropout': 0.0}),
    )
    whole = state_tensors(run('one', config))
    parts = state_tensors(run('four', replace(config, micro_batch=256)))
    assert_same_gradients(whole, parts)


def assert_same_gradients(a: dict, b: dict) -> None:
    names = [name for name in a if name.startswith('optimizer/') and name.endswith('/exp_avg')]
    largest = max(a[name].abs().max() for name in names)
    assert largest > 1e-3
    for name in names:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6 * largest.item(), msg=name)


def test_loss_scaling_cancels(config, run):
    config = replace(
        config, duration=1024, preview=1024, network=replaced(config.network, {'architecture.dropout': 0.0})
    )
    one, scaled = (run(name, replace(config, loss_scaling=s)) for name, s in (('one', 1.0), ('scaled', 64.0)))
    for a, b in zip(read_stats(one), read_stats(scaled), strict=True):
        assert b['loss'] == pytest.approx(a['loss'], rel=1e-4)
        assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-3)
    a, b = state_tensors(one), state_tensors(scaled)
    name = 'optimizer/net/unet.out_conv.weight/exp_avg'
    torch.testing.assert_close(b[name] / 64, a[name], rtol=1e-2, atol=1e-4)


def test_files_of_a_run(config, run, finished):
    folder = finished('files')
    names = sorted(path.name for path in folder.iterdir())
    times = ('0000001', '0000002')
    expected = [f'network-snapshot-{t}-{std}.safetensors' for t in times for std in ('0.050', '0.100')]
    expected += [f'training-state-{t}.safetensors' for t in times]
    assert set(expected) <= set(names) and not [name for name in names if name.endswith('.tmp')]
    assert json.loads((folder / 'config.json').read_text()) == json.loads(json.dumps(config.to_json()))
    record = read_stats(folder)[-1]
    assert record['nimg'] == 2048 and record['nonfinite'] == 0 and record['grad_norm'] > 0


def test_another_config_is_refused(config, run):
    run('other', replace(config, duration=1024))
    changed = replaced(config, {'seed': 1, 'optimizer.lr': 0.02})
    with pytest.raises(UserError) as error:
        run('other', changed)
    assert error.value.problems[1:] == ['optimizer.lr is 0.02, was 0.01', 'seed is 1, was 0']


def test_what_a_continued_run_may_change(config):
    old = json.loads(json.dumps(config.to_json()))
    refuse_differences(Path(), old, replace(config, duration=8192, workers=2, keep=0))
    with pytest.raises(UserError) as error:
        refuse_differences(Path(), old, replace(config, micro_batch=64, precision='bf16', seed=3))
    assert error.value.problems[1:] == [
        'seed is 3, was 0',
        'micro_batch is 64, was None',
        'precision is bf16, was fp32',
        '--allow-rounding lets the latter change',
    ]
    with pytest.raises(UserError, match='--allow-rounding lets these change'):
        refuse_differences(Path(), old, replace(config, compile=True))
    refuse_differences(Path(), old, replace(config, micro_batch=64, precision='bf16'), allow_rounding=True)


def test_configs_from_before_a_field_are_understood(config):
    old = json.loads(json.dumps(config.to_json()))
    del old['loss_scaling']
    refuse_differences(Path(), old, config)
    with pytest.raises(UserError, match=r'loss_scaling is 2\.0, was 1\.0'):
        refuse_differences(Path(), old, replace(config, loss_scaling=2.0))


def test_loss_falls(config, run):
    config = replace(
        config, batch=64, duration=80 * 64, optimizer=Optimizer(0.02, 100, 640), status=640, snapshot=5120,
        checkpoint=5120, preview=5120, network=replaced(config.network, {'architecture.dropout': 0.0}),
    )  # fmt: skip
    records = read_stats(run('falls', config))
    assert records[-1]['mse'] < 0.75 * records[0]['mse'] and records[-1]['loss'] < 0.75 * records[0]['loss']


def test_state_round_trip(config, tmp_path):
    state = TrainState(config, CPU)
    for p in state.net.parameters():
        p.grad = torch.ones_like(p)
    state.method.optimizers['net'].step()
    state.nimg = 512 * 5
    state.saving(tmp_path)()
    other = TrainState(replace(config, seed=0), CPU)
    other.load(state_files(tmp_path)[0])
    assert other.nimg == state.nimg
    for a, b in zip(state.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ('exp_avg', 'exp_avg_sq', 'step'):
            assert torch.equal(
                state.method.optimizers['net'].state[a][key], other.method.optimizers['net'].state[b][key]
            )


@pytest.mark.parametrize(('keep', 'expected'), [(2, [3, 10]), (1, [10]), (0, [1, 2, 3, 10])])
def test_newest_states_are_kept(config, tmp_path, keep, expected):
    state = TrainState(replace(config, keep=keep), CPU)
    for p in state.net.parameters():
        p.grad = torch.ones_like(p)
    state.method.optimizers['net'].step()
    for nimg in (1024, 2048, 3072, 10240):
        state.nimg = nimg
        state.saving(tmp_path)()
    assert [path.name for path in state_files(tmp_path)] == [f'training-state-{k:07d}.safetensors' for k in expected]


def test_a_state_is_copied_before_training_goes_on(config, tmp_path):
    state = TrainState(config, CPU)
    for p in state.net.parameters():
        p.grad = torch.ones_like(p)
    state.method.optimizers['net'].step()
    state.nimg = 1024
    before = {name: t.clone() for name, t in state.net.state_dict().items()}
    jobs = [state.saving(tmp_path), state.saving_snapshots(tmp_path)]
    state.method.optimizers['net'].param_groups[0]['lr'] = 0.1
    state.method.optimizers['net'].step()
    assert not torch.equal(before['unet.out_gain'], state.net.state_dict()['unet.out_gain'])
    state.nimg = 2048
    state.ema.update(state.net.state_dict(), 2048, 1024)
    for job in jobs:
        job()
    assert all(torch.equal(state_tensors(tmp_path)[f'net/{name}'], t) for name, t in before.items())
    net, info = load_network(tmp_path / 'network-snapshot-0000001-0.100.safetensors')
    start = Denoiser(config.network, seed=config.seed)  # the averages began with it, and have not moved
    assert info.nimg == 1024
    assert torch.equal(net.unet.out_conv.weight, start.unet.out_conv.weight.half().float())


def test_all_problems_of_a_config_are_told_at_once(config):
    with pytest.raises(UserError) as error:
        replace(config, duration=1000, ema=Averages((0.3,)), precision='fp64', seed=-1).check()
    text = '\n'.join(error.value.problems)
    assert len(error.value.problems) == 4
    assert 'duration must be a multiple of the batch (256 images), not 1000 (try 768 or 1024)' in text
    with pytest.raises(UserError, match=r'multiple of the number of ranks \(3\), not 256 \(try 255 or 258\)'):
        config.check(world_size=3)
    with pytest.raises(UserError) as error:
        replace(config, slice=100, keep=-1, held_out=1.0, loss_scaling=0.0, nonfinite_steps=-5).check()
    assert error.value.problems == [
        'slice must be a multiple of the batch (256 images), not 100 (try 256)',
        'keep must be at least 0, not -1',
        'nonfinite_steps must be at least 0, not -5',
        'the loss scaling must be positive and finite in float32, not 0.0',
        'the share of held-out images must be at least 0 and less than 1, not 1.0',
    ]
    with pytest.raises(UserError, match=r'no multiple of batch-gpu 100 \(try 128 or 64\)'):
        replace(config, micro_batch=100).check()


@pytest.mark.parametrize('name', PRESETS)
def test_presets_can_be_built(name):
    preset = get_preset(name)
    sigma_data = preset.network.preconditioning.sigma_data
    assert preset.preset == name and getattr(preset.method.weighting, 'sigma_data', sigma_data) == sigma_data
    config = preset.check()
    assert from_json(TrainConfig, config.to_json()) == config
    with torch.device('meta'):
        Denoiser(config.network)


# EDM2 table 6: channels, alpha_ref, t_ref, duration in Mi, dropout, P_mean, P_std.
TABLE6 = {
    'edm2-img512-xs': (128, 0.0120, 70000, 2048, 0.0, -0.4, 1.0),
    'edm2-img512-s': (192, 0.0100, 70000, 2048, 0.0, -0.4, 1.0),
    'edm2-img512-m': (256, 0.0090, 70000, 2048, 0.1, -0.4, 1.0),
    'edm2-img512-l': (320, 0.0080, 70000, 1792, 0.1, -0.4, 1.0),
    'edm2-img512-xl': (384, 0.0070, 70000, 1280, 0.1, -0.4, 1.0),
    'edm2-img512-xxl': (448, 0.0065, 70000, 896, 0.1, -0.4, 1.0),
    'edm2-img64-xs': (128, 0.0120, 35000, 1024, 0.0, -0.8, 1.6),
    'edm2-img64-s': (192, 0.0100, 35000, 1024, 0.0, -0.8, 1.6),
    'edm2-img64-m': (256, 0.0090, 35000, 2048, 0.1, -0.8, 1.6),
    'edm2-img64-l': (320, 0.0080, 35000, 1024, 0.1, -0.8, 1.6),
    'edm2-img64-xl': (384, 0.0070, 35000, 640, 0.1, -0.8, 1.6),
}


@pytest.mark.parametrize('name', TABLE6)
def test_presets_are_the_table_of_the_paper(name):
    for block, prefix in (('A', 'edm2-'), ('G*', 'edm2plus-')):
        preset = get_preset(name.replace('edm2-', prefix))
        net, optimizer, levels = preset.network.architecture, preset.optimizer, preset.method.levels
        row = [net.model_channels, optimizer.lr, optimizer.decay, preset.duration // 2**20, net.dropout]
        row += [levels.P_mean, levels.P_std]
        expected = list(TABLE6[name])
        if prefix == 'edm2plus-' and 'img64' in name:  # the later decay and longer run of EDM2+
            expected[2:4] = [70000, 640 if name.endswith('-xl') else 2048]
        assert row == expected and net.block == block
        assert (preset.batch, optimizer.rampup, preset.snapshot, preset.checkpoint) == (2048, 10**7, 2**23, 2**27)
        assert preset.network.image_shape == (3 if 'img64' in name else 4, 64, 64) and preset.network.label_dim == 1000
        assert (net.channel_mult, net.num_blocks, net.attn_resolutions) == ((1, 2, 3, 4), 3, (16, 8))


def train_on_one_and_two_ranks(arguments, run_script, tmp_path):
    for ranks, name in ((0, 'one'), (2, 'two')):
        process = run_script('train.py', *arguments, f'--outdir={tmp_path / name}', ranks=ranks)
        assert process.returncode == 0, process.stderr


def test_two_ranks_have_the_gradients_of_one(archive, run_script, tmp_path):
    """One batch of 1024 = 2 ranks x 2 rounds x 256."""
    arguments = [
        *('--preset=edm2plus-digits', f'--data={archive}', '--channels=16', '--duration=1024', '--batch=1024'),
        *('--status=1024', '--snapshot=1024', '--checkpoint=1024', '--preview=1024', '--batch-gpu=256'),
        '--set=sampler.steps=2',
    ]
    train_on_one_and_two_ranks(arguments, run_script, tmp_path)
    assert_same_gradients(state_tensors(tmp_path / 'one'), state_tensors(tmp_path / 'two'))


def test_two_ranks_equal_one(archive, run_script, tmp_path):
    arguments = [
        *('--preset=edm2plus-digits', f'--data={archive}', '--channels=16', '--duration=1280', '--batch=64'),
        *('--status=64', '--snapshot=1280', '--checkpoint=1280', '--preview=1280', '--rampup=640'),
        '--set=sampler.steps=2',
    ]
    train_on_one_and_two_ranks(arguments, run_script, tmp_path)
    one, two = read_stats(tmp_path / 'one'), read_stats(tmp_path / 'two')
    assert len(one) == 20
    for a, b in zip(one, two, strict=True):
        assert b['loss'] == pytest.approx(a['loss'], rel=1e-3), a['nimg']
        assert b['grad_norm'] == pytest.approx(a['grad_norm'], rel=1e-2), a['nimg']  # Adam would hide a factor
