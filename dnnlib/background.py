"""Writing files beside the training, so that no step waits for a disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one writing job at a time in a thread of its own.

    As a context manager it waits for the last job and raises its error, if any. Where an error is under way it does
    not: that one shall be told at once.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='writer')
        self._job: Future | None = None

    def __enter__(self) -> 'BackgroundWriter':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=False)

    def submit(self, job: Callable[[], None]) -> None:
        """Start a job as soon as the one before is done, which is waited for: never more than one set of copies.

        Raises:
            Exception: whatever stopped the job before.
        """
        self.wait()
        self._job = self._pool.submit(job)

    def check(self) -> None:
        """Raise what stopped the last job, if it has stopped; do not wait for it."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job and raise what stopped it."""
        job, self._job = self._job, None
        if job is not None:
            job.result()
