"""Progress: lines in a log, a bar on a terminal."""

import io

import pytest

import dnnlib.progress
from dnnlib.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [1000.0]
    monkeypatch.setattr(dnnlib.progress.time, 'monotonic', lambda: now[0])
    return now


def work(clock, seconds: float, **arguments) -> None:
    with progress(1000, 'images', **arguments) as advance:
        for _ in range(10):
            clock[0] += seconds
            advance(100)
        advance(100)  # beyond the end


def test_a_line_a_minute_without_a_terminal(clock, capsys):
    work(clock, 25)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        'images: 300 of 1000 img, 75 s, about 175 s left',
        'images: 600 of 1000 img, 150 s, about 100 s left',
        'images: 900 of 1000 img, 225 s, about 25 s left',
    ]


def test_short_work_and_other_ranks_are_silent(clock, capsys):
    work(clock, 5)
    work(clock, 100, shown=False)
    assert capsys.readouterr().err == ''


def test_a_bar_on_a_terminal(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr('sys.stderr', terminal := Terminal())
    work(clock, 100)
    assert '1000/1000' in terminal.getvalue() and 'left' not in terminal.getvalue()
