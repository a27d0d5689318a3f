"""Writing a dataset: whole or not at all, and continued where it was stopped."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.files.archive import is_zip_name
from dataset.files.labels import CLASSES_KEY, LABEL_FILE, NOTE_KEY
from dataset.files.zip_format import DamagedZipError, ZipWriter
from dnnlib.errors import UserError
from dnnlib.files import atomic_path, locked_folder, make_folder, read_object, write_json
from dnnlib.images import to_pil

JOURNAL = 'journal.json'


def work_folder(dest: str | os.PathLike) -> Path:
    """Where a dataset is while it is being made."""
    return Path(dest).with_name(f'.{Path(dest).name}.tmp')


def read_journal(folder: Path) -> dict[str, Any]:
    """The journal of a dataset that is being made: about, count, size, state; ValueError where it is damaged."""
    return read_object(folder / JOURNAL)


class DatasetWriter(contextlib.AbstractContextManager):
    """Takes files one after another, numbers them, and makes a zip or folder of them when it is told to finish.

    Until then all is in `.NAME.tmp` beside it, which no reader takes: the data, and from the first `checkpoint` on
    `journal.json`. After an error, Ctrl-C or a kill, that folder stays where a checkpoint was made, for a writer with
    `resume` to continue; else it is removed. Equal files give equal bytes, interrupted or not.

    Args:
        dest: A name ending in `.zip`, replaced where it exists; any other name is a folder, which must be empty
            where it exists. Folders above it are made.
        about: All that the result depends on, as JSON has it; where a journal says otherwise, it is refused.
        resume: Continue where there is a journal.
        overwrite: Ignore a journal.

    Attributes:
        state: What was given to the last checkpoint, {} at the beginning.
        folder: Where other files that belong to the work may be put until it is finished.
    """

    def __init__(
        self, dest: str | os.PathLike, about: Mapping[str, Any] | None = None, resume: bool = False,
        overwrite: bool = False,
    ):  # fmt: skip
        self.dest = Path(dest)
        self.folder = work_folder(dest)
        self.state: dict[str, Any] = {}
        self._names: list[str] = []
        self._about = json.loads(json.dumps(about or {}))
        self._data, self._journal_path = self.folder / 'data', self.folder / JOURNAL
        self._zip: ZipWriter | None = None
        self._finished = False
        self._work = self._working(resume, overwrite)

    def __enter__(self) -> 'DatasetWriter':
        self._work.__enter__()
        return self

    def __exit__(self, *details: Any) -> bool | None:
        return self._work.__exit__(*details)

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
        """Flush to disk what was written; a later run can continue from here, and finds `state` again."""
        if self._zip:
            self._zip.sync()
        self.state = dict(state)
        size = self._zip.size if self._zip else 0
        write_json(self._journal_path, {'about': self._about, 'count': self.count, 'size': size, 'state': self.state})

    def finish(
        self, labels: Sequence[int] | None, made_with: Mapping[str, Any] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Write `dataset.json` and put everything in its place.

        Args:
            labels: Class index of every file, None where they have no labels.
            made_with: How the dataset was made, for `ImageDataset.made_with`.
            class_names: Of all classes, where they have names.
        """
        names = self._names
        assert labels is None or len(labels) == len(names), f'{len(labels)} labels for {len(names)} images'
        pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        named = {CLASSES_KEY: list(class_names)} if class_names and labels is not None else {}
        note = {NOTE_KEY: dict(made_with)} if made_with else {}
        self._write(LABEL_FILE, json.dumps({'labels': pairs, **named, **note}).encode())
        if self._zip:
            self._zip.finish()
            with atomic_path(self.dest) as beside:
                self._data.replace(beside)
        else:
            self._data.rename(self.dest)  # takes the place of an empty folder, fails on any other
        self._finished = True

    @contextlib.contextmanager
    def _working(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Hold the work folder, which no other process may use at the same time."""
        make_folder(self.dest.parent)
        with self._errors_named():
            self.folder.mkdir(exist_ok=True)
            with locked_folder(self.folder):
                try:
                    self._open(self._accepted_journal(resume, overwrite))
                    yield
                finally:
                    if self._zip:
                        with contextlib.suppress(OSError):
                            self._zip.close()
                    if self._finished or not self._journal_path.exists():
                        shutil.rmtree(self.folder, ignore_errors=True)

    def _accepted_journal(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """What to continue from, None to start over."""
        if not self._journal_path.exists():
            return None
        try:
            journal = read_journal(self.folder)
        except ValueError:
            journal = None
        if resume and journal is not None:
            about = journal['about']
            other = sorted(name for name in {*about, *self._about} if about.get(name) != self._about.get(name))
            if other:
                raise UserError(
                    f'{self.dest} was started with other {" and ".join(other)}; --overwrite starts over, '
                    f'as does removing {self.folder}'
                )
            return journal
        if not overwrite:
            count = 'some' if journal is None else journal['count']
            raise UserError(
                f'{self.dest} was stopped after {count} images; add --resume to continue, or --overwrite to start over'
            )
        self._journal_path.unlink()
        return None

    def _open(self, journal: dict[str, Any] | None) -> None:
        if journal is None:
            journal = {'count': 0, 'size': 0, 'state': {}}
            for path in self.folder.glob('[!.]*'):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        count, self.state = journal['count'], journal['state']
        try:
            if is_zip_name(self.dest):
                self._zip = ZipWriter(self._data, journal['size'])
                self._names = self._zip.names()
            else:
                self._data.mkdir(exist_ok=True)
                self._names = self._kept_files(count)
            if len(self._names) != count:
                raise DamagedZipError(f'{count} images expected, found {len(self._names)}')
        except DamagedZipError as error:
            raise UserError(f'{self.folder} cannot be continued: {error}; --overwrite starts over') from None

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

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Give errors of writing, such as a full disk, the name that the user knows; those of reading have theirs."""
        try:
            yield
        except OSError as error:
            if error.errno and (error.filename is None or f'.{self.dest.name}.' in str(error.filename)):
                raise OSError(error.errno, error.strerror, os.fspath(self.dest)) from error
            raise


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
