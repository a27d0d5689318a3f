"""How fast datasets are made and read, and what opening one of ImageNet's size takes.

    python benchmarks/datasets.py convert                       # images/s of one core, 500x375 JPEG to 64x64
    python benchmarks/datasets.py loader --workers=1,2,4        # images/s of PNG and latents, beside decoding alone
    python benchmarks/datasets.py open --count=1281167          # seconds and memory, without and with the index

Everything is made in a temporary folder (`--folder` for another) and removed.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from dataset.files.archive import decode_image, decode_npy
from dataset.files.index import index_path
from dataset.files.writer import DatasetWriter, encode_npy, encode_png
from dataset.making.convert import Recipe, make_file
from dataset.order import BatchOrder, make_loader
from dataset.reader import ImageDataset
from dataset.sources.table import open_source

BATCH = 64
folder_option = click.option('--folder', help='Where to put the data for a while.')


@click.group()
def main() -> None:
    """How fast datasets are made and read."""


def photographs(count: int, width: int, height: int) -> list[np.ndarray]:
    """Crops of scikit-learn's photographs, so that compression has the work that it has with real images."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    images = load_sample_images().images
    crops = []
    for i in range(count):
        photo = PIL.Image.fromarray(images[i % 2])
        zoom = rng.uniform(max(width / 640, height / 427) * 1.01, 2)
        photo = photo.resize((round(640 * zoom), round(427 * zoom)), PIL.Image.Resampling.BICUBIC)
        left, top = (int(rng.integers(0, extent + 1)) for extent in (photo.width - width, photo.height - height))
        crops.append(np.asarray(photo.crop((left, top, left + width, top + height))))
    return crops


def rate(work: Callable[[], int], repeats: int = 5) -> float:
    """Images per second: the median of several runs of `work`, which returns how many it did."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        rates.append(work() / (time.perf_counter() - start))
    return statistics.median(rates)


@main.command()
@folder_option
def convert(folder: str | None) -> None:
    """500x375 JPEG to 64x64 PNG, one process."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        for i, image in enumerate(photographs(64, 500, 375)):
            PIL.Image.fromarray(image).save(Path(temporary, f'{i}.jpg'), quality=90)
        source = open_source(temporary)
        for transform in ('center-crop', 'center-crop-dhariwal'):
            recipe = Recipe((64, 64), transform)
            speed = rate(lambda r=recipe: len([make_file(source, i, r) for i in range(64)]))
            print(f'{transform}: {speed:.0f} images/s')
        print(f'reading and decoding alone: {rate(lambda: len([source.read(i) for i in range(64)])):.0f} images/s')


@main.command()
@click.option('--workers', default='1,2,4', show_default=True, help='Numbers of processes.')
@click.option('--seconds', default=5.0, show_default=True, help='For which each number runs.')
@folder_option
def loader(workers: str, seconds: float, folder: str | None) -> None:
    """64x64 PNG and 8x64x64 latents, through make_loader."""
    images = photographs(500, 64, 64)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        kinds: dict[str, tuple[str, list[bytes], Callable]] = {
            'PNG': ('.png', [encode_png(image) for image in images], decode_image),
            'NPY, uint8': ('.npy', [encode_npy(image.transpose(2, 0, 1)) for image in images], decode_npy),
            'NPY, latents': (
                '.npy', [encode_npy(rng.standard_normal((8, 64, 64), np.float32)) for _ in range(500)], decode_npy
            ),
        }  # fmt: skip
        for kind, (ending, files, decode) in kinds.items():
            path = Path(temporary, f'{kind}.zip')
            with DatasetWriter(path) as writer:
                for i in range(4000):
                    writer.add(ending, files[i % 500])
                writer.finish([i % 10 for i in range(4000)])
            limit = rate(lambda f=files, d=decode: len([d(data, '') for data in f]))
            print(f'{kind}: {np.mean([len(data) for data in files]):.0f} bytes, decoding alone {limit:.0f} images/s')
            for number in map(int, workers.split(',')):
                speed, limit = loader_rate(ImageDataset(path), number, seconds)
                print(f'  {number} workers: {speed:.0f} images/s; the main process alone could take {limit:.0f}')


def loader_rate(dataset: ImageDataset, workers: int, seconds: float) -> tuple[float, float]:
    """Images per second out of a loader that has got going, and per second of this process's own work."""
    batches = make_loader(dataset, BatchOrder(len(dataset), 0, BATCH, BATCH), workers)
    for _ in range(8 * max(workers, 1)):
        next(batches)
    count, start, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        count += len(next(batches).images)
    spent, busy = time.perf_counter() - start, time.process_time() - busy
    batches.close()
    return count / spent, count / busy


OPEN = """
import json, sys, time
start = time.perf_counter()
import os, torch
from dataset.reader import ImageDataset
from dataset.order import BatchOrder, make_loader
imported = time.perf_counter()
dataset = ImageDataset(sys.argv[1])
opened = time.perf_counter()

def rss(process='self', what='VmRSS'):
    lines = open(f'/proc/{process}/status').read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))

result = {'import': imported - start, 'open': opened - imported, 'peak_mb': rss(what='VmHWM'), 'rank_mb': rss()}
batches = make_loader(dataset, BatchOrder(len(dataset), 0, 64, 64), 2)
import multiprocessing
sizes = []
for i in range(int(sys.argv[2])):
    next(batches)
    if i % 1000 == 10 or i == int(sys.argv[2]) - 1:
        sizes.append(max(rss(child.pid) for child in multiprocessing.active_children()))
result['worker_mb'] = sizes
result['fingerprint'] = dataset.fingerprint
batches.close()
print(json.dumps(result))
"""


@main.command('open')
@click.option('--count', default=1_281_167, show_default=True, help='Images.')
@click.option('--ranks', default=2, show_default=True, help='Processes that open it at once.')
@click.option('--batches', default=20_018, show_default=True, help='Batches of 64 to read; the default is an epoch.')
@click.option('--kind', default='zip', show_default=True, help='zip or dir')
@folder_option
def open_(count: int, ranks: int, batches: int, kind: str, folder: str | None) -> None:
    """Open a dataset of many tiny images, in several processes at once, and read it with two workers each."""
    with io.BytesIO() as file:
        PIL.Image.new('RGB', (4, 4), 'red').save(file, format='png')
        tiny = file.getvalue()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, 'many.zip' if kind == 'zip' else 'many')
        start = time.perf_counter()
        with DatasetWriter(path) as writer:
            for _ in range(count):
                writer.add('.png', tiny)
            writer.finish(np.arange(count) % 1000)
        print(f'{count} images written in {time.perf_counter() - start:.1f} s', flush=True)
        for title in ('without an index', 'with the index'):
            command = [sys.executable, '-c', OPEN, str(path), str(batches if 'with the' in title else 200)]
            environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
            processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(ranks)]
            results = [json.loads(process.communicate()[0]) for process in processes]
            for rank, result in enumerate(results):
                print(f'{title}, rank {rank}: opened in {result["open"]:.1f} s (imports {result["import"]:.1f} s), '
                      f'memory {result["rank_mb"]:.0f} MB, at most {result["peak_mb"]:.0f}; largest worker '
                      f'{" -> ".join(f"{size:.0f}" for size in result["worker_mb"])} MB', flush=True)  # fmt: skip
        print(f'index: {index_path(path).stat().st_size / 1e6:.0f} MB')


if __name__ == '__main__':
    main()
