"""Measure images against a data set, compare image sets, and make reference files of data sets."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib import cli
from dnnlib.download import file_sha256, local_file
from dnnlib.errors import UserError
from dnnlib.files import make_folder, write_json
from evaluation.measure import is_file_of_statistics, load_statistics, made, made_shape, open_images
from metrics.detectors import Detector, DetectorOptions, load_detectors
from metrics.gathering import Batch, Gathered, ImageSet, gather
from metrics.reading import Images, Part, describe, read_batches
from metrics.records import append_record, describe_run, find_generation, format_int_list
from metrics.reference import SUFFIX, save_reference
from metrics.registry import (
    METRICS,
    Metric,
    check_sets,
    evaluate,
    format_result,
    format_summary,
    memory_notes,
    needs_of,
    reference_problems,
    select_metrics,
    set_warnings,
    summarize,
)
from networks.encoders import load_encoder
from networks.files import NetworkInfo, load_network
from sampling.options import sampler_config, sampler_options, take_sampler_flags
from sampling.pipeline import check_fit, generate
from torch_utils import distributed

GPU_WORKERS = 4  # processes that decode beside a GPU; beside a CPU detector they would only take its cores
LIST = '\n'.join(f'  {name:<17} {metric.about}' for name, metric in METRICS.items())
EPILOG = f"""\b
Metrics:
{LIST}
"""

output_file = click.Path(dir_okay=False, path_type=Path)
ref_option = click.option(
    '--ref', metavar='FILE|DATASET', help='Reference file, published statistics (.npz, .pkl), or the real images.'
)


def repeats_option(text: str) -> Callable:
    """--repeats with a meaning of its own in each command."""
    return click.option('--repeats', type=click.IntRange(min=1), default=1, show_default=True, help=text)


@dataclass(frozen=True)
class Setup:
    """What all commands share: the metrics, where and how they are computed, and where results go."""

    metrics: dict[str, Metric]
    device: torch.device
    detectors: dict[str, Detector]
    batch: int
    workers: int
    json: Path | None
    log: Path | None

    def gather(self, about: ImageSet, batches: Iterator[Batch], reference: bool = False) -> Gathered:
        """One pass over a set of images."""
        return gather(about, batches, needs_of(self.metrics, reference), self.device, self.detectors)

    def read(self, images: Images, title: str) -> Iterator[Batch]:
        """This rank's batches of stored images."""
        return read_batches(images, self.batch, title, self.workers)


def measuring(default: str, results: bool = True) -> Callable:
    """Add the options that all commands share, and give the command a `Setup` instead of them.

    Args:
        default: Of --metrics.
        results: Whether there are results to write: --json and --log.
    """
    options = [
        click.option('--metrics', metavar='LIST', default=default, show_default=True,
                     help=f'Comma-separated, of: {", ".join(METRICS)}.'),
        click.option('--inception', metavar='FILE',
                     help='Weights of Inception-v3; else $EDM2PLUS_INCEPTION or a download.'),
        click.option('--dinov2', metavar='DIR', help='Model folder of DINOv2; else $EDM2PLUS_DINOV2 or a download.'),
        click.option('--any-weights', is_flag=True, help='Accept other weights than the published ones.'),
        click.option('--batch', type=click.IntRange(min=1), default=256, show_default=True, help='Images at a time.'),
        click.option('--workers', type=click.IntRange(min=0),
                     help=f'Processes that decode; by default {GPU_WORKERS} beside a GPU, else none.'),
        click.option('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.'),
    ]  # fmt: skip
    if results:
        options[1:1] = [
            click.option('--json', type=output_file, help='Write all numbers to this file.'),
            click.option('--log', type=output_file, default='metrics.jsonl', show_default=True,
                         help='Append a line with all numbers and how to repeat them.'),
        ]  # fmt: skip

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(metrics, inception, dinov2, any_weights, batch, workers, device, json=None, log=None, **flags):
            chosen = select_metrics(metrics.split(','))
            options = DetectorOptions(inception, dinov2, any_weights, flags.get('offline', False))

            @contextlib.contextmanager
            def start() -> Iterator[Setup]:
                """Join torchrun's processes, if there are any, load the detectors, and leave in the end."""
                with distributed.session(device) as place:
                    detectors = load_detectors((need.detector for need in needs_of(chosen)), place, options)
                    decoders = (GPU_WORKERS if place.type == 'cuda' else 0) if workers is None else workers
                    yield Setup(chosen, place, detectors, batch, decoders, json, log)

            return command(chosen, start, **flags)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


