"""Tensors inside pickles of others: found without reading them, read one by one.

PyTorch pickles a tensor as a call on its storage, and a storage as the bytes of a file of its own in the format that
torch.save had before version 1.6: five pickles and the raw numbers. Those are read by the same machine as the file
around them. PyTorch's own reader, in its mode for weights only, would run nothing either, but it allocates what the
file claims before it looks how much there is.
"""

import math
import warnings
from typing import Any

import numpy as np
import torch

from torch_utils.pickle_machine import Global, Machine

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
STORAGES = {
    'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.FloatStorage': torch.float32,
    'torch.DoubleStorage': torch.float64,
    'torch.BoolStorage': torch.bool,
    'torch.ByteStorage': torch.uint8,
    'torch.CharStorage': torch.int8,
    'torch.ShortStorage': torch.int16,
    'torch.IntStorage': torch.int32,
    'torch.LongStorage': torch.int64,
}
MOST_DIMS = 32
HEAD_BYTES = 2048  # of the five pickles before the numbers; they have about 400


class Storage:
    """The numbers of one or several tensors, where they lie.

    Args:
        dtype: Of the numbers.
        data: Their bytes.
    """

    def __init__(self, dtype: torch.dtype, data: bytes | memoryview):
        self.dtype = dtype
        self.data = data

    def place(self) -> int | None:
        """The address of the numbers: one for all storages that a file makes of the same bytes; None without any."""
        return np.frombuffer(self.data, np.uint8).ctypes.data if len(self.data) else None


class PickledTensor:
    """A tensor that has not been read yet. All its elements lie within its storage.

    Attributes:
        storage: Its numbers.
        shape: Its size.
        dtype: Its dtype.
    """

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any):
        if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
            raise TypeError('a tensor in an unknown form')
        for numbers in (size, stride):
            if type(numbers) is not tuple or len(numbers) > MOST_DIMS or any(type(n) is not int for n in numbers):
                raise TypeError('a tensor of impossible shape')
        if len(size) != len(stride) or min((*size, *stride), default=0) < 0:
            raise TypeError('a tensor of impossible shape')
        count, wanted = len(storage.data) // storage.dtype.itemsize, math.prod(size)
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        overflows = math.prod(n or 1 for n in size) >= 2**62 or max((0, *stride)) >= 2**62
        if wanted > count or (wanted and end > count) or overflows:
            raise ValueError(f'a tensor of shape {size} reaches beyond its {count} numbers')
        self.storage, self.shape, self.dtype = storage, size, storage.dtype
        self._offset, self._stride = offset, stride

    def read(self, share: bool = False) -> torch.Tensor:
        """The tensor, in memory of its own; or, to `share`, in that of the mapped file, which nobody may write to.

        What is shared may lie at any address: good to be copied or written to disk, no good to compute with.
        """
        count = len(self.storage.data) // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # that nobody may write to it
            flat = torch.frombuffer(self.storage.data if share else bytearray(self.storage.data), dtype=self.dtype)
        return flat.as_strided(self.shape, self._stride, self._offset if math.prod(self.shape) else 0)


def _load_storage(data: Any) -> Storage:
    """What a storage was written as: magic number, protocol, system, storage, keys; then the count and the numbers."""
    if type(data) not in (bytes, memoryview):
        raise TypeError('no bytes')
    data = memoryview(data)
    values, end = [], 0
    for _ in range(5):
        machine = Machine(data[:HEAD_BYTES], 'its content', _STORAGE_NAMES, start=end, persistent=_storage_description)
        values.append(machine.run())
        end = machine.at
    magic, protocol, system, description, keys = values
    if magic != MAGIC or protocol != PROTOCOL or type(description) is not _Description:
        raise ValueError('not a storage')
    if type(system) is not dict or system.get('little_endian') is not True:
        raise ValueError('a storage of another byte order')
    if type(keys) is not list or len(keys) != 1 or type(keys[0]) is not str or keys[0] != description.key:
        raise ValueError('several storages in one')
    numbers = data[end + 8 :]
    claimed = int.from_bytes(data[end : end + 8], 'little')
    if claimed != description.count or len(numbers) != claimed * description.dtype.itemsize:
        raise ValueError(f'a storage of {description.count} numbers has {len(numbers)} bytes')
    return Storage(description.dtype, numbers)


# A file may ask for the same storage again and again, in a few bytes; its head is read anew each time.
_load_storage.price = 4 * HEAD_BYTES


class _Description:
    """A storage as the fourth pickle names it."""

    def __init__(self, dtype: torch.dtype, key: str, count: int):
        self.dtype, self.key, self.count = dtype, key, count


def _storage_description(parts: Any) -> _Description:
    # ('storage', type, key, place, count, view of another storage)
    if type(parts) is not tuple or len(parts) not in (5, 6) or (len(parts) == 6 and parts[5] is not None):
        raise ValueError('a storage in an unknown form')
    _, kind, key, _, count = parts[:5]
    if not isinstance(kind, Global) or kind.name not in STORAGES or type(key) is not str or type(count) is not int:
        raise ValueError('a storage in an unknown form')
    return _Description(STORAGES[kind.name], key, count)


def _not_called(*_: Any) -> None:
    raise TypeError('a storage made without its numbers')


def _rebuild_parameter(tensor: Any, *_: Any) -> PickledTensor:
    if not isinstance(tensor, PickledTensor):
        raise TypeError('a parameter that is no tensor')
    return tensor


_STORAGE_NAMES = dict.fromkeys(STORAGES, _not_called)

# For `read_pickle`, which should be asked for `views`: then numbers stay in the file until they are read.
TENSORS = {
    'torch._utils._rebuild_tensor_v2': PickledTensor,
    'torch._utils._rebuild_parameter': _rebuild_parameter,
    'torch.storage._load_from_bytes': _load_storage,
}
