"""Measure images against a data set, and make reference files of data sets."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import make_folder, write_json
from metrics.gathering import Batch, Gathered, ImageSet, gather
from metrics.reference import SUFFIX, load_reference, save_reference
from metrics.registry import (
    METRICS,
    Metric,
    check_sets,
    evaluate,
    format_result,
    needs_of,
    reference_problems,
    select_metrics,
)
from networks.files import load_network
from sampling.pipeline import SamplerConfig, check_fit, generate
from torch_utils import distributed
from torch_utils.tensor_files import library_versions
from training.dataset import ImageDataset

REFERENCE_METRICS = ['fd_pixels']  # those whose needs a reference file can hold

output_file = click.Path(dir_okay=False, path_type=Path)
batch_option = click.option(
    '--batch', help='Images at a time.', type=click.IntRange(min=1), default=256, show_default=True
)

metrics_option = click.option(
    '--metrics',
    help=f'Comma-separated, of: {", ".join(METRICS)}.',
    metavar='LIST',
    default='fd_pixels',
    show_default=True,
)


@click.group()
def main():
    """Measure how close images are to a data set.

    \b
    python calculate_metrics.py ref --data=digits.zip --dest=digits-ref.safetensors
    python calculate_metrics.py calc --images=out --ref=digits-ref.safetensors
    python calculate_metrics.py gen --net=net.safetensors --ref=digits.zip --seeds=0-1796
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py calc --images=out --ref=imagenet.zip
    """


@main.command()
@click.option('--images', help='Folder or zip of images.', metavar='DIR|ZIP', required=True)
@click.option('--ref', help='Reference file, or the real images.', metavar='FILE|DATASET', required=True)
@metrics_option
@click.option('--json', 'json_path', help='Write all numbers to this file.', type=output_file)
@batch_option
def calc(images: str, ref: str, metrics: str, json_path: Path | None, batch: int):
    """Measure the images of a folder or zip.

    \b
    python calculate_metrics.py calc --images=out --ref=digits.zip \\
        --metrics=fd_pixels,class_agreement --json=metrics.json
    """
    chosen = select_metrics(metrics.split(','))
    dataset = ImageDataset(images)
    with _process_group() as device:
        reference = _open_reference(ref, chosen, _describe(dataset), batch, device)
        _prepare_folder(json_path)
        gathered = gather(_describe(dataset), _read(dataset, batch, 'images'), needs_of(chosen), device)
        if distributed.rank() == 0:
            _report(chosen, reference, ref, gathered, {'path': images}, json_path)


@main.command()
@click.option('--net', 'net_path', help='Network file, or a published pickle.', metavar='FILE|URL', required=True)
@click.option('--gnet', 'gnet_path', help='Guiding network file.', metavar='FILE|URL')
@click.option('--offline', help='Download nothing; URLs come from the cache.', is_flag=True)
@click.option('--guidance', help='Guidance weight; 1 is none.', type=float, default=1.0, show_default=True)
@click.option('--ref', help='Reference file, or the real images.', metavar='FILE|DATASET', required=True)
@metrics_option
@click.option('--seeds', help='An image for each.', type=cli.INTS, default='0-49999', show_default=True)
@click.option('--steps', help='Sampling steps.', type=int, default=32, show_default=True)
@click.option('--precision', help='Of the features.', metavar='fp32|bf16|fp16', default='fp32', show_default=True)
@click.option('--json', 'json_path', help='Write all numbers to this file.', type=output_file)
@batch_option
def gen(net_path, gnet_path, offline, guidance, ref, metrics, seeds, steps, precision, json_path, batch):
    """Generate images and measure them; no image is written.

    \b
    python calculate_metrics.py gen --net=net.safetensors --ref=digits.zip --seeds=0-1796
    """
    chosen = select_metrics(metrics.split(','))
    config = SamplerConfig(steps=steps, guidance=guidance).check()
    seeds = list(dict.fromkeys(seeds))
    with _process_group() as device:
        net, info = load_network(net_path, device, precision, offline)
        guiding_net = load_network(gnet_path, device, precision, offline)[0] if gnet_path else None
        check_fit(net, guiding_net, config, classes=None)
        about = ImageSet(
            Path(net_path).name,
            len(seeds),
            (info.config.img_channels, *info.config.img_resolution),
            info.config.label_dim,
        )
        reference = _open_reference(ref, chosen, about, batch, device)
        _prepare_folder(json_path)
        batches = _generate(net, guiding_net, seeds, config, batch)
        gathered = gather(about, batches, needs_of(chosen), device)
        if distributed.rank() == 0:
            source = {
                'net': {'file': net_path, **info.to_header()},
                'guiding_net': gnet_path,
                'sampler': {'name': 'heun', **config.to_json()},
                'seeds': seeds,
                'precision': precision,
                'device': device.type,
            }
            _report(chosen, reference, ref, gathered, source, json_path)


def _generate(net, guiding_net, seeds: list[int], config: SamplerConfig, batch_size: int) -> Iterator[Batch]:
    """This rank's generated images: every world_size-th seed."""
    places = range(distributed.rank(), len(seeds), distributed.world_size())
    start = 0
    with tqdm(total=len(places), desc='images', unit='img', disable=True if distributed.rank() else None) as bar:
        for made in generate(net, [seeds[i] for i in places], config, guiding_net, batch_size=batch_size):
            indices = torch.tensor(places[start : start + len(made.seeds)])
            start += len(made.seeds)
            bar.update(len(made.seeds))
            yield Batch(made.images, made.labels, indices)


