"""Frozen dataclasses as plain values and back: nested, checked, with a tag where one of several classes may stand.

A field that takes one of several classes is declared `kind: Any = tagged(TABLE)`; in JSON its object carries the name
of its class in that table under `name` (or another key). Infinite numbers become null.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from dnnlib.errors import UserError, printable, quoted, unknown_choice

NAMES = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a name'}


def tagged(table: Mapping[str, type], key: str = 'name', **kwargs: Any) -> Any:
    """A dataclass field that takes an instance of one of the classes of `table`; other arguments go to the field."""
    return dataclasses.field(metadata={'table': table, 'key': key}, **kwargs)


def option(default: Any, help: str) -> Any:
    """A dataclass field that becomes a command-line option; `help` is what --help says of it."""
    return dataclasses.field(default=default, metadata={'help': help})


def tag_of(value: Any, table: Mapping[str, type]) -> str:
    """The name that a config's class has in a table."""
    return next(name for name, cls in table.items() if cls is type(value))


def to_json(value: Any) -> Any:
    """A config as plain values; `from_json` is its inverse."""
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if not dataclasses.is_dataclass(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    values = {}
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        values[field.name] = to_json(found)
        if 'table' in field.metadata and found is not None:
            tag = {field.metadata['key']: tag_of(found, field.metadata['table'])}
            values[field.name] = tag | values[field.name]
    return values


def from_json(cls: type, values: Any, where: str = '') -> Any:
    """Rebuild a config that `to_json` wrote.

    Args:
        cls: The dataclass.
        values: Plain values, perhaps from a file that nobody vouches for.
        where: What the names of fields are prefixed with in messages.
    """
    if not isinstance(values, dict):
        raise UserError(f'{where or "the config"} must be an object with named fields, not {quoted(values)}')
    where = f'{where}.' if where else ''
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    known = [where + name for name in fields]
    found = [unknown_choice('field', where + name, known) for name in values if name not in fields]
    missing = [f for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    found += [f'missing field {where + f.name!r}' for f in missing if f.name not in values]
    read = {}
    for name in values.keys() & fields.keys():
        try:
            read[name] = _read(values[name], hints[name], fields[name], where + name)
        except UserError as error:
            found += error.problems
    if found:
        raise UserError(found)
    return cls(**read)


def _read(value: Any, hint: Any, field: dataclasses.Field, where: str) -> Any:
    if 'table' in field.metadata and (value is not None or field.default is not None):
        table, key = field.metadata['table'], field.metadata['key']
        name = value.get(key) if isinstance(value, dict) else value
        if not isinstance(name, str) or name not in table:
            raise UserError(unknown_choice(where, str(name), table))
        rest = {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else {}
        return from_json(table[name], rest, where)
    for option in _options(hint):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return from_json(option, value, where)
    if value is None and float in _options(hint) and field.default == math.inf:
        return math.inf
    value = _tuples(value)
    if hint == tuple[float, float] and isinstance(value, tuple) and value[-1:] == (None,):
        value = (*value[:-1], math.inf)  # an interval without an upper end
    if not _fits(value, hint):
        raise UserError(f'{where} must be {_wanted(hint)}, not {quoted(value)}')
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field; no bool is a number."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(kinds) == 2 and kinds[1] is ...:
            return all(_fits(v, kinds[0]) for v in value)
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(v, typing.get_args(hint)[1]) for v in value.values())
    if hint is Any or dataclasses.is_dataclass(hint):
        return hint is Any or isinstance(value, hint)
    if hint is float:
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is hint if isinstance(hint, type) else value is hint


def _wanted(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return ' or '.join(_wanted(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        count = '' if kinds[-1] is ... else f'{len(kinds)} '
        return f'a list of {count}{NAMES.get(kinds[0], "a value").split(" ", 1)[1]}s'
    if typing.get_origin(hint) is dict:
        return 'an object with named fields'
    return 'null' if hint is type(None) else NAMES.get(hint, getattr(hint, '__name__', str(hint)))


def replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with fields changed, by dotted name: `{'optimizer.lr': 0.01, 'network.architecture.dropout': 0.1}`.

    A tagged field may also be given by the name of its class, which then has its defaults.
    """
    found = []
    for path, value in changes.items():
        try:
            config = _replaced(config, path.split('.'), value, '')
        except UserError as error:
            found += error.problems
    if found:
        raise UserError(found)
    return config


def _replaced(config: Any, path: list[str], value: Any, where: str) -> Any:
    (name, *rest), fields = path, {field.name: field for field in dataclasses.fields(config)}
    if name not in fields:
        raise UserError(unknown_choice(f'field of {where or "the config"}', name, fields))
    field, old, where = fields[name], getattr(config, name), f'{where}.{name}' if where else name
    if rest and 'table' in field.metadata and rest == [field.metadata['key']]:
        rest = []
    if rest:
        if not dataclasses.is_dataclass(old):
            raise UserError(f'{where} has no fields: it is {quoted(old)}')
        return dataclasses.replace(config, **{name: _replaced(old, rest, value, where)})
    hint = typing.get_type_hints(type(config))[name]
    return dataclasses.replace(config, **{name: value if _is_config(value) else _read(value, hint, field, where)})


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def differences(old: dict[str, Any], new: dict[str, Any], free: Collection[str] = (), prefix: str = '') -> list[str]:
    """One line for each field in which two configs (as JSON values) differ, those `free` to change left out."""
    lines = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if prefix + name in free:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, free, f'{prefix}{name}.')
        elif a != b:
            lines.append(f'{printable(prefix + name)} is {printable(b)}, was {printable(a)}')
    return lines


def parse_setting(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` of `--set`: a dotted name and a JSON value, or a bare word.

    Raises:
        UserError: where there is no `=`.
    """
    name, equals, value = text.partition('=')
    if not equals or not name:
        raise UserError(f'{quoted(text)} is not NAME=VALUE, such as optimizer.lr=0.01')
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value
