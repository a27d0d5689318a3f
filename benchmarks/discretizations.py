"""EDM's figure 2 on digits: fd_pixels against evaluations, of Euler on VP's and VE's noise levels and of Heun on EDM's.

python -m benchmarks.discretizations --net=demo/run/phema-0000049-0.120.safetensors --ref=demo/digits.zip --dest=x.png

Every line is a way to follow the same ODE of the same network from the same seeds.
"""

import dataclasses
from pathlib import Path

import click
import torch

from diffusion import schedules
from dnnlib import cli
from evaluation.measure import Evaluator, Generation, MeasureConfig
from metrics.registry import select_metrics
from networks.encoders import load_encoder
from networks.files import load_network
from sampling.ablation import Ablation
from sampling.config import SamplerConfig
from sampling.samplers import Heun

WAYS = {
    "Euler, VP's schedule and scaling": SamplerConfig(
        sampler=Ablation(solver='euler', schedule='vp', scaling='vp'), disc=schedules.VP()
    ),
    "Euler, VE's schedule": SamplerConfig(sampler=Ablation(solver='euler', schedule='ve'), disc=schedules.VE()),
    "Euler, EDM's noise levels": SamplerConfig(sampler=Ablation(solver='euler'), disc=schedules.EDM()),
    "Heun, EDM's noise levels": SamplerConfig(sampler=Heun(), disc=schedules.EDM()),
}


def draw(dest: Path, lines: dict[str, list[tuple[int, float]]]) -> None:
    """The plot."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6.5, 4), layout='constrained')).subplots()
    for label, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker='o', markersize=3, label=label)
    axes.set(xlabel='evaluations of the network', ylabel='fd_pixels')
    axes.grid(alpha=0.3, which='both')
    axes.legend(fontsize='small')
    figure.savefig(dest, dpi=110)


@click.command()
@click.option('--net', 'net_path', required=True, metavar='FILE', help='Network file.')
@click.option('--ref', required=True, metavar='DATASET', help='The real images.')
@click.option('--dest', required=True, type=click.Path(path_type=Path), metavar='FILE.png', help='The plot.')
@click.option('--seeds', type=cli.INTS, default='0-499', show_default=True, help='An image for each.')
@click.option('--evaluations', type=cli.INTS, default='5,9,17,33,65', show_default=True, help='Odd numbers.')
def main(net_path: str, ref: str, dest: Path, seeds: list[int], evaluations: list[int]) -> None:
    """Print the table of docs/sampling.md and draw its plot."""
    net, info = load_network(net_path)
    evaluator = Evaluator(MeasureConfig(select_metrics(['fd_pixels']), (ref,), batch=250), torch.device('cpu'))
    lines: dict[str, list[tuple[int, float]]] = {label: [] for label in WAYS}
    click.echo(f'| evaluations | {" | ".join(WAYS)} |\n|---:|{"---:|" * len(WAYS)}')
    for count in evaluations:
        for label, config in WAYS.items():
            steps = (count + 1) // 2 if config.evaluations > config.steps else count
            config = dataclasses.replace(config, steps=steps)
            assert config.evaluations == count
            made = evaluator.network(net, Generation(seeds, config, load_encoder(info.encoder, torch.device('cpu'))))
            lines[label].append((count, made['fd_pixels']['value']))
        row = ' | '.join(f'{points[-1][1]:.3f}' for points in lines.values())
        click.echo(f'| {count} | {row} |')
    draw(dest, lines)


if __name__ == '__main__':
    cli.run(main)
