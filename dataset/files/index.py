"""What opening a dataset finds out: its images, their labels and a fingerprint; kept beside it for the next time.

For ImageNet that takes many seconds and much memory, which every rank and every run would spend again. So the index of
a large dataset goes to a file beside it, from which processes map it into memory together: no copies, no waiting.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.files.archive import ENDINGS, NPY, Archive, read_label_file
from dataset.files.file_table import FileTable, Names, describe_state
from dnnlib.errors import UserError
from torch_utils.tensor_files import TensorFile, UnreadableFileError, save_tensors

KEEP_FROM = 20_000  # images; the index of fewer is made in a moment
VERSION = 1
COLUMNS = ('sizes', 'offsets', 'packed', 'crcs', 'methods')


@dataclass(frozen=True)
class DatasetIndex:
    """The images of a dataset.

    Attributes:
        files: The image files, sorted by name.
        labels: Class indices, int64 [N], or None.
        made_with: How it was made, as `dataset_tool.py` wrote it; {} where it does not say.
        fingerprint: 16 hexadecimal digits that change with names, file sizes or labels, and for NPY, the sizes of which
            are all the same, with `made_with`.
    """

    files: FileTable
    labels: np.ndarray | None
    made_with: Mapping[str, Any]
    fingerprint: str


def index_path(path: str | os.PathLike) -> Path:
    """Where the index of a dataset is kept: hidden, so that no reader takes it for one."""
    whole = Path(path).resolve()
    return whole.with_name(f'.{whole.name}.index.safetensors')


def open_index(path: str | os.PathLike) -> DatasetIndex:
    """Load the index of a folder or zip, or make it, and keep that of a large one where that can be written.

    Several processes may do so at once: the file appears whole, and all make the same.

    Raises:
        UserError: where the dataset cannot be used.
        OSError: where it cannot be read.
    """
    kept = _load(path)
    if kept is not None:
        return kept
    before = describe_state(path)
    archive = Archive(path)
    index = _make(archive)
    if len(index.files) < KEEP_FROM:
        return index
    state = {**before, 'folders': archive.folders} if archive.folders else before  # all from before it was read
    with contextlib.suppress(OSError):  # read-only, full: every process makes its own
        _save(index, state, index_path(path))
    return _load(path) or index  # mapped into memory, what was made can be freed


def _make(archive: Archive) -> DatasetIndex:
    rows = archive.rows_ending(ENDINGS)
    files = archive.files.select(rows)
    labels, made_with = read_label_file(archive, files.names)
    return DatasetIndex(files, labels, made_with, _fingerprint(files, labels, made_with))


def _fingerprint(files: FileTable, labels: np.ndarray | None, made_with: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    classes = [None] * len(files) if labels is None else labels.tolist()
    for name, size, label in zip(files.names, files.sizes.tolist(), classes, strict=True):
        digest.update(repr((name, size, label)).encode(errors='surrogateescape'))
    if files.names[0].endswith(NPY):
        digest.update(json.dumps(made_with, sort_keys=True).encode())
    return digest.hexdigest()


def _save(index: DatasetIndex, state: Mapping[str, Any], path: Path) -> None:
    names = index.files.names
    arrays = {'text': names.text, 'ends': names.ends, **{name: getattr(index.files, name) for name in COLUMNS}}
    if index.labels is not None:
        arrays['labels'] = index.labels
    arrays['crcs'] = arrays['crcs'].view(np.int32) if len(arrays['crcs']) else arrays['crcs']
    header = {
        'kind': 'dataset index',
        'version': VERSION,
        'state': state,
        'made_with': index.made_with,
        'fingerprint': index.fingerprint,
    }
    save_tensors(path, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, header)


def _load(path: str | os.PathLike) -> DatasetIndex | None:
    """The kept index, None where there is none that holds for the dataset as it is now."""
    kept = index_path(path)
    try:
        file = TensorFile(kept, 'dataset index')
        header = file.header
        if header.get('version') != VERSION or header.get('kind') != 'dataset index':
            return None
        if header['state'] != describe_state(path, header['state'].get('folders', ())):
            return None
        arrays = {name: tensor.numpy() for name, tensor in file.items()}
    except (OSError, UnreadableFileError):
        return None
    crcs = arrays['crcs'].view(np.uint32) if len(arrays['crcs']) else arrays['crcs']
    table = FileTable(Names(arrays['text'], arrays['ends']), **{name: arrays[name] for name in COLUMNS[:3]}, crcs=crcs,
                      methods=arrays['methods'])  # fmt: skip
    return DatasetIndex(table, arrays.get('labels'), header['made_with'], header['fingerprint'])


def check_exists(path: str | os.PathLike) -> None:
    """Say how to make a dataset where there is none.

    Raises:
        UserError: where `path` does not exist.
    """
    if not Path(path).exists():
        how = f'python dataset_tool.py convert --source=digits --dest={path}'
        raise UserError(f'dataset {path} does not exist; make one, for instance with: {how}')
