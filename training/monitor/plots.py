"""Pictures of a run: its loss, and the profiles of averages."""

import importlib.util
import math
from pathlib import Path

from dnnlib.files import atomic_path
from dnnlib.jsonl import read_records
from training.monitor.log import METRICS_FILE, read_stats

SIZE = (12, 3.4)  # inches


def plot_loss(folder: Path) -> None:
    """Draw losses over training time and noise level to loss.png, if matplotlib is installed.

    Left to right: the uncertainty-weighted loss, the plain weighted squared error (with that of held-out images), and
    the error by noise level in the first, the middle and the last record.
    """
    if importlib.util.find_spec('matplotlib') is None:
        return
    from matplotlib.figure import Figure

    records = read_stats(folder)
    if not records:
        return
    figure = Figure(figsize=SIZE, layout='constrained')
    left, middle, right = figure.subplots(1, 3)
    nimg = [record['nimg'] / 1000 for record in records]
    for axes, key, title in (
        (left, 'loss', 'uncertainty-weighted loss'),
        (middle, 'mse', 'weighted squared error'),
    ):
        axes.plot(nimg, [record[key] for record in records], linewidth=1, label='training images')
        axes.set(xlabel='training images (thousands)', title=title)
        for std, points in _held_out(folder, key).items():
            axes.plot(*points, marker='o', markersize=3, linewidth=1, label=f'held-out images, EMA {std:g}')
            axes.legend(fontsize='small')
    for record in {r['nimg']: r for r in (records[0], records[len(records) // 2], records[-1])}.values():
        _draw_by_noise(right, record)
    right.set(xlabel='ln(sigma)', title='weighted squared error by noise level')
    right.legend(title='images', fontsize='small')
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    with atomic_path(folder / 'loss.png') as beside:
        figure.savefig(beside, format='png', dpi=120)


def _held_out(folder: Path, key: str) -> dict[float, tuple[list[float], list[float]]]:
    curves: dict[float, tuple[list[float], list[float]]] = {}
    for record in read_records(folder / METRICS_FILE):
        if 'held_out' in record:
            x, y = curves.setdefault(record['ema_std'], ([], []))
            x.append(record['nimg'] / 1000)
            y.append(record['held_out'][key])
    return curves


def _draw_by_noise(axes, record: dict) -> None:
    edges, mse = record['by_noise']['ln_sigma_edges'], record['by_noise']['mse']
    half = (edges[1] - edges[0]) / 2
    centres = [edges[0] - half, *(edge + half for edge in edges)]
    axes.plot(centres, [math.nan if v is None else v for v in mse], marker='o', markersize=3, label=f'{record["nimg"]}')
