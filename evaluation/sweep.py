"""Metrics over EMA length, training time and guidance (EDM2 figures 5a and 6)."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.files import atomic_path
from dnnlib.jsonl import append_record, mend_records, read_records
from ema.reconstruct import Plan, Snapshot, Wanted
from evaluation.measure import Evaluator, Generation
from networks.files import build_network
from torch_utils import distributed

ROWS_FILE = 'sweep.jsonl'
KEY = ('nimg', 'ema_std', 'guidance')


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to measure.

    Args:
        snapshots: Of the run.
        plans: One for each training time.
        guidance: Weights.
    """

    snapshots: list[Snapshot]
    plans: list[Plan]
    guidance: list[float]

    @classmethod
    def make(
        cls, snapshots: list[Snapshot], stds: Sequence[float], times: Sequence[int] | None, guidance: Sequence[float]
    ) -> 'Sweep':
        """Solve for everything; see `Plan.make` for the arguments."""
        wanted = [Wanted.of_length(std) for std in stds]
        plans = [Plan.make(snapshots, wanted, nimg) for nimg in (times or [None])]
        return cls(snapshots, plans, list(dict.fromkeys(guidance)))

    def run(
        self,
        folder: Path,
        evaluator: Evaluator,
        how: Generation,
        device: torch.device,
        precision: str,
        memory: float,
    ) -> None:
        """Measure what is not yet in the folder's sweep.jsonl, and write it there; every rank calls it.

        Args:
            folder: Rank 0 reads and writes in it.
            evaluator: Does it.
            how: Makes images, for each guidance weight with that.
            device, precision: Of the networks.
            memory: Bytes that reconstructed networks may take at once.
        """
        if distributed.rank() == 0:
            mend_records(folder / ROWS_FILE)
        for plan in self.plans:
            missing = self._missing(folder, plan)
            wanted = [each for each in plan.wanted if any(std == each.std for std, _ in missing)]
            if not wanted:
                continue
            for each, info, weights in dataclasses.replace(plan, wanted=wanted).reconstruct(memory):
                net = build_network(info.config, weights, device, precision)
                for weight in [w for std, w in missing if std == each.std]:
                    sampler = dataclasses.replace(how.sampler, guidance=weight)
                    guiding_net = how.guiding_net if weight != 1 else None
                    found = evaluator.network(net, dataclasses.replace(how, sampler=sampler, guiding_net=guiding_net))
                    if distributed.rank() == 0:
                        combination = plan.combinations[each.std]
                        row = {'nimg': plan.nimg, 'ema_std': each.std, 'guidance': weight}
                        row |= {'profile_error': combination.error, 'amplification': combination.amplification}
                        append_record(folder / ROWS_FILE, row | {'metrics': found})
                        write_table(folder)
                        values = '  '.join(f'{name} {numbers["value"]:.5g}' for name, numbers in found.items())
                        print(f'{plan.nimg:>12} images  EMA {each.std:.3f}  guidance {weight:g}  {values}', flush=True)

    def _missing(self, folder: Path, plan: Plan) -> list[tuple[float, float]]:
        """(length, weight) that rank 0 has no row for, the same on all ranks."""
        pairs = [(each.std, weight) for each in plan.wanted for weight in self.guidance]
        there = set()
        if distributed.rank() == 0:
            there = {tuple(row[key] for key in KEY) for row in read_records(folder / ROWS_FILE, KEY)}
        flags = torch.tensor([int((plan.nimg, *pair) in there) for pair in pairs])
        return [pair for pair, done in zip(pairs, distributed.all_reduce_max(flags).tolist(), strict=True) if not done]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a sweep, by time, guidance and length."""
    rows = read_records(folder / ROWS_FILE, (*KEY, 'metrics'))
    return sorted(rows, key=lambda row: (row['nimg'], row['guidance'], row['ema_std']))


def write_table(folder: Path) -> None:
    """Write sweep.csv: a line for each network, a column for each metric."""
    rows = read_rows(folder)
    names = list(dict.fromkeys(name for row in rows for name in row['metrics']))
    with atomic_path(folder / 'sweep.csv') as beside, open(beside, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        columns = (*KEY, 'profile_error', 'amplification')
        writer.writerow([*columns, *names])
        for row in rows:
            values = [row['metrics'].get(name, {}).get('value', '') for name in names]
            writer.writerow([*(row[key] for key in columns), *values])


def plot_sweep(folder: Path) -> None:
    """Draw each metric against EMA length to sweep.png, a line for each training time and guidance weight."""
    from matplotlib.figure import Figure

    rows = read_rows(folder)
    names = list(dict.fromkeys(name for row in rows for name in row['metrics']))
    figure = Figure(figsize=(5.5 * len(names), 3.8), layout='constrained')
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for nimg, weight in dict.fromkeys((row['nimg'], row['guidance']) for row in rows):
            line = [row for row in rows if (row['nimg'], row['guidance']) == (nimg, weight) and name in row['metrics']]
            label = f'{nimg / 1e6:.3g} M images' + (f', guidance {weight:g}' if weight != 1 else '')
            values = [row['metrics'][name]['value'] for row in line]
            axes.plot([row['ema_std'] for row in line], values, marker='o', markersize=3, label=label)
        axes.set(xlabel='EMA length (sigma_rel)', ylabel=name, title=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize='small')
    with atomic_path(folder / 'sweep.png') as beside:
        figure.savefig(beside, format='png', dpi=120)
