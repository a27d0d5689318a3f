"""What it costs that an image is the same to the bit in every batch: portions of fixed size against whole batches.

python benchmarks/portions.py
"""

import statistics
import time

import click
import torch

from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.edm2.config import EDM2Config
from sampling.portions import evaluating, portion_size

NETWORKS = {
    '8x8x1, 64 channels, G*': NetworkConfig((8, 8), 1, 10, EDM2Config(64, (1, 2), 2, (8, 4))),
    '32x32x3, 64 channels, G*': NetworkConfig((32, 32), 3, 10, EDM2Config(64, (1, 2, 2), 1, (16, 8))),
    '32x32x3, 64 channels, A': NetworkConfig((32, 32), 3, 10, EDM2Config(64, (1, 2, 2), 1, (16, 8), block='A')),
    '64x64x3, 64 channels, G*': NetworkConfig((64, 64), 3, 10, EDM2Config(64, (1, 2, 3, 4), 1, (16, 8))),
}
BATCHES = (64, 1)
ROUNDS = 5


def seconds(evaluate, x: torch.Tensor, labels: torch.Tensor) -> float:
    """One evaluation of a batch."""
    start = time.perf_counter()
    evaluate(x, torch.tensor(1.0), labels)
    return time.perf_counter() - start


@click.command()
@torch.inference_mode()
def main() -> None:
    """Print the time of each and the median of their ratios, measured in turn."""
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    print('| network | portion | batch | whole ms | portions ms | ratio |')
    print('|---|---:|---:|---:|---:|---:|')
    for name, config in NETWORKS.items():
        net = Denoiser(config).eval().requires_grad_(False)
        for batch in BATCHES:
            x, labels = torch.zeros(batch, config.img_channels, *config.img_resolution), torch.eye(10)[[3] * batch]
            with evaluating([net], batch) as (portions,):
                pairs = [(seconds(net, x, labels), seconds(portions, x, labels)) for _ in range(ROUNDS + 1)][1:]
            a, b = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
            ratio = statistics.median(y / x for x, y in pairs)
            print(f'| {name} | {portion_size(config)} | {batch} | {a:.1f} | {b:.1f} | {ratio:.2f} |', flush=True)


if __name__ == '__main__':
    main()
