"""Pickles of others, read without running anything in them.

    read_pickle('data_batch_1')[b'labels']           # plain values are what they were
    to_array(read_pickle('data_batch_1')[b'data'])   # a call that the file asks for is a `Call`: noted, not made

The unpickler is the standard library's in its Python form, which lets a subclass choose the opcodes: C's hashes any key
(which may take forever), and makes room for as many values as a file claims.
"""

import mmap
import os
import pickle
import re
import types
from collections.abc import Collection
from typing import Any, NoReturn

import numpy as np

from dnnlib.errors import UserError, quoted
from torch_utils.tensor_files import UnreadableFileError

DICTS = {'builtins.dict', 'collections.OrderedDict', 'dnnlib.util.EasyDict'}  # read as dict
ARRAYS = ('multiarray._reconstruct', 'multiarray.scalar', 'numeric._frombuffer')
CALLS = {
    '_codecs.encode',
    'builtins.set',
    'numpy.dtype',
    'numpy.ndarray',
    *(f'numpy.{c}.{name}' for c in ('core', '_core') for name in ARRAYS),
}
DTYPE = re.compile(r'[<>|=]?(?:[biu][1248]|f[248]|c(?:8|16)|\?)')  # numbers only: no objects, no records, no dates
MOST_READS = 2**21  # bounds time and memory; a published network takes some 50,000, a batch of CIFAR-10 70,000
LONGEST_NAME = 1000  # characters of a name or key: equal keys are compared to their ends
LARGEST_KEY = 2**61 - 1  # integers below this hash to themselves, so that no file can make all keys collide
LARGE = 4096  # bytes objects from here on are views of the file
OPCODES = (  # those that put values together; none that calls, sets or hashes what a file says
    'PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE '
    'BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 '
    'EMPTY_LIST APPEND APPENDS EMPTY_DICT BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL'
)


class Name(str):
    """A name that a pickle asks for: nothing of it is imported."""

    __slots__ = ()


class Call:
    """What a pickle asks to be called, with what, and the state that the result would get."""

    __slots__ = ('args', 'name', 'state')

    def __init__(self, name: Name, args: tuple):
        self.name, self.args, self.state = name, args, None


