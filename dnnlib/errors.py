"""Errors that a user can mend, and how to say them."""

import difflib
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar('T')

MOST_SHOWN = 10  # problems in one message


class UserError(ValueError):
    """A user's mistake: one line, shown without a traceback by the scripts; of many problems, the first ten.

    Args:
        problems: One message, or several found in the same check.
        where: The file that all of them are in, named once.
        everywhere: Whether all ranks raise it together, so that one of them says it for all.
    """

    def __init__(self, problems: str | Iterable[str], where: str | None = None, everywhere: bool = False):
        self.everywhere = everywhere
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, 'an error needs at least one problem'
        shown, more = self.problems[:MOST_SHOWN], len(self.problems) - MOST_SHOWN
        message = '; '.join(shown if more <= 0 else [*shown, f'and {more} more'])
        super().__init__(f'{where}: {message}' if where else message)


def quoted(value: object, limit: int = 100) -> str:
    """A name or value that a file or user gave, fit for a message: on one line, escaped, cut at `limit` characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    text = short.repr(value)
    text = text if text.isprintable() else ascii(text)[1:-1]  # a `__repr__` may say anything
    return text if len(text) <= limit else f'{text[: limit - 3]}...'


def unknown_choice(kind: str, name: str, choices: Iterable[str]) -> str:
    """Message for a name that is not among `choices`, naming the nearest ones (or all, if none is near)."""
    choices = list(choices)
    near = difflib.get_close_matches(str(name)[:100], choices, n=3, cutoff=0.5)
    if near:
        return f'unknown {kind} {quoted(name)}; did you mean {" or ".join(near)}?'
    return f'unknown {kind} {quoted(name)}; choose from {", ".join(choices)}'


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`, or a UserError that names the nearest choices."""
    if name not in table:
        raise UserError(unknown_choice(kind, name, table))
    return table[name]


def printable(text: object, limit: int = 100) -> str:
    """A name from a file as it may be printed: `limit` characters at most, control characters escaped."""
    text = str(text)
    if len(text) > limit:
        text = f'{text[: limit // 2 - 3]}...{text[-limit // 2 :]}'
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def warn(message: str) -> None:
    """Show the user a doubt on stderr, once for all ranks."""
    if int(os.environ.get('RANK', '0')) == 0:
        print(f'warning: {message}', file=sys.stderr, flush=True)
