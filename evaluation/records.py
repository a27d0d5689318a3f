"""What makes a result repeatable: a line in metrics.jsonl with everything that it depends on."""

import datetime
import importlib.metadata
import shlex
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from dnnlib.files import parse_object
from metrics.collectors import MOST_FEATURES
from torch_utils import distributed
from torch_utils.tensor_files import library_versions

GENERATION = 'generation.json'


def describe_run(device: torch.device, batch_size: int) -> dict[str, Any]:
    """When, how and on what this process measures."""
    return {
        'time': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'command': f'python {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}',
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'ranks': distributed.world_size(),
        'batch': batch_size,
        'most_features': MOST_FEATURES,
        'versions': {**library_versions(), **{name: _version(name) for name in ('pillow', 'transformers')}},
        'commit': find_commit(),
    }


def find_commit() -> str | None:
    """The git commit that this code is of, with `-dirty` where files differ from it; None without git."""
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--match=']
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_generation(images: str) -> dict[str, Any] | None:
    """generation.json of a folder, in a zip, or beside an `.npz`: how images were made. None where there is none."""
    path = Path(images)
    try:
        if path.is_dir() or path.suffix == '.npz':
            content = ((path if path.is_dir() else path.parent) / GENERATION).read_text(encoding='utf-8')
        else:
            with zipfile.ZipFile(path) as archive:
                content = archive.read(GENERATION).decode()
        record = parse_object(content)
    except (FileNotFoundError, KeyError):
        return None
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f'{GENERATION} of {images} cannot be read: {error}') from None
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
