"""What makes it fast changes nothing: the papers' formulation, layouts, weights settled once a step; the benchmark."""

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import train as script
from benchmarks import speed
from dnnlib.errors import UserError
from ema.power import ema_beta
from networks import denoiser
from networks.edm2 import unet
from networks.edm2.branches import BRANCHES
from networks.edm2.magnitude import MPConv
from networks.folding import settled
from networks.layout import features_format
from sampling import portions
from sampling.options import note_execution
from sampling.portions import EAGER, Execution
from tests.conftest import ROOT
from tests.test_networks import golden_inputs, golden_net
from tests.test_sampling import busy, images_of
from torch_utils.tf32 import tf32
from training.config import Averages
from training.inputs import training_inputs
from training.monitor.timing import PhaseTimer
from training.presets.table import get_preset
from training.state import TrainState
from training.step import Stepper


@pytest.mark.parametrize('name', BRANCHES)
def test_folded_constants_are_the_papers_formulas(name):
    """Some ten roundings of float32, 6e-8 each, further on relative to the largest value."""
    net, inputs = golden_net(name).eval(), golden_inputs()
    with torch.no_grad():
        ours = net(*inputs)
        with speed.formulation():
            theirs = net(*inputs)
    assert 0 < (ours - theirs).abs().max() < 1e-6 * theirs.abs().max() * 5


@pytest.mark.parametrize('name', ['A', 'G*'])
def test_layouts_and_settled_weights_give_the_same_gradients(name, monkeypatch):
    inputs, found, forced = golden_inputs(), {}, []
    settle = MPConv.settle
    monkeypatch.setattr(MPConv, 'settle', lambda layer: forced.append(layer) or settle(layer))
    for layout in (torch.channels_last, torch.contiguous_format):
        monkeypatch.setattr(unet, 'features_format', lambda *_, layout=layout: layout)
        for once in ('never', 'settled', 'gathering'):
            net = golden_net(name).train()
            seen = []
            for part in (*net.unet.enc.values(), *net.unet.dec.values()):
                part.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
            forced.clear()
            if once != 'never':
                with settled(net, gathering=once == 'gathering'):
                    for _ in range(2):  # micro-batches
                        net(*inputs).square().mean().backward()
                assert len(forced) == len(set(forced)) > 30
            else:
                for _ in range(2):
                    net(*inputs).square().mean().backward()
                assert len(forced) > len(set(forced))
            assert all(out.is_contiguous(memory_format=layout) for out in seen)
            found[layout, once] = [p.grad for p in net.parameters() if p.grad is not None]
    first = found.pop((torch.channels_last, 'never'))
    scale = max(g.norm() for g in first)
    for gradients in found.values():
        for a, b in zip(gradients, first, strict=True):
            assert (a - b).norm() < 3e-5 * scale  # thirty layers' roundings; was 1.1e-5


