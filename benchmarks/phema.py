"""Post-hoc reconstruction against merely reading the snapshots, and its memory.

python -m benchmarks.phema --snapshots=128

Snapshots of an EDM2-XS (124.7 M parameters) in FP16, with random weights, are written to a temporary folder (0.25 GB
each) and removed in the end. With fewer than fit into memory, all readings but the first come from the page cache.
"""

import argparse
import dataclasses
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ema.reconstruct import Plan, Wanted, find_snapshots
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, constant_names, save_network
from training.presets.table import get_preset

MI = 2**20


def write_snapshots(folder: Path, count: int) -> int:
    """Write them, half of each length; return their bytes."""
    config = get_preset('edm2-img512-xs').network
    constants = constant_names(config)
    weights = {n: t if n in constants else t.half() for n, t in Denoiser(config).state_dict().items()}
    info = NetworkInfo(config, 0, None, 'edm2-img512-xs')
    for i in range(count):
        nimg, std = (i // 2 + 1) * 8 * MI, (0.05, 0.10)[i % 2]
        path = folder / f'network-snapshot-{nimg // 1000:07d}-{std:.3f}.safetensors'
        save_network(path, weights, dataclasses.replace(info, nimg=nimg, ema_std=std), dtype=None)
    return sum(path.stat().st_size for path in folder.iterdir())


def read_all(folder: Path) -> None:
    """Every byte, into one buffer."""
    buffer = bytearray(4 * MI)
    for path in sorted(folder.iterdir()):
        with open(path, 'rb', buffering=0) as file:
            while file.readinto(buffer):
                pass


def seconds(job) -> float:
    """How long it takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def main() -> None:
    """Measure both in turn and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--snapshots', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--folder', help='for the snapshots; a temporary one by default')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        size = write_snapshots(folder, arguments.snapshots)
        snapshots = find_snapshots(folder)
        plan = Plan.make(snapshots, [Wanted.of_length(std) for std in (0.03, 0.075, 0.12, 0.2)])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pairs = []
        for _ in range(arguments.rounds):
            reading = seconds(lambda: read_all(folder))
            pairs.append((reading, seconds(lambda: [None for _ in plan.reconstruct()])))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, made = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds')
    print('| snapshots | GB | reading s | reconstructing 4 lengths s | ratio | peak memory MiB (before) |')
    print('|---:|---:|---:|---:|---:|---:|')
    print(f'| {arguments.snapshots} | {size / 1e9:.1f} | {read:.2f} | {made:.2f} | {ratio:.2f} | '
          f'{peak / 1024:.0f} ({before / 1024:.0f}) |')  # fmt: skip


if __name__ == '__main__':
    main()
