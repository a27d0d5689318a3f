"""Files of records, one JSON object in a line."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dnnlib.errors import warn
from dnnlib.files import atomic_path, named_errors


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line."""
    with named_errors(path), open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')


def read_records(path: Path, needed: Collection[str] = ()) -> list[dict[str, Any]]:
    """All records that have the fields `needed`; none where there is no file.

    Damaged lines are left out, with a warning unless it is the last.
    """
    return [record for record, _ in _read(path) if record.keys() >= set(needed)]


def mend_records(path: Path) -> None:
    """Drop damaged lines, such as a last one that was cut short, so that lines added after it can be read."""
    _keep(path, lambda record: True)


def cut_records(path: Path, nimg: int) -> None:
    """Drop what lies beyond `nimg`, and records that do not say where they lie, so that a resumed run has each once."""
    _keep(path, lambda record: isinstance(record.get('nimg'), int) and record['nimg'] <= nimg)


def _keep(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file, each line as it was."""
    if path.exists():
        lines = [line for record, line in _read(path) if wanted(record)]
        with atomic_path(path) as beside:
            beside.write_bytes(b''.join(line + b'\n' for line in lines))


def _read(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Records and their lines."""
    found, lines = [], path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append((record, line))
        elif number < len(lines):
            warn(f'{path}: line {number} is damaged and left out')
    return found
