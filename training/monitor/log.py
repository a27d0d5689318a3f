"""Lines of JSON that a run leaves behind, and its log."""

import contextlib
import time
from pathlib import Path
from typing import Any

from dnnlib.files import named_errors
from dnnlib.jsonl import read_records

STATS_FILE = 'stats.jsonl'  # a line for each status interval
METRICS_FILE = 'metrics.jsonl'  # a line for each EMA of each snapshot that was measured
LOG_FILE = 'log.txt'


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's stats.jsonl that have what status lines have."""
    return read_records(folder / STATS_FILE, ('nimg', 'loss', 'mse', 'by_noise'))


class RunLog:
    """What a run says, on the terminal and, with the time, in log.txt.

    Args:
        folder: Of the run; None on ranks that have no say.
    """

    def __init__(self, folder: Path | None):
        self.path = folder and folder / LOG_FILE

    def say(self, text: str, show: bool = True) -> None:
        """Write a line to the log, and print it unless told otherwise."""
        if self.path is None:
            return
        if show:
            with contextlib.suppress(BrokenPipeError):  # Ctrl-C ended `tee`, too; the state is still to be saved
                print(text, flush=True)
        with named_errors(self.path), open(self.path, 'a', encoding='utf-8') as file:
            file.writelines(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {line}\n' for line in text.splitlines())