def test_a_wrong_preset_is_one_line():
    process = subprocess.run(
        [sys.executable, '-m', 'benchmarks.speed', '--networks=edm2-digits'], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 2 and process.stderr.count('\n') == 1
    assert process.stderr.startswith("speed.py: error: unknown preset 'edm2-digits'")


def test_steps_have_the_gradient_of_the_formulation(monkeypatch):
    """In one batch and in micro-batches, whose weights are computed once; the formulation does all that it says."""
    computed, used_weight, found = Counter(), MPConv.used_weight, []
    monkeypatch.setattr(MPConv, 'used_weight', lambda layer, *a: computed.update([layer]) or used_weight(layer, *a))
    forced, settle, cleaned, clean = Counter(), MPConv.settle, [], torch.nan_to_num
    monkeypatch.setattr(MPConv, 'settle', lambda layer: forced.update([layer]) or settle(layer))
    monkeypatch.setattr(torch, 'nan_to_num', lambda g, **how: cleaned.append(g) or clean(g, **how))
    for around, micro in ((speed.formulation, 4), (contextlib.nullcontext, 8), (contextlib.nullcontext, 2)):
        config = replace(get_preset('edm2plus-digits'), batch=8, micro_batch=micro, augment=None)
        with around():
            method = config.method.build(config, torch.device('cpu'))
            for name, p in method.net.named_parameters():
                if name.endswith('_gain'):
                    torch.nn.init.ones_(p)
            for seen in (computed, forced, cleaned):
                seen.clear()
            stored = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
            parts = zip(*(x.split(micro) for x in (stored, torch.arange(8), torch.arange(8))), strict=True)
            inputs = [training_inputs(y, c, n.tolist(), config, torch.device('cpu')) for y, c, n in parts]
            method.step(iter(inputs), 0, PhaseTimer(torch.device('cpu')))
        found.append([p.grad for p in method.net.parameters()])
        ours, there = around is contextlib.nullcontext, sum(g is not None for g in found[-1])
        assert set(computed.values()) == ({1} if ours else set()) and set(forced.values()) == {1 if ours else 8 / micro}
        assert method.optimizers['net'].defaults['fused'] == (ours or None) and len(cleaned) == (0 if ours else there)
        assert not any(layer.gathering or layer.kept is not None for layer in method.net.modules() if layer in computed)
    scale = max(g.norm() for g in found[0])
    for gradients in found[1:]:
        for a, b in zip(gradients, found[0], strict=True):
            assert (a - b).norm() < 3e-6 * scale  # ten layers' roundings


def test_gathering_among_frozen_weights_and_mistakes():
    x, found = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for gathering in (False, True):
        net = torch.nn.Sequential(MPConv(8, 8, 3), MPConv(8, 8, 3)).train()
        for layer in net:
            layer.reset_parameters(torch.Generator().manual_seed(1))
        net[0].requires_grad_(False)
        with settled(net, gathering):
            for _ in range(2):
                with torch.no_grad():
                    net(x.to(torch.bfloat16))
                net(x).pow(3).mean().backward()
        assert net[0].weight.grad is None
        found.append(net[1].weight.grad.clone())
        with pytest.raises(ZeroDivisionError), settled(net, gathering):
            net(x).sum().backward()
            raise ZeroDivisionError
        assert not any(layer.settled or layer.gathering or layer.kept is not None for layer in net)
    torch.testing.assert_close(*found)


def test_training_is_timed_when_its_memory_is_there():
    cpu, calls = torch.device('cpu'), []
    for what in ('train', 'latency'):
        case = speed.Case(what, 'edm2plus-digits', 'users', 'fp32', False, 1, lambda: calls.append(time.sleep(0.02)))
        assert case.seconds(cpu) >= 0.02
    assert len(calls) == 3


def test_layouts_as_measured(monkeypatch):
    cpu, gpu, last, first = torch.device('cpu'), torch.device('cuda'), torch.channels_last, torch.contiguous_format
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda amx=amx: amx, raising=False)
        assert features_format(cpu, depthwise=False, training=True) == (last if amx else first)
        assert {
            features_format(gpu, False, True),
            features_format(cpu, True, True),
            features_format(cpu, False, False),
        } == {last}
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    assert features_format(cpu, depthwise=False, training=True) == first


def test_emulated_precisions(monkeypatch, capsys):
    cpu = torch.device('cpu')
    monkeypatch.setattr(denoiser.platform, 'machine', lambda: 'x86_64')
    for units in ((False, False), (True, False), (False, True)):
        for name, there in zip(('_is_avx512_bf16_supported', '_is_amx_tile_supported'), units, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda there=there: there, raising=False)
        assert denoiser.is_emulated('bf16', cpu) == (not any(units))
        assert not denoiser.is_emulated('fp32', cpu) and not denoiser.is_emulated('bf16', torch.device('cuda'))
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    note_execution(EAGER, 1, 'bf16', cpu)
    assert 'emulates bf16' in capsys.readouterr().err
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    assert not denoiser.is_emulated('bf16', cpu)  # nobody knows


