"""The plots of docs/study.md, from its tables alone, and its picture of drawn digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.recipes import ROWS, STD, slug
from benchmarks.study.tables import spread, table
from dnnlib.files import atomic_path

COLORS = {name: f'C{i}' for i, name in enumerate(ROWS)}
BIN = 0.6  # width in ln sigma
METRICS = {'error': 'held-out error', 'fd_pixels': 'fd_pixels'}


def curves(
    axes: Axes, lines: list[dict[str, Any]], x: str, y: str, scale: float = 1.0, kept: Callable = lambda line: True
) -> None:
    """A curve for each row, with the range over its seeds."""
    for name, color in COLORS.items():
        xs, mean, least, most = spread([r for r in lines if r['row'] == name and kept(r)], x, y)
        if xs:
            xs = [scale * v for v in xs]
            style = '-' if name in ('A', 'G*') else '--' if name in ('EDM', 'SiD2') else ':'
            axes.plot(xs, mean, style, color=color, marker='o', markersize=3, linewidth=1.3, label=name)
            axes.fill_between(xs, least, most, color=color, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3, which='both')


def decimal(axes: Axes, label: str) -> None:
    """A logarithmic axis with numbers as people write them."""
    axes.set(yscale='log', ylabel=label)
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:.3g}')
    axes.tick_params(axis='y', which='minor', labelsize='small')


def draw(folder: Path) -> None:
    """Write quality.png, ema.png, noise.png and drawn.png beside the tables."""
    results, noise = table(folder / 'results.csv'), table(folder / 'noise.csv')
    networks = {line['row']: line for line in table(folder / 'networks.csv')}
    for name, figure in (
        ('quality', quality(results)),
        ('ema', ema(results, networks)),
        ('noise', by_noise(noise, networks)),
        ('drawn', drawn(folder, networks)),
    ):
        if figure is not None:
            with atomic_path(folder / f'{name}.png') as beside:
                figure.savefig(beside, format='png', dpi=90)


def quality(results: list[dict[str, Any]]) -> Figure:
    """Error and fd_pixels against images, operations and seconds of training."""
    figure = Figure(figsize=(11, 6.4), layout='constrained')
    grid = figure.subplots(2, 3, sharey='row')
    for axes, metric in zip(grid, METRICS, strict=True):
        for axis, (x, scale, label) in zip(
            axes,
            (
                ('nimg', 1e-3, 'thousands of images'),
                ('operations', 1e-12, 'forward operations, 10$^{12}$'),
                ('training_seconds', 1, 'CPU seconds of training'),
            ),
            strict=True,
        ):
            curves(axis, results, x, metric, scale, lambda line: line['ema_std'] == STD)
            axis.set(xlabel=label)
        decimal(axes[0], METRICS[metric])
    grid[0, 0].legend(fontsize='small', ncols=2)
    return figure


def ema(results: list[dict[str, Any]], networks: dict[str, dict[str, Any]]) -> Figure:
    """Error and fd_pixels against EMA length, after as many operations as A's."""
    figure = Figure(figsize=(8, 3.6), layout='constrained')
    for axis, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
        kept = [line for line in results if line['nimg'] == networks[line['row']]['same_operations']]
        curves(axis, kept, 'ema_std', metric)
        axis.set(xlabel='EMA length')
        decimal(axis, METRICS[metric])
    axis.legend(fontsize='small', ncols=2)
    return figure


def middle(low: float | None, high: float | None) -> float:
    """Of a bin of ln sigma; the outer two are open, and drawn as wide as the others."""
    return high - BIN / 2 if low is None else low + BIN / 2


def by_noise(noise: list[dict[str, Any]], networks: dict[str, dict[str, Any]]) -> Figure | None:
    """Held-out error at each noise level relative to A's mean: after as many images, and as many operations."""
    if 'A' not in networks:
        return None
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    for axis, when in zip(figure.subplots(1, 2, sharey=True), ('same_images', 'same_operations'), strict=True):
        kept = [
            {**line, 'bin': middle(line['ln_sigma_from'], line['ln_sigma_to'])}
            for line in noise
            if line['nimg'] == networks[line['row']][when]
        ]
        xs, means, *_ = spread([line for line in kept if line['row'] == 'A'], 'bin', 'error')
        of_a = dict(zip(xs, means, strict=True))
        curves(axis, [{**r, 'error': r['error'] / of_a[r['bin']]} for r in kept if r['bin'] in of_a], 'bin', 'error')
        axis.set(xlabel='ln sigma', title=f'as many {when.removeprefix("same_")} as A')
    figure.axes[0].set_ylabel("held-out error, relative to A's")
    figure.axes[1].legend(fontsize='small', ncols=2)
    return figure


def drawn(folder: Path, networks: dict[str, dict[str, Any]]) -> Figure | None:
    """Digits of the same seeds by every row, after as many operations as A's."""
    paths = {name: folder / slug(name) / f'drawn-{line["same_operations"]:.0f}.png' for name, line in networks.items()}
    paths = {name: path for name, path in paths.items() if path.exists()}
    if not paths:
        return None
    figure = Figure(figsize=(9, 0.55 * len(paths)), layout='constrained')
    for axis, (name, path) in zip(figure.subplots(len(paths), 1, squeeze=False)[:, 0], paths.items(), strict=True):
        axis.imshow(np.asarray(PIL.Image.open(path)), cmap='gray', vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha='right', va='center')
    return figure
