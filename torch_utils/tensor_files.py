"""Named tensors and a JSON header in one safetensors file; no pickle on either side."""

import errno
import json
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


class PieceReader:
    """Pieces of the floating-point tensors of a safetensors file, read straight into memory that is given.

    `TensorFile` maps the file, and pays for every page of it; where all of many large files are read once, that costs
    more than reading. The format: eight bytes of length, a JSON header with the place of each tensor, the tensors.

    Args:
        path: A file that `TensorFile` has opened before.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._file = open(self.path, 'rb', buffering=0)  # noqa: SIM115
        length = int.from_bytes(self._file.read(8), 'little')
        self._places: dict[str, Any] = json.loads(self._file.read(length))
        self._start = 8 + length

    def __enter__(self) -> 'PieceReader':
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return _DTYPES[self._places[name]['dtype']]

    def read(self, name: str, first: int, room: memoryview) -> None:
        """Fill `room` (bytes) with a tensor's elements from number `first` on, in memory order.

        Safe to call from several threads.

        Raises:
            UnreadableFileError: where the file ends before.
        """
        place = self._start + self._places[name]['data_offsets'][0] + first * self.dtype(name).itemsize
        while room:
            count = os.preadv(self._file.fileno(), [room], place)
            if not count:
                raise UnreadableFileError(f'{self.path} ends within {name}')
            room, place = room[count:], place + count
