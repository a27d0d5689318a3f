"""Quality against evaluations: a teacher with its samplers, and students that were distilled from it.

python -m benchmarks.students --teacher=demo/run/phema-0000049-0.120.safetensors --ref=demo/digits.zip \
    --plot=docs/students.png demo/students/*/network-snapshot-0000024-0.100.safetensors

All have the same seeds; a student is sampled as its file says.
"""

from collections.abc import Iterator

import click
import matplotlib
import matplotlib.pyplot as plt
import torch

from dnnlib import cli
from evaluation.measure import Evaluator, Generation, MeasureConfig
from metrics.registry import select_metrics
from networks.denoiser import Denoiser
from networks.encoders import PixelEncoder
from networks.files import load_network
from sampling.config import SamplerConfig
from sampling.samplers import DPMpp2M, Heun
from training.methods.moment_matching import HALF_TANGENT, STUDENT_SAMPLER

METRICS = ('fd_pixels', 'class_agreement')
STEPS = (1, 2, 4, 8)
SAMPLERS = {
    'teacher, Heun': [SamplerConfig(steps, Heun()) for steps in (1, 2, 3, 4)],  # 1, 3, 5 and 7 evaluations
    'teacher, DPM-Solver++(2M)': [SamplerConfig(steps, DPMpp2M()) for steps in STEPS],
    'teacher, DPM-Solver++(2M) at their levels': [SamplerConfig(steps, DPMpp2M(), HALF_TANGENT) for steps in STEPS],
    'teacher, ancestral at their levels': [SamplerConfig(steps, STUDENT_SAMPLER, HALF_TANGENT) for steps in STEPS],
}


def rows(teacher: str, students: tuple[str, ...]) -> Iterator[tuple[str, Denoiser, SamplerConfig]]:
    """Name of the curve, network and sampler of everything that is measured."""
    net, _ = load_network(teacher)
    for name, configs in SAMPLERS.items():
        yield from ((name, net, config) for config in configs)
    for path in students:
        net, info = load_network(path)
        yield 'students', net, SamplerConfig.from_json(info.sampler)


def draw(curves: dict[str, list[tuple[int, ...]]], picture: str) -> None:
    """A panel for each metric; points of a curve are (evaluations, metric, metric)."""
    matplotlib.use('Agg')
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    for axis, metric, k in zip(axes, METRICS, (1, 2), strict=True):
        for name, points in curves.items():
            points = sorted(points)
            axis.plot([p[0] for p in points], [p[k] for p in points], 'o-', label=name)
        axis.set(xscale='log', xlabel='evaluations', ylabel=metric, xticks=STEPS, xticklabels=STEPS)
        axis.minorticks_off()
    axes[0].set_yscale('log')
    axes[1].legend(fontsize='small')
    figure.savefig(picture, dpi=100)


@click.command()
@click.argument('students', nargs=-1, metavar='FILE...')
@click.option('--teacher', required=True, metavar='FILE', help='Network file.')
@click.option('--ref', required=True, metavar='DATASET', help='The real images.')
@click.option('--plot', 'picture', required=True, metavar='PNG', help='Where the curves go.')
@click.option('--seeds', type=cli.INTS, default='0-999', show_default=True, help='An image for each.')
def main(students: tuple[str, ...], teacher: str, ref: str, picture: str, seeds: list[int]) -> None:
    """Print the table of docs/sampling.md, and draw it."""
    evaluator = Evaluator(MeasureConfig(select_metrics(METRICS), (ref,), batch=250), torch.device('cpu'))
    curves: dict[str, list[tuple[int, ...]]] = {}
    click.echo(f'| | evaluations | {" | ".join(METRICS)} |\n|---|---:|---:|---:|')
    for name, net, config in rows(teacher, students):
        measured = evaluator.network(net, Generation(seeds, config, PixelEncoder()))
        values = [measured[metric]['value'] for metric in METRICS]
        curves.setdefault(name, []).append((config.evaluations, *values))
        click.echo(f'| {name} | {config.evaluations} | {values[0]:.3f} | {values[1]:.3f} |')
    draw(curves, picture)


if __name__ == '__main__':
    cli.run(main)
