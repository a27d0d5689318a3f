"""How far a piece of work has come: a bar on a terminal, a line a minute in a log."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

EVERY = 60.0  # seconds between lines where there is no terminal


@contextlib.contextmanager
def progress(total: int, title: str, unit: str = 'img', shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Give a function to call with the number of units done since the last call; what exceeds `total` is ignored.

    Args:
        total: Units in all.
        title: What is being done.
        unit: Of what.
        shown: Whether this process shows it at all: rank 0 does.
    """
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        """Note that `count` more are done; without a terminal, print a line now and then."""
        nonlocal done, last
        count = min(count, total - done)
        done += count
        bar.update(count)
        now = time.monotonic()
        if shown and bar.disable and now - last >= EVERY and 0 < done < total:
            last, left = now, (now - start) * (total - done) / done
            print(
                f'{title}: {done} of {total} {unit}, {now - start:.0f} s, about {left:.0f} s left',
                file=sys.stderr,
                flush=True,
            )

    with tqdm(total=total, desc=title, unit=unit, disable=not (shown and sys.stderr.isatty())) as bar:
        yield advance
