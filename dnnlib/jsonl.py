"""Files of records, one JSON object in a line."""

import json
from pathlib import Path
from typing import Any

from dnnlib.files import atomic_path, named_errors


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line."""
    with named_errors(path), open(path, 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')


def read_records(path: Path) -> list[dict[str, Any]]:
    """All lines; none where there is no file. A last line that was cut short is left out."""
    records = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def mend_records(path: Path) -> None:
    """Drop a last line that was cut short, so that lines added after it can be read."""
    if path.exists():
        _write_records(path, read_records(path))


def cut_records(path: Path, nimg: int) -> None:
    """Drop what lies beyond `nimg`, so that a continued run has every line once."""
    if path.exists():
        _write_records(path, [record for record in read_records(path) if record['nimg'] <= nimg])


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    with atomic_path(path) as beside:
        beside.write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
