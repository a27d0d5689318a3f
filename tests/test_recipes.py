"""What CONTRIBUTING.md says of additions: the examples, put where it says, in a copy of this project, and run."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers import state_tensors

BLOCKS = re.findall(
    r'```python\n# (\S+?\.py)(?:: a row of (\w+))?\n(.*?)```', (ROOT / 'CONTRIBUTING.md').read_text(), re.S
)
SMALL = ['--duration=1024', '--snapshot=1024', '--checkpoint=1024', '--preview=1024', '--status=128', '--channels=16']


def apply(place: Path, path: str, table: str, code: str) -> None:
    """Do what a block says: write a file, or add a row (its last line), and before the table what the row names."""
    if not table:
        assert not (place / path).exists()
        (place / path).write_text(code)
        return
    text, (before, row) = (place / path).read_text(), code.strip().rsplit('\n', 1)
    if not before.startswith('@'):  # imports go to the top, classes before the table
        end = ast.parse(text).body[0].end_lineno
        lines = text.split('\n')
        text, before = '\n'.join([*lines[:end], before, *lines[end:]]), ''
    head = re.search(rf'^{table}\b.*?= {{', text, re.M)
    (place / path).write_text(f'{text[: head.start()]}{before}\n\n{head[0]}\n    {row}\n{text[head.end() :]}')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A copy of the project with all examples in it."""
    place = tmp_path_factory.mktemp('copy') / 'project'
    shutil.copytree(
        ROOT, place, ignore=lambda folder, names: {n for n in names if n.startswith('.') or n in ('tests', 'demo')}
    )
    for path, table, code in BLOCKS:
        apply(place, path, table, code)
    return place