def read_pickle(source: str | os.PathLike | bytes, names: Collection[str] = (), where: str | None = None) -> Any:
    """Read a pickle of protocol 2 to 5, trusting nothing in it.

    It becomes None, bool, int, float, str, bytes (large ones as views of the mapped file), tuple, list (also for sets),
    dict and `Call`. Values may contain themselves or share parts: check types before you print, compare or walk them.

    Args:
        source: A file, or bytes.
        names: What it may ask for, as `module.name`, besides `DICTS` and `CALLS`.
        where: How messages call the source; by default the file's name.
    """
    if isinstance(source, bytes):
        return PickleReader(memoryview(source), where or 'the pickle', names).load()
    with open(source, 'rb') as file:  # copy on write, since PyTorch wants tensors to be writable
        empty = os.fstat(file.fileno()).st_size == 0
        data = b'' if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return PickleReader(memoryview(data), where or os.fspath(source), names).load()


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a pickle of protocol 2 or later."""
    return head[:1] == b'\x80' and head[1:2] in (b'\x02', b'\x03', b'\x04', b'\x05')


class PickleReader(pickle._Unpickler):
    """Reads pickles that follow one another in `data`, as `read_pickle` describes; at most so many pieces of them.

    Attributes:
        at: Position after what has been read.
    """

    def __init__(self, data: memoryview, where: str, names: Collection[str], most_reads: int = MOST_READS):
        super().__init__(types.SimpleNamespace(read=self._take, readline=self._line), encoding='bytes')
        self.data, self.where, self.names, self.left, self.at = data, where, names, most_reads, 0

    def load(self) -> Any:
        """The next pickle."""
        try:
            return super().load()
        except UnreadableFileError:
            raise
        except Exception as error:  # whatever comes of bytes that are no pickle
            problem = f'opcode {error}' if isinstance(error, KeyError) else type(error).__name__
            self._refuse(f'it is damaged, or of another protocol than 2 to 5 ({problem})')

    def find_class(self, module: str, name: str) -> Name:
        """A name of the file, if it is among those it may use; called by the base class."""
        full = f'{module}.{name}'
        if '.' in name or not (full in self.names or full in CALLS or full in DICTS):
            self._refuse(f'it asks for {quoted(full)}, which is not among the names a file may use')
        return Name(full)

    def _refuse(self, problem: str) -> NoReturn:
        raise UnreadableFileError(f'{self.where} cannot be read: byte {self.at}: {problem}') from None

    def _take(self, count: int) -> bytes | memoryview:
        part = self.data[self.at : self.at + count]
        self.left -= 1
        if len(part) < count:
            self._refuse('the file is cut short or damaged: it ends within a value')
        if self.left < 0:
            self._refuse('it has more values than any file that is known')
        self.at += count
        return part if count >= LARGE else bytes(part)

    def _line(self) -> bytes:
        line = bytes(self.data[self.at : self.at + LONGEST_NAME]).partition(b'\n')[0]
        return self._take(len(line) + 1)

    def _call(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple or (name in DICTS and args):
            self._refuse('it calls what is no function, or with what are no arguments')
        self.append({} if name in DICTS else Call(name, args))

    def _build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].state = state  # nothing but a `Call` has one

    def _put(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            self._refuse('it puts keys into what is no dictionary')
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Tuples may take forever to be hashed, long text to be compared, and numbers may be chosen to collide.
            text = type(key) in (str, bytes) and len(key) <= LONGEST_NAME
            if not (text or key is None or (type(key) in (bool, int) and abs(key) < LARGEST_KEY)):
                self._refuse(f'it has {quoted(key)} as a key of a dictionary')
            self.stack[-1][key] = value

    dispatch = {  # noqa: RUF012, as in the base class
        **{code: pickle._Unpickler.dispatch[code] for name in OPCODES.split() for code in getattr(pickle, name)},
        pickle.FRAME[0]: lambda self: self.read(8),
        pickle.BYTEARRAY8[0]: pickle._Unpickler.load_binbytes8,
        pickle.EMPTY_SET[0]: pickle._Unpickler.load_empty_list,
        pickle.FROZENSET[0]: pickle._Unpickler.load_list,
        pickle.ADDITEMS[0]: pickle._Unpickler.load_appends,
        pickle.SETITEM[0]: lambda self: self._put([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self._put(self.pop_mark()),
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _build,
        pickle.BINPERSID[0]: lambda self: None,  # what stands for a value outside the pickle stays as it is
    }


def to_pickle(value: Any) -> bytes:
    """Plain values and arrays as a pickle, for programs of others that read nothing else."""
    return pickle.dumps(value)


def to_array(value: Any) -> np.ndarray:
    """The array of numbers, or scalar (an array of no dimensions), that a `Call` stands for, with memory of its own."""
    try:
        kind = value.name.rpartition('.')[2]
        if kind == '_reconstruct' and value.args[0] == 'numpy.ndarray':
            _, shape, dtype, fortran, data = value.state
            order = 'F' if fortran else 'C'
        elif kind == 'scalar':
            (dtype, data), shape, order = value.args, (), 'C'
        elif kind == '_frombuffer':
            data, dtype, shape, order = value.args
        else:
            raise TypeError('a call')
        if type(data) is Call:  # protocol 2 of Python 3 has bytes as text
            data = _to_bytes(data)
        array = np.frombuffer(data, _to_dtype(dtype)).reshape(shape, order=order)
        return array.astype(array.dtype.newbyteorder('='))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f'no array of numbers ({type(error).__name__})') from None


def _to_bytes(value: Call) -> bytes:
    text, encoding = value.args
    if value.name != '_codecs.encode' or encoding != 'latin1' or type(text) is not str:
        raise TypeError('no bytes')
    return text.encode('latin1')


def _to_dtype(value: Any) -> np.dtype:
    """A dtype from (code, ...) and, if there is a state, (version, byte order, ...); text of Python 2 is bytes."""
    code, order = value.args[0], '=' if value.state is None else value.state[1]
    code, order = (text.decode() if type(text) is bytes else text for text in (code, order))
    if value.name != 'numpy.dtype' or not DTYPE.fullmatch(code) or order not in ('<', '>', '=', '|'):
        raise TypeError('a dtype')
    return np.dtype(code).newbyteorder(order)
