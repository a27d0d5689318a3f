"""The command-line options of measuring, the same for all scripts that measure."""

from collections.abc import Callable
from typing import Any

import click

from evaluation.measure import MeasureConfig
from metrics.detectors import DetectorOptions
from metrics.registry import select_metrics


def measure_options(default: str | None, ref: str | None, option: Callable = click.option) -> Callable:
    """Add --metrics, --ref and the options of detectors to a click command; what they give is for `measure_config`.

    Args:
        default: Of --metrics; None where nothing is measured without it.
        ref: Help of --ref; None leaves it out.
        option: Stands for `click.option`, as `dnnlib.cli.group` does.
    """
    options = [
        option('--metrics', metavar='LIST', default=default, show_default=default is not None,
               help='What to measure, such as fid,kid,fd_dinov2; see calculate_metrics.py --help.'),
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


def measure_config(
    flags: dict[str, Any], batch: int = 64, workers: int | None = 0, offline: bool = False
) -> MeasureConfig:
    """Take the values of `measure_options` out of a command's flags, where --metrics was given or has a default."""
    weights = {name: flags.pop(name) for name in ('inception', 'dinov2', 'any_weights')}
    metrics, refs = flags.pop('metrics'), flags.pop('refs', ())
    return MeasureConfig(
        select_metrics(metrics.split(',') if metrics else ()),
        tuple(refs),
        DetectorOptions(**weights, offline=offline),
        batch,
        workers,
    )
