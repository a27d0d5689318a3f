"""The same work on many items in several processes, with results in order."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def default_workers(count: int) -> int:
    """Processes for that many images: the cores this process may use, none for a handful."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(cores, 16) if count >= 500 and cores > 1 else 0


def in_order(function: Callable[[Any], Any], items: Sequence[Any], workers: int = 0) -> Iterator[Any]:
    """Yield `function(item)` of each item, in the order of the items whatever the number of processes.

    Args:
        function: Picklable. What it raises in another process arrives with that one's traceback in its message, so
            let it return what is meant for users.
        items: Picklable too.
        workers: Processes beside this one; 0 does the work here. They end with the iterator, and with this process.
    """
    if not workers:
        yield from map(function, items)
        return
    yield from torch.utils.data.DataLoader(
        _Calls(function, items),
        sampler=range(len(items)),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        generator=torch.Generator(),  # without one, a loader draws from the global stream as it starts
    )


class _Calls(torch.utils.data.Dataset):
    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]):
        self.function = function
        self.items = items

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


def _as_it_is(result: Any) -> Any:
    return result