@pytest.fixture(scope='module')
def run(place, archive):
    """Run a script of the copy; --data and the sizes of a short run are given."""

    def run(script: str, *args: str, ranks: int = 0) -> str:
        torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks else []
        common = ['--preset=edm2plus-digits', f'--data={archive}'] if script == 'train.py' else []
        done = subprocess.run(
            [sys.executable, *torchrun, script, *common, *args], cwd=place, capture_output=True, text=True, timeout=120,
            env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def resumed_equals_whole(run, place, name: str, *args: str) -> dict[str, torch.Tensor]:
    """Train in one go and in two; return the tensors of the state, which must be the same."""
    run('train.py', *args, f'--outdir={name}')
    for _ in range(2):
        run('train.py', *args, f'--outdir={name}-2', '--slice=512')
    whole, parts = (state_tensors(place / folder) for folder in (name, f'{name}-2'))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    return whole


def test_examples_touch_at_most_two_files():
    assert [path for path, _, _ in BLOCKS] == [
        *('networks/toy.py', 'networks/families.py', 'diffusion/weightings.py'),
        *('sampling/renoising.py', 'sampling/table.py', 'training/methods/twins.py', 'training/methods/table.py'),
    ]


@pytest.mark.slow
def test_family(run, place):
    small = [flag for flag in SMALL if 'channels' not in flag]
    toy = ['--set=network.architecture=toy', '--set=network.architecture.width=8', *small]
    whole = resumed_equals_whole(run, place, 'toy', *toy)
    run('train.py', *toy, '--outdir=toy-ranks', ranks=2)
    ranks = state_tensors(place / 'toy-ranks')
    for name in (key for key in whole if key.startswith('net/')):
        torch.testing.assert_close(whole[name], ranks[name], rtol=1e-3, atol=1e-4)
    run('reconstruct_phema.py', '--indir=toy', '--outstd=0.08')
    run('generate.py', '--net=toy/phema-0000001-0.080.safetensors', '--seeds=0-3', '--steps=2', '--outdir=toy-images')
    assert len(list((place / 'toy-images').glob('*.png'))) == 4
    counted = json.loads(run('count_flops.py', '--net=toy/phema-0000001-0.080.safetensors', '--json'))
    assert counted['config']['architecture'] == {'family': 'toy', 'width': 8}
    # Two 3x3 convolutions, a linear layer for noise level and 10 classes, and the uncertainty head.
    assert counted['parameters'] == (9 + 1) * 8 + (11 + 1) * 8 + (9 * 8 + 1) + 128
    assert counted['macs'] == 64 * 2 * 9 * 8 + 11 * 8
    assert re.search(r'^parameters +0\.00 M$', run('train.py', *toy, '--dry-run'), re.M)
    run('train.py', *toy, '--seed=1', '--lr=1e-30', '--outdir=toy-seed')
    run('train.py', *toy, '--seed=0', '--lr=1e-30', '--outdir=toy-same')
    run('train.py', *toy, '--seed=0', '--lr=1e-30', '--outdir=toy-again')
    first, second, again = (state_tensors(place / f'toy-{name}') for name in ('same', 'seed', 'again'))
    weight = 'net/unet.conv_in.weight'
    assert torch.equal(first[weight], again[weight]) and not torch.equal(first[weight], second[weight])


@pytest.mark.slow
def test_weighting(run, place):
    inverse = ['--set=method.weighting=inverse', '--set=network.uncertainty=0', *SMALL]
    whole = resumed_equals_whole(run, place, 'inverse', *inverse)
    assert not any('logvar' in name for name in whole)
    run('train.py', *inverse, '--outdir=inverse-ranks', ranks=2)
    # The head without its use: parameters that never have a gradient.
    unused = ['--set=method=unused', *SMALL]
    (place / 'training/methods/unused.py').write_text(UNUSED)
    apply(place, 'training/methods/table.py', 'METHODS', ROW)
    resumed_equals_whole(run, place, 'unused', *unused)
    run('train.py', *unused, '--outdir=unused-ranks', ranks=2)


UNUSED = """
import dataclasses
from training.methods.denoising import DenoisingConfig, Denoising, DenoisingLoss
from training.update import Update


class PlainLoss(DenoisingLoss):
    def forward(self, *args):
        sigma, _, errors = super().forward(*args)
        return sigma, errors, errors


@dataclasses.dataclass(frozen=True)
class UnusedConfig(DenoisingConfig):
    def build(self, config, device):
        method = Denoising(config, device)
        method.update = Update(PlainLoss(method.net, config.method), method.optimizers['net'], config)
        return method
"""
ROW = "from training.methods.unused import UnusedConfig\n\n'unused': UnusedConfig,\n"


@pytest.mark.slow
def test_sampler(run, place):
    run('train.py', *SMALL, '--outdir=base')
    net = '--net=base/network-snapshot-0000001-0.100.safetensors'
    pictures = {}
    for name, options in (
        ('warm', ['--warmth=1']),
        ('mild', ['--warmth=0.5']),
        ('again', ['--warmth=0.5', '--batch=1']),
    ):
        run('generate.py', net, '--sampler=renoising', *options, '--steps=4', '--seeds=0-3', f'--outdir={name}')
        record = json.loads((place / name / 'generation.json').read_text())
        assert record['sampler']['sampler']['name'] == 'renoising'
        pictures[name] = [path.read_bytes() for path in sorted((place / name).glob('*.png'))]
    assert pictures['mild'] == pictures['again'] != pictures['warm']
    assert '--warmth' in run('calculate_metrics.py', 'gen', '--help')


@pytest.mark.slow
def test_method(run, place):
    whole = resumed_equals_whole(run, place, 'twins', '--set=method=twins', *SMALL)
    weight = 'unet.out_conv.weight'
    assert not torch.equal(whole[f'net/{weight}'], whole[f'twin/{weight}'])
    assert whole[f'optimizer/twin/{weight}/step'] == whole[f'optimizer/net/{weight}/step'] == 8
    run('train.py', '--set=method=twins', *SMALL, '--outdir=twins-ranks', ranks=2)
