"""Named tensors and a JSON header in one safetensors file; no pickle on either side."""

import errno
import json
import mmap
import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_path

HEADER_KEY = 'edm2plus'  # the one metadata entry that is ours; its value is JSON


class UnreadableFileError(UserError):
    """A file that is cut short, or that nothing of ours has written."""


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any] | None
) -> None:
    """Write named tensors with `header` (anything JSON can say; None for nothing), whole or not at all.

    Raises:
        OSError: naming the file, where it cannot be written.
    """
    assert len({t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}) == sum(
        t.numel() > 0 for t in tensors.values()
    ), 'tensors that share memory would be written twice'
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = None if header is None else {HEADER_KEY: json.dumps({**header, 'versions': library_versions()})}
    with atomic_path(path) as beside:
        try:
            safetensors.torch.save_file(contiguous, beside, metadata)
        except safetensors.SafetensorError as error:  # a full disk, say
            raise OSError(errno.EIO, str(error), os.fspath(path)) from None


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on, for the headers of files."""
    return {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': numpy.__version__}


class TensorFile:
    """An open safetensors file of ours: its header at once, its tensors one by one as they are asked for.

    Args:
        path: The file.
        kind: What the caller needs, for error messages: `network file`, `training state`.

    Attributes:
        header: The JSON object written by `save_tensors`.
        names: Names of the tensors, sorted.

    Raises:
        UnreadableFileError: where the file is not a safetensors file, is cut short, or has no header of ours.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike, kind: str = 'network file'):
        self.path = os.fspath(path)
        with open(self.path, 'rb'):  # an OSError that names the file
            pass
        try:
            self._file = safetensors.safe_open(self.path, framework='pt')
            metadata = self._file.metadata() or {}
            self.header: dict[str, Any] = json.loads(metadata[HEADER_KEY])
        except safetensors.SafetensorError as error:
            raise UnreadableFileError(f'{self.path} is not a {kind} (a safetensors file): {error}') from None
        except (KeyError, json.JSONDecodeError):
            raise UnreadableFileError(f'{self.path} is not a {kind}: its header does not say what it is') from None
        self.names: list[str] = sorted(self._file.keys())

    def __enter__(self) -> 'TensorFile':
        return self

    def __exit__(self, *_: object) -> None:
        del self._file

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name, in the dtype it was stored in."""
        return self._file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their names, read one by one."""
        for name in self.names:
            yield name, self.get(name)


_DTYPES = {'F16': torch.float16, 'BF16': torch.bfloat16, 'F32': torch.float32, 'F64': torch.float64}


class MappedTensors:
    """The floating-point tensors of a safetensors file, mapped into memory, flat, and let go one by one.

    `TensorFile` keeps all of a file in this process's memory that was ever looked at. Here what has been used is given
    back, so that many large files can be open at once. The format: eight bytes of length, a JSON header with the place
    of each tensor, the tensors.

    Args:
        path: A file that `TensorFile` has opened before.

    Raises:
        UnreadableFileError: where the file is shorter than its header says.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        with open(self.path, 'rb') as file:
            self._start = 8 + int.from_bytes(file.read(8), 'little')
            self._places: dict[str, Any] = json.loads(file.read(self._start - 8))
            end = max(place['data_offsets'][1] for name, place in self._places.items() if name != '__metadata__')
            if os.fstat(file.fileno()).st_size < self._start + end:  # to look beyond the end would kill the process
                raise UnreadableFileError(f'{self.path} is cut short')
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # PyTorch wants it writable

    def __enter__(self) -> 'MappedTensors':
        return self

    def __exit__(self, *_: object) -> None:
        del self._map  # it ends with the last tensor of it

    def get(self, name: str) -> torch.Tensor:
        """The elements of a tensor, in memory order; not to be written to. Valid for as long as it is held."""
        (first, last), stored = self._places[name]['data_offsets'], self._places[name]['dtype']
        if stored not in _DTYPES:
            raise UnreadableFileError(f'{self.path}: {name} is of type {stored}, not floating-point numbers')
        dtype = _DTYPES[stored]
        if first == last:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(
            self._map, dtype=dtype, offset=self._start + first, count=(last - first) // dtype.itemsize
        )

    def release(self, name: str) -> None:
        """Take a tensor out of this process's memory; it comes back when it is looked at again."""
        first, last = (self._start + offset for offset in self._places[name]['data_offsets'])
        first -= first % mmap.PAGESIZE
        if hasattr(mmap, 'MADV_DONTNEED') and last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