@click.group(epilog=EPILOG)
def main():
    """Measure how close images are to a data set.

    \b
    python calculate_metrics.py ref --data=digits.zip --dest=digits-ref.safetensors
    python calculate_metrics.py calc --images=out --ref=digits-ref.safetensors
    python calculate_metrics.py gen --net=net.safetensors --ref=digits.zip --seeds=0-1796
    python calculate_metrics.py compare real.zip out
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py calc --images=out --ref=imagenet.zip --metrics=fid,kid
    """


@main.command(epilog=EPILOG)
@click.option('--images', 'path', metavar='DIR|ZIP|NPZ', required=True, help='The images; of an .npz, arr_0.')
@ref_option
@repeats_option('Equal parts to measure one by one.')
@measuring('fd_pixels')
def calc(chosen: dict[str, Metric], start, path: str, ref: str | None, repeats: int):
    """Measure stored images.

    \b
    python calculate_metrics.py calc --images=out --ref=digits.zip --metrics=fd_pixels,class_agreement
    python calculate_metrics.py calc --images=out --ref=img64.pkl --metrics=fid --inception=WEIGHTS.pth
    python calculate_metrics.py calc --images=out150k --ref=ref.safetensors --metrics=fid,kid --repeats=3
    """
    images = open_images(path)
    parts = split(images, repeats)
    check_early(chosen, describe(parts[0]), ref)
    with start() as setup:
        reference = open_reference(setup, ref, describe(parts[0]))
        gathered = (setup.gather(describe(part), setup.read(part, part.name)) for part in parts)
        report(setup, reference, ref, gathered, {'path': path, 'generation': find_generation(path)})


@main.command(epilog=EPILOG)
@click.argument('first', metavar='A')
@click.argument('second', metavar='B')
@measuring('fd_pixels')
def compare(chosen: dict[str, Metric], start, first: str, second: str):
    """Compare two sets of images, A in the place of the reference.

    Fréchet and kernel distances are the same either way round; precision is the share of B within A's manifold.

    \b
    python calculate_metrics.py compare real.zip out --metrics=fid,precision_recall
    """
    images = open_images(second)
    check_early(chosen, describe(images), first)
    with start() as setup:
        reference = open_reference(setup, first, describe(images))
        gathered = [setup.gather(describe(images), setup.read(images, images.name))]
        report(setup, reference, first, gathered, {'path': second, 'generation': find_generation(second)})


