"""What opening a dataset finds out: its images, their labels and a fingerprint; kept beside it for the next time.

For ImageNet that takes many seconds and much memory, which every rank and every run would spend again. So the index of
a large dataset goes to a file beside it, from which processes map it into memory together: no copies, no waiting.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.files.archive import ENDINGS, NPY, Archive
from dataset.files.file_table import FileTable, Names
from dataset.files.labels import LABEL_FILE, Labels, read_labels
from dnnlib.errors import UserError
from torch_utils.tensor_files import TensorFile, UnreadableFileError, save_tensors

KEEP_FROM = 20_000  # images; the index of fewer is made in a moment
VERSION = 1
KIND = 'dataset index'
COLUMNS = ('sizes', 'offsets', 'packed', 'crcs', 'methods')


@dataclass(frozen=True)
class DatasetIndex:
    """The images of a dataset.

    Attributes:
        files: The image files, sorted by name.
        labels: What `dataset.json` says of them.
        fingerprint: 16 hexadecimal digits that change with names, file sizes or labels, and for NPY, the sizes of which
            are all the same, with `made_with`.
    """

    files: FileTable
    labels: Labels
    fingerprint: str


@dataclass(frozen=True)
class Header:
    """What a kept index says of itself; `state` is what it is valid for."""

    version: int
    state: dict[str, Any]
    made_with: dict[str, Any]
    fingerprint: str
    class_names: tuple[str, ...] | None = None


def index_path(path: str | os.PathLike) -> Path:
    """Where the index of a dataset is kept: hidden, so that no reader takes it for one."""
    whole = Path(path).resolve()
    return whole.with_name(f'.{whole.name}.index.safetensors')


def open_index(path: str | os.PathLike) -> DatasetIndex:
    """Load the index of a folder or zip, or make it, and keep that of a large one where that can be written.

    Several processes may do so at once: the file appears whole, and all make the same.
    """
    if not Path(path).exists():
        how = f'python dataset_tool.py convert --source=digits --dest={path}'
        raise UserError(f'dataset {path} does not exist; make one, for instance with: {how}')
    kept = _load(path)
    if kept is not None:
        return kept
    before = _state(path)
    archive = Archive(path)
    index = _make(archive)
    if len(index.files) < KEEP_FROM:
        return index
    state = {**before, 'folders': archive.folders} if archive.folders else before  # all from before it was read
    with contextlib.suppress(OSError):  # read-only, full: every process makes its own
        _save(index, state, index_path(path))
    return _load(path) or index  # mapped into memory, what was made can be freed


def _make(archive: Archive) -> DatasetIndex:
    files = archive.files.select(archive.rows_ending(ENDINGS))
    labels = read_labels(archive, files.names)
    digest = hashlib.blake2b(digest_size=8)
    classes = [None] * len(files) if labels.classes is None else labels.classes.tolist()
    for name, size, label in zip(files.names, files.sizes.tolist(), classes, strict=True):
        digest.update(repr((name, size, label)).encode(errors='surrogateescape'))
    if files.names[0].endswith(NPY):
        digest.update(json.dumps(labels.made_with, sort_keys=True).encode())
    return DatasetIndex(files, labels, digest.hexdigest())


def _state(path: str | os.PathLike, folders: Iterable[str] = ()) -> dict:
    """What an index is valid for: size and time of a zip, times of all `folders` of a folder, in JSON's types."""
    if not Path(path).is_dir():
        about = Path(path).stat()
        return {'size': about.st_size, 'mtime_ns': about.st_mtime_ns}
    labels = Path(path, LABEL_FILE)
    about = labels.stat() if labels.exists() else None
    return {
        'folders': {folder: Path(path, folder).stat().st_mtime_ns for folder in folders},
        'labels': about and [about.st_size, about.st_mtime_ns],
    }


def _save(index: DatasetIndex, state: Mapping[str, Any], path: Path) -> None:
    names = index.files.names
    arrays = {'text': names.text, 'ends': names.ends, **{name: getattr(index.files, name) for name in COLUMNS}}
    if index.labels.classes is not None:
        arrays['labels'] = index.labels.classes
    arrays['crcs'] = arrays['crcs'].view(np.int32)
    header = {
        'kind': KIND,
        'version': VERSION,
        'state': state,
        'made_with': index.labels.made_with,
        'class_names': index.labels.class_names,
        'fingerprint': index.fingerprint,
    }
    save_tensors(path, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, header)


def _load(path: str | os.PathLike) -> DatasetIndex | None:
    """The kept index, None where there is none that holds for the dataset as it is now."""
    try:
        with TensorFile(index_path(path), KIND) as file:
            header = file.about(Header)
            if header.version != VERSION or header.state != _state(path, header.state.get('folders', ())):
                return None
            arrays = {name: tensor.numpy() for name, tensor in file.items()}
        arrays['crcs'] = arrays['crcs'].view(np.uint32)
        table = FileTable(Names(arrays['text'], arrays['ends']), **{name: arrays[name] for name in COLUMNS})
        labels = Labels(arrays.get('labels'), header.class_names and list(header.class_names), header.made_with)
        return DatasetIndex(table, labels, header.fingerprint)
    except (OSError, UnreadableFileError, KeyError, TypeError, AttributeError):
        return None
