"""Which files are in a folder or a zip, in arrays that a million entries may fill and many processes may share."""

import bisect
import dataclasses
import itertools
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from dataset.files.zip_format import ENCRYPTED
from dnnlib.errors import UserError, printable
from dnnlib.files import open_regular

ENCODING = ('utf-8', 'surrogateescape')  # file names that are not UTF-8 keep their bytes


class Names(Sequence):
    """A list of names in two arrays.

    Args:
        text: All names one after another, UTF-8, uint8.
        ends: Where each one ends, int64 [N].
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, names: Sequence[bytes]) -> 'Names':
        """Put names, in UTF-8, into arrays."""
        ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
        return cls(np.frombuffer(bytearray().join(names), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        """A name, or a list of names for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = self.ends[i - 1] if i else 0
        return self.text[start : self.ends[i]].tobytes().decode(*ENCODING)

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode(*ENCODING)
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class FileTable:
    """The files of a folder or a zip, sorted by name (by the bytes of their UTF-8).

    Attributes:
        names: Relative, with `/`.
        sizes: Bytes of each file, unpacked, int64 [N].
        offsets: Of the local headers in a zip, int64 [N]; this and what follows is [0] for a folder.
        packed: Bytes in the zip, int64 [N].
        crcs: CRC-32 of the unpacked content, uint32 [N].
        methods: How it is packed: zipfile's numbers, or ENCRYPTED; uint8 [N].
    """

    names: Names
    sizes: np.ndarray
    offsets: np.ndarray
    packed: np.ndarray
    crcs: np.ndarray
    methods: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        """The row of a file, None where there is none of that name."""
        raw = name.encode(*ENCODING)
        row = bisect.bisect_left(range(len(self)), raw, key=lambda i: self.names[i].encode(*ENCODING))
        return row if row < len(self) and self.names[row] == name else None

    def select(self, rows: Sequence[int]) -> 'FileTable':
        """The files of these rows."""
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        chosen = {name: column[rows] if len(column) else column for name, column in columns.items()}
        return FileTable(Names.of([self.names[i].encode(*ENCODING) for i in rows]), **chosen)


def list_zip(path: str | os.PathLike) -> FileTable:
    """The files of a zip; hidden ones, and the `__MACOSX` folders that macOS puts there, are left out."""
    with open_regular(path) as file:
        if file.read(2) != b'PK':
            raise UserError(f'{path} is neither a folder nor a zip')
        try:
            entries = zipfile.ZipFile(file).infolist()
            _check_count(file, len(entries))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            raise UserError(f'{path} is cut short or damaged: {error}') from None
        end = file.seek(0, os.SEEK_END)
    folders = [entry for entry in entries if entry.filename.endswith('/')]
    _refuse(path, 'are folders with content', [entry.filename for entry in folders if entry.file_size])
    entries = [entry for entry in entries if not entry.filename.endswith('/')]
    _refuse(path, 'lead out of it', [entry.filename for entry in entries if _leads_out(entry.filename)])
    entries = sorted((entry for entry in entries if not _is_hidden(entry.filename)), key=lambda entry: entry.filename)
    names = [entry.filename for entry in entries]
    _refuse(path, 'are there more than once', sorted({a for a, b in itertools.pairwise(names) if a == b}))
    cut = [entry.filename for entry in entries if not 0 <= entry.header_offset <= end - entry.compress_size]
    _refuse(path, 'are of files beyond its end or beginning', cut)
    numbers = np.fromiter(itertools.chain.from_iterable(map(_numbers, entries)), np.int64, 5 * len(entries))
    sizes, offsets, packed, crcs, methods = (column.copy() for column in numbers.reshape(-1, 5).T)
    names = Names.of([name.encode(*ENCODING) for name in names])
    return FileTable(names, sizes, offsets, packed, crcs.astype(np.uint32), methods.astype(np.uint8))


def _check_count(file: BinaryIO, count: int) -> None:
    """Hold the entries of a zip against the number that its end gives, which zipfile ignores."""
    file.seek(max(file.seek(0, os.SEEK_END) - 2**17, 0))
    tail = file.read()
    (noted,) = struct.unpack_from('<H', tail, tail.rindex(b'PK\5\6') + 10)
    if noted == 2**16 - 1 and b'PK\6\6' in tail:
        (noted,) = struct.unpack_from('<Q', tail, tail.rindex(b'PK\6\6') + 32)
    if (noted - count) % 2**16:  # of more files, some programs write the lower 16 bits
        raise ValueError(f'it has {count} files, {noted} expected')


def _numbers(entry: zipfile.ZipInfo) -> tuple[int, ...]:
    method = ENCRYPTED if entry.flag_bits & 1 else min(entry.compress_type, 255)
    return entry.file_size, entry.header_offset, entry.compress_size, entry.CRC, method


def list_folder(path: str | os.PathLike) -> tuple[FileTable, dict[str, int]]:
    """The files below a folder, links followed and hidden ones left out, and all folders that were looked into.

    Of each folder there is the time it was changed before it was looked into, in ns.
    """
    folders: dict[str, int] = {}
    files = sorted(_walk(os.fspath(path), folders))
    sizes = np.fromiter((size for _, size in files), np.int64, len(files))
    none = np.zeros(0, np.int64)
    return FileTable(Names.of([name for name, _ in files]), sizes, none, none, none, none), folders


def _walk(
    root: str, folders: dict[str, int], parents: tuple[str, ...] = (), prefix: str = ''
) -> Iterator[tuple[bytes, int]]:
    real = os.path.realpath(root)
    if real in parents:
        raise UserError(f'{root} is a link to a folder that it is in, a loop without end')
    folders[prefix] = os.stat(root).st_mtime_ns  # noqa: PTH116 (a million)
    with os.scandir(root) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            name = f'{prefix}{entry.name}'
            if entry.is_dir():
                yield from _walk(entry.path, folders, (*parents, real), f'{name}/')
            else:
                yield name.encode(*ENCODING), entry.stat().st_size


def _is_hidden(name: str) -> bool:
    if not name.startswith('.') and '/.' not in name and '__MACOSX' not in name:
        return False
    return any(part.startswith('.') or part == '__MACOSX' for part in name.split('/'))


def _leads_out(name: str) -> bool:
    return not name or name.startswith('/') or ('..' in name and '..' in name.replace('\\', '/').split('/'))


def _refuse(path: str | os.PathLike, why: str, names: list[str]) -> None:
    if names:
        raise UserError(
            f'{path} is cut short or damaged: {len(names)} of its names {why}, for instance {printable(names[0])}'
        )
