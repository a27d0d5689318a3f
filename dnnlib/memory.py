"""How much memory there is."""

import os
from pathlib import Path


def free_memory() -> float:
    """Bytes available without swapping; where the system does not say, half of its memory."""
    information = Path('/proc/meminfo')
    for line in information.read_text().splitlines() if information.exists() else []:
        if line.startswith('MemAvailable:'):
            return float(int(line.split()[1]) * 1024)
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2
