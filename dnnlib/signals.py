"""Being asked to stop, by a scheduler or at the keyboard, without being cut off in the middle of something."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

STOPPING = [name for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]


class StopSignals:
    """While active, SIGTERM, SIGINT and SIGUSR1 are noted instead of ending the process.

    A second SIGINT (an impatient Ctrl-C) interrupts as usual. Outside the main thread, where Python lets no one
    handle signals, nothing is changed.

    Args:
        last: Whether the process ends afterwards. Then signals are ignored from the end of the block on: a scheduler
            sends them one by one, and a late one would kill a process that has done what it was asked to.

    Attributes:
        received: Name of the first signal, or None.
    """

    def __init__(self, last: bool = False):
        self.received: str | None = None
        self._last = last
        self._before: dict[int, Any] = {}

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():
            for name in STOPPING:
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._last else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT and os.environ.get('RANK', '0') == '0':  # a step may take long
            with contextlib.suppress(OSError):  # Ctrl-C ended `tee`, too; print is not safe in here
                os.write(2, b'\nstops after this step, with everything saved; another Ctrl-C ends it at once\n')
        self.received = self.received or signal.Signals(number).name


def ignore_stop_signals() -> None:
    """For helper processes: leave stopping to the parent, which a signal to the whole process group also reaches."""
    for name in STOPPING:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
