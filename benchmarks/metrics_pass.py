"""The whole pass of a metric (read, decode, detect, accumulate) against its detector alone, measured side by side.

python benchmarks/metrics_pass.py [--detector=inception|pixels] [--count=128] [--workers=0]

Inception gets random weights of the public layout: its speed does not depend on them.
"""

import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from dataset.reader import ImageDataset
from metrics.detectors import DetectorOptions, load_detectors
from metrics.frechet import frechet_distance
from metrics.gathering import Need, gather
from metrics.reading import describe, read_batches
from tests.helpers import make_archive, random_inception


@click.command()
@click.option('--detector', 'name', default='inception')
@click.option('--count', default=128)
@click.option('--batch', default=32)
@click.option('--side', default=64)
@click.option('--workers', default=0)
@click.option('--rounds', default=3)
def main(name: str, count: int, batch: int, side: int, workers: int, rounds: int) -> None:
    """Print images/s of the detector on images in memory, of reading alone, and of the whole pass."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    with tempfile.TemporaryDirectory() as folder:
        options = DetectorOptions(any_weights=True)
        if name == 'inception':
            options = DetectorOptions(str(random_inception(Path(folder) / 'random.pth')), any_weights=True)
        detector = load_detectors([name], device, options)[name]
        dataset = ImageDataset(make_archive(Path(folder) / 'data.zip', count, 0, (3, side, side)))
        batches = [b.images.to(device) for b in read_batches(dataset, batch, 'load')]

        def wait() -> None:
            if device.type == 'cuda':
                torch.cuda.synchronize()

        def detect() -> None:
            for images in batches:
                detector(images)
            wait()

        def read() -> None:
            for _ in read_batches(dataset, batch, 'read', workers):
                pass

        def whole() -> None:
            needs = [Need(name, 'statistics')]
            gather(describe(dataset), read_batches(dataset, batch, 'whole', workers), needs, device, {name: detector})
            wait()

        times: dict[str, list[float]] = {'detector alone': [], 'reading alone': [], 'whole pass': []}
        detect()
        for _ in range(rounds):
            for title, work in zip(times, (detect, read, whole), strict=True):
                start = time.perf_counter()
                work()
                times[title].append(time.perf_counter() - start)
    print(f'{name}, {count} PNGs of {side}x{side}, batch {batch}, {device.type}, {torch.get_num_threads()} threads')
    for title, seconds in times.items():
        print(f'| {title} | {count / statistics.median(seconds):.1f} images/s |')
    print(f'| Fréchet distance, 2048 features | {frechet_seconds():.1f} s |')


def frechet_seconds(size: int = 2048) -> float:
    """Seconds for two regular covariances."""
    x, y = (
        torch.randn(size + 500, size, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    )
    arguments = (x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    start = time.perf_counter()
    frechet_distance(*arguments)
    return time.perf_counter() - start


if __name__ == '__main__':
    main()
