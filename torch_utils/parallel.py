"""The same work on many items in several processes, with results in order."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dnnlib.errors import UserError


def default_workers(count: int) -> int:
    """Processes for that many images: the cores this process may use, none for a handful."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(cores, 16) if count >= 500 and cores > 1 else 0


def in_order(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int = 0, chunk: int = 1, keep_errors: bool = False
) -> Iterator[Any]:
    """Yield `function(item)` of each item, in the order of the items whatever the number of processes.

    A UserError or OSError is raised at its item's turn, or, with `keep_errors`, yielded.

    Args:
        function: Picklable.
        items: Picklable too.
        workers: Processes beside this one; 0 does the work here. They end with the iterator, and with this process.
        chunk: Items that a process takes at a time.
        keep_errors: Yield errors in place of results.
    """
    work = _Chunks(function, items, chunk)
    chunks = map(work.__getitem__, range(len(work)))
    if workers:
        chunks = torch.utils.data.DataLoader(
            work,
            sampler=range(len(work)),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            generator=torch.Generator(),  # without one, a loader draws from the global stream as it starts
        )
    for results in chunks:
        for result in results:
            if isinstance(result, UserError | OSError) and not keep_errors:
                raise result
            yield result


@dataclass
class _Chunks(torch.utils.data.Dataset):
    """Results of the work on each chunk of the items.

    Errors are returned: raised in another process, one would arrive with a traceback for a message.
    """

    function: Callable[[Any], Any]
    items: Sequence[Any]
    chunk: int

    def __len__(self) -> int:
        return -(-len(self.items) // self.chunk)

    def __getitem__(self, index: int) -> list[Any]:
        return [self._result(item) for item in self.items[index * self.chunk : (index + 1) * self.chunk]]

    def _result(self, item: Any) -> Any:
        try:
            return self.function(item)
        except (UserError, OSError) as error:
            return error


def _as_it_is(result: Any) -> Any:
    return result
