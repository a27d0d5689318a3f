"""Named tensors and a JSON header in one safetensors file; no pickle on either side.

The header holds a digest of each tensor and one of itself, so that damage is noticed when the file is read.
`python -m torch_utils.tensor_files verify FILE...` tells which files are whole.
"""

import dataclasses
import errno
import hashlib
import json
import mmap
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import click
import numpy as np
import safetensors
import safetensors.torch
import torch

from dnnlib import cli
from dnnlib.configs import from_json
from dnnlib.errors import UserError, printable, quoted
from dnnlib.files import atomic_path, open_regular, parse_object

HEADER_KEY = 'edm2plus'  # the one metadata entry that is ours; its value is JSON
VERIFY_VARIABLE = 'EDM2PLUS_VERIFY'  # 0 turns the digests of tensors off, except those of training states
ROW, ROWS = 1024, 512  # of 8-byte words that are summed at once, 4 MiB: they stay in the cache

T = TypeVar('T')
File = TypeVar('File', bound='TensorFile')


class UnreadableFileError(UserError):
    """A file that is cut short or damaged, or that nothing of ours has written."""


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
    metadata = None
    if header is not None:
        digests = {name: digest(t, t.shape) for name, t in contiguous.items()}
        header = {**header, 'versions': library_versions(), 'digests': digests}
        metadata = {HEADER_KEY: json.dumps({**header, 'digest': _header_digest(header)}, allow_nan=False)}
    with atomic_path(path) as beside:
        try:
            safetensors.torch.save_file(contiguous, beside, metadata)
        except safetensors.SafetensorError as error:  # a full disk, say
            raise OSError(errno.EIO, str(error), os.fspath(path)) from None


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on, for the headers of files."""
    return {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__}


def digest(tensor: torch.Tensor, shape: tuple[int, ...]) -> str:
    """A checksum of a contiguous tensor on the CPU, its dtype and shape, several times as fast as a CRC-32.

    The bytes are taken as blocks of 512 x 1024 words, and what is hashed is the sums of each block's rows and columns
    modulo 2^64. A change of one word, or of one row or column, is always noticed; several can only cancel out where
    they are the corners of rectangles. It is no protection from someone who wants to deceive.
    """
    found = hashlib.blake2b(f'{tensor.dtype} {tuple(shape)}'.encode(), digest_size=8)
    if not tensor.numel():
        return found.hexdigest()
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    rows = len(data) // (8 * ROW)
    words = data[: rows * 8 * ROW].view('<u8').reshape(rows, ROW)
    for i in range(0, rows, ROWS):
        found.update(words[i : i + ROWS].sum(axis=0))
        found.update(words[i : i + ROWS].sum(axis=1))
    found.update(data[rows * 8 * ROW :])
    return found.hexdigest()


def _header_digest(header: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(header).encode(), digest_size=8).hexdigest()


def _read_header(text: str) -> dict[str, Any]:
    """Our header; one that has digests must fit its own.

    Raises:
        ValueError: where it is none.
    """
    header = parse_object(text)
    own = header.pop('digest', None)
    digests = header.get('digests')
    if own is None and digests is None:  # older files have none
        return header
    if own != _header_digest(header) or not isinstance(digests, dict):
        raise ValueError('its digest does not fit')
    return header


class TensorFile:
    """An open safetensors file of ours: its header at once, its tensors one by one as they are asked for.

    Args:
        path: The file.
        kind: What the caller needs, for error messages: `network file`, `training state`.
        verify: Whether to compare the tensors with their digests, where there are any; None for the user's choice.

    Attributes:
        header: The JSON object written by `save_tensors`.
        names: Names of the tensors, sorted.
        digests: By name, where tensors are compared with them as they are read; else None.

    Raises:
        UnreadableFileError: where the file is not a safetensors file, is cut short, or has no header of ours.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike, kind: str = 'network file', verify: bool | None = None):
        self.path, self.kind = os.fspath(path), kind
        open_regular(path).close()  # an OSError that names the file
        try:
            self._file = safetensors.safe_open(self.path, framework='pt')
            self.header = _read_header((self._file.metadata() or {})[HEADER_KEY])
        except safetensors.SafetensorError as error:
            raise UnreadableFileError(f'{self.path} is not a {kind} (a safetensors file): {printable(error)}') from None
        except KeyError:
            raise UnreadableFileError(f'{self.path} is not a {kind}: its header does not say what it is') from None
        except ValueError as error:
            raise UnreadableFileError(f'{self.path} is not a {kind}: its header is damaged: {error}') from None
        self.names: list[str] = sorted(self._file.keys())
        self.digests: dict[str, str] | None = self.header.get('digests')
        if self.digests is not None and sorted(self.digests) != self.names:
            raise UnreadableFileError(f'{self.path} is damaged: it does not hold the tensors that its header names')
        if not (os.environ.get(VERIFY_VARIABLE) != '0' if verify is None else verify):
            self.digests = None

    def __enter__(self: File) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        del self._file

    def about(self, cls: type[T], **readers: Callable[[Any], Any]) -> T:
        """The header as a dataclass whose fields are checked; others that it has are left aside.

        Args:
            cls: The dataclass.
            readers: Of fields that are more than JSON, raising UserError.

        Raises:
            UnreadableFileError: naming the file, where the header is of another kind, or fields are missing or of
                another type.
        """
        if (kind := self.header.get('kind', 'of unknown kind')) != self.kind:
            raise UnreadableFileError(f'{self.path} is not a {self.kind} but {quoted(kind)}')
        names = {field.name for field in dataclasses.fields(cls)} & self.header.keys()
        try:
            return from_json(cls, {name: readers.get(name, lambda v: v)(self.header[name]) for name in names})
        except UserError as error:
            raise UnreadableFileError(error.problems, where=self.path) from None

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name, in the dtype it was stored in.

        Raises:
            UnreadableFileError: where it does not fit its digest.
        """
        tensor = self._file.get_tensor(name)
        if self.digests is not None:
            _compare(self.path, name, tensor, tensor.shape, self.digests)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their names, read one by one."""
        for name in self.names:
            yield name, self.get(name)


