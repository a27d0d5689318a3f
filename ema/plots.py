"""Profiles of averages as a picture."""

import math
from pathlib import Path

import numpy as np

from dnnlib.files import atomic_path
from ema.power import profile
from ema.reconstruct import Plan


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
