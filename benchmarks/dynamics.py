"""Magnitudes and error over training for every step from ADM to EDM2, as EDM2's figures 3 and 15: docs/ladder.png.

python -m benchmarks.dynamics

Trains `ladder-a-digits` to `ladder-g-digits` on the digits that scikit-learn carries, and draws what their stats.jsonl
hold. Widths and batches are small, for many steps in few minutes. What is trained already is not trained again.
"""

import subprocess
import sys
from pathlib import Path

import click
from matplotlib.figure import Figure

from dnnlib.files import atomic_path
from training.monitor.log import read_stats

ROOT = Path(__file__).parent.parent
RUNGS = 'abcdefg'
KINDS = ('activations', 'weights')
INTERVAL = 64  # images between status lines, every 16th of which has magnitudes
WINDOW = 16  # of the running mean of the error, in status lines
SMALL = ('--channels=16', '--channels-per-head=16', '--batch=32')


def run(script: str, *arguments: object) -> None:
    """Run a script of the root."""
    subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], check=True)


def measured(folder: Path) -> tuple[dict[str, dict[str, tuple]], list[float], list[float]]:
    """What is drawn of a run.

    Returns:
        Kind -> resolution -> (thousands of images, mean, max) of the magnitudes; thousands of images and running mean
        of the weighted squared error.
    """
    records = read_stats(folder)
    there = [(record['nimg'] / 1000, record) for record in records if 'magnitudes' in record]
    curves = {
        kind: {
            bucket: tuple(zip(*((x, *r['magnitudes'][kind][bucket]) for x, r in there), strict=True))
            for bucket in there[0][1]['magnitudes'][kind]
        }
        for kind in KINDS
    }
    errors = [record['mse'] for record in records]
    means = [sum(errors[i : i + WINDOW]) / WINDOW for i in range(len(errors) - WINDOW + 1)]
    return curves, [record['nimg'] / 1000 for record in records[WINDOW - 1 :]], means


def draw(folders: dict[str, Path]) -> Figure:
    """A column for each run: magnitudes by resolution relative to the first, mean (solid) and largest; the error."""
    figure = Figure(figsize=(2.3 * len(folders), 6.6), layout='constrained')
    grid = figure.subplots(3, len(folders), sharex=True, sharey='row', squeeze=False)
    for column, (rung, folder) in enumerate(folders.items()):
        curves, nimg, errors = measured(folder)
        for axes, kind in zip(grid[:2, column], KINDS, strict=True):
            for i, (bucket, (x, mean, largest)) in enumerate(curves[kind].items()):
                axes.plot(x, [v / mean[0] for v in mean], color=f'C{i}', linewidth=1.3, label=bucket)
                axes.plot(x, [v / largest[0] for v in largest], color=f'C{i}', linewidth=1, linestyle=':')
        grid[2, column].plot(nimg, errors, color='#333333', linewidth=1)
        grid[2, column].set(yscale='log', xlabel='thousands of images')
        grid[0, column].set_title(f'config {rung.upper()}')
        for axes in grid[:, column]:
            axes.grid(alpha=0.3)
    for axes, label in zip(
        grid[:, 0], (*(f'{kind}, relative' for kind in KINDS), 'weighted squared error'), strict=True
    ):
        axes.set_ylabel(label)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    return figure


@click.command()
@click.option('--outdir', default='demo/ladder', show_default=True, help='Dataset and run folders.')
@click.option('--dest', default='docs/ladder.png', show_default=True, help='Where the picture goes.')
@click.option('--rungs', default=RUNGS, show_default=True, help='Letters of the configs.')
@click.option('--duration', default=12 * 1024, show_default=True, help='Images of each run.')
def main(outdir: str, dest: str, rungs: str, duration: int) -> None:
    """Train what is not trained yet, and draw."""
    data = Path(outdir) / 'digits.zip'
    if not data.exists():
        run('dataset_tool.py', 'convert', '--source=digits', f'--dest={data}')
    folders = {rung: Path(outdir) / rung for rung in rungs}
    for rung, folder in folders.items():
        run('train.py', f'--preset=ladder-{rung}-digits', f'--data={data}', f'--outdir={folder}',
            f'--status={INTERVAL}', f'--duration={duration}', *SMALL)  # fmt: skip
    with atomic_path(dest) as beside:
        draw(folders).savefig(beside, format='png', dpi=80)


if __name__ == '__main__':
    main()
