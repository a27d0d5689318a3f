"""CIFAR-10 as its authors distribute it."""

import io
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from dataset.sources.source import InMemory, Source
from dataset.sources.unpacked import read_unpacked
from dnnlib.errors import UserError
from torch_utils.pickles import read_pickle, to_array

CIFAR10 = 'cifar-10-batches-py'
LONGEST_NAMES = 2**16  # bytes of all classes together
LARGEST = 2**28  # bytes, unpacked; CIFAR-10 has 186 MB


def open_cifar10(path: str) -> Source:
    """The 50000 training images of `cifar-10-python.tar.gz`: 32x32 RGB, 10 classes."""
    batches = _cifar10_members(path)
    try:
        for batch, meta in batches:  # before NumPy sees them: lists within lists could keep it busy forever
            _check_types(batch[b'labels'], int)
            _check_types(meta[b'label_names'], bytes)
            assert sum(map(len, meta[b'label_names'])) <= LONGEST_NAMES
        images = np.concatenate([to_array(batch[b'data']).astype(np.uint8, casting='safe') for batch, _ in batches])
        images = images.reshape(-1, 3, 32, 32)
        labels = np.concatenate([np.asarray(batch[b'labels'], np.int64) for batch, _ in batches])
        names = [name.decode() for name in meta[b'label_names']]
        assert len(images) == len(labels) > 0 and labels.min() >= 0 and labels.max() < len(names)
    except (LookupError, TypeError, ValueError, OverflowError, AssertionError):
        raise UserError(f'{path} does not hold CIFAR-10 as it should') from None
    return Source(
        name='cifar-10',
        names=[f'{path}:{i}' for i in range(len(images))],
        labels=labels,
        class_names=names,
        read=InMemory(np.ascontiguousarray(images.transpose(0, 2, 3, 1))),
        bytes_on_disk=Path(path).stat().st_size,
    )


def _check_types(values: Any, kind: type) -> None:
    """Make sure that values from a pickle are a list of one kind."""
    if type(values) is not list or any(type(value) is not kind for value in values):
        raise TypeError(f'no list of {kind.__name__}')


def _cifar10_members(path: str) -> list[tuple[dict, dict]]:
    """The training batches in order, each with batches.meta."""
    found: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(read_unpacked(path, LARGEST)), mode='r:') as archive:
            for member in archive:
                base = member.name.removeprefix('./')
                if re.fullmatch(rf'{CIFAR10}/(data_batch_\d|batches\.meta)', base) and member.isfile():
                    data = archive.extractfile(member).read()
                    found[base.split('/')[1]] = read_pickle(data, where=f'{path}/{base}')
    except tarfile.TarError as error:
        raise UserError(f'{path} is cut short or damaged: {error}') from None
    meta = found.pop('batches.meta', None)
    if meta is None or not found:
        raise UserError(f'{path} does not hold {CIFAR10}/data_batch_1, ... and {CIFAR10}/batches.meta')
    return [(found[name], meta) for name in sorted(found)]
