"""Where the time of training goes."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import torch

HOST_PHASES = ('data', 'saving', 'measuring')  # what the host does while the device may still be busy with steps before


class Growing:
    """Tells when one minute has passed since it was made, then two, four, and so on."""

    def __init__(self) -> None:
        self.began, self.next = time.monotonic(), 60.0

    def due(self) -> bool:
        """Whether the next of these times has come; then the one after it is twice the time that has passed."""
        passed = time.monotonic() - self.began
        if passed < self.next:
            return False
        self.next = 2 * passed
        return True


class PhaseTimer:
    """Seconds spent in each phase.

    On a GPU, what the device does is measured by events that it records as it gets there, so that nothing waits;
    phases of the host are measured by its clock.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == 'cuda'
        self._seconds: Counter[str] = Counter()
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`."""
        if self.on_gpu and name not in HOST_PHASES:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            since = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - since

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; waits for the device."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, Counter()
        return {name: round(value, 6) for name, value in seconds.items()}