def _compare(path: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], digests: Mapping[str, str]) -> None:
    if digest(tensor, shape) != digests[name]:
        raise UnreadableFileError(f'{path} is damaged: tensor {quoted(name)} is not what was written')


_DTYPES = {'F16': torch.float16, 'BF16': torch.bfloat16, 'F32': torch.float32, 'F64': torch.float64}


class MappedTensors:
    """The floating-point tensors of a safetensors file, mapped into memory, flat, and let go one by one.

    `TensorFile` keeps all of a file in this process's memory that was ever looked at. Here what has been used is given
    back, so that many large files can be open at once. The format: eight bytes of length, a JSON header with the place
    of each tensor, the tensors.

    Args:
        path: A file that `TensorFile` can open.
    """

    def __init__(self, path: str | os.PathLike):
        with TensorFile(path) as checked:
            self.path, self._digests = checked.path, checked.digests
        with open(self.path, 'rb') as file:
            self._start = 8 + int.from_bytes(file.read(8), 'little')
            self._places: dict[str, Any] = json.loads(file.read(self._start - 8))
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
        count = (last - first) // dtype.itemsize
        tensor = torch.frombuffer(self._map, dtype=dtype, offset=self._start + first, count=count)
        if self._digests is not None:
            _compare(self.path, name, tensor, self._places[name]['shape'], self._digests)
        return tensor

    def release(self, name: str) -> None:
        """Take a tensor out of this process's memory; it comes back when it is looked at again."""
        first, last = (self._start + offset for offset in self._places[name]['data_offsets'])
        first -= first % mmap.PAGESIZE
        if hasattr(mmap, 'MADV_DONTNEED') and last > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


@click.group()
def main():
    """Tools for the safetensors files of this project."""


@main.command()
@click.argument('files', nargs=-1, required=True, metavar='FILE...')
def verify(files):
    """Tell which files are whole: compare all that they hold with the digests written into them."""
    damaged = 0
    for path in files:
        try:
            with TensorFile(path, 'file of ours', verify=True) as file:
                count = sum(1 for _ in file.items())
                whole = 'whole' if file.digests is not None else 'readable, but too old to have digests'
            click.echo(f'{path}: {whole}, {count} tensors')
        except (UserError, OSError) as error:
            damaged += 1
            click.echo(error if isinstance(error, UserError) else f'{path}: {error.strerror}')
    if damaged:
        raise UserError(f'{damaged} of {len(files)} files are damaged')


if __name__ == '__main__':
    cli.run(main)
