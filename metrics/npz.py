"""The `.npz` files of evaluators: images, or statistics of them."""

import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import UserError, printable
from dnnlib.files import open_regular

# What Python and NumPy raise for damaged files; RuntimeError includes what is nested too deeply or not implemented.
DAMAGED = (ValueError, KeyError, TypeError, EOFError, OverflowError, MemoryError, RuntimeError, OSError,
           struct.error, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)  # fmt: skip


class NpzImages:
    """The `.npz` that ADM's evaluator reads: `arr_0` uint8 [N, H, W, C], and perhaps labels [N] in `arr_1`.

    What was stored uncompressed (as `np.savez` does) is read image by image; compressed arrays are held in memory.

    Args:
        path: The file.

    Raises:
        UserError: where it is no such file; nothing in it is unpickled.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.name = Path(self.path).name.removesuffix('.npz')
        members = npz_members(self.path)
        if 'arr_0' not in members:
            raise UserError(f'{self.path} holds no images: it has no arr_0, only {", ".join(members) or "nothing"}')
        self._array = npz_array(self.path, 'arr_0')
        if self._array.dtype != np.uint8 or self._array.ndim != 4 or self._array.shape[3] not in (1, 3):
            raise UserError(
                f'{self.path} holds no images: arr_0 is {self._array.dtype} {self._array.shape}, not uint8 [N, H, W, C]'
            )
        self._labels = npz_array(self.path, 'arr_1') if 'arr_1' in members else None
        count, height, width, channels = self._array.shape
        if self._labels is not None and (self._labels.shape != (count,) or self._labels.dtype.kind not in 'iu'):
            raise UserError(f'{self.path}: arr_1 is {self._labels.dtype} {self._labels.shape}, not a class per image')
        if count == 0:
            raise UserError(f'{self.path} holds no images: arr_0 is empty')
        self.names = range(count)
        self.image_shape = (channels, height, width)
        self.num_classes = 0 if self._labels is None else int(self._labels.max()) + 1
        self.fingerprint = f'crc32 {members["arr_0"]:08x}'

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = np.array(self._array[index]).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(image)), -1 if self._labels is None else int(self._labels[index])


def npz_members(path: str | os.PathLike) -> dict[str, int]:
    """Names of the arrays in an `.npz`, with the CRC-32 of each."""
    open_regular(path).close()  # an OSError that names the file
    try:
        with zipfile.ZipFile(path) as file:
            return {info.filename.removesuffix('.npy'): info.CRC for info in file.infolist()}
    except DAMAGED as error:
        raise UserError(f'{os.fspath(path)} is not an .npz file: {error}') from None


def npz_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """An array of an `.npz`: mapped where it is stored uncompressed, read otherwise. Objects are refused."""
    open_regular(path).close()
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f'{name}.npy')
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = header[version](member)
                skipped = member.tell()
            if dtype.hasobject:
                raise ValueError('it holds objects, which are not unpickled')
            if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
                with archive.open(info) as member:
                    return np.lib.format.read_array(member, allow_pickle=False)
            with archive.open(info) as member:  # to its end, where its CRC-32 is compared
                while member.read(2**20):
                    pass
        with open(path, 'rb') as file:
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), '<u2')  # of the name and the extra field, in the local header
        start = info.header_offset + 30 + int(lengths.sum()) + skipped
        return np.memmap(path, dtype, 'r', start, shape, 'F' if fortran else 'C')
    except DAMAGED as error:
        raise UserError(f'{os.fspath(path)}: the array {name} cannot be read: {printable(error)}') from None
