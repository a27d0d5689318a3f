"""The main job in small, through the real scripts: convert, train, reconstruct, generate, measure."""

import json
import re

import pytest
import torch

from networks.files import load_network, read_info
from tests.conftest import ROOT
from training.monitor.log import read_stats


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    """A run of the digits preset for a fifteenth of its length, with a narrower network, and what follows from it."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp('job')

    def run(script: str, *args: str) -> str:
        process = subprocess.run(
            [sys.executable, '-W', 'error', str(ROOT / script), *args],
            cwd=folder, capture_output=True, text=True, timeout=400,
            env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return process.stdout

    run('dataset_tool.py', 'convert', '--source=digits', '--dest=digits.zip')
    run(
        'train.py',
        *('--preset=edm2plus-digits', '--data=digits.zip', '--outdir=run', '--channels=32', '--batch=64'),
        *('--duration=8Ki', '--rampup=2Ki', '--snapshot=1Ki', '--checkpoint=4Ki', '--preview=4Ki', '--seed=0'),
    )
    text = run('reconstruct_phema.py', '--indir=run', '--outdir=ema', '--outstd=0.050,0.150')
    net = 'ema/phema-0000008-0.150.safetensors'
    run('generate.py', f'--net={net}', '--seeds=0-19', '--class=0-9', '--outdir=samples', '--steps=9')
    run(
        'calculate_metrics.py', 'gen', f'--net={net}', '--ref=digits.zip', '--metrics=fd_pixels,class_agreement',
        '--seeds=0-299', '--steps=9', '--json=metrics.json',
    )  # fmt: skip
    run('calculate_metrics.py', 'calc', '--images=samples', '--ref=digits.zip', '--json=calc.json')
    return folder, text


def test_training_learned(job):
    records = read_stats(job[0] / 'run')
    assert records[-1]['nimg'] == 8 * 1024
    assert records[-1]['mse'] < 0.6 * records[0]['mse']


def test_reconstruction_of_a_stored_length_is_the_snapshot(job):
    folder, text = job
    # Snapshots and their combination are rounded to float16.
    a, _ = load_network(folder / 'ema/phema-0000008-0.050.safetensors')
    b, _ = load_network(folder / 'run/network-snapshot-0000008-0.050.safetensors')
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    info = read_info(folder / 'ema/phema-0000008-0.150.safetensors')
    assert info.ema_std == 0.15 and info.nimg == 8 * 1024 and info.preset == 'edm2plus-digits'
    error = float(re.search(r'0\.150\.safetensors {2}profile error ([\d.]+)', text)[1])
    assert 0 < error < 0.1


def test_metrics(job):
    folder, _ = job
    metrics = json.loads((folder / 'metrics.json').read_text())
    fd, agreement = metrics['metrics']['fd_pixels'], metrics['metrics']['class_agreement']
    # Random classes would agree in a tenth, and images of noise are at a distance of more than 10.
    assert agreement['value'] > 0.5, agreement
    assert fd['value'] < 2 and fd['num_images'] == 300 and 0 < fd['real_halves'] < 0.1, fd
    assert metrics['images']['seeds'] == ['0-299'] and metrics['images']['net']['ema_std'] == 0.15
    calc = json.loads((folder / 'calc.json').read_text())
    assert calc['metrics']['fd_pixels']['num_images'] == 20


def test_pictures(job):
    folder, _ = job
    for name in ('samples-grid.png', 'run/samples-0000004.png', 'run/samples-0000008.png', 'run/loss.png'):
        assert (folder / name).stat().st_size > 1000, name
    assert len(list((folder / 'samples').glob('*.png'))) == 20
