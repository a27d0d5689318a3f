"""The dataset layout on disk: image files in a folder or a zip, and `dataset.json` with their labels.

A folder and a zip hold the same files:

    00000/img00000000.png
    00000/img00000001.png
    ...
    dataset.json             {"labels": [["00000/img00000000.png", 6], ...]}, or null for no labels
"""

import collections
import contextlib
import io
import json
import os
import secrets
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import PIL.Image

from dnnlib.errors import UserError
from dnnlib.files import atomic_path, make_folder
from dnnlib.images import to_pil

LABEL_FILE = 'dataset.json'
LABEL_EXAMPLE = '{"labels": [["00000/img00000000.png", 6], ...]}'
IMAGE_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.bmp': 'BMP'}
ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # the same for all files, so that equal content gives equal bytes


class Archive:
    """The files of a folder or a zip, readable from any process.

    Hidden files, and the `__MACOSX` folders that macOS puts into zips, do not count.

    Args:
        path: A folder (links inside it are followed) or a zip.

    Attributes:
        path: As given.
        sizes: Bytes of each file by name; names are relative, with `/`, in sorted order.

    Raises:
        UserError: where `path` does not exist, is not a zip, is a damaged zip, or its links form a loop.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._zip: zipfile.ZipFile | None = None
        self._zip_process = -1
        if not Path(self.path).exists():
            raise UserError(f'{self.path} does not exist')
        self._is_folder = Path(self.path).is_dir()
        files = list(_walk(self.path) if self._is_folder else self._zip_files())
        self.sizes = dict(sorted((name, size) for name, size in files if not _is_hidden(name)))
        repeated = [name for name, count in collections.Counter(name for name, _ in files).items() if count > 1]
        if repeated:
            raise UserError(f'{self.path} holds {len(repeated)} names more than once, for instance {repeated[0]}')

    def __getstate__(self) -> dict:
        """A spawned worker opens the zip for itself."""
        return {**self.__dict__, '_zip': None, '_zip_process': -1}

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f'{self.path}/{name}'

    def image_names(self) -> list[str]:
        """The files that are images by their extension, sorted.

        Raises:
            UserError: where there are none.
        """
        names = [name for name in self.sizes if PurePosixPath(name).suffix.lower() in IMAGE_FORMATS]
        if not names:
            raise UserError(f'{self.path} holds no images ({", ".join(IMAGE_FORMATS)})')
        return names

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            UserError: where it is damaged, encrypted or packed in a way that Python's zipfile does not know.
            OSError: with its name, where it cannot be read.
        """
        try:
            return Path(self.path, name).read_bytes() if self._is_folder else self._open_zip().read(name)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.where(name)) from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, unknown
            raise UserError(f'{self.where(name)} cannot be read from its zip: {error}') from None

    def read_image(self, name: str) -> PIL.Image.Image:
        """Decode an image file whole, without following its EXIF orientation.

        Raises:
            UserError: with the file's name, where it is damaged, not of a known format, or a decompression bomb.
        """
        data = self.read(name)
        with image_errors(self.where(name)):
            image = PIL.Image.open(io.BytesIO(data), formats=tuple(set(IMAGE_FORMATS.values())))
            image.load()
            return image

    def _zip_files(self) -> Iterator[tuple[str, int]]:
        return ((info.filename, info.file_size) for info in self._open_zip().infolist() if not info.is_dir())

    def _open_zip(self) -> zipfile.ZipFile:
        """This process's own handle: one inherited by a fork shares its position in the file with the parent."""
        if self._zip is None or self._zip_process != os.getpid():
            try:
                self._zip, self._zip_process = zipfile.ZipFile(self.path), os.getpid()
            except zipfile.BadZipFile as error:
                with open(self.path, 'rb') as file:
                    begins_well = file.read(2) == b'PK'
                what = f'is cut short or damaged: {error}' if begins_well else 'is neither a folder nor a zip'
                raise UserError(f'{self.path} {what}') from None
        return self._zip


def _walk(root: str, parents: tuple[str, ...] = (), prefix: str = '') -> Iterator[tuple[str, int]]:
    """Names and sizes of all files below a folder."""
    real = os.path.realpath(root)
    if real in parents:
        raise UserError(f'{root} is a link to a folder that it is in, a loop without end')
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, (*parents, real), f'{prefix}{entry.name}/')
            else:
                yield f'{prefix}{entry.name}', entry.stat().st_size


def _is_hidden(name: str) -> bool:
    return any(part.startswith('.') or part == '__MACOSX' for part in name.split('/'))


