"""The command-line options of measuring, the same for all scripts that measure."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from dataset.sources.table import EMBEDDED
from dnnlib.download import is_url
from evaluation.measure import MeasureConfig, open_images
from metrics.baselines import has_statistics
from metrics.detectors import DetectorOptions
from metrics.reference import SUFFIX, read_about
from metrics.registry import require_packages, select_metrics

SMALL = 32  # pixels of the shorter side, below which images tell Inception little


def measure_options(default: bool, ref: str | None, option: Callable = click.option) -> Callable:
    """Add --metrics, --ref and the options of detectors to a click command; what they give is for `measure_config`.

    Args:
        default: Whether something is measured without --metrics, see `default_metrics`.
        ref: Help of --ref; None leaves it out.
        option: Stands for `click.option`, as `dnnlib.cli.group` does.
    """
    told = '  [default: fid; fd_pixels of embedded sets and tiny images]' if default else ''
    options = [
        option('--metrics', metavar='LIST',
               help=f'What to measure, such as fid,kid,fd_dinov2; see calculate_metrics.py --help.{told}'),
        option('--inception', metavar='FILE', help='Weights of Inception-v3; else $EDM2PLUS_INCEPTION or a download.'),
        option('--dinov2', metavar='DIR', help='Model folder of DINOv2; else $EDM2PLUS_DINOV2 or a download.'),
        option('--any-weights', is_flag=True, help='Accept other weights of detectors than the published ones.'),
    ]  # fmt: skip
    if ref is not None:
        options.insert(1, option('--ref', 'refs', metavar='FILE|DATASET', multiple=True, help=ref))

    def decorate(command: Callable) -> Callable:
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


def default_metrics(sources: Iterable[str]) -> str:
    """FID, as EDM2 measures it; fd_pixels for embedded sets and images too small for Inception.

    Args:
        sources: Data sets, files of images, references.
    """
    for source in sources:
        path = Path(source)
        if is_url(source) or not path.exists() or has_statistics(path):  # what is not there is told where it is read
            continue
        about = read_about(path) if path.suffix == SUFFIX else open_images(source)
        made_with = getattr(about, 'made_with', None) or {}
        if min(about.image_shape[1:]) < SMALL or made_with.get('source') in EMBEDDED:
            return 'fd_pixels'
    return 'fid'


def measure_config(
    flags: dict[str, Any],
    batch: int = 64,
    workers: int | None = 0,
    offline: bool = False,
    sources: Iterable[str] | None = None,
    packages: bool = True,
) -> MeasureConfig:
    """Take the values of `measure_options` out of a command's flags, where --metrics was given or has a default.

    Args:
        flags: By name.
        batch, workers, offline: As for `MeasureConfig`.
        sources: What decides over `default_metrics` where there are no references; None measures nothing by default.
        packages: Refuse metrics whose packages are not installed.
    """
    weights = {name: flags.pop(name) for name in ('inception', 'dinov2', 'any_weights')}
    metrics, refs = flags.pop('metrics'), flags.pop('refs', ())
    if metrics is None and sources is not None:
        metrics = default_metrics(refs or sources)
    chosen = select_metrics(() if metrics is None else metrics.split(','))
    if packages:
        require_packages(chosen)
    return MeasureConfig(
        chosen,
        tuple(refs),
        DetectorOptions(**weights, offline=offline),
        batch,
        workers,
    )
