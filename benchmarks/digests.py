"""What digests cost: saving and loading a training state and a network file of 280 M parameters, with and without.

    OMP_NUM_THREADS=1 python -m benchmarks.digests [--folder=DIR] [--scale=1]

The tensors of the state are those of `edm2-img64-s` in training: weights, Adam's two averages, two EMAs, float32; the
network file has the weights alone. Reads come from the page cache, which is where digests weigh most.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import click
import torch

from torch_utils import tensor_files
from torch_utils.tensor_files import TensorFile, save_tensors

BLOCK = 1536 * 768 * 9  # elements of a large convolution
BLOCKS = 26  # 276 M


def seconds(work: Callable[..., None], *args) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def read(path: Path, verify: bool) -> None:
    """Load all tensors into memory of their own, as a state is loaded."""
    with TensorFile(path, 'benchmark', verify=verify) as file:
        for _, tensor in file.items():
            tensor.clone()


def write(path: Path, tensors: dict[str, torch.Tensor], digests: bool) -> None:
    """Save all tensors."""
    with mock.patch.object(tensor_files, 'digest', tensor_files.digest if digests else lambda tensor, shape: ''):
        save_tensors(path, tensors, {'kind': 'benchmark'})


@click.command()
@click.option('--folder', type=click.Path(path_type=Path), help='On the disk to measure; by default a temporary one.')
@click.option('--scale', type=float, default=1.0, help='Of the number of parameters.')
@click.option('--rounds', type=int, default=5)
def main(folder, scale, rounds):
    """Print a table of medians, the variants in turn."""
    print(f'| file | GiB | save s | with digests | ratio | load s | with digests | ratio |\n|---|{"---:|" * 7}')
    with TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, 'tensors.safetensors')
        for name, copies in (('training state', 5), ('network, float32', 1)):
            block = torch.randn(BLOCK)
            tensors = {f'{c}.{i}': block.clone() for c in range(copies) for i in range(max(1, round(BLOCKS * scale)))}
            times: dict[tuple[str, bool], list[float]] = {}
            for _ in range(rounds):
                for digests in (False, True):
                    times.setdefault(('save', digests), []).append(seconds(write, path, tensors, digests))
                for digests in (False, True):  # the last file written has them
                    times.setdefault(('load', digests), []).append(seconds(read, path, digests))
            found = {key: statistics.median(values) for key, values in times.items()}
            cells = [
                f'{found[what, False]:.2f} | {found[what, True]:.2f} | {found[what, True] / found[what, False]:.2f}'
                for what in ('save', 'load')
            ]
            print(f'| {name} | {path.stat().st_size / 2**30:.2f} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
