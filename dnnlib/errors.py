"""Errors that a user can mend, and how to say them."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: one line per problem, shown without a traceback by the scripts.

    Args:
        problems: One message, or several found in the same check.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        assert self.problems, 'an error needs at least one problem'
        super().__init__('; '.join(self.problems))


def unknown_choice(kind: str, name: str, choices: Iterable[str]) -> str:
    """Message for a name that is not among `choices`, naming the nearest ones (or all, if none is near)."""
    choices = list(choices)
    near = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
    if near:
        return f'unknown {kind} {name!r}; did you mean {" or ".join(near)}?'
    return f'unknown {kind} {name!r}; choose from {", ".join(choices)}'
