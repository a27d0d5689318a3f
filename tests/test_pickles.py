"""Pickles: what is read is what was written, and hostile files get nowhere."""

import collections
import io
import itertools
import pickle
import random
import signal
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest

from dnnlib.errors import UserError
from torch_utils.pickles import MOST_READS, Call, Name, PickleReader, read_pickle, to_array
from torch_utils.tensor_files import UnreadableFileError

PROTOCOLS = range(3, 6)


# Honest files

VALUES = [
    *(None, True, False, 0, 255, 256, 65536, -1, 2**31, 2**40, -(2**70), 1.5, float('inf'), -0.0),
    *('', 'a', 'line\nbreak\\', 'é€😀\ud800', 'x' * 5000, b'', b'\x00\xff\n' * 3000, bytearray(b'ab')),
    *([], [1, [2, []]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, (4,)), list(range(3000))),
    *({}, {'a': 1, 2: {b'c': None}}, collections.OrderedDict(b=1, a=2)),
]
ARRAYS = [
    np.arange(12.0).reshape(3, 4),
    np.asfortranarray(np.arange(12).reshape(3, 4)),
    np.arange(3, dtype='>i2'),
    np.zeros((0, 3)),
    np.array(3, np.uint8),
    np.array([True, False]),
    np.linspace(-1, 1, 2000, dtype=np.float16),
    *(np.float64(2.5), np.int32(7), np.bool_(True), np.complex64(1j)),
]


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_values_come_back(protocol):
    for value in VALUES:
        if protocol == 5 or not isinstance(value, bytearray):
            read = read_pickle(pickle.dumps(value, protocol))
            assert read == value and isinstance(read, bytes | memoryview | type(value).__mro__[-2])
    assert list(read_pickle(pickle.dumps(collections.OrderedDict(b=1, a=2), protocol))) == ['b', 'a']


def test_sets_come_as_lists():
    assert read_pickle(pickle.dumps([{1}, frozenset('a')], 4)) == [[1], ['a']]
    assert read_pickle(pickle.dumps({1}, 3)).args == ([1],)


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_arrays_come_back_with_memory_of_their_own(protocol):
    for array in ARRAYS:
        read = to_array(read_pickle(pickle.dumps(array, protocol)))
        assert type(read) is np.ndarray and read.dtype == array.dtype.newbyteorder('=')
        np.testing.assert_array_equal(read, array)
        assert read.flags.owndata and read.flags.writeable
        assert read.flags.f_contiguous == array.flags.f_contiguous


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_shared_and_recursive_values_stay_so(protocol):
    array = np.arange(3)
    loop = [array, {'again': array}]
    loop.append(loop)
    read = read_pickle(pickle.dumps(loop, protocol))
    assert read[0] is read[1]['again'] and type(read[0]) is Call and read[2] is read


def python2_batch() -> bytes:
    """What Python 2 writes for a CIFAR-10 batch (protocol 2), by hand: text is bytes, an array of 2x3 bytes."""

    def text(value: bytes) -> bytes:
        return b'U' + bytes([len(value)]) + value

    dtype = b'cnumpy\ndtype\nq\x02' + text(b'u1') + b'K\x00K\x01\x87Rq\x03(K\x03' + text(b'|') + b'NNNJ\xff\xff\xff\xff'
    dtype += b'J\xff\xff\xff\xffK\x00tb'
    array = b'cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85' + text(b'b') + b'\x87Rq\x04'
    array += b'(K\x01K\x02K\x03\x86' + dtype + b'\x89' + text(b'\x00\x01\x02\xfd\xfe\xff') + b'tb'
    items = (
        text(b'data') + array + text(b'labels') + b']q\x05(K\x06K\x09e' + text(b'filenames') + b'](' + text(b'\xe9.png')
    )
    return b'\x80\x02}q\x00(' + items + b'eu.'


def test_python_2_text_is_bytes(tmp_path):
    path = tmp_path / 'data_batch_1'
    path.write_bytes(python2_batch())
    batch = read_pickle(path)
    assert batch[b'labels'] == [6, 9] and batch[b'filenames'] == [b'\xe9.png']
    pixels = to_array(batch[b'data'])
    assert pixels.tolist() == [[0, 1, 2], [253, 254, 255]] and pixels.dtype == np.uint8


