"""What all tests share: one thread each (two workers run side by side), scripts as subprocesses, golden numbers."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # read once, when torch is imported; subprocesses inherit it

import json
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from networks.config import NetworkConfig

ROOT = Path(__file__).parent.parent

hypothesis.settings.register_profile('edm2plus', deadline=None, derandomize=True)  # no timed, no random failures
hypothesis.settings.load_profile('edm2plus')


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
        # The exception: gradients of 1x1 kernels come in another (equivalent) layout than DDP's buckets have.
        warnings = 'error,ignore:Grad strides do not match bucket view strides'
        environment = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONWARNINGS': warnings, **(env or {})}
        return subprocess.run(
            [*head, *map(str, args)], capture_output=True, text=True, cwd=tmp_path, timeout=timeout, env=environment
        )

    return run


@pytest.fixture
def tiny_config() -> NetworkConfig:
    """A network that takes milliseconds: 8x8 grayscale, 10 classes."""
    return NetworkConfig((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16)


@pytest.fixture(autouse=True)
def no_change_of_global_randomness():
    """Random numbers come from explicit generators: nothing may draw from the global one."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), 'the global random state was used'