@main.command()
@click.option('--data', help='The data set.', metavar='DIR|ZIP', required=True)
@click.option('--dest', help=f'File to write, ending in {SUFFIX}.', type=output_file, required=True)
@batch_option
def ref(data: str, dest: Path, batch: int):
    """Write the statistics of a data set to a file, for `calc --ref`.

    \b
    python calculate_metrics.py ref --data=digits.zip --dest=digits-ref.safetensors
    """
    if dest.suffix != SUFFIX:
        raise UserError(f'--dest={dest} must end in {SUFFIX}')
    dataset = ImageDataset(data)
    if problems := reference_problems(_describe(dataset)):
        raise UserError(problems)
    with _process_group() as device:
        _prepare_folder(dest)
        needs = needs_of(select_metrics(REFERENCE_METRICS))
        real = gather(_describe(dataset), _read(dataset, batch, 'data set'), needs, device)
        if distributed.rank() == 0:
            save_reference(dest, real)
            click.echo(f'{dest}: statistics of {real.about.count} images of {real.about.name}')


@contextlib.contextmanager
def _process_group() -> Iterator[torch.device]:
    """Join torchrun's processes, if there are any, and leave them again."""
    try:
        yield distributed.init()
    finally:
        distributed.close()


def _describe(dataset: ImageDataset) -> ImageSet:
    return ImageSet(dataset.name, len(dataset), tuple(dataset.image_shape), dataset.num_classes, dataset.fingerprint)


def _read(dataset: ImageDataset, batch_size: int, title: str) -> Iterator[Batch]:
    """This rank's batches of a data set: every world_size-th one."""
    rank, world_size = distributed.rank(), distributed.world_size()
    starts = range(rank * batch_size, len(dataset), world_size * batch_size)
    for start in tqdm(starts, desc=title, unit='batch', disable=True if rank else None):
        indices = torch.arange(start, min(start + batch_size, len(dataset)))
        images, labels = zip(*(dataset[i] for i in indices.tolist()), strict=True)
        yield Batch(torch.stack(images), torch.tensor(labels), indices)


def _prepare_folder(path: Path | None) -> None:
    """Find out that `path` cannot be written before the images are read, not after."""
    if path is not None and distributed.rank() == 0:
        make_folder(path.parent)


def _open_reference(
    path: str, metrics: dict[str, Metric], images: ImageSet, batch_size: int, device: torch.device
) -> Gathered:
    """Load a reference file, or gather what the metrics need of a data set; refuse what `images` cannot be held to."""
    if path.endswith(SUFFIX):
        reference = load_reference(path, needs_of(metrics))
        check_sets(metrics, reference.about, images)
        return reference
    dataset = ImageDataset(path)
    check_sets(metrics, _describe(dataset), images)
    return gather(_describe(dataset), _read(dataset, batch_size, 'reference'), needs_of(metrics), device)


def _report(
    metrics: dict[str, Metric],
    reference: Gathered,
    reference_path: str,
    images: Gathered,
    source: dict[str, Any],
    json_path: Path | None,
) -> None:
    """Evaluate, print a line for each metric and warning, and write everything to `json_path`."""
    results = evaluate(metrics, reference, images)
    for name, numbers in results['metrics'].items():
        click.echo(format_result(name, numbers))
    for warning in results['warnings']:
        click.echo(f'warning: {warning}', err=True)
    if json_path is not None:
        described = {
            'images': {**source, **vars(images.about)},
            'reference': {'path': reference_path, **vars(reference.about), 'versions': reference.versions},
        }
        write_json(json_path, {**results, **described, 'versions': library_versions()})


if __name__ == '__main__':
    cli.run(main)