def test_numpy_of_old_and_new_names():
    data = pickle.dumps({'mu': np.arange(2.0)}, 4)
    new, old = b'\x16numpy._core.multiarray', b'\x15numpy.core.multiarray'
    assert (new in data) != (old in data)
    for name in (new, old):
        content = data.replace(new, name).replace(old, name)
        size = struct.pack('<Q', len(content) - 11)
        assert to_array(read_pickle(content[:3] + size + content[11:])['mu']).tolist() == [0, 1]


def test_names_of_ones_own():
    data = b'\x80\x04\x8c\x03lib\x8c\x08Settings\x93K\x01\x85R\x94}\x8c\x01kK\x03sb.'
    with pytest.raises(UnreadableFileError, match=r"asks for 'lib.Settings', which is not among"):
        read_pickle(data)
    read = read_pickle(data, {'lib.Settings'})
    assert (read.name, read.args, read.state) == ('lib.Settings', (1,), {'k': 3})


def test_large_bytes_as_views(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(pickle.dumps([b'a' * 4096, b'b' * 4095], 4))
    view, copy = read_pickle(path)
    assert isinstance(view, memoryview) and view == b'a' * 4096 and type(copy) is bytes
    view[0] = 0  # of this process alone
    assert path.read_bytes().count(b'a') == 4096


# Hostile files

NAMES = [
    *(('os', 'system'), ('posix', 'system'), ('nt', 'system'), ('subprocess', 'Popen'), ('pty', 'spawn')),
    *(('builtins', 'eval'), ('builtins', 'exec'), ('__builtin__', 'eval'), ('builtins', '__import__')),
    *(('builtins', 'getattr'), ('builtins', 'open'), ('operator', 'attrgetter'), ('functools', 'partial')),
    *(('importlib', 'import_module'), ('runpy', 'run_path'), ('pickle', 'loads'), ('_pickle', 'loads')),
    *(('torch', 'load'), ('torch.storage', '_load_from_bytes'), ('torch.hub', 'load'), ('numpy', 'load')),
    *(('webbrowser', 'open'), ('shutil', 'rmtree'), ('types', 'CodeType'), ('types', 'FunctionType')),
    *(('copyreg', '_reconstructor'), ('copyreg', 'add_extension'), ('socket', 'create_connection')),
    *(('torch_utils.persistence', '_reconstruct_persistent_obj'), ('torch_utils.pickles', 'read_pickle')),
    *(
        ('collections', 'Counter'),
        ('builtins', 'bytearray'),
        ('torch', 'Tensor'),
        ('torch._utils', '_rebuild_tensor_v2'),
    ),
    *(('torch', 'storage._load_from_bytes'), ('torch.storage', 'io.open'), ('numpy', 'ndarray.__class__')),
    *(('collections', 'OrderedDict.__init__'), ('numpy.core.multiarray', '_reconstruct.__globals__')),
    *(
        ('numpy', 'core.multiarray.scalar'),
        ('', 'eval'),
        ('builtins', ''),
        ('builtins', 'eval\0'),
        ('\uff4fs', 'system'),
    ),
]
COMMAND = b'\x8c\x0atouch PWND'


def short(text: str) -> bytes:
    data = text.encode()
    return b'\x8c' + bytes([len(data)]) + data


def forms(module: str, name: str) -> dict[str, bytes]:
    """Every way in which a pickle can call a name."""
    line = f'{module}\n{name}\n'.encode()
    stacked = short(module) + short(name) + b'\x93'
    return {
        'GLOBAL REDUCE': b'c' + line + b'(' + COMMAND + b'tR.',
        'STACK_GLOBAL REDUCE': b'\x80\x04' + stacked + COMMAND + b'\x85R.',
        'INST': b'(' + COMMAND + b'i' + line + b'.',
        'OBJ': b'(c' + line + COMMAND + b'o.',
        'NEWOBJ': b'\x80\x02c' + line + COMMAND + b'\x85\x81.',
        'NEWOBJ_EX': b'\x80\x04' + stacked + COMMAND + b'\x85}\x92.',
        'BUILD': b'\x80\x02c' + line + b'}' + COMMAND + COMMAND + b'sb.',
        'GLOBAL alone': b'c' + line + b'.',
        'nested': b'\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93]' + stacked + COMMAND + b'\x85Ra\x85R.',
        'ndarray state': b'\x80\x04' + ARRAY + b'(K\x01K\x02\x85' + stacked + COMMAND + b'\x85R\x89C\x02abtb.',
    }


NDARRAY = b'\x8c\x05numpy\x8c\x07ndarray\x93'
RECONSTRUCT = b'\x8c\x15numpy.core.multiarray\x8c\x0c_reconstruct\x93'
ARRAY = RECONSTRUCT + NDARRAY + b'K\x00\x85C\x01b\x87R'
DTYPE = b'\x8c\x05numpy\x8c\x05dtype\x93'
U1 = DTYPE + b'\x8c\x02u1\x85R'
ORDERED = b'\x8c\x0bcollections\x8c\x0bOrderedDict\x93'
ENCODE = b'\x8c\x07_codecs\x8c\x06encode\x93'
SCALAR = b'\x8c\x15numpy.core.multiarray\x8c\x06scalar\x93'
SET = b'\x8c\x08builtins\x8c\x03set\x93'
FROMBUFFER = b'\x8c\x12numpy.core.numeric\x8c\x0b_frombuffer\x93'
OPTIONS = b'NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t'


def array_of(shape: bytes, data: bytes = b'C\x02ab', dtype: bytes = U1) -> bytes:
    return ARRAY + b'(K\x01' + shape + dtype + b'\x89' + data + b'tb.'


ABUSE = {
    **{f'extension {code[0]:#x}': code + b'.' for code in (b'\x82\x01', b'\x83\x01\x00', b'\x84\x01\x00\x00\x00')},
    'persistent id': b'P1\n.',
    'persistent value': b'K\x01Q.',
    'buffer outside': b'\x80\x05\x97.',
    'read-only buffer': b'\x80\x05C\x01a\x98.',
    'protocol 6': b'\x80\x06N.',
    'unknown opcode': b'\xff.',
    'empty file': b'',
    'only STOP': b'.',
    'only MARK': b'(.',
    'pop mark without mark': b't.',
    'memo without value': b'h\x00.',
    'memo of nothing': b'\x94.',
    'negative memo': b'g-1\n.',
    'array of a subclass': RECONSTRUCT + ORDERED + b'K\x00\x85C\x01b\x87R.',
    'array of text': RECONSTRUCT + b'\x8c\x07ndarrayK\x00\x85C\x01b\x87R.',
    'ndarray called': NDARRAY + b'J\xff\xff\xff\x7f\x85\x85R.',
    'array of objects': array_of(b'K\x02\x85', dtype=DTYPE + b'\x8c\x02O8\x85R'),
    'array of records': array_of(b'K\x02\x85', dtype=DTYPE + b'\x8c\x0aV100000000\x85R'),
    'array of text of any length': array_of(b'K\x02\x85', dtype=DTYPE + b'\x8c\x0aU100000000\x85R'),
    'dtype by expression': DTYPE + b'\x8c\x06u1, u1\x85R.',
    'dtype from a tuple': DTYPE + b'\x8c\x02u1J\xff\xff\xff\x7f\x86\x85R.',
    'dtype aligned by a list': DTYPE + b'\x8c\x02u1]\x86R.',
    'dtype with fields': U1 + b'(K\x03\x8c\x01|]]NJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb.',
    'dtype of strange order': U1 + b'(K\x03\x8c\x01S' + OPTIONS + b'b.',
    'dtype of short state': U1 + b'K\x03\x85b.',
    'huge shape': array_of(b'\x8a\x06\x00\x00\x00\x00\x00\x01\x85'),
    'shape that overflows': array_of(b'\x8a\x08\x01\x00\x00\x00\x00\x00\x00\x40\x8a\x01\x04K\x02\x87'),
    'empty but overflowing shape': array_of(b'K\x00\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x7fK\x04\x87', b'C\x00'),
    'negative shape': array_of(b'J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86'),
    'shape of floats': array_of(b'G@\x00\x00\x00\x00\x00\x00\x00\x85'),
    'shape of truth': array_of(b'K\x02\x88\x86'),
    'many dimensions': array_of(b'(K\x02' + b'K\x01' * 80 + b't'),
    'data of text': array_of(b'K\x02\x85', b'\x8c\x02ab'),
    'dtype that is none': array_of(b'K\x02\x85', dtype=b'\x8c\x02u1'),
    'scalar too short': SCALAR + DTYPE + b'\x8c\x02f8\x85RC\x01a\x86R.',
    'scalar of objects': SCALAR + DTYPE + b'\x8c\x01O\x85RC\x08abcdefgh\x86R.',
    'encode by a codec': ENCODE + b'\x8c\x03abc\x8c\x05rot13\x86R.',
    'encode by a codec of bytes': ENCODE + b'C\x03abc\x8c\x03zip\x86R.',
    'encode not possible': ENCODE + b'\x8c\x03\xe2\x82\xac\x8c\x06latin1\x86R.',
    'OrderedDict of a number': ORDERED + b'K\x05\x85R.',
    'OrderedDict of text': ORDERED + b'\x8c\x02ab\x85R.',
    'OrderedDict with options': ORDERED + b')}\x8c\x04selfK\x01s\x92.',
    'OrderedDict with options of no name': ORDERED + b')}K\x01K\x01s\x92.',
    'OrderedDict with state': ORDERED + b')R}\x8c\x09__class__' + ORDERED + b'sb.',
    'dict with state': b'}}\x8c\x09__class__K\x01sb.',
    'list with state': b']}b.',
    'global with state': ORDERED + b'}\x8c\x04call' + ENCODE + b'sb.',
    'global with slots': ORDERED + b'N}\x8c\x04call' + ENCODE + b's\x86b.',
    'call of text': b'\x8c\x04eval\x8c\x01a\x85R.',
    'call of a dict': b'})R.',
    'call without tuple': ORDERED + b']R.',
    'object of text': b'(\x8c\x04evalo.',
    'name of a number': b'K\x01K\x02\x93.',
    'set of lists': SET + b']]a\x85R.',
    'set of a number': SET + b'K\x05\x85R.',
    'key that is a list': b'}]K\x01s.',
    'key that is a global': b'}' + ORDERED + b'K\x01s.',
    'odd items': b'}(K\x01u.',
    'items of a list': b'](K\x01K\x02u.',
    'append to a dict': b'}K\x01a.',
    'append to a tuple': b')(K\x01e.',
    'items of an array': array_of(b'K\x02\x85')[:-1] + b'K\x00K\x01s.',
    'add to a list': b'](K\x01\x90.',
    'integer of many digits': b'I' + b'9' * 5000 + b'\n.',
    'integer of words': b'Iten\n.',
    'float of words': b'Ften\n.',
    'line without end': b'V' + b'a' * 10000,
    'text that is no UTF-8': b'\x8c\x02\xff\xfe.',
    'text of Python 2': b"S'a'\n.",
    'truncated escape': b'V\\u12\n.',
    'array without content': ARRAY + b'.',
    'array in itself': ARRAY + b'q\x00(K\x01K\x02\x85' + U1 + b'\x89h\x00tb.',
    'dtype in itself': DTYPE + b'\x8c\x02u1\x85Rq\x00(K\x03h\x00' + OPTIONS + b'b.',
    'array of a doubled shape': b')' + b'q\x00h\x00\x86' * 100 + b'q\x01' + array_of(b'h\x01'),
    'array of a doubled order': b')'
    + b'q\x00h\x00\x86' * 100
    + b'q\x01'
    + U1.join((FROMBUFFER + b'(C\x01a', b'K\x01\x85h\x01tR.')),
    'array of an extended dtype': array_of(b'K\x02\x85', dtype=DTYPE + b'\x8c\x08datetime\x85R'),
    'name as a key': b'}' + SET + b'K\x01s.',
    'call as a key': b'}' + SET + b')RK\x01s.',
    'state of a name': SET + b'}\x8c\x04nameK\x01sb.',
    'attributes of a name': SET + b'N}\x8c\x04nameK\x01s\x86b.',
    'items of a call': SET + b')RK\x00K\x01s.',
    'items of bytes': b'C\x01aK\x00K\x01s.',
    'append to a call': SET + b')RK\x01a.',
    'call of a call': SET + b')R)R.',
    'arguments that are a list': SET + b']K\x01aR.',
}
SIZES = {
    'BINBYTES8': b'\x8e' + struct.pack('<Q', 2**60) + b'a.',
    'BINBYTES8 beyond 63 bits': b'\x8e' + b'\xff' * 8 + b'a.',
    'BINBYTES': b'B' + struct.pack('<I', 2**32 - 1) + b'a.',
    'BINUNICODE8': b'\x8d' + struct.pack('<Q', 2**62) + b'a.',
    'BINUNICODE': b'X' + struct.pack('<I', 2**31) + b'a.',
    'BYTEARRAY8': b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'a.',
    'BINSTRING': b'T' + struct.pack('<i', -1) + b'a.',
    'LONG4': b'\x8b' + struct.pack('<I', 2**31 - 1) + b'a.',
    'LONG4 negative': b'\x8b' + struct.pack('<i', -1) + b'a.',
    'LONG4 within the file': b'\x8b' + struct.pack('<I', 10**6) + b'\xff' * 10**6 + b'.',
    'FRAME': b'\x80\x04\x95' + struct.pack('<Q', 2**62) + b'N.',
    'memo': b'Nr\xff\xff\xff\xff.',
    'shape': array_of(b'J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86'),
}
# Each of these takes many bytes of memory for a byte of file.
COUNT = 30_000
BOMBS = {
    'sets': b'(' + b'\x8f' * COUNT + b't.',
    'dicts': b'(' + b'}' * COUNT + b't.',
    'nested lists': b']' * COUNT + b'a' * (COUNT - 1) + b'.',
    'nested tuples': b')' + b'\x85' * COUNT + b'.',
    'marks': b'(' * COUNT + b'.',
    'copies of the top': b'N' + b'2' * COUNT + b'.',
    'memo': b'N' + b'\x94' * COUNT + b'.',
    'memo by number': b'N' + b''.join(b'r' + struct.pack('<I', i * 5) for i in range(COUNT // 5)) + b'.',
    'integers': b'(' + b'J\x00\x00\x00\x70' * (COUNT // 2) + b't.',
    'keys': b'}(' + b''.join(b'M' + struct.pack('<H', i) + b'N' for i in range(65536)) + b'u.',
    'one wide character': b'X' + struct.pack('<I', 10**6) + '😀'.encode() + b'a' * (10**6 - 4) + b'.',
    'the same text encoded': b'('
    + ENCODE
    + b'q\x00X'
    + struct.pack('<I', 50000)
    + b'a' * 50000
    + b'\x8c\x06latin1\x86q\x01R'
    + b'h\x00h\x01R' * 1000
    + b't.',
    'the same bytes as arrays': b'B'
    + struct.pack('<I', 50000)
    + b'a' * 50000
    + b'q\x000'
    + U1
    + b'q\x010('
    + (ARRAY + b'(K\x01M\x50\xc3\x85h\x01\x89h\x00tb') * 500
    + b't.',
    'the same list as sets': b'(]('
    + b''.join(b'M' + struct.pack('<H', i) for i in range(2000))
    + b'eq\x00'
    + SET
    + b'q\x01'
    + b'h\x01h\x00\x85R' * 5000
    + b't.',
    'the same pairs as dicts': b'(]('
    + b''.join(b'M' + struct.pack('<H', i) + b'N\x86' for i in range(2000))
    + b'eq\x00'
    + ORDERED
    + b'q\x01'
    + b'h\x01h\x00\x85R' * 5000
    + b't.',
}
# What would be exponential to print or hash; it may be read, or refused, but at once.
SHARING = {
    'doubled tuples': b')' + b'q\x00h\x00\x86' * 100 + b'.',
    'doubled lists': b']' + b'q\x00](h\x00h\x00e' * 100 + b'.',
    'doubled tuples as a key': b'})' + b'q\x00h\x00\x86' * 100 + b'Ns.',
    'deep tuple as a key': b'})' + b'\x85' * 50000 + b'Ns.',
    'deep tuple in a set': b'\x8f()' + b'\x85' * 50000 + b'\x90.',
    'list in itself': b']q\x00h\x00a.',
    'colliding keys': b'}('
    + b''.join(b'\x8a\x0b' + (i * (2**61 - 1)).to_bytes(11, 'little') + b'N' for i in range(30000))
    + b'u.',
}

guarding = False
touched: list[str] = []


def _audit(event: str, args: tuple) -> None:
    """Python's own record of what a program does to the world."""
    if guarding and event.startswith(('os.', 'subprocess.', 'socket.', 'exec', 'compile', 'import', 'open', 'shutil.')):
        touched.append(f'{event} {args!r:.100}')


sys.addaudithook(_audit)


@pytest.fixture(scope='module')
def refuse():
    """Read a hostile file; it must be refused in one line, at once, without any contact with the world."""

    def check(data: bytes, may_be_read: bool = False, read=read_pickle) -> str:
        global guarding
        touched.clear()
        signal.setitimer(signal.ITIMER_REAL, 30)  # the default action ends the test run: a hang is a failure
        guarding = True
        try:
            read(data)
        except UserError as error:
            message = str(error)
        else:
            message = ''
        finally:
            guarding = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert not touched
        assert may_be_read or message
        assert '\n' not in message and len(message) < 600
        return message

    for array in ARRAYS:
        to_array(read_pickle(pickle.dumps(array)))  # what NumPy imports on first use
    return check


def array_from(data: bytes) -> np.ndarray:
    return to_array(read_pickle(data))


@pytest.mark.parametrize(('module', 'name'), NAMES)
def test_no_other_name_resolves(refuse, module, name):
    for form, data in forms(module, name).items():
        message = refuse(data)
        if form not in ('INST', 'OBJ'):  # of these, not even the name is read
            shown = repr(f'{module}.{name}')
            assert f'asks for {shown}, which is not among' in message, form
            position = int(message.split('byte ')[1].split(':')[0])
            assert data[:position].endswith((f'c{module}\n{name}\n'.encode(), b'\x93')), form


class Reduced:
    """Pickles as a call, of any kind that Python offers."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('function', [eval, exec, getattr, open, print, io.open, sys.exit, pickle.loads, type])
def test_what_pickle_itself_writes(refuse, protocol, function):
    made = [
        Reduced(function, ('1',)),
        Reduced(collections.OrderedDict, (), {'a': Reduced(function, ())}),
        Reduced(collections.OrderedDict, (), None, None, iter([('a', Reduced(function, ()))])),
        Reduced(np.dtype, ('f8',), (3, '<', None, None, None, -1, -1, 0, {'metadata': Reduced(function, ())})),
    ]
    for value in made:
        assert 'not among the names' in refuse(pickle.dumps(value, protocol)) or protocol < 2


@pytest.mark.parametrize('case', ABUSE)
def test_allowed_names_take_only_what_is_right(refuse, case):
    """What reads them refuses it, or what makes arrays of them."""
    refuse(ABUSE[case], read=array_from)


@pytest.mark.parametrize('case', SIZES)
def test_sizes_are_not_believed(refuse, case):
    tracemalloc.start()
    try:
        refuse(SIZES[case], read=array_from)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('case', BOMBS)
def test_memory_is_bounded_by_the_number_of_values(refuse, case):
    """A text may become four times as wide; all else is some 100 bytes, at most 240, for each time that is read."""
    data, reads = BOMBS[case], []

    def read(data):
        reader = PickleReader(memoryview(data), 'x', ())
        try:
            reader.load()
        finally:
            reads.append(MOST_READS - reader.left)

    tracemalloc.start()
    try:
        refuse(data, may_be_read=True, read=read)
        assert tracemalloc.get_traced_memory()[1] < 240 * reads[0] + 5 * len(data) + 100_000
    finally:
        tracemalloc.stop()


def test_the_number_of_values_is_bounded(refuse):
    def read(data):
        return PickleReader(memoryview(data), 'x', (), most_reads=1000).load()

    assert len(read(b'(' + b'N' * 997 + b't.')) == 997
    assert 'more values' in refuse(b'(' + b'N' * 998 + b't.', read=read)


def test_nothing_that_is_read_can_act(refuse):
    """Whatever opcodes and allowed names make, it is of these types, none of which does anything."""
    kinds = {type(None), bool, int, float, str, bytes, memoryview, tuple, list, dict, Call, Name}
    for data in [*ABUSE.values(), *SHARING.values(), *BOMBS.values(), *(pickle.dumps(a) for a in (*VALUES, *ARRAYS))]:
        try:
            left = [read_pickle(data)]
        except UserError:
            continue
        seen = set()
        while left:
            value = left.pop()
            if id(value) not in seen:
                seen.add(id(value))
                assert type(value) in kinds
                left += value.values() if type(value) is dict else value if type(value) in (tuple, list) else ()
                left += (value.name, value.args, value.state) if type(value) is Call else ()


# Files of a few hundred KB whose values are looked at again and again: time must not grow with the square of the size.
QUADRATIC = {
    'a call with many arguments': b'(' + b'N' * 100_000 + b'tq\x01' + SET + b'q\x00(' + b'h\x00h\x01R' * 20_000 + b't.',
    'memo places that collide': b'N' + b''.join(b'p%d\n' % (i * (2**61 - 1)) for i in range(20_000)) + b'.',
    'equal keys of great length': b''.join(
        b'X' + struct.pack('<I', 4_000_000) + b'a' * 4_000_000 + bytes([ord('q'), i]) for i in range(2)
    )
    + b'}'
    + b'h\x00Nsh\x01Ns' * 20_000
    + b'.',
}


@pytest.mark.parametrize('case', QUADRATIC)
def test_time_is_bounded_by_the_size_of_the_file(refuse, case):
    start = time.process_time()
    refuse(QUADRATIC[case], may_be_read=True)
    assert time.process_time() - start < 1


def test_messages_are_one_line_of_text(refuse):
    """What a file writes into an error, here as a name, reaches no terminal as it is."""
    message = refuse(b'\x8c\x01x\x8c\x08a\n\x1b[31mb\x93.')
    assert message.isprintable() and r'x.a\n\x1b[31mb' in message
    assert len(refuse(b'\x8c\x01xX' + struct.pack('<I', 10**6) + b'a' * 10**6 + b'\x93.')) < 250


@pytest.mark.parametrize('case', SHARING)
def test_shared_and_deep_values_take_no_time(refuse, case):
    message = refuse(SHARING[case], may_be_read=True)
    assert ('as a key' in message) == ('key' in case)


def array_in(data: bytes) -> np.ndarray:
    content = read_pickle(data)
    return to_array(content.get('mu') if type(content) is dict else content)


def honest_file(protocol: int) -> bytes:
    return pickle.dumps({'mu': np.arange(3.0), 'n': [1, 2**40, -1.5, 'é', b'\xff'], 's': {1}}, protocol)


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_truncated_files(refuse, protocol):
    data = honest_file(protocol)
    for end in range(len(data)):
        refuse(data[:end])


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_flipped_bits(refuse, protocol):
    data, rng = honest_file(protocol), random.Random(protocol)
    flips = list(itertools.product(range(len(data)), range(8)))
    for place, bit in rng.sample(flips, 600):
        broken = bytearray(data)
        broken[place] ^= 1 << bit
        refuse(bytes(broken), may_be_read=True, read=array_in)


@pytest.mark.parametrize('seed', range(4))
def test_random_opcodes(refuse, seed):
    rng = random.Random(seed)
    pieces = [bytes([code]) for code in PickleReader.dispatch]
    pieces += [ARRAY, U1, ORDERED, ENCODE, SET, b'K\x01', b'h\x00', b'q\x00']
    for _ in range(1500):
        refuse(b''.join(rng.choices(pieces, k=12)) + b'.', may_be_read=True, read=array_from)


def test_errors_are_the_users(tmp_path):
    path = tmp_path / 'evil.pkl'
    path.write_bytes(forms('os', 'system')['STACK_GLOBAL REDUCE'])
    with pytest.raises(UserError, match=r"evil\.pkl cannot be read: byte 15: it asks for 'os\.system'"):
        read_pickle(path)
    path.write_bytes(b'')
    with pytest.raises(UserError, match='cut short'):
        read_pickle(path)
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / 'none')
