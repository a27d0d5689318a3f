"""Files that appear whole or not at all."""

import contextlib
import fcntl
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib.errors import UserError, quoted

MOST_NESTED = 50  # levels of JSON


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; on success flush it to disk and rename it to `path`.

    If the block raises, or the process dies, `path` is as it was before and the temporary file is removed
    (a kill may leave it behind; its name begins with a dot and ends in `.tmp`, and no reader takes it).
    The file gets the permissions that the umask asks for.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        with named_errors(path):
            yield beside
            with open(beside, 'rb+') as file:
                os.fsync(file.fileno())
            beside.chmod(0o666 & ~_umask())
            beside.replace(path)
            _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def named_errors(path: str | os.PathLike) -> Iterator[None]:
    """Give errors of the operating system that name no file, such as those of a full disk, the name `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from None


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading; a pipe or a device, which may have no end, is refused with a UserError."""
    without_waiting = getattr(os, 'O_NONBLOCK', 0)  # for someone to write into a pipe
    file = open(path, 'rb', opener=lambda name, flags: os.open(name, flags | without_waiting))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f'{os.fspath(path)} is not a regular file')
    return file


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """The content of a regular file of at most that many bytes; a larger one is refused with a UserError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f'{os.fspath(path)} has {size} bytes, more than the {most} that are read')
        return file.read()


@contextlib.contextmanager
def locked_folder(path: str | os.PathLike) -> Iterator[None]:
    """Lock a folder for this process, or raise a UserError where another one has; it ends with the process.

    Where the file system has no locks (some network ones), nothing is locked.
    """
    with open(Path(path) / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process is at work in {os.fspath(path)}') from None
        except OSError:
            pass
        yield


def _umask() -> int:
    """The process's umask; the system call can only read it by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Flush a rename in `folder` to disk, where the platform can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_path(path) as beside:
        beside.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object with finite numbers, nested 50 levels deep at most.

    Raises:
        ValueError: for anything else.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None
    if not isinstance(value, dict):
        raise ValueError('it is not an object with named fields')
    level: list[Any] = [value]
    for _ in range(MOST_NESTED):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    if level:
        raise ValueError('it is nested too deeply')
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{quoted(text)} is not a finite number')
    return value


def read_object(path: str | os.PathLike, most: int = 2**28) -> dict[str, Any]:
    """The JSON object in a file of at most `most` bytes."""
    try:
        return parse_object(read_regular(path, most))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f'{os.fspath(path)} cannot be read: {error}') from None


def make_folder(path: str | os.PathLike) -> Path:
    """Create a folder for output and check that it can be written, so that a run fails before its work."""
    if not os.fspath(path):
        raise UserError('the name of the output folder is empty')  # an unset variable on a command line, say
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f'{path} is a file; a folder is needed for the output')
    path.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:  # its filename is that of the probe
        raise type(error)(error.errno, error.strerror, str(path)) from None
    return path