@main.command(epilog=EPILOG)
@click.option('--net', 'net_path', help='Network file, or a published pickle.', metavar='FILE|URL', required=True)
@click.option(
    '--gnet', 'gnet_path', help='Guiding network file; "self": the main one without labels.', metavar='FILE|URL|self'
)
@ref_option
@click.option('--seeds', help='An image for each.', type=cli.INTS, default='0-49999', show_default=True)
@repeats_option('Measure so many times, each with the seeds after the last.')
@click.option('--class', 'classes', type=cli.INTS, help='Class, or classes to cycle through; by default random.')
@sampler_options
@click.option('--guidance', type=float, default=1.0, show_default=True, help='Guidance weight; 1 is none.')
@click.option('--offline', is_flag=True, help='Download nothing; URLs come from the cache.')
@click.option('--vae', metavar='DIR', help='Folder of the VAE, for latents on machines without a network.')
@click.option('--precision', help='Of the features.', metavar='fp32|bf16|fp16', default='fp32', show_default=True)
@measuring('fd_pixels')
def gen(chosen, start, net_path, gnet_path, guidance, ref, seeds, repeats, classes, offline, vae, precision, **flags):
    """Generate images and measure them; no image is written. Images are those of generate.py for the same options.

    \b
    python calculate_metrics.py gen --net=net.safetensors --ref=digits.zip --seeds=0-1796
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py gen --net=NET --ref=REF --metrics=fid --repeats=3
    """
    sampler_flags = take_sampler_flags(flags)
    seeds = list(dict.fromkeys(seeds))
    if ref is not None:
        local_file(ref, offline)
    with start() as setup:
        net, info = load_network(net_path, setup.device, precision, offline)
        guiding_net, guiding_info = (net, info) if gnet_path == 'self' else (None, None)
        if guiding_net is None and gnet_path:
            guiding_net, guiding_info = load_network(gnet_path, setup.device, precision, offline)
        config = sampler_config(sampler_flags, guidance, info.sampler)
        check_fit(net, guiding_net, config, classes)
        encoder = load_encoder(info.encoder, setup.device, vae)
        make = functools.partial(
            generate, net, config=config, guiding_net=guiding_net, classes=classes, encoder=encoder
        )
        about = ImageSet(Path(net_path).name, len(seeds), made_shape(info.config, info.encoder), info.config.label_dim)
        check_early(chosen, about, ref)
        reference = open_reference(setup, ref, about)
        runs = [[seed + k * (max(seeds) - min(seeds) + 1) for seed in seeds] for k in range(repeats)]
        gathered = (setup.gather(about, made(make, run, setup.batch)) for run in runs)
        source = {
            'net': describe_network(net_path, info),
            'guiding_net': describe_network(gnet_path, guiding_info) if guiding_info is not None else None,
            'sampler': config.to_json(),
            'seeds': [format_int_list(run) for run in runs],
            'classes': classes,
            'vae': vae,
            'precision': precision,
        }
        report(setup, reference, ref, gathered, source)


@main.command(epilog=EPILOG)
@click.option('--data', help='The data set.', metavar='DIR|ZIP|NPZ', required=True)
@click.option('--dest', help=f'File to write, ending in {SUFFIX}.', type=output_file, required=True)
@measuring('fd_pixels', results=False)
def ref(chosen: dict[str, Metric], start, data: str, dest: Path):
    """Write what metrics need of a data set to a file, for `--ref`.

    \b
    python calculate_metrics.py ref --data=digits.zip --dest=digits-ref.safetensors
    python calculate_metrics.py ref --data=img64.zip --dest=img64-ref.safetensors --metrics=fid,fd_dinov2,kid
    """
    if dest.suffix != SUFFIX:
        raise UserError(f'--dest={dest} must end in {SUFFIX}')
    images = open_images(data)
    about = describe(images)
    if problems := reference_problems(about):
        raise UserError(problems)
    if not needs_of(chosen, reference=True):
        raise UserError(f'{", ".join(chosen)} needs no reference')
    with start() as setup:
        if distributed.rank() == 0:
            make_folder(dest.parent)
        note_memory(setup, about.count, None, about.image_shape)
        real = setup.gather(about, setup.read(images, 'data set'), reference=True)
        if distributed.rank() == 0:
            save_reference(dest, real)
            kinds = ', '.join(f'{need.detector}/{need.collector.kind}' for need in real.collected)
            click.echo(f'{dest}: {kinds} of {about.count} images of {about.name}')
            for warning in set_warnings(real):
                click.echo(f'warning: {warning}', err=True)


def split(images: Images, repeats: int) -> list[Images]:
    """Consecutive parts of equal size, for --repeats."""
    if repeats == 1:
        return [images]
    size, rest = divmod(len(images), repeats)
    if rest:
        raise UserError(f'{images.name} has {len(images)} images, which {repeats} repeats do not divide evenly')
    return [Part(images, k * size, (k + 1) * size) for k in range(repeats)]


def describe_network(path: str, info: NetworkInfo) -> dict[str, Any]:
    """A network file, with its SHA-256."""
    sha256 = None if path == 'self' else file_sha256(local_file(path))
    return {'file': path, 'sha256': sha256, **info.to_header()}


def check_early(metrics: dict[str, Metric], images: ImageSet, ref: str | None) -> None:
    """Find what can be wrong before detectors are loaded and images are read."""
    if ref is None:
        check_sets(metrics, None, images)
    elif not any(metric.reference for metric in metrics.values()):
        raise UserError(f'{", ".join(metrics)} needs no reference: measure the images with calc or gen, without --ref')
    else:
        path = str(local_file(ref))
        about = None if is_file_of_statistics(path) else describe(open_images(path))
        if about is not None:
            check_sets(metrics, about, images)


