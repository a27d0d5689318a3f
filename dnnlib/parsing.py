"""Numbers and lists as people write them: `1,2,5-10`, `8Mi`, `0.05,0.10,...,0.25`."""

import re

from dnnlib.errors import UserError

UNITS = {'': 1, 'k': 10**3, 'M': 10**6, 'G': 10**9, 'Ki': 2**10, 'Mi': 2**20, 'Gi': 2**30}

MOST_BETWEEN = 10_000  # numbers that `...` may stand for


def parse_int_list(text: str) -> list[int]:
    """Parse `1,2,5-10` into [1, 2, 5, 6, 7, 8, 9, 10]; order and repeats are kept."""
    numbers: list[int] = []
    for part in text.split(','):
        match = re.fullmatch(r'\s*(\d+)(?:-(\d+))?\s*', part)
        if match is None:
            raise UserError(f'cannot read {part.strip()!r} in the list {text!r}; write for instance 0-99 or 1,2,5-10')
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= 2**63:
            raise UserError(f'{last} in {text[:40]!r} is too large')
        if last < first:
            raise UserError(f'the range {part.strip()!r} in {text!r} goes down; write {last}-{first}')
        numbers.extend(range(first, last + 1))
    return numbers


def parse_float_list(text: str) -> list[float]:
    """Parse `0.05,0.10,...,0.25` into [0.05, 0.10, 0.15, 0.20, 0.25].

    Three dots stand for the arithmetic sequence that the two numbers before it begin and the one after it ends.
    """
    parts = [part.strip() for part in text.split(',')]
    numbers: list[float] = []
    for i, part in enumerate(parts):
        if part == '...':
            numbers.extend(_between(parts, i, text))
        else:
            numbers.append(_float(part, text))
    return numbers


def _between(parts: list[str], dots: int, text: str) -> list[float]:
    """The numbers that `...` at position `dots` stands for, ends excluded."""
    if dots < 2 or dots + 1 >= len(parts):
        raise UserError(f"'...' in {text!r} needs two numbers before it and one after, as in 0.05,0.10,...,0.25")
    before, start, end = (_float(parts[dots + k], text) for k in (-2, -1, 1))
    step = start - before
    count = (end - start) / step if step else 0
    if not 0.5 < count < MOST_BETWEEN or abs(count - round(count)) > 1e-6:
        raise UserError(f'{end:g} in {text!r} is not reached from {start:g} in steps of {step:g}')
    return [round(start + k * step, 12) for k in range(1, round(count))]


def _float(part: str, text: str) -> float:
    try:
        return float(part)
    except ValueError:
        raise UserError(f'cannot read {part!r} in {text!r} as a number') from None


def parse_nimg(text: str) -> int:
    """Parse a number of images such as `8Mi`, `200k`, `1.5M` or `4096` (binary units end in i)."""
    match = re.fullmatch(r'\s*(\d+(?:\.\d*)?)\s*([kMG]i?|Ki|)\s*', text)
    if match is None or match[2] not in UNITS:
        raise UserError(f'cannot read {text!r} as a number of images; write for instance 4096, 200k or 8Mi')
    value = float(match[1]) * UNITS[match[2]]
    if not value < 2**63:
        raise UserError(f'{text[:40]!r} is too large')
    if value != round(value):
        raise UserError(f'{text!r} is not a whole number of images')
    return round(value)


def parse_grid(text: str) -> tuple[int, int]:
    """Parse `4x10` into (4, 10), rows and columns."""
    match = re.fullmatch(r'\s*([1-9]\d{0,3})x([1-9]\d{0,3})\s*', text)
    if match is None:
        raise UserError(f'cannot read {text!r} as ROWSxCOLS; write for instance 4x10')
    return int(match[1]), int(match[2])
