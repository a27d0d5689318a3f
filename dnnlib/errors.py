"""Errors that a user can mend, and how to word them."""

import difflib
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar('T')
LONGEST = 100  # characters of a name or value from a file
MOST_PROBLEMS = 10


class UserError(ValueError):
    """A user's mistake: one line, shown without a traceback by the scripts.

    Args:
        problems: One message, or several found in the same check, of which the first ten are shown.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, 'an error needs at least one problem'
        shown, more = self.problems[:MOST_PROBLEMS], len(self.problems) - MOST_PROBLEMS
        super().__init__('; '.join([*shown, f'and {more} more'] if more > 0 else shown))


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """`table[name]`; where there is none, a UserError that names the nearest choices."""
    if name not in table:
        raise UserError(unknown_choice(kind, name, table))
    return table[name]


def unknown_choice(kind: str, name: str, choices: Collection[str]) -> str:
    """Message for a name that is not among `choices`, naming the nearest ones (or all, if none is near)."""
    near = difflib.get_close_matches(str(name)[:LONGEST], choices, n=3, cutoff=0.5)
    offer = f'did you mean {" or ".join(near)}?' if near else f'choose from {", ".join(choices)}'
    return f'unknown {kind} {quoted(name)!r}; {offer}'


def quoted(value: Any) -> str:
    """A name or value that comes from a file, for a message: 100 characters at most, control characters escaped."""
    text = str(value)
    if len(text) > LONGEST:
        text = f'{text[: LONGEST // 2 - 3]}...{text[-LONGEST // 2 :]}'
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def warn(message: str) -> None:
    """Show the user a doubt, on stderr, once for all ranks."""
    if int(os.environ.get('RANK', '0')) == 0:
        print(f'warning: {message}', file=sys.stderr, flush=True)
