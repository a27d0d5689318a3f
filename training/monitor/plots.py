"""Pictures of a run: its loss, and the profiles of averages."""

import importlib.util
import math
from pathlib import Path

import numpy as np

from dnnlib.errors import UserError
from dnnlib.files import atomic_path
from ema.power import profile
from ema.reconstruct import Plan
from training.monitor.log import METRICS_FILE, read_records, read_stats

SIZE = (12, 3.4)  # inches


def require_matplotlib() -> None:
    """Make sure that pictures can be drawn.

    Raises:
        UserError: where matplotlib is missing.
    """
    if importlib.util.find_spec('matplotlib') is None:
        raise UserError('a plot needs matplotlib: pip install matplotlib')


def plot_profiles(path: Path, plan: Plan) -> None:
    """Draw the weight that each average gives to the parameters of the past, as in EDM2 figure 4.

    Dashed: wanted. Solid: what the combination of snapshots achieves. Ticks below: times of the snapshots.
    """
    from matplotlib.figure import Figure

    times = np.linspace(0, plan.nimg, 2000)
    figure = Figure(figsize=(8, 4.2), layout='constrained')
    axes = figure.subplots()
    stored = [profile(times, s.info.nimg, s.info.ema_std) for s in plan.snapshots]
    for i, (std, combination) in enumerate(plan.combinations.items()):
        achieved = sum(c * p for c, p in zip(combination.coefficients, stored, strict=True))
        colour, label = f'C{i % 10}', f'{std:g} (error {combination.error:.2%})'
        axes.plot(times / 1000, achieved * plan.nimg, color=colour, linewidth=1, label=label)
        axes.plot(times / 1000, profile(times, plan.nimg, std) * plan.nimg, color=colour, linestyle='--', alpha=0.6)
    for nimg in {s.info.nimg for s in plan.snapshots}:
        axes.axvline(nimg / 1000, ymax=0.02, color='grey', linewidth=0.8)
    axes.set(
        xlabel='training images (thousands)',
        ylabel='weight, relative to a plain average',
        title='EMA profiles: wanted (dashed) and achieved',
    )
    columns = math.ceil(len(plan.combinations) / 16)
    figure.legend(title='length', fontsize='small', loc='outside right upper', ncols=columns)
    figure.set_figwidth(7 + 2.1 * columns)
    axes.grid(alpha=0.3)
    with atomic_path(path) as beside:
        figure.savefig(beside, format='png', dpi=120)


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
