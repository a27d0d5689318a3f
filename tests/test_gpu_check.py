"""The page about a machine: all of it on a CPU, in small; and what it says where something is broken on purpose."""

import contextlib
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional

from benchmarks import gpu_check, machine_checks, rank_checks
from benchmarks.check_lines import Line
from networks import denoiser
from tests.conftest import ROOT
from tests.golden_networks import RELATIVE
from training.state import TrainState

CPU = torch.device('cpu')


def missed(lines) -> list[str]:
    """What was missed."""
    return [line.what for line in lines if line.ok is False]


@pytest.mark.slow
def test_all_checks_on_a_cpu(tmp_path):
    command = [sys.executable, '-m', 'benchmarks.gpu_check', '--device=cpu', '--quick', f'--dest={tmp_path}/page.md']
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    page, record = (tmp_path / 'page.md').read_text(), json.loads((tmp_path / 'page.json').read_text())
    assert process.returncode == 0 and page.splitlines()[2].startswith('0 missed'), page + process.stderr
    assert list(record['seconds']) == list(machine_checks.CHECKS) and len(record['lines']) > 40
    for words in ('CPU, ', 'gloo, 1 rank, sum', 'gloo, 2 ranks, gradient', 'flash_attention', 'latency', 'fd_pixels'):
        assert words in page


def test_page(tmp_path):
    result = CliRunner().invoke(gpu_check.main, ['--device=cpu', '--checks=machine', f'--dest={tmp_path}/page.md'])
    assert result.exit_code == 0 and '1 ok, 0 not checked' in result.output, result.output
    assert '| ok | CPU, ' in (tmp_path / 'page.md').read_text()
    lines = [Line('a|b', '1\n2', '3', False), Line('c', '', '', None, 'no GPU'), Line('d', '4', '4', True)]
    page = gpu_check.page(lines, {'x': 1.5, 'y': 2.0}, {'x': '\n'.join(map(str, range(100)))})
    assert '1 missed, 1 ok, 1 not checked.' in page and '| **missed** | a\\|b | 1 2 | 3 |' in page
    assert '| not checked: no GPU | c |' in page and 'x 2, y 2; together 4.' in page
    assert '    99\n' in page and '    75\n' in page and '    74\n' not in page


def test_what_ends_a_check_is_a_line(monkeypatch, tmp_path):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    (line,), said = gpu_check.run('golden', 0, 'cuda', True, 60)
    assert line.ok is False and line.what == 'golden' and 'ended with exit code 2: ' in line.measured
    assert 'device cuda:0 is not there' in line.measured and 'device cuda:0' in said
    (line,), _ = gpu_check.run('golden', 0, 'cpu', True, 0.2)
    assert line.ok is False and line.measured.startswith('did not end within 0 s')
    monkeypatch.setitem(gpu_check.SECONDS, 'cpu', 0)
    result = CliRunner().invoke(gpu_check.main, ['--device=cpu', '--checks=golden', f'--dest={tmp_path}/page.md'])
    assert result.exit_code == 0 and 'not checked: the others took all the time' in (tmp_path / 'page.md').read_text()
    monkeypatch.setattr(gpu_check, 'run', lambda *args: ([line], 'its last words'))
    monkeypatch.setitem(gpu_check.SECONDS, 'cpu', 10)
    result = CliRunner().invoke(gpu_check.main, ['--device=cpu', '--checks=golden', f'--dest={tmp_path}/page.md'])
    assert result.exit_code == 1 and 'its last words' in (tmp_path / 'page.md').read_text()


EVALUATED, TRAINED = 'evaluation to golden values', ('losses and images of three steps', 'norms of gradients')


