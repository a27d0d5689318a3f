"""Plots of several runs over each other, as data URIs of SVGs."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from reporting.runs import Run

COLUMNS, WIDTH, HEIGHT = 2, 5.6, 3.4  # plots in a row, inches of each


def plot_runs(runs: Sequence[Run]) -> str:
    """Losses, learning rate and speed over training time, and the error by noise level at the end."""
    figure, axes = _figure(5 if any(_held_out(run) for run in runs) else 4)
    for run in runs:
        nimg = [record['nimg'] / 1000 for record in run.stats]
        for place, key in zip(axes, ('loss', 'mse', 'images_per_second'), strict=False):
            place.plot(nimg, [record[key] for record in run.stats], linewidth=1, label=run.name)
        edges, mse = run.stats[-1]['by_noise']['ln_sigma_edges'], run.stats[-1]['by_noise']['mse']
        half = (edges[1] - edges[0]) / 2
        values = [math.nan if value is None else value for value in mse]
        axes[3].plot(
            [edges[0] - half, *(edge + half for edge in edges)], values, marker='.', linewidth=1, label=run.name
        )
        for std, points in _held_out(run).items():
            axes[4].plot(*zip(*points, strict=True), marker='.', linewidth=1, label=f'{run.name}, EMA {std:g}')
    titles = [
        'uncertainty-weighted loss',
        'weighted squared error',
        'images per second',
        'weighted squared error by noise level, at the end',
        'weighted squared error of held-out images',
    ]
    for place, title in zip(axes, titles, strict=False):
        place.set(title=title, xlabel='ln(sigma)' if 'noise level' in title else 'training images (thousands)')
        place.legend(fontsize='small')
        place.grid(alpha=0.3)
    return _data_uri(figure)


def plot_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """Each metric of a sweep against EMA length, a line for each training time and guidance weight."""
    names = list(dict.fromkeys(name for row in rows for name in row['metrics']))
    figure, axes = _figure(len(names))
    for place, name in zip(axes, names, strict=False):
        for nimg, weight in dict.fromkeys((row['nimg'], row['guidance']) for row in rows):
            line = [row for row in rows if (row['nimg'], row['guidance']) == (nimg, weight) and name in row['metrics']]
            values = [row['metrics'][name]['value'] for row in line]
            label = f'{nimg / 1000:g} k images, guidance {weight:g}'
            place.plot([row['ema_std'] for row in line], values, marker='.', linewidth=1, label=label)
        place.set(xlabel='EMA length (sigma_rel)', title=name)
        place.legend(fontsize='small')
        place.grid(alpha=0.3)
    return _data_uri(figure)


def _held_out(run: Run) -> dict[float, list[tuple[float, float]]]:
    """Held-out error over training time of each EMA length."""
    curves: dict[float, list[tuple[float, float]]] = {}
    for record in run.measured:
        if 'held_out' in record:
            curves.setdefault(record['ema_std'], []).append((record['nimg'] / 1000, record['held_out']['mse']))
    return curves


def _figure(count: int) -> tuple[Figure, list]:
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * rows), layout='constrained')
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _data_uri(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format='svg')
    return f'data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}'