def open_reference(setup: Setup, ref: str | None, images: ImageSet) -> Gathered | None:
    """Load a reference file, or gather what the metrics need of a data set; refuse what `images` cannot be held to.

    Before the first image is read, it makes the folders of results and says what memory will be taken.
    """
    if ref is None:
        prepare(setup, None, images)
        return None
    path, needs = str(local_file(ref)), needs_of(setup.metrics, reference=True)
    if is_file_of_statistics(path):
        reference = load_statistics(path, needs, setup.detectors)
        check_sets(setup.metrics, reference.about, images)
        prepare(setup, reference.about, images)
        return reference
    dataset = open_images(path)
    about = describe(dataset)
    prepare(setup, about, images)
    return setup.gather(about, setup.read(dataset, 'reference'), reference=True)


def prepare(setup: Setup, real: ImageSet | None, images: ImageSet) -> None:
    """Find out before images are read, not after, that results cannot be written; say what memory will be taken."""
    for path in (setup.json, setup.log):
        if path is not None and distributed.rank() == 0:
            make_folder(path.parent)
            appended = path == setup.log and path.exists()  # other files are replaced, which is up to their folder
            if not os.access(path if appended else path.parent, os.W_OK):
                raise UserError(f'{path} cannot be written' + ('; choose another --log' if path == setup.log else ''))
    note_memory(setup, real and real.count, images.count, images.image_shape)


def note_memory(setup: Setup, num_real: int | None, num_images: int | None, image_shape: tuple[int, int, int]) -> None:
    """Say what metrics that keep features will take."""
    sizes = {name: detector.num_features(image_shape) for name, detector in setup.detectors.items()}
    if distributed.rank() == 0:
        for note in memory_notes(setup.metrics, num_real, num_images, sizes):
            click.echo(note, err=True)


def report(setup: Setup, reference: Gathered | None, ref: str | None, runs, source: dict[str, Any]) -> None:
    """Evaluate each run, print a line for each metric and warning, and write everything down."""
    results, about = [], None
    for gathered in runs:  # every rank takes part in gathering
        about = gathered.about
        if distributed.rank() == 0:
            results.append(evaluate(setup.metrics, reference, gathered))
            for name, numbers in results[-1]['metrics'].items():
                click.echo(format_result(name, numbers))
    if distributed.rank() != 0:
        return
    record = {**results[0], 'warnings': list(dict.fromkeys(w for r in results for w in r['warnings']))}
    record['warnings'] += weights_warnings(setup, reference)
    if len(results) > 1:
        del record['metrics']
        record['runs'] = [result['metrics'] for result in results]
        record['summary'] = summarize(setup.metrics, results)
        for name, summary in record['summary'].items():
            click.echo(format_summary(name, summary, about.count, len(results)))
    for warning in record['warnings']:
        click.echo(f'warning: {warning}', err=True)
    record['images'] = {**vars(about), **source}
    record['reference'] = None if reference is None else describe_reference(ref, reference)
    record['run'] = describe_run(setup.device, setup.batch)
    if setup.json is not None:
        write_json(setup.json, record)
    if setup.log is not None:
        append_record(setup.log, record)


def weights_warnings(setup: Setup, reference: Gathered | None) -> list[str]:
    """What there is to say of detectors whose weights are not certainly the published ones."""
    found = []
    for name, detector in setup.detectors.items():
        if detector.published is False:
            found.append(f'{name} has other weights than the published ones: compare the values with nothing else')
        elif detector.published is None and reference and reference.identities.get(name, '') is None:
            found.append(f'{name}: nothing tells whether its weights are those of the published reference')
    return found


def describe_reference(ref: str, reference: Gathered) -> dict[str, Any]:
    """The reference, with the SHA-256 of its file if it is one."""
    path = local_file(ref)
    sha256 = file_sha256(path) if path.is_file() and is_file_of_statistics(str(path)) else None
    return {'path': ref, 'sha256': sha256, **vars(reference.about), 'versions': reference.versions}


if __name__ == '__main__':
    cli.run(main)
