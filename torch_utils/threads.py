"""How many threads a tensor operation is spread over."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def one_thread_each(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """As many workers as there are threads, or `count`; each works alone: sums then have one order on every machine."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count or threads, 'one each', torch.set_num_threads, (1,)) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)  # the workers' setting holds for all threads to come