def test_training_says_that_bf16_is_emulated(archive, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, 'train', lambda *_, **options: seen.append(options['notes']))
    words = ['--preset=edm2plus-digits', f'--data={archive}', '--device=cpu', '--precision=bf16', '--batch-gpu=32']
    for emulated in (True, False):
        monkeypatch.setattr(script, 'is_emulated', lambda *_, emulated=emulated: emulated)
        result = CliRunner().invoke(script.main, [*words, f'--outdir={tmp_path}/run'], standalone_mode=False)
        assert result.exit_code == 0, result.output
        assert ('emulates bf16' in result.output) == emulated == any('emulates bf16' in line for line in seen.pop())


def test_tf32_of_networks_alone(tiny_config, monkeypatch):
    backends, seen = (torch.backends.cudnn, torch.backends.cuda.matmul), []
    look = lambda *_: seen.append([backend.allow_tf32 for backend in backends])  # noqa: E731
    monkeypatch.setattr(portions, 'PORTION_FEATURES', 1)  # as on a GPU, no threads beside each other
    net = busy(tiny_config)
    net.register_forward_pre_hook(look)
    state = TrainState(replace(get_preset('edm2plus-digits'), network=tiny_config, tf32=True), torch.device('cpu'))
    monkeypatch.setattr(state.method, 'step', look)
    with tf32(False):
        images_of(net, range(1), sampler={'steps': 1}, execution=Execution(tf32=True))
        images_of(net, range(1), sampler={'steps': 1}, execution=EAGER)
        Stepper(state, iter([]), PhaseTimer(torch.device('cpu')))()
        look()
    assert seen == [[True] * 2, [False] * 2, [True] * 2, [False] * 2]


def test_averages_every_few_steps(tiny_config):
    """Updates at every second step give what eq. 127 says of weights that change at every second step."""
    preset = get_preset('edm2plus-digits')
    config = replace(preset, network=tiny_config, ema_every=2, ema=Averages((0.1,), halflife=4096, rampup=0))
    state, b = TrainState(config, torch.device('cpu')), config.batch
    expected = halved = 0.0
    halved = state.net.unet.out_gain.item()
    for step in range(1, 7):
        state.nimg = step * b
        torch.nn.init.constant_(state.net.unet.out_gain, step)
        state.update_averages()
        if step % 2 == 0:
            expected += (step - expected) * (1 - ema_beta(0.1, step, 2))
            halved += (step - halved) * (1 - 0.5 ** (2 * b / 4096))
        if step > 1:
            assert state.ema.averages[0.1]['unet.out_gain'].item() == pytest.approx(expected, rel=1e-5)
            assert state.traditional.average['unet.out_gain'].item() == pytest.approx(halved, rel=1e-5)
    for changes in ({'ema_every': 0}, {'ema_every': 3, 'snapshot': 4 * b}):
        with pytest.raises(UserError, match='ema_every'):
            replace(preset, **changes).check()


def test_benchmark(tmp_path):
    words = ['--networks=edm2plus-digits,sid2-digits', '--reference=edm2plus-digits', '--batches=2,2', '--rounds=1']
    result = CliRunner().invoke(speed.main, [*words, f'--json={tmp_path}/speed.json', '--device=cpu'])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / 'speed.json').read_text())
    names = ('what', 'network', 'as', 'precision', 'compiled', 'batch', 'seconds', 'ratio')
    assert len(rows) == 9 and all(set(row) == set(names) for row in rows)
    assert [row['ratio'] for row in rows if row['as'] == 'formulation'] == [1, 1, 1]
    assert {row['what'] for row in rows} == {'latency', 'throughput', 'train'}
    assert all(row['seconds'] > 0 and row['ratio'] > 0 for row in rows)
    assert '| latency | edm2plus-digits | users |' in result.output
