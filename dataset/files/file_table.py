"""Which files are in a folder or a zip, in arrays that a million entries may fill and many processes may share."""

import bisect
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.files.zip_format import read_directory
from dnnlib.errors import UserError

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
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    def __repr__(self) -> str:
        return f'<{len(self)} names, {self[0]} to {self[-1]}>' if len(self) else '<no names>'


@dataclass(frozen=True)
class FileTable:
    """The files of a folder or a zip, sorted by name (by the bytes of their UTF-8).

    Attributes:
        names: Relative, with `/`.
        sizes: Bytes of each file, int64 [N].
        offsets, packed, crcs, methods: Places in a zip, see `zip_format.ZipEntries`; [0] for a folder.
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
    """The files of a zip; hidden ones, and the `__MACOSX` folders that macOS puts there, do not count.

    Raises:
        UserError: where it is no zip, is damaged, or has a name twice or one that leads out of it.
        OSError: where it cannot be read.
    """
    entries = read_directory(path)
    names = entries.names
    outside = [name for name in names if _leads_out(name)]
    if outside:
        name = outside[0].decode(*ENCODING)
        raise UserError(f'{path} holds {len(outside)} names that lead out of it, for instance {name}')
    rows = sorted((i for i, name in enumerate(names) if not _is_hidden(name)), key=names.__getitem__)
    twice = [names[a] for a, b in itertools.pairwise(rows) if names[a] == names[b]]
    if twice:
        name = twice[0].decode(*ENCODING)
        raise UserError(f'{path} holds {len(set(twice))} names more than once, for instance {name}')
    columns = (entries.sizes, entries.offsets, entries.packed, entries.crcs, entries.methods)
    return FileTable(Names.of([names[i] for i in rows]), *(column[rows] for column in columns))


def list_folder(path: str | os.PathLike) -> tuple[FileTable, dict[str, int]]:
    """The files below a folder, links followed and hidden ones left out, and all folders that were looked into.

    Of each folder there is the time it was changed before it was looked into, in ns.

    Raises:
        UserError: where links form a loop.
        OSError: where a folder in it cannot be read.
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
            if _is_hidden(entry.name.encode(*ENCODING)):
                continue
            name = f'{prefix}{entry.name}'
            if entry.is_dir():
                yield from _walk(entry.path, folders, (*parents, real), f'{name}/')
            else:
                yield name.encode(*ENCODING), entry.stat().st_size


def _is_hidden(name: bytes) -> bool:
    if not name.startswith(b'.') and b'/.' not in name and b'__MACOSX' not in name:
        return False
    return any(part.startswith(b'.') or part == b'__MACOSX' for part in name.split(b'/'))


def _leads_out(name: bytes) -> bool:
    return name.startswith(b'/') or (b'..' in name and b'..' in name.replace(b'\\', b'/').split(b'/')) or b'\0' in name


def describe_state(path: str | os.PathLike, folders: Iterable[str] = ()) -> dict:
    """What a list of files was valid for: size and time of a zip, times of all folders, in JSON's types.

    Args:
        path: Folder or zip.
        folders: Of a folder, those below it, as `list_folder` gives them.
    """
    if not Path(path).is_dir():
        about = Path(path).stat()
        return {'size': about.st_size, 'mtime_ns': about.st_mtime_ns}
    labels = Path(path, 'dataset.json')
    about = labels.stat() if labels.exists() else None
    return {
        'folders': {folder: Path(path, folder).stat().st_mtime_ns for folder in folders},
        'labels': about and [about.st_size, about.st_mtime_ns],
    }
