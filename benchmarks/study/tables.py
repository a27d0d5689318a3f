"""The study's tables: read from CSV files, summed up over seeds, and as docs/study.md has them."""

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.recipes import STD

SHOWN = {  # column -> factor, decimals
    'error': (1, 4), 'fd_pixels': (1, 3), 'class_agreement': (100, 1), 'precision': (100, 0), 'recall': (100, 0),
}  # fmt: skip
ENDS = {'same_images': 'images', 'same_operations': 'operations'}


def table(path: Path) -> list[dict[str, Any]]:
    """Lines of a CSV file, numbers as such, None where there is nothing."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text or None

    with open(path, newline='', encoding='utf-8') as file:
        return [{key: value(text) for key, text in line.items()} for line in csv.DictReader(file)]


def spread(
    lines: Iterable[dict[str, Any]], x: str, y: str
) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, and over the seeds mean, least and largest y, sorted by x; lines without a number are left out."""
    found = defaultdict(list)
    for line in lines:
        if line[x] is not None and line[y] is not None:
            found[line[x]].append(line[y])
    xs = sorted(found)
    return xs, [float(np.mean(found[v])) for v in xs], [min(found[v]) for v in xs], [max(found[v]) for v in xs]


def with_range(values: list[float], factor: float, decimals: int) -> str:
    """Mean, and of several values the least and the largest."""
    if not values:
        return ''
    mean, least, most = (f'{factor * v:.{decimals}f}' for v in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f'{mean} ({least} to {most})'


def markdown(folder: Path) -> str:
    """Both tables of docs/study.md: what the rows cost, and how good they are at both ends."""
    networks = {line['row']: line for line in table(folder / 'networks.csv')}
    rates = {line['row']: line['lr'] for line in table(folder / 'rates.csv') if line['chosen'] == 'True'}
    results = [line for line in table(folder / 'results.csv') if line['ema_std'] == STD]
    lines = [
        '| row | width | thousands of parameters | million operations | images for the operations of A | learning rate '
        '| CPU ms of training for an image | of sampling |',
        '|---|---:|---:|---:|---:|---:|---:|---:|',
    ]
    for name, line in networks.items():
        times = ' | '.join(
            '' if line[key] is None else f'{1000 * line[key]:.1f}' for key in ('training_seconds', 'sampling_seconds')
        )
        numbers = f'{line["parameters"] / 1e3:.0f} | {line["operations"] / 1e6:.1f} | {line["same_operations"]:.0f}'
        lines.append(f'| {name} | {line["width"]:.0f} | {numbers} | {rates.get(name, 0):g} | {times} |')
    for end, what in ENDS.items():
        lines += [
            '',
            f'As many {what} as A:',
            '',
            f'| row | seeds | {" | ".join(SHOWN)} |',
            '|---|---:|' + '---:|' * len(SHOWN),
        ]
        for name, network in networks.items():
            there = [line for line in results if line['row'] == name and line['nimg'] == network[end]]
            cells = [with_range([r[key] for r in there if r[key] is not None], *how) for key, how in SHOWN.items()]
            lines.append(f'| {name} | {len(there)} | {" | ".join(cells)} |')
    return '\n'.join(lines)
