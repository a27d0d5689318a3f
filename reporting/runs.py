"""What a run folder says of a run."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError
from dnnlib.files import read_object
from dnnlib.jsonl import read_records

NEEDED = ('nimg', 'loss', 'mse', 'by_noise', 'seconds', 'images_per_second', 'memory_gib')  # of a record, for a page
COMMAND = 'command: '  # begins the line of log.txt that tells how a run was started


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        name: Of its folder, or as much of the path as tells it from the others.
        folder: Where it is.
        config: As plain values.
        stats: Records of stats.jsonl, at least one.
        measured: Records of metrics.jsonl.
        previews: Its sample grids with their training time in thousands of images, in order.
        commands: That started and resumed it.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    stats: list[dict[str, Any]]
    measured: list[dict[str, Any]]
    previews: list[tuple[int, Path]]
    commands: list[str]


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder.

    Raises:
        UserError: where it is none, or nothing has been trained in it yet.
    """
    try:
        config = read_object(folder / 'config.json')
    except (OSError, UserError):
        config = {}
    if not {'data', 'preset', 'duration'} <= config.keys():
        raise UserError(f'{folder} is no run folder: there is no readable config.json in it')
    stats = read_records(folder / 'stats.jsonl', NEEDED)
    if not stats:
        raise UserError(f'{folder} has no lines in stats.jsonl yet')
    named = ((re.fullmatch(r'samples-(\d+)\.png', path.name), path) for path in folder.iterdir())
    previews = sorted((int(match[1]), path) for match, path in named if match)
    log = folder / 'log.txt'
    lines = log.read_text(encoding='utf-8', errors='replace').splitlines() if log.exists() else []
    commands = [line.partition(COMMAND)[2] for line in lines if COMMAND in line]
    measured = read_records(folder / 'metrics.jsonl', ('nimg', 'ema_std'))
    return Run(name, folder, config, stats, measured, previews, list(dict.fromkeys(commands)))


def read_runs(folders: list[Path]) -> list[Run]:
    """Read several, each with a name of its own."""
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    return [read_run(folder, name if unique else str(folder)) for folder, name in zip(folders, names, strict=True)]


def compare_configs(runs: list[Run]) -> tuple[list[tuple[str, list[Any]]], list[tuple[str, Any]]]:
    """Fields of the configs by dotted name: those that differ, with a value for each run, and those that do not."""
    flat = [_flat('', run.config) for run in runs]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [(name, [values.get(name) for values in flat]) for name in names]
    different = [(name, values) for name, values in rows if any(value != values[0] for value in values)]
    return different, [(name, values[0]) for name, values in rows if all(value == values[0] for value in values)]


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: v for part in value for key, v in _flat(f'{name}.{part}' if name else part, value[part]).items()}
