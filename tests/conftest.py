"""What all tests share: one thread each (two workers run side by side), scripts as subprocesses, golden numbers."""

import os

from dnnlib.configs import replaced
from tests.helpers import edm2_network
from training.methods.denoising import DenoisingConfig

os.environ.setdefault('OMP_NUM_THREADS', '1')  # read once, when torch is imported; subprocesses inherit it

import importlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import hypothesis
import pytest
import torch

from dataset.reader import ImageDataset
from diffusion.levels import LogNormal
from dnnlib import cli
from dnnlib.signals import STOPPING
from networks.config import NetworkConfig
from tests.helpers import make_archive
from training.config import TrainConfig
from training.loop import train
from training.optimizer import Optimizer

ROOT = Path(__file__).parent.parent

# A shell ignores it for what it starts in the background, and so would processes that tests want to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile('edm2plus', deadline=None, derandomize=True)  # no timed, no random failures
hypothesis.settings.load_profile('edm2plus')


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """As before after every test: train.py, run in this process, leaves signals ignored, and processes inherit that."""
    before = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def golden():
    """Numbers computed with the reference formulation; see its `about`."""
    return json.loads((ROOT / 'tests/golden/edm2.json').read_text())


@pytest.fixture
def run_script(tmp_path):
    """Run a root script in a subprocess with warnings as errors; returns the completed process."""

    def run(script: str, *args, ranks: int = 0, timeout: float = 120, env: dict | None = None):
        head = [sys.executable, str(ROOT / script)]
        if ranks:
            torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
            head = [*torchrun, str(ROOT / script)]
        environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONWARNINGS': 'error', **(env or {})}
        return subprocess.run(
            [*head, *map(str, args)], capture_output=True, text=True, cwd=tmp_path, timeout=timeout, env=environment
        )

    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Run a root script as `run_script` does, but in this process, which takes no seconds to start."""

    def run(script: str, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.run(importlib.import_module(Path(script).stem).main)
        return subprocess.CompletedProcess(sys.argv, end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope='session')
def tiny_config() -> NetworkConfig:
    """A network that takes milliseconds: 8x8 grayscale, 10 classes."""
    return edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16)


@pytest.fixture(scope='session')
def archive(tmp_path_factory):
    """A dataset of 30 images in 10 classes."""
    return make_archive(tmp_path_factory.mktemp('data') / 'tiny.zip', count=30, classes=10)


@pytest.fixture(scope='session')
def config(archive, tiny_config) -> TrainConfig:
    """A run of eight steps on it, seconds long."""
    dataset = ImageDataset(archive)
    return TrainConfig(
        preset='edm2plus-digits',
        data=str(archive),
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        network=replaced(tiny_config, {'architecture.dropout': 0.1}),
        method=DenoisingConfig(LogNormal(-0.8, 1.6)),
        optimizer=Optimizer(0.01, 100, 2048),
        duration=2048,
        batch=256,
        snapshot=1024,
        checkpoint=1024,
        status=256,
        preview=2048,
    )


@pytest.fixture
def run(tmp_path):
    """Train in this process, without the picture of the loss, which takes as long as steps; returns the run folder."""

    def train_in(name: str, config: TrainConfig):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        with mock.patch('training.loop.plot_loss'):
            train(config.check(), ImageDataset(config.data), folder, torch.device('cpu'))
        return folder

    return train_in


@pytest.fixture(scope='session')
def trained_once(config, tmp_path_factory):
    """The run folder of `config`, for `finished` alone."""
    folder = tmp_path_factory.mktemp('trained')
    train(config, ImageDataset(config.data), folder, torch.device('cpu'))
    return folder


@pytest.fixture
def finished(trained_once, tmp_path):
    """Copy the run folder of `config`, which is trained once, to a folder of that name; returns it."""
    return lambda name: Path(shutil.copytree(trained_once, tmp_path / name))


@pytest.fixture(autouse=True)
def no_change_of_global_randomness():
    """Random numbers come from explicit generators: nothing may draw from the global one."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), 'the global random state was used'


def pytest_sessionfinish(session):
    """With ALL_PACKAGES=1, as `make test-all` sets it, a test that was skipped for want of a package fails the run."""
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    reasons = [str(report.longrepr) for report in getattr(reporter, 'stats', {}).get('skipped', ())]
    if os.environ.get('ALL_PACKAGES') == '1' and any('import' in r or 'install' in r for r in reasons):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