@pytest.mark.parametrize(
    ('what', 'found'),
    [
        ('golden value', [EVALUATED]),
        ('golden norm', [TRAINED[1]]),
        ('weight', [EVALUATED, *TRAINED]),
        ('NaN', [EVALUATED, 'evaluation to float32 on the CPU', *TRAINED]),
        ('eleven bits', [EVALUATED, *TRAINED]),
    ],
)
def test_broken_on_purpose(what, found, golden, monkeypatch, tmp_path):
    """What the page says of a wrong golden value, a weight off by 1e-3, a NaN, and of TF32's bits for float32."""
    monkeypatch.setattr(machine_checks, 'PRECISIONS', ('fp32',))
    expected, make = json.loads(json.dumps(golden)), machine_checks.golden_net
    if what == 'golden value':
        expected['nets']['A']['D_last8'][2] += 1e-3
    elif what == 'golden norm':
        expected['nets']['G*']['train']['grad_norm_step0']['unet.enc.8x8_block0.emb_gain'] *= 1.002
    elif what == 'eleven bits':
        monkeypatch.setitem(denoiser.PRECISIONS, 'fp32', torch.float16)
    else:

        def changed(name):
            net = make(name)
            with torch.no_grad():
                net.unet.out_gain.mul_(float('nan') if what == 'NaN' else 1.001)
            return net

        monkeypatch.setattr(machine_checks, 'golden_net', changed)
    (tmp_path / 'golden.json').write_text(json.dumps(expected))
    monkeypatch.setattr(machine_checks, 'GOLDEN', tmp_path / 'golden.json')
    lines = list(machine_checks.golden(CPU, True, tmp_path))
    assert missed(lines) == [f'golden networks, fp32, {name}' for name in found] and len(lines) == 4


def test_a_precision_that_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_checks, 'PRECISIONS', ('bf16',))
    monkeypatch.setitem(denoiser.PRECISIONS, 'bf16', torch.float32)
    lines = machine_checks.golden(CPU, True, tmp_path)
    assert missed(lines) == ['golden networks, bf16, evaluation to float32 on the CPU']


def test_tf32_is_told_from_float32(monkeypatch, tmp_path):
    """With factors of convolutions and products rounded to TF32's 10 bits, as a GPU does; a CPU never does."""
    conv2d, linear, on = functional.conv2d, functional.linear, []

    def short(t):
        return ((t.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if on[-1] else t

    @contextlib.contextmanager
    def allowed(yes):
        on.append(yes)
        yield
        on.append(False)

    (line,) = machine_checks.tf32(CPU, True, tmp_path)
    assert line.ok and line.measured == '0'
    on.append(False)
    monkeypatch.setattr(functional, 'conv2d', lambda x, w, *args, **kw: conv2d(short(x), short(w), *args, **kw))
    monkeypatch.setattr(functional, 'linear', lambda x, w, *args, **kw: linear(short(x), short(w), *args, **kw))
    monkeypatch.setattr(machine_checks, 'tf32_allowed', allowed)
    (line,) = machine_checks.tf32(CPU, True, tmp_path)
    assert line.ok is False and 1e-5 < float(line.measured) < RELATIVE['fp16']


@pytest.mark.parametrize('kind', ['cpu', 'cuda'])
def test_share_of_travel_that_is_hidden(kind):
    names = {'cpu': ('gloo:all_reduce', 'autograd::engine::evaluate_function: Add', 'aten::add'),
             'cuda': ('ncclDevKernel_AllReduce', 'gemm', 'launch')}[kind]  # fmt: skip
    spans = [(0, 20, 30), (0, 50, 60), (1, 0, 25), (1, 28, 40), (2, 0, 100)]  # of 20, 5 and 2 are hidden
    events = [
        SimpleNamespace(
            name=names[i],
            time_range=SimpleNamespace(start=start, end=end),
            device_type=SimpleNamespace(name='CPU' if i == 2 else kind.upper()),
        )
        for i, start, end in spans
    ]
    assert rank_checks.hidden(events, torch.device(kind)) == 7 / 20
    assert math.isnan(rank_checks.hidden(events[2:], torch.device(kind)))


def test_a_bit_that_is_lost_in_resuming(monkeypatch, tmp_path, capfd):
    """The last bit of one weight, which after four more steps is in most."""
    load = TrainState.load

    def loaded(state, path, *args):
        load(state, path, *args)
        state.net.unet.out_gain.detach().view(torch.int32).bitwise_xor_(1)

    monkeypatch.setattr(TrainState, 'load', loaded)
    lines = list(machine_checks.resume(CPU, True, tmp_path))
    assert missed(lines) == ['stopped and resumed, deterministic algorithms', 'a state, loaded and written again']
    assert lines[1].measured == '1 of 490 tensors differ, such as net/unet.out_gain'
    assert not torch.are_deterministic_algorithms_enabled()
