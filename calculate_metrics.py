"""Measure images against a data set, compare image sets, and make reference files of data sets."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import click

from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import make_folder
from evaluation.measure import Evaluator, Generation, MeasureConfig, open_images
from evaluation.options import measure_config, measure_options
from evaluation.records import find_generation, format_int_list
from evaluation.report import check_outputs, report
from evaluation.selftest import closed_forms, halves
from metrics.baselines import BASELINES, reference_file, save_baseline
from metrics.reading import Images, describe, random_subset, split_evenly
from metrics.reference import SUFFIX, save_reference
from metrics.registry import metrics_table, needs_of, reference_problems
from metrics.results import set_warnings
from networks.encoders import load_encoder
from networks.published.models import resolve_model
from sampling.networks import load_networks
from sampling.options import (
    execution_options,
    note_execution,
    parse_classes,
    sampler_config,
    sampler_options,
    take_sampler_flags,
)
from sampling.pipeline import check_fit
from torch_utils import distributed

EPILOG = f"""\b
Metrics, as names with a statistic and the features that it is of:
{metrics_table()}
Published references: {', '.join(BASELINES)}
"""
REF = 'Reference file, published statistics (.npz, .pkl, or by name), or the real images; may be repeated.'

output_file = click.Path(dir_okay=False, path_type=Path)


def repeats_option(text: str) -> Callable:
    """--repeats with a meaning of its own in each command."""
    return click.option('--repeats', type=click.IntRange(min=1), default=1, show_default=True, help=text)


def measuring(ref: str | None = REF, results: bool = True, packages: bool = True) -> Callable:
    """Add the options that all commands share, and give the command a `MeasureConfig` instead of most of them.

    Args:
        ref: Help of --ref; None leaves it out.
        results: Whether there are results to write: --json and --record.
        packages: Refuse metrics whose packages are not installed.
    """
    options = [
        measure_options(True, ref),
        click.option('--batch', type=click.IntRange(min=1), default=256, show_default=True, help='Images at a time.'),
        click.option('--workers', type=click.IntRange(min=0),
                     help='Processes that decode; by default 4 beside a GPU, else none.'),
        click.option('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.'),
    ]  # fmt: skip
    if results:
        options[1:1] = [
            click.option('--json', type=output_file, help='Write all numbers to this file.'),
            click.option('--record', type=output_file, default='metrics.jsonl', show_default=True,
                         help='Append a line with all numbers and how to repeat them.'),
        ]  # fmt: skip

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(batch, workers, **flags):
            sources = [flags[name] for name in ('data', 'first') if flags.get(name)]
            offline = flags.get('offline', False)
            return command(measure_config(flags, batch, workers, offline, sources, packages), **flags)

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
@click.option('--subset', 'num', type=click.IntRange(min=2), metavar='N', help='Measure N of them, drawn at random.')
@click.option('--seed', type=int, default=0, show_default=True, help='Decides which --subset draws.')
@repeats_option('Equal parts to measure one by one.')
@measuring()
def calc(config: MeasureConfig, path: str, num: int | None, seed: int, repeats: int, **outputs):
    """Measure stored images.

    \b
    python calculate_metrics.py calc --images=out --ref=digits.zip --metrics=fd_pixels,class_agreement
    python calculate_metrics.py calc --images=out --ref=img64.pkl --metrics=fid --inception=WEIGHTS.pth
    python calculate_metrics.py calc --images=out150k --ref=ref.safetensors --metrics=fid,kid --repeats=3
    """
    images = open_images(path)
    measure_stored(config, path, split_evenly(random_subset(images, num, seed) if num else images, repeats), **outputs)


@main.command(epilog=EPILOG)
@click.argument('first', metavar='A')
@click.argument('second', metavar='B')
@measuring(ref=None)
def compare(config: MeasureConfig, first: str, second: str, **outputs):
    """Compare two sets of images, A in the place of the reference.

    Fréchet and kernel distances are the same either way round; precision is the share of B within A's manifold.

    \b
    python calculate_metrics.py compare real.zip out --metrics=fid,precision_recall
    """
    measure_stored(dataclasses.replace(config, refs=(first,)), second, [open_images(second)], **outputs)


def measure_stored(
    config: MeasureConfig, path: str, parts: list[Images], device: str | None, json: Path | None, record: Path | None
) -> None:
    """Measure the images at `path`, part by part."""
    config.check(describe(parts[0]))
    with distributed.session(device) as place:
        evaluator = Evaluator(config, place)
        evaluator.prepare(describe(parts[0]))
        check_outputs(json, record)
        runs = (evaluator.stored(part) for part in parts)
        report(evaluator, runs, {'path': path, 'generation': find_generation(path)}, json, record)


@main.command(epilog=EPILOG)
@click.option('--net', 'net_path', metavar='FILE|DIR|URL', help='Network file, a run folder for its newest, or a '
              'published pickle.')  # fmt: skip
@click.option('--preset', metavar='NAME', help='Published EDM or EDM2 model, as for generate.py.')
@click.option(
    '--gnet', 'gnet_path', help='Guiding network file; "self": the main one without labels.', metavar='FILE|URL|self'
)
@click.option('--seeds', help='An image for each.', type=cli.INTS, default='0-49999', show_default=True)
@repeats_option('Measure so many times, each with the seeds after the last.')
@click.option('--class', 'classes', metavar='LIST', help='Numbers or names, to cycle through; by default random.')
@sampler_options
@click.option('--guidance', type=float, help='Guidance weight; 1 is none, and the default without --preset.')
@click.option('--offline', is_flag=True, help='Download nothing; URLs come from the cache.')
@click.option('--vae', metavar='DIR', help='Folder of the VAE, for latents on machines without a network.')
@click.option(
    '--precision', help="Of the network's features.", metavar='fp32|bf16|fp16', default='fp32', show_default=True
)
@execution_options
@measuring()
def gen(config, execution, net_path, preset, gnet_path, seeds, repeats, classes, guidance, offline, vae, precision,
        device, json, record, **flags):  # fmt: skip
    """Generate images and measure them; no image is written. Images are those of generate.py for the same options.

    \b
    python calculate_metrics.py gen --net=net.safetensors --ref=digits.zip --seeds=0-1796
    torchrun --standalone --nproc_per_node=8 calculate_metrics.py gen --net=NET --ref=REF --metrics=fid --repeats=3
    """
    sampler_flags = take_sampler_flags(flags)
    net_path, gnet_path, guidance = resolve_model(preset, net_path, gnet_path, guidance)
    seeds = list(dict.fromkeys(seeds))
    for ref in config.refs:
        reference_file(ref, offline)
    with distributed.session(device) as place:
        net, info, guiding_net, nets = load_networks(net_path, gnet_path, place, precision, offline)
        sampler = sampler_config(sampler_flags, guidance, info.sampler)
        classes = parse_classes(classes, info.class_names)
        check_fit(net, guiding_net, sampler, classes)
        width = max(seeds) - min(seeds) + 1
        runs = [[seed + k * width for seed in seeds] for k in range(repeats)]
        encoder, name = load_encoder(info.encoder, place, vae), Path(net_path).name
        ways = [Generation(run, sampler, encoder, guiding_net, classes, name, execution) for run in runs]
        config.check(ways[0].describe(net.config))
        note_execution(execution, len(seeds) * repeats, precision, place)
        evaluator = Evaluator(config, place)
        evaluator.prepare(ways[0].describe(net.config))
        check_outputs(json, record)
        source = {
            **nets,
            'sampler': sampler.to_json(),
            'seeds': [format_int_list(run) for run in runs],
            'classes': classes,
            'vae': vae,
            'precision': precision,
            'execution': dataclasses.asdict(execution),
        }
        report(evaluator, (evaluator.generated(net, how) for how in ways), source, json, record)


@main.command(epilog=EPILOG)
@click.option('--data', help='The data set.', metavar='DIR|ZIP|NPZ', required=True)
@click.option(
    '--dest', help=f'File to write, ending in {SUFFIX}; in .pkl, one that EDM2 reads.', type=output_file, required=True
)
@measuring(ref=None, results=False)
def ref(config: MeasureConfig, data: str, dest: Path, device: str | None):
    """Write what metrics need of a data set to a file, for `--ref`.

    \b
    python calculate_metrics.py ref --data=digits.zip --dest=digits-ref.safetensors
    python calculate_metrics.py ref --data=img64.zip --dest=img64-ref.safetensors --metrics=fid,fd_dinov2,kid
    """
    if dest.suffix not in (SUFFIX, '.pkl'):
        raise UserError(f'--dest={dest} must end in {SUFFIX}, or in .pkl for EDM2')
    images = open_images(data)
    about = describe(images)
    if problems := reference_problems(about):
        raise UserError(problems)
    if not needs_of(config.metrics, reference=True):
        raise UserError(f'{", ".join(config.metrics)} needs no reference')
    with distributed.session(device) as place:
        evaluator = Evaluator(config, place)
        if distributed.rank() == 0:
            make_folder(dest.parent)
        evaluator.note_memory(about.count, None, about)
        real = evaluator.stored(images, 'data set', reference=True)
        if distributed.rank() == 0:
            (save_reference if dest.suffix == SUFFIX else save_baseline)(dest, real)
            kinds = ', '.join(f'{need.features}/{need.kind}' for need in real.collected)
            click.echo(f'{dest}: {kinds} of {about.count} images of {about.name}')
            for warning in set_warnings(real):
                click.echo(f'warning: {warning}', err=True)


@main.command()
@click.option('--data', help='A data set, to measure its halves, and it against --ref.', metavar='DIR|ZIP|NPZ')
@measuring('References of these data, published ones for instance; may be repeated.', results=False, packages=False)
def selftest(config: MeasureConfig, data: str | None, device: str | None) -> int:
    """Measure what has a known value, and show the two side by side: do this before you publish a number.

    \b
    python calculate_metrics.py selftest
    python calculate_metrics.py selftest --data=img64.zip --ref=edm2-img64 --metrics=fid,fd_dinov2
    """
    checks, missing = list(closed_forms()), []
    if data is None:
        missing.append('detectors and published references: give --data')
    else:
        images = open_images(data)
        with distributed.session(device) as place:
            found, missing = halves(config, images, place)
            checks += found
    if distributed.rank() != 0:
        return 0
    click.echo(f'{"":<44} {"expected":>12}{"":<10} {"measured":>12}')
    for check in checks:
        click.echo(check)
    for each in missing:
        click.echo(f'not checked: {each}')
    return 0 if all(check.passed for check in checks) else 1


if __name__ == '__main__':
    cli.run(main)
