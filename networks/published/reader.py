"""What a published pickle holds: objects with the name of their class and their attributes, and tensors by name.

Its objects are pickled as Python source and attributes, and the usual loader runs the source. Here it is not looked at.
"""

import dataclasses
import os
from typing import Any

import torch

from dnnlib.errors import UserError, quoted
from torch_utils.pickles import Call, Name, PickleReader, read_pickle

OBJECT = 'torch_utils.persistence._reconstruct_persistent_obj'
CONTAINERS = {'torch.nn.modules.container.ModuleDict', 'torch.nn.modules.container.ModuleList'}
PARAMETER, TENSOR = 'torch._utils._rebuild_parameter', 'torch._utils._rebuild_tensor_v2'
STORAGE = 'torch.storage._load_from_bytes'
NAMES = {OBJECT, *CONTAINERS, PARAMETER, TENSOR, STORAGE}
DTYPES = {
    'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16,
    'torch.FloatStorage': torch.float32,
    'torch.DoubleStorage': torch.float64,
}
MAGIC = [0x1950A86A20F9469CFC6C, 1001]  # what the bytes of a storage begin with
MOST_DIMS = 32
MOST_READS = 1000  # of the five pickles before the numbers of a storage, which need a tenth of that


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PublishedObject:
    """An object of the file.

    Args:
        class_name: Of the source that is not run, or of PyTorch's containers.
        state: Its attributes.
    """

    class_name: str
    state: dict


def read_published(path: str | os.PathLike) -> dict:
    """What was pickled: a dict; see `read_pickle` for its values."""
    content = read_pickle(path, NAMES)
    return content if type(content) is dict else {}


def to_object(value: Any) -> PublishedObject | None:
    """The object that a value stands for; None where it is something else."""
    if type(value) is not Call:
        return None
    name, state = value.name.rpartition('.')[2], value.state
    if value.name == OBJECT and value.args and type(value.args[0]) is dict:
        name, state = value.args[0].get('class_name'), value.args[0].get('state')
    elif value.name not in CONTAINERS:
        return None
    return PublishedObject(name, state) if type(name) is str and type(state) is dict else None


def keyword_arguments(net: PublishedObject) -> dict[str, Any]:
    """What the constructor of an object got by name, if it got nothing else; see `plain` for the values."""
    args, arguments = net.state.get('_init_args'), net.state.get('_init_kwargs')
    if type(arguments) is not dict or not (args is None or (type(args) is tuple and not args)):
        raise UserError('the arguments of the network are missing')
    return {name: plain(value) for name, value in arguments.items()}


def plain(value: Any) -> Any:
    """A value as configs have it, a list as a tuple; of what is more than a word or some numbers, its type in words."""
    if type(value) in (list, tuple) and len(value) <= 32 and all(type(v) in (int, float) for v in value):
        return tuple(value)
    if type(value) is str and len(value) <= 32 and value.isidentifier():
        return value
    return value if value is None or type(value) in (bool, int, float) else f'a {type(value).__name__}'


def find_tensors(net: PublishedObject) -> dict[str, torch.Tensor]:
    """The tensors of a tree of modules, by their names in a state dict, as views of the mapped file.

    Raises:
        UserError: for what no tree of modules has; so that the walk is no longer than the file, nothing occurs twice.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    left = [('', net)]
    while left:
        prefix, module = left.pop()
        for kind in ('_parameters', '_buffers', '_modules'):
            part = module.state.get(kind)
            if part is None:
                continue
            if type(part) is not dict or id(part) in seen:
                raise UserError(f'{quoted(prefix + kind)} is no dictionary, or occurs twice')
            seen.add(id(part))
            for key, value in part.items():
                name = f'{prefix}{key}'
                if type(key) is not str or len(name) > 200 or not name.isprintable():
                    raise UserError(f'{kind} has the name {quoted(name)}')
                if value is not None and kind != '_modules':
                    found[name] = _to_tensor(value, name, seen)
                elif value is not None:
                    if (child := to_object(value)) is None:
                        raise UserError(f'{quoted(name)} is no module')
                    left.append((f'{name}.', child))
    return found


def _to_tensor(value: Any, name: str, seen: set[int]) -> torch.Tensor:
    try:
        if value.name == PARAMETER:
            value = value.args[0]
        storage, offset, size, stride = value.args[:4]
        if value.name != TENSOR or storage.name != STORAGE or len(size) > MOST_DIMS:
            raise TypeError
        (data,) = storage.args
        if id(data) in seen:
            raise UserError('it shares its numbers with another one')
        seen.add(id(data))
        numbers = _read_storage(data)
        tensor = numbers.as_strided(size, stride, offset)  # which checks all three
        if tensor.numel() > numbers.numel():
            raise ValueError
        return tensor
    except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        problem = f': {error}' if isinstance(error, UserError) else ''
        raise UserError(f'{quoted(name)} is no tensor that can be read{problem}') from None


def _read_storage(data: bytes | memoryview) -> torch.Tensor:
    """The numbers of a storage: five pickles (magic number, version, system, description, keys), a count, the bytes.

    This is what torch.save wrote before version 1.6. torch.load would run no code, but it can be kept busy for years.
    """
    reader = PickleReader(memoryview(data), 'its storage', DTYPES, MOST_READS)
    *magic, system, (_, kind, _, _, count, view), _ = (reader.load() for _ in range(5))
    if magic != MAGIC or system.get('little_endian') is not True or type(kind) is not Name or view is not None:
        raise ValueError
    start = reader.at + 8
    expected = count * DTYPES[kind].itemsize
    if data[reader.at : start] != count.to_bytes(8, 'little') or len(data) - start != expected:
        raise ValueError
    if not count:
        return torch.empty(0, dtype=DTYPES[kind])
    data = bytearray(data) if memoryview(data).readonly else data
    return torch.frombuffer(data, dtype=DTYPES[kind], offset=start, count=count)
