"""Pickles of others, read without running what is in them: containers, NumPy arrays, and what a caller adds.

    read_pickle('data_batch_1')[b'data']                          # CIFAR-10: a dict of lists and arrays
    read_pickle('edm2.pkl', {'dnnlib.util.EasyDict': plain_dict})  # names of one's own

Not a single name in a file is imported. See `torch_utils.pickle_machine` for what that means.
"""

import mmap
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from torch_utils.pickle_machine import Buildable, Global, Machine, PickleRefusedError, check_key

DTYPE = re.compile(r'[<>|=]?(?:[biu][1248]|f[248]|c(?:8|16)|\?)')  # numbers only: no objects, no records, no dates
MOST_DIMS = 32


def read_pickle(
    source: str | os.PathLike | bytes | memoryview,
    names: Mapping[str, Callable[..., Any]] | None = None,
    where: str | None = None,
    views: bool = False,
) -> Any:
    """Read a pickle of any protocol, trusting nothing in it.

    What it may hold: None, bool, int, float, str, bytes, list, tuple, dict, set, OrderedDict (read as dict), NumPy
    arrays and scalars of numbers, and values that the functions in `names` make. Text written by Python 2 comes as
    bytes, bytearrays come as bytes, arrays come with memory of their own in the machine's byte order. Keys of dicts
    are text or bytes (1024 at most), None or integers.

    Values may contain themselves, or share parts so often that they are astronomically large when written out: check
    the types of a value's parts before you print, compare or walk it.

    Args:
        source: A file, or bytes.
        names: `module.name` -> function that stands for it, besides `CONTAINERS` and `ARRAYS`. It is called with
            arguments from the file, so it must expect anything, and raises ValueError or TypeError for what it does
            not take. A `Buildable` that it returns gets the state that follows in the file.
        where: How messages call the source; by default the file's name.
        views: Whether bytes objects of 4 KiB or more come as read-only views of the (mapped) file, not as copies.

    Raises:
        PickleRefusedError: a UserError, for a name that is not allowed (with its byte position), a damaged file, or
            one that asks for memory beyond 64 MiB + 4 times its size.
        OSError: where the file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        where = where or os.fspath(source)
        data = map_file(source)
    else:
        where = where or 'the pickle'
        data = memoryview(source)
    return Machine(data, where, {**CONTAINERS, **ARRAYS, **(names or {})}, views=views).run()


def map_file(path: str | os.PathLike) -> memoryview:
    """The bytes of a file, read from disk as they are asked for.

    Raises:
        OSError: naming the file, where it cannot be read.
    """
    with open(path, 'rb') as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b'')
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins with these bytes (8 or more) is a pickle of protocol 2 or later."""
    return head[:1] == b'\x80' and head[1:2] in (b'\x02', b'\x03', b'\x04', b'\x05')


# Containers


def plain_dict(pairs: Any = ()) -> dict:
    """A dict, for OrderedDict and other subclasses of dict; items that come one by one follow later."""
    if type(pairs) is dict:
        return dict(pairs)
    if type(pairs) not in (list, tuple):
        raise TypeError(f'made from a {type(pairs).__name__}')
    result = {}
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise TypeError('made from what are no pairs')
        result[check_key(pair[0])] = pair[1]
    return result


def _plain_set(values: Any = ()) -> set:
    if type(values) not in (list, tuple):
        raise TypeError(f'made from a {type(values).__name__}')
    return set(map(check_key, values))


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes in protocols 0 to 2."""
    if type(text) is not str or encoding not in ('latin1', 'latin-1'):
        raise TypeError('something other than text to latin1')
    return text.encode('latin-1')


def _plain_bytes(data: Any = b'', encoding: Any = 'latin-1') -> bytes:
    return data if type(data) is bytes else _encode(data, encoding)


CONTAINERS: dict[str, Callable[..., Any]] = {
    'collections.OrderedDict': plain_dict,
    '_codecs.encode': _encode,
    **{f'{m}.{name}': _plain_bytes for m in ('builtins', '__builtin__') for name in ('bytes', 'bytearray')},
    **{f'{module}.set': _plain_set for module in ('builtins', '__builtin__')},
    **{
        f'{module}.frozenset': lambda values=(): frozenset(_plain_set(values)) for module in ('builtins', '__builtin__')
    },
}


# Arrays


class _Dtype(Buildable):
    """A dtype of numbers; the state that follows gives the byte order."""

    def __init__(self, code: Any, *flags: Any):
        code = code.decode('ascii') if type(code) is bytes else code
        if type(code) is not str or not DTYPE.fullmatch(code):
            raise TypeError('a dtype other than of numbers')
        if len(flags) > 2 or any(type(flag) not in (bool, int) for flag in flags):
            raise TypeError('unknown options')
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> '_Dtype':
        # (version, byte order, subdtype, names, fields, itemsize, alignment, flags)
        if type(state) is not tuple or len(state) not in (8, 9) or any(part is not None for part in state[2:5]):
            raise TypeError('a dtype other than of numbers')
        order = state[1].decode('ascii') if type(state[1]) is bytes else state[1]
        if type(order) is not str or order not in ('<', '>', '=', '|'):
            raise TypeError('a dtype of unknown byte order')
        self.dtype = self.dtype.newbyteorder(order)
        return self


class _Array(Buildable):
    """An array without content yet."""

    def __init__(self, kind: Any, shape: Any, code: Any):
        if not isinstance(kind, Global) or kind.call is not _no_array:
            raise TypeError('a subclass of ndarray')

    def build(self, state: Any) -> np.ndarray:
        if type(state) is not tuple or len(state) != 5 or type(state[3]) not in (bool, int):
            raise TypeError('an array in an unknown form')
        _, shape, dtype, fortran, data = state
        return _make_array(data, dtype, shape, 'F' if fortran else 'C')


def _no_array(*_: Any) -> None:
    raise TypeError('an array made without its content')


def _make_array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """An array with memory of its own; its size is that of its data, whatever the shape claims."""
    if not isinstance(dtype, _Dtype) or type(data) not in (bytes, memoryview) or order not in ('C', 'F'):
        raise TypeError('an array in an unknown form')
    if type(shape) is not tuple or len(shape) > MOST_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise TypeError('an array of impossible shape')
    size = dtype.dtype.itemsize
    for n in shape:
        size *= n
    if size != len(data):
        raise ValueError(f'an array that needs {size} bytes has {len(data)}')
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array.astype(dtype.dtype.newbyteorder('='), order=order, copy=True)


def _scalar(dtype: Any, data: Any) -> np.generic:
    return _make_array(data, dtype, (), 'C')[()]


ARRAYS: dict[str, Callable[..., Any]] = {
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _no_array,
    **{f'numpy.{core}.multiarray._reconstruct': _Array for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')},
    **{f'numpy.{core}.numeric._frombuffer': _make_array for core in ('core', '_core')},
}

__all__ = [
    'ARRAYS',
    'CONTAINERS',
    'Buildable',
    'Global',
    'PickleRefusedError',
    'looks_like_pickle',
    'map_file',
    'plain_dict',
    'read_pickle',
]