@contextlib.contextmanager
def image_errors(where: str) -> Iterator[None]:
    """Turn what Pillow raises about a broken file, and its warning of decompression bombs, into a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', PIL.Image.DecompressionBombWarning)
            yield
    except PIL.UnidentifiedImageError:
        known = ', '.join(sorted(set(IMAGE_FORMATS.values())))
        raise UserError(f'{where} is damaged or of another format than {known}') from None
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise UserError(f'{where} has too many pixels: {error}') from None
    except (OSError, SyntaxError, ValueError, LookupError, EOFError, struct.error, zlib.error) as error:
        raise UserError(f'{where} cannot be decoded: {error}') from None


def read_labels(archive: Archive, names: Sequence[str]) -> np.ndarray | None:
    """Class indices of the images `names`, int64 [N], as `dataset.json` gives them; None where it gives none.

    Raises:
        UserError: where `dataset.json` cannot be read, has a label that is not a class index, or does not name
            exactly these images.
    """
    if LABEL_FILE not in archive.sizes:
        return None
    where = archive.where(LABEL_FILE)
    try:
        content = json.loads(archive.read(LABEL_FILE))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON: {error}') from None
    pairs = content.get('labels') if isinstance(content, dict) else ()
    if pairs is None:
        return None
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise UserError(f'{where} does not say which image has which label; it should read like {LABEL_EXAMPLE}')
    labels = dict(pairs)
    problems = [f'{where} {problem}' for problem in _label_problems(pairs, labels, names)]
    if problems:
        raise UserError(problems)
    return np.array([labels[name] for name in names], np.int64)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _label_problems(pairs: list, labels: dict[str, object], names: Sequence[str]) -> Iterator[str]:
    known = set(names)
    # type(), because to isinstance True is an int
    wrong = [name for name, label in pairs if type(label) is not int or not 0 <= label < 2**31]
    if wrong:
        label = labels[wrong[0]]
        yield f'has {len(wrong)} labels that are not whole numbers from 0 up, for instance {label!r} of {wrong[0]}'
    if len(labels) < len(pairs):
        name = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        yield f'has more than one label for an image, for instance {name}'
    missing = [name for name in names if name not in labels]
    if missing:
        yield f'has no label for {len(missing)} of {len(names)} images, for instance {missing[0]}'
    extra = [name for name in labels if name not in known]
    if extra:
        yield f'has labels for {len(extra)} images that are not there, for instance {extra[0]}'


def write_dataset(
    dest: str | os.PathLike, images: Iterable[np.ndarray], labels: np.ndarray | None
) -> tuple[int, int, int, int]:
    """Write images as PNGs with `dataset.json`, as a folder or as an uncompressed zip, whole or not at all.

    Equal images and labels give equal bytes. Folders above `dest` are made where they are missing.

    Args:
        dest: A name ending in `.zip`, replaced where it exists; any other name is a folder, which must be empty
            where it exists.
        images: uint8 [H, W, C] with one or three channels, all of one shape; consumed one by one, at least one.
        labels: Integers [N], one for each image, or None.

    Returns:
        Number of images and their shape: (N, H, W, C).

    Raises:
        OSError: with the name of `dest`, where it cannot be written.
    """
    dest = Path(dest)
    make_folder(dest.parent)
    names = []
    with (_zip_writer if is_zip_name(dest) else _folder_writer)(dest) as write:
        for i, image in enumerate(images):
            names.append(f'{i // 1000:05d}/img{i:08d}.png')
            with io.BytesIO() as file:
                to_pil(image).save(file, format='png')
                write(names[-1], file.getvalue())
        assert labels is None or len(labels) == len(names), f'{len(labels)} labels for {len(names)} images'
        pairs = None if labels is None else [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        write(LABEL_FILE, json.dumps({'labels': pairs}).encode())
    return len(names), *image.shape


def shape_text(height: int, width: int, channels: int) -> str:
    """How messages write the shape of an image: `64x48 RGB`, width first."""
    return f'{width}x{height} {"grayscale" if channels == 1 else "RGB"}'


def is_zip_name(dest: str | os.PathLike) -> bool:
    """Whether output of that name is a zip rather than a folder."""
    return Path(dest).suffix.lower() == '.zip'


@contextlib.contextmanager
def _zip_writer(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    def write(name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, ZIP_TIME)
        info.create_system, info.external_attr = 3, 0o644 << 16  # Unix, on every platform
        archive.writestr(info, data)

    with _errors_naming(dest), atomic_path(dest) as beside, zipfile.ZipFile(beside, 'w') as archive:
        yield write


@contextlib.contextmanager
def _folder_writer(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    beside = dest.with_name(f'.{dest.name}.{secrets.token_hex(4)}.tmp')  # hidden, so no reader takes it

    def write(name: str, data: bytes) -> None:
        path = beside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    with _errors_naming(dest):
        try:
            beside.mkdir()
            yield write
            beside.rename(dest)  # takes the place of an empty folder, fails on any other
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def _errors_naming(dest: Path) -> Iterator[None]:
    """Give errors of writing, such as a full disk, the name that the user knows; those of reading have theirs."""
    try:
        yield
    except OSError as error:
        if error.filename is None or f'.{dest.name}.' in str(error.filename):
            raise OSError(error.errno, error.strerror, os.fspath(dest)) from error
        raise
