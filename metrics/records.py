"""What makes a result repeatable: a line in metrics.jsonl with everything that it depends on."""

import datetime
import json
import os
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from metrics.collectors import MOST_FEATURES
from torch_utils import distributed
from torch_utils.tensor_files import library_versions

GENERATION = 'generation.json'


def describe_run(device: torch.device, batch_size: int) -> dict[str, Any]:
    """When, how and on what this process measures."""
    return {
        'time': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'command': shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'ranks': distributed.world_size(),
        'batch': batch_size,
        'most_features': MOST_FEATURES,
        'versions': library_versions(),
    }


def find_generation(images: str) -> dict[str, Any] | None:
    """generation.json of a folder, in a zip, or beside an `.npz`: how the images were made. None where there is none.

    Raises:
        UserError: where it is not JSON.
    """
    path = Path(images)
    try:
        if path.is_dir() or path.suffix == '.npz':
            content = ((path if path.is_dir() else path.parent) / GENERATION).read_text(encoding='utf-8')
        else:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(GENERATION).decode()
        record = json.loads(content)
    except (FileNotFoundError, KeyError):
        return None
    except ValueError as error:
        raise UserError(f'{GENERATION} of {images} is not JSON: {error}') from None
    if isinstance(record, dict) and isinstance(record.get('seeds'), list):
        record['seeds'] = format_int_list(record['seeds'])
    return record


def format_int_list(numbers: list[int]) -> str:
    """Write [1, 2, 5, 6, 7] as `1-2,5-7`: the inverse of `dnnlib.parsing.parse_int_list`, short for long ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ','.join(str(first) if first == last else f'{first}-{last}' for first, last in runs)


def append_record(path: str | os.PathLike, record: dict[str, Any]) -> None:
    """Add a line of JSON to a file, in one write, after what is there.

    Raises:
        OSError: naming the file, where it cannot be written.
    """
    line = json.dumps(record) + '\n'
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
