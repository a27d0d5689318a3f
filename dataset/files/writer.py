"""Writing a dataset: whole or not at all, and to be gone on with where it was stopped."""

import contextlib
import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dataset.files.archive import ABOUT_KEY, LABEL_FILE, is_zip_name
from dataset.files.zip_format import DamagedZipError, ZipWriter
from dnnlib.errors import UserError
from dnnlib.files import atomic_path, make_folder, write_json
from dnnlib.images import to_pil

JOURNAL = 'journal.json'


def work_folder(dest: str | os.PathLike) -> Path:
    """Where a dataset is while it is in the making."""
    return Path(dest).with_name(f'.{Path(dest).name}.tmp')


def read_journal(folder: Path) -> dict[str, Any]:
    """The journal of a dataset in the making: about, count, size, state.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is no JSON.
    """
    return json.loads((folder / JOURNAL).read_text(encoding='utf-8'))


class DatasetWriter:
    """Takes files one after another, numbers them, and makes a zip or folder of them when it is told to finish.

    Until then all is in `.NAME.tmp` beside it, which no reader takes: the data, and from the first `checkpoint` on
    `journal.json`. An error, Ctrl-C or a kill leaves that folder where a checkpoint was made, for a writer with
    `resume` to go on from there; else it is removed. Equal files give equal bytes, stopped or not.

    Use it in a `with` statement.

    Args:
        dest: A name ending in `.zip`, replaced where it exists; any other name is a folder, which must be empty
            where it exists. Folders above it are made.
        about: All that the result depends on; a journal that says otherwise is not gone on with. Values that JSON
            can hold.
        resume: Go on from a journal, where there is one.
        overwrite: Forget a journal, where there is one.

    Attributes:
        state: What was given to the last checkpoint, {} at the beginning.
        folder: Where other files that belong to the work may be put until it is finished.

    Raises:
        UserError: where another process is at it, a journal is there and neither `resume` nor `overwrite` says what to
            do with it, or it is of other input or options.
        OSError: with the name of `dest`, where it cannot be written.
    """

    def __init__(
        self, dest: str | os.PathLike, about: Mapping[str, Any] | None = None, resume: bool = False,
        overwrite: bool = False,
    ):  # fmt: skip
        self.dest = Path(dest)
        self.folder = work_folder(dest)
        self._names: list[str] = []
        self.state: dict[str, Any] = {}
        self._about = json.loads(json.dumps(about or {}))
        self._zip: ZipWriter | None = None
        self._lock = -1
        make_folder(self.dest.parent)
        with self._errors_naming():
            self._take_folder()
        try:
            with self._errors_naming():
                journal = self._read_journal(resume, overwrite)
                self._open(journal)
        except BaseException:
            self._leave(keep=self._journal_path.exists())
            raise

    def __enter__(self) -> 'DatasetWriter':
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock < 0:
            return
        self._leave(keep=kind is not None and self._journal_path.exists())
        if isinstance(error, OSError) and self._is_ours(error):
            raise OSError(error.errno, error.strerror, os.fspath(self.dest)) from error

    @property
    def count(self) -> int:
        """Files written so far."""
        return len(self._names)

    def add(self, ending: str, data: bytes) -> None:
        """Write the next file: `00000/img00000000.png`, for instance."""
        name = f'{self.count // 1000:05d}/img{self.count:08d}{ending}'
        self._write(name, data)
        self._names.append(name)

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Flush to disk what was written; a later run may go on from here, and finds `state` again."""
        if self._zip:
            self._zip.sync()
        self.state = dict(state)
        size = self._zip.size if self._zip else 0
        write_json(self._journal_path, {'about': self._about, 'count': self.count, 'size': size, 'state': self.state})

    def finish(self, labels: Sequence[int] | None, made_with: Mapping[str, Any] | None = None) -> None:
        """Write `dataset.json` and put everything in its place.

        Args:
            labels: Class index of every file, None where they have no labels.
            made_with: How the dataset was made, for `ImageDataset.made_with`.
        """
        names = self._names
        assert labels is None or len(labels) == len(names), f'{len(labels)} labels for {len(names)} images'
        pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        content: dict[str, Any] = {'labels': pairs}
        if made_with:
            content[ABOUT_KEY] = dict(made_with)
        self._write(LABEL_FILE, json.dumps(content).encode())
        if self._zip:
            self._zip.finish()
            self._zip.close()
            with atomic_path(self.dest) as beside:
                self._data.replace(beside)
        else:
            self._data.rename(self.dest)  # takes the place of an empty folder, fails on any other
        self._leave(keep=False)

    @property
    def _data(self) -> Path:
        return self.folder / 'data'

    @property
    def _journal_path(self) -> Path:
        return self.folder / JOURNAL

    def _take_folder(self) -> None:
        """Make the folder, or take one that was left; no other process may be at it (where the file system tells)."""
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir()
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise UserError(f'{self.dest} is being written by another process') from None
        except OSError:  # network file systems that know no locks, or none of folders (NFS)
            pass

    def _read_journal(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """What to go on from, None to begin anew."""
        if not self._journal_path.exists():
            return None
        try:
            journal = read_journal(self.folder)
        except ValueError:
            journal = None
        if resume and journal is not None:
            self._refuse_differences(journal['about'])
            return journal
        if not overwrite:
            count = 'some' if journal is None else journal['count']
            raise UserError(
                f'{self.dest} was stopped after {count} images; add --resume to go on, or --overwrite to begin anew'
            )
        self._journal_path.unlink()
        return None

    def _refuse_differences(self, about: Mapping[str, Any]) -> None:
        names = sorted(name for name in {*about, *self._about} if about.get(name) != self._about.get(name))
        if names:
            raise UserError(
                f'{self.dest} was begun with other {" and ".join(names)}; --overwrite begins anew, '
                f'removing {self.folder} does too'
            )

    def _open(self, journal: dict[str, Any] | None) -> None:
        if journal is None:
            for path in self.folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            self.state = journal['state']
        count, size = (journal['count'], journal['size']) if journal else (0, 0)
        try:
            if is_zip_name(self.dest):
                self._zip = ZipWriter(self._data, size)
                self._names = self._zip.names()
            else:
                self._data.mkdir(exist_ok=True)
                self._names = self._kept_files(count)
            if len(self._names) != count:
                raise DamagedZipError(f'{count} images expected, {len(self._names)} are there')
        except DamagedZipError as error:
            raise UserError(f'{self.folder} cannot be gone on with: {error}; --overwrite begins anew') from None

    def _kept_files(self, count: int) -> list[str]:
        """The first `count` files of the folder; those after them, written since the journal was, are removed."""
        names = []
        for path in sorted(self._data.glob('*/*')):
            if int(path.name[3:11]) < count:
                names.append(f'{path.parent.name}/{path.name}')
            else:
                path.unlink()
        return names

    def _write(self, name: str, data: bytes) -> None:
        if self._zip:
            self._zip.add(name, data)
        else:
            path = self._data / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def _leave(self, keep: bool) -> None:
        if self._zip:
            with contextlib.suppress(OSError):
                self._zip.close()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    @contextlib.contextmanager
    def _errors_naming(self) -> Iterator[None]:
        """Give errors of writing, such as a full disk, the name that the user knows; those of reading have theirs."""
        try:
            yield
        except OSError as error:
            if self._is_ours(error):
                raise OSError(error.errno, error.strerror, os.fspath(self.dest)) from error
            raise

    def _is_ours(self, error: OSError) -> bool:
        return error.filename is None or f'.{self.dest.name}.' in str(error.filename)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, C] as a PNG file."""
    with io.BytesIO() as file:
        to_pil(image).save(file, format='png')
        return file.getvalue()


def encode_npy(array: np.ndarray) -> bytes:
    """An array as a NumPy file."""
    with io.BytesIO() as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
        return file.getvalue()


def write_dataset(
    dest: str | os.PathLike, images: Iterable[np.ndarray], labels: np.ndarray | None
) -> tuple[int, int, int, int]:
    """Write images as PNGs with `dataset.json`, as a folder or as an uncompressed zip, whole or not at all.

    Args:
        dest: As for `DatasetWriter`.
        images: uint8 [H, W, C] with one or three channels, all of one shape; consumed one by one, at least one.
        labels: Integers [N], one for each image, or None.

    Returns:
        Number of images and their shape: (N, H, W, C).

    Raises:
        OSError: with the name of `dest`, where it cannot be written.
    """
    with DatasetWriter(dest) as writer:
        for image in images:
            writer.add('.png', encode_png(image))
        writer.finish(labels)
        return writer.count, *image.shape
