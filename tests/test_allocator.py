"""Memory that tensors free is used again, without a visit to the system."""

import platform
import subprocess
import sys

import pytest
import torch

from training import loop
from training.presets.table import get_preset

SCRIPT = """
import resource, torch
from torch_utils.allocator import keep_freed_memory

def share():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, more than glibc keeps by itself
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**26

keep_freed_memory({keep})
print(min(share() for _ in range(20)))  # small ones may settle in the hole that a large one leaves, at first
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries have no such setting')
def test_freed_memory_is_kept():
    """Shares of a tensor that are new pages; huge pages, where the system gives them, are one for 512."""
    found = []
    for keep in (False, True):
        words = [sys.executable, '-c', SCRIPT.format(keep=keep)]
        found.append(float(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    default, kept = found
    assert kept < 1e-3 < default


@pytest.mark.parametrize('kind', ['cpu', 'cuda'])
def test_training_keeps_it_on_a_cpu(kind, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(loop, 'keep_freed_memory', lambda: calls.append(kind))
    monkeypatch.setattr(loop, 'TrainState', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(get_preset('edm2plus-digits'), None, tmp_path, torch.device(kind))
    assert calls == ['cpu'] * (kind == 'cpu')
