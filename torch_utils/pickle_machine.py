"""A machine that reads the pickle format and can do nothing but build values: no import, no attribute, no call by name.

Python's own `pickle` runs what a file tells it to run. Here a name in the file is looked up in a table that the caller
gives; what is not in the table is refused with its byte position, and what is there is a function made for hostile
arguments, not the function of that name. What a file may allocate is bounded by its own size.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch_utils.tensor_files import UnreadableFileError

# Memory that a file may ask for: some for small files, whose values are larger than their bytes, then in proportion.
# Strings, arrays and lists of real data need 1 to 3 bytes per byte of file.
FREE_BYTES = 64 * 2**20
BYTES_PER_BYTE = 4

# Estimates of CPython's own costs, generous, so that what is charged is never less than what is taken.
SLOT_BYTES = 16  # a place on the stack and, later, in a list or tuple
OBJECT_BYTES = 64
ENTRY_BYTES = 112  # of a dict or set, growth included
LARGE_BYTES = 4096  # from here on, `views` makes no copies
LONGEST_INT = 128  # bytes; conversion of longer ones to text takes quadratic time
LARGEST_KEY = 2**61 - 1  # integers below this hash to themselves, so that no file can make all keys collide
LONGEST_KEY = 1024  # characters; equal keys are compared to their ends, again and again where a file says so
LINE_BYTES = 4096  # searched for a newline at a time


class PickleRefusedError(UnreadableFileError):
    """A pickle that is damaged, or asks for more than it may."""


class Global:
    """What a name in a pickle stands for: opaque to the file, called by its REDUCE and NEWOBJ.

    Args:
        name: `module.name` as in the file.
        call: Makes the value. Its arguments come from the file: it must expect anything. An attribute `price` of it
            is charged for each call in bytes, where a call takes more time than the size of its arguments tells.
    """

    def __init__(self, name: str, call: Callable[..., Any]):
        self.name = name
        self.call = call
        self.price = getattr(call, 'price', 0)


class Buildable:
    """A value that the BUILD opcode completes; all others refuse it."""

    def build(self, state: Any) -> Any:
        """Take the state from the file and return the finished value, which replaces this one (or is this one)."""
        raise NotImplementedError


class Machine:
    """One run over one pickle.

    Args:
        data: The bytes; more may follow the pickle.
        where: How messages call the file.
        table: `module.name` -> function, for all names that may occur.
        start: Where in `data` the pickle begins.
        persistent: Resolves persistent ids; without it they are refused.
        views: Whether bytes objects of 4 KiB or more come as views of `data` instead of copies.

    Attributes:
        at: Position of the opcode being executed; after `run`, where the pickle has ended.
    """

    def __init__(
        self,
        data: memoryview,
        where: str,
        table: Mapping[str, Callable[..., Any]],
        start: int = 0,
        persistent: Callable[[Any], Any] | None = None,
        views: bool = False,
    ):
        self.data = data
        self.where = where
        self.table = table
        self.persistent = persistent
        self.views = views
        self.at = self.position = start
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open MARK
        self.memo: dict[int, Any] = {}
        self.unfinished: dict[Buildable, list[int]] = {}  # and their places in the memo
        self.globals: dict[str, Global] = {}
        self.left = FREE_BYTES + BYTES_PER_BYTE * (len(data) - start)

    def run(self) -> Any:
        """Execute the opcodes up to STOP and return the value.

        Values may share parts and contain themselves, so that a small file can hold what has no end when written
        out: check the types of a value's parts before you print, compare or walk it.

        Raises:
            PickleRefusedError: naming the file and the byte position.
        """
        try:
            while True:
                self.at = self.position
                code = self.take(1)[0]
                if code == STOP:
                    value = self.stack.pop()
                    self.at = self.position
                    return value
                handler = HANDLERS.get(code)
                if handler is None:
                    self.refuse(f'opcode {code:#04x} is unknown')
                self.charge(SLOT_BYTES)
                handler(self)
        except PickleRefusedError:
            raise
        except IndexError:
            self.refuse('it takes from an empty stack, the file is damaged')
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            self.refuse(f'{error or type(error).__name__}'[:300])

    def refuse(self, problem: str) -> NoReturn:
        """Stop here. A problem may quote the file: what would not show as one line of text is escaped."""
        problem = problem if problem.isprintable() else ascii(problem)[1:-1]
        raise PickleRefusedError(f'{self.where} cannot be read: byte {self.at}: {problem}') from None

    def charge(self, count: int) -> None:
        """Account for `count` bytes about to be allocated."""
        self.left -= count
        if self.left < 0:
            self.refuse('it asks for more memory than a file of this size may')

    # Reading

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        end = self.position + count
        if not self.position <= end <= len(self.data):
            self.refuse('the file is cut short or damaged: it ends within a value')
        self.position, part = end, self.data[self.position : end]
        return part

    def number(self, count: int) -> int:
        """The next `count` bytes as an unsigned integer."""
        return int.from_bytes(self.take(count), 'little')

    def line(self) -> bytes:
        """What comes before the next newline, for the opcodes of protocol 0."""
        end = self.position
        while (found := bytes(self.data[end : end + LINE_BYTES]).find(b'\n')) < 0:
            end += LINE_BYTES
            if end >= len(self.data):
                self.refuse('the file is cut short or damaged: it ends within a line')
        line = self.take(end + found - self.position)
        self.take(1)
        self.charge(8 * len(line))
        return bytes(line)

    def text(self, count: int) -> str:
        """The next `count` bytes as text."""
        part = self.take(count)
        self.charge(2 * count + OBJECT_BYTES)
        raw = bytes(part)
        if not raw.isascii():
            self.charge(4 * count)  # one rare character makes all of them four bytes wide
        return raw.decode('utf-8', 'surrogatepass')

    def blob(self, count: int) -> bytes | memoryview:
        """The next `count` bytes as a value."""
        part = self.take(count)
        self.charge(OBJECT_BYTES)
        if self.views and count >= LARGE_BYTES:
            return part
        self.charge(count)
        return bytes(part)

    def integer(self, count: int) -> int:
        """The next `count` bytes as a signed integer."""
        if count > LONGEST_INT:
            self.refuse(f'an integer of {count} bytes')
        return int.from_bytes(self.take(count), 'little', signed=True)

    # The stack

    def push(self, value: Any, cost: int = 0) -> None:
        """Put a value on the stack that takes about `cost` bytes besides its place there."""
        self.charge(cost)
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        """All values since the last MARK."""
        values, self.stack = self.stack, self.marked.pop()
        return values

    def remember(self, place: int) -> None:
        """Put the top of the stack into the memo.

        Its places are numbers that the file chooses. Those that are no larger than the file cannot be many that hash
        to the same, and each takes a byte or more to fill.
        """
        if not 0 <= place <= len(self.data):
            self.refuse(f'it counts its values beyond its own size, to {place}')
        self.charge(ENTRY_BYTES)
        value = self.stack[-1]
        if isinstance(value, Buildable):
            self.unfinished.setdefault(value, []).append(place)
        self.memo[place] = value

    def recall(self, place: int) -> None:
        """Push what the memo holds."""
        if place not in self.memo:
            self.refuse(f'there is no value {place} to refer to')
        self.stack.append(self.memo[place])

    # Names and calls

    def find(self, module: Any, name: Any) -> Global:
        """Look a name up in the table; everything that is not in it ends here."""
        if type(module) is not str or type(name) is not str:
            self.refuse('a name that is no text')
        full = f'{module}.{name}'
        if '.' in name or full not in self.table:  # a dotted name would walk through attributes
            shown = full if len(full) <= 100 and full.isprintable() else ascii(full[:100])
            self.refuse(f'it asks for {shown}, which is not among the names a file may use; nothing of it was run')
        if full not in self.globals:
            self.globals[full] = Global(full, self.table[full])
        return self.globals[full]

    def call(self, function: Any, args: Any, options: Any = None) -> Any:
        """Call a global, paying for the size of its arguments, which it may copy."""
        if not isinstance(function, Global):
            self.refuse('it calls what is no function')
        if type(args) is not tuple:
            self.refuse(f'{function.name} is called without a list of arguments')
        if options is not None and (type(options) is not dict or not all(type(key) is str for key in options)):
            self.refuse(f'{function.name} is called with options that have no names')
        self.charge(function.price + OBJECT_BYTES + SLOT_BYTES * (len(args) + len(options or ())))
        self.charge(sum(map(weight, args)))
        try:
            return function.call(*args, **(options or {}))
        except RecursionError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self.refuse(f'{function.name}: {error}'[:300])

    def build(self, state: Any) -> None:
        """Complete the value on top of the stack, and whatever the memo remembers of it."""
        stub = self.stack[-1]
        if not isinstance(stub, Buildable):
            self.refuse('it sets the state of a value that has none')
        self.charge(OBJECT_BYTES + weight(state))
        value = self.stack[-1] = stub.build(state)
        if value is not stub:
            for place in self.unfinished.pop(stub, ()):
                self.memo[place] = value

    def insert(self, target: Any, values: list[Any]) -> None:
        """Put keys and values into a dict, in turn."""
        if type(target) is not dict or len(values) % 2:
            self.refuse('it puts keys into what is no dictionary, or without values')
        self.charge(ENTRY_BYTES * (len(values) // 2))
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[check_key(key)] = value

    def extend(self, target: Any, values: list[Any]) -> None:
        """Put values at the end of a list."""
        if type(target) is not list:
            self.refuse('it appends to what is no list')
        target.extend(values)

    def add(self, target: Any, values: list[Any]) -> None:
        """Put values into a set."""
        if type(target) is not set:
            self.refuse('it adds to what is no set')
        self.charge(ENTRY_BYTES * len(values))
        target.update(map(check_key, values))


def weight(value: Any, nested: bool = True) -> int:
    """Bytes that a copy of `value` would take; of what is inside it, only of the parts of tuples."""
    if isinstance(value, bytes | bytearray | memoryview | str):
        return 4 * len(value) if type(value) is str else len(value)
    if isinstance(value, tuple) and nested:
        return SLOT_BYTES * len(value) + sum(weight(part, nested=False) for part in value)
    return ENTRY_BYTES * len(value) if isinstance(value, dict | list | set | frozenset | tuple) else 0


def check_key(key: Any) -> str | bytes | int | None:
    """Return a key of a dict or set.

    Tuples may nest until hashing them overflows Python's stack, numbers may be chosen to collide, and long text takes
    long to compare.

    Raises:
        TypeError: where it is neither short text nor bytes nor a small integer.
    """
    if key is None or type(key) is bool or (type(key) is int and abs(key) < LARGEST_KEY):
        return key
    if type(key) in (str, bytes):
        if len(key) <= LONGEST_KEY:
            return key
        raise TypeError(f'a key of {len(key)} characters')
    raise TypeError(f'a {type(key).__name__} as a key of a dictionary or set')


STOP = ord('.')
HANDLERS: dict[int, Callable[[Machine], None]] = {}


def _opcode(code: str) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    """Register the handler of an opcode."""

    def register(handler: Callable[[Machine], None]) -> Callable[[Machine], None]:
        assert ord(code) not in HANDLERS
        HANDLERS[ord(code)] = handler
        return handler

    return register


def _simple(code: str, action: Callable[[Machine], None]) -> None:
    _opcode(code)(action)


# Values
_simple('N', lambda m: m.push(None))
_simple('\x88', lambda m: m.push(True))
_simple('\x89', lambda m: m.push(False))
_simple('K', lambda m: m.push(m.number(1)))
_simple('M', lambda m: m.push(m.number(2), 32))
_simple('J', lambda m: m.push(m.integer(4), 32))
_simple('\x8a', lambda m: m.push(m.integer(m.number(1)), OBJECT_BYTES + LONGEST_INT))
_simple('\x8b', lambda m: m.push(m.integer(m.number(4)), OBJECT_BYTES + LONGEST_INT))
_simple('G', lambda m: m.push(struct.unpack('>d', m.take(8))[0], 32))
_simple('F', lambda m: m.push(float(m.line()), 32))
_simple('L', lambda m: m.push(_decimal(m, m.line().removesuffix(b'L')), OBJECT_BYTES + LONGEST_INT))
_simple('V', lambda m: m.push(m.line().decode('raw-unicode-escape'), 64))
_simple('X', lambda m: m.push(m.text(m.number(4))))
_simple('\x8c', lambda m: m.push(m.text(m.number(1))))
_simple('\x8d', lambda m: m.push(m.text(m.number(8))))
_simple('B', lambda m: m.push(m.blob(m.number(4))))
_simple('C', lambda m: m.push(m.blob(m.number(1))))
_simple('\x8e', lambda m: m.push(m.blob(m.number(8))))
_simple('\x96', lambda m: m.push(m.blob(m.number(8))))  # a bytearray; as bytes here
_simple('T', lambda m: m.push(m.blob(m.number(4))))  # text of Python 2: bytes
_simple('U', lambda m: m.push(m.blob(m.number(1))))

# Containers
_simple('(', lambda m: _mark(m))
_simple(')', lambda m: m.push(()))
_simple(']', lambda m: m.push([], OBJECT_BYTES))
_simple('}', lambda m: m.push({}, 4 * OBJECT_BYTES))
_simple('\x8f', lambda m: m.push(set(), 4 * OBJECT_BYTES))
_simple('t', lambda m: _push_tuple(m, m.pop_mark()))
_simple('\x85', lambda m: _push_tuple(m, [m.stack.pop()]))
_simple('\x86', lambda m: _push_tuple(m, [m.stack.pop() for _ in range(2)][::-1]))
_simple('\x87', lambda m: _push_tuple(m, [m.stack.pop() for _ in range(3)][::-1]))
_simple('l', lambda m: m.push(m.pop_mark(), OBJECT_BYTES))
_simple('a', lambda m: m.extend(m.stack[-2], [m.stack.pop()]))
_simple('e', lambda m: _fill(m, m.extend))
_simple('s', lambda m: _set_item(m))
_simple('u', lambda m: _fill(m, m.insert))
_simple('\x90', lambda m: _fill(m, m.add))

# Stack and memo
_simple('0', lambda m: m.stack.pop() if m.stack else m.pop_mark())
_simple('1', lambda m: m.pop_mark())
_simple('2', lambda m: m.push(m.stack[-1]))
_simple('g', lambda m: m.recall(_decimal(m, m.line())))
_simple('h', lambda m: m.recall(m.number(1)))
_simple('j', lambda m: m.recall(m.number(4)))
_simple('p', lambda m: m.remember(_decimal(m, m.line())))
_simple('q', lambda m: m.remember(m.number(1)))
_simple('r', lambda m: m.remember(m.number(4)))
_simple('\x94', lambda m: m.remember(len(m.memo)))

# Names and calls
_simple('c', lambda m: m.push(m.find(m.line().decode(), m.line().decode()), OBJECT_BYTES))
_simple('R', lambda m: _call(m))
_simple('\x81', lambda m: _call(m))
_simple('b', lambda m: m.build(m.stack.pop()))


def _mark(m: Machine) -> None:
    m.charge(OBJECT_BYTES)
    m.marked.append(m.stack)
    m.stack = []


def _push_tuple(m: Machine, values: list[Any]) -> None:
    m.push(tuple(values), OBJECT_BYTES)


def _fill(m: Machine, put: Callable[[Any, list[Any]], None]) -> None:
    values = m.pop_mark()
    put(m.stack[-1], values)


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.insert(m.stack[-1], [key, value])


def _call(m: Machine) -> None:
    args, function = m.stack.pop(), m.stack.pop()
    m.push(m.call(function, args))


def _decimal(m: Machine, text: bytes) -> int:
    if len(text) > 2 * LONGEST_INT:
        m.refuse(f'an integer of {len(text)} digits')
    return int(text)


@_opcode('\x80')
def _protocol(m: Machine) -> None:
    version = m.number(1)
    if version > 5:
        m.refuse(f'pickle protocol {version} is unknown')


@_opcode('\x95')
def _frame(m: Machine) -> None:
    if m.number(8) > len(m.data) - m.position:
        m.refuse('the file is cut short or damaged: it is shorter than a frame in it')


@_opcode('I')
def _int_line(m: Machine) -> None:
    text = m.line()
    m.push({b'00': False, b'01': True}[text] if text in (b'00', b'01') else _decimal(m, text), 64 + LONGEST_INT)


@_opcode('d')
def _dict(m: Machine) -> None:
    values, target = m.pop_mark(), {}
    m.insert(target, values)
    m.push(target, 4 * OBJECT_BYTES)


@_opcode('\x91')
def _frozenset(m: Machine) -> None:
    values, target = m.pop_mark(), set()
    m.add(target, values)
    m.add(target, values)
    m.push(frozenset(target), 4 * OBJECT_BYTES)


@_opcode('\x93')
def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.push(m.find(module, name), OBJECT_BYTES)


@_opcode('\x92')
def _new_with_options(m: Machine) -> None:
    options, args, function = m.stack.pop(), m.stack.pop(), m.stack.pop()
    m.push(m.call(function, args, options))


@_opcode('i')
def _inst(m: Machine) -> None:
    function = m.find(m.line().decode(), m.line().decode())
    args = tuple(m.pop_mark())
    m.push(m.call(function, args))


@_opcode('o')
def _obj(m: Machine) -> None:
    function, *args = m.pop_mark()
    m.push(m.call(function, tuple(args)))


@_opcode('P')
def _persistent_line(m: Machine) -> None:
    _persistent(m, m.line().decode())


@_opcode('Q')
def _persistent_value(m: Machine) -> None:
    _persistent(m, m.stack.pop())


def _persistent(m: Machine, key: Any) -> None:
    if m.persistent is None:
        m.refuse('it refers to a value outside the file')
    m.push(m.persistent(key), OBJECT_BYTES)


def _refused(codes: str, problem: str) -> None:
    for code in codes:
        _opcode(code)(lambda m: m.refuse(problem))


_refused('\x82\x83\x84', "it asks for an entry of Python's extension registry, which is not among the names it may use")
_refused('\x97\x98', 'it refers to a buffer outside the file')
_refused('S', 'text of Python 2 in protocol 0, which is not read')
