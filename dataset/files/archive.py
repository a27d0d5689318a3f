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
import struct
import warnings
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dataset.files.file_table import FileTable, list_folder, list_zip
from dataset.files.zip_format import DamagedZipError, read_member
from dnnlib.errors import UserError

LABEL_FILE = 'dataset.json'
LABEL_EXAMPLE = '{"labels": [["00000/img00000000.png", 6], ...]}'
ABOUT_KEY = 'edm2plus'  # in dataset.json: how the data set was made; other readers pass over it
IMAGE_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.bmp': 'BMP'}
FORMATS = tuple(sorted(set(IMAGE_FORMATS.values())))
NPY = '.npy'
ENDINGS = frozenset({*IMAGE_FORMATS, NPY})
MODE_CHANNELS = {'L': 1, 'RGB': 3}  # Pillow's names of 8-bit grayscale and colour
LATENT_CHANNELS = 8  # four of mean, four of standard deviation
CHANNEL_NAMES = {1: 'grayscale', 3: 'RGB', LATENT_CHANNELS: 'latents'}


class Archive:
    """The files of a folder or a zip, readable from any process.

    Hidden files, and the `__MACOSX` folders that macOS puts into zips, do not count.

    Args:
        path: A folder (links inside it are followed) or a zip.
        files: Those that shall be read, where they are known already.

    Attributes:
        path: As given.
        files: All of them, sorted by name.
        folders: Below a folder, where it was looked into, '' and names that end in `/`; and their times, see
            `list_folder`.

    Raises:
        UserError: where `path` does not exist, is not a zip, is a damaged zip, or its links form a loop.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike, files: FileTable | None = None):
        self.path = os.fspath(path)
        self.folders: dict[str, int] = {}
        self._file = -1
        if not Path(self.path).exists():
            raise UserError(f'{self.path} does not exist')
        self._is_folder = Path(self.path).is_dir()
        if files is not None:
            self.files = files
        elif self._is_folder:
            self.files, self.folders = list_folder(self.path)
        else:
            self.files = list_zip(self.path)

    def __getstate__(self) -> dict:
        """A spawned worker opens the zip for itself."""
        return {**self.__dict__, '_file': -1}

    def __del__(self):
        if getattr(self, '_file', -1) >= 0:
            os.close(self._file)

    def where(self, name: str) -> str:
        """How messages call a file."""
        return f'{self.path}/{name}'

    def rows_ending(self, endings: Container[str], what: str = 'images') -> list[int]:
        """Rows in `files` of those whose names have one of these endings, in lower case.

        Raises:
            UserError: where there are none.
        """
        rows = [row for row, name in enumerate(self.files.names) if os.path.splitext(name)[1].lower() in endings]  # noqa: PTH122
        if not rows:
            raise UserError(f'{self.path} holds no {what} ({", ".join(sorted(endings))})')
        return rows

    def read(self, row: int) -> bytes:
        """The content of the file in that row of `files`.

        Raises:
            UserError: where it is damaged, encrypted or packed in a way that is not known here.
            OSError: with its name, where it cannot be read.
        """
        name = self.files.names[row]
        try:
            return Path(self.path, name).read_bytes() if self._is_folder else self._read_member(row)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.where(name)) from None
        except DamagedZipError as error:
            raise UserError(f'{self.where(name)} cannot be read from its zip: {error}') from None

    def read_pixels(self, row: int) -> np.ndarray:
        """Decode an image file of a data set.

        Returns:
            uint8 [C, H, W] with one or three channels, or, of latents, float32 [8, H, W]: mean and standard deviation.

        Raises:
            UserError: with the file's name, where it is damaged, or not such an image.
        """
        name = self.files.names[row]
        data, where = self.read(row), self.where(name)
        return decode_npy(data, where) if name.lower().endswith(NPY) else decode_image(data, where)

    def _read_member(self, row: int) -> bytes:
        if self._file < 0:  # a fork inherits it, which does no harm: reading by place has no position to share
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0))
        table = self.files
        columns = (table.offsets, table.packed, table.sizes, table.crcs, table.methods)
        return read_member(self._file, *(int(column[row]) for column in columns))


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decode an image file to uint8 [C, H, W] in memory of its own, without following its EXIF orientation.

    Raises:
        UserError: naming it as `where`, where it is damaged or not 8-bit grayscale or RGB.
    """
    with image_errors(where), PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
    if image.mode not in MODE_CHANNELS:
        raise UserError(f'{where} is of mode {image.mode}, not 8-bit L or RGB; see dataset_tool.py convert')
    pixels = np.asarray(image).reshape(image.height, image.width, MODE_CHANNELS[image.mode])
    return pixels.transpose(2, 0, 1).copy(order='C')


def decode_npy(data: bytes, where: str) -> np.ndarray:
    """Decode a NumPy file to uint8 [C, H, W], C 1 or 3, or float32 [8, H, W]; nothing is unpickled.

    Raises:
        UserError: naming it as `where`, where it is damaged, of Python objects, or of another shape or type.
    """
    try:
        with io.BytesIO(data) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            rest = len(file.read(1))
    except (ValueError, EOFError, SyntaxError, TypeError, OverflowError, MemoryError) as error:
        raise UserError(f'{where} cannot be decoded: {str(error).splitlines()[0]}') from None
    kind = (array.dtype.str[1:], array.shape[0]) if array.ndim == 3 and array.size else None
    if kind not in (('u1', 1), ('u1', 3), ('f4', LATENT_CHANNELS)) or rest:
        raise UserError(
            f'{where} is {array.dtype} {list(array.shape)}; uint8 [1 or 3, H, W] are images, '
            f'float32 [{LATENT_CHANNELS}, H, W] latents (mean, standard deviation)'
        )
    return np.ascontiguousarray(array, array.dtype.newbyteorder('='))


@contextlib.contextmanager
def image_errors(where: str, formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Turn what Pillow raises about a broken file, and its warning of decompression bombs, into a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', PIL.Image.DecompressionBombWarning)
            yield
    except PIL.UnidentifiedImageError:
        raise UserError(f'{where} is damaged or of another format than {", ".join(formats)}') from None
    except (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError) as error:
        raise UserError(f'{where} has too many pixels: {error}') from None
    except (OSError, SyntaxError, ValueError, LookupError, EOFError, RuntimeError, struct.error, zlib.error) as error:
        raise UserError(f'{where} cannot be decoded: {error}') from None


def read_label_file(archive: Archive, names: Sequence[str]) -> tuple[np.ndarray | None, dict[str, Any]]:
    """What `dataset.json` says of the images `names`.

    Returns:
        Class indices, int64 [N], or None where it gives none; and how the data set was made, {} where that is not said.

    Raises:
        UserError: where `dataset.json` cannot be read, has a label that is not a class index, or does not name
            exactly these images.
    """
    row = archive.files.find(LABEL_FILE)
    if row is None:
        return None, {}
    where = archive.where(LABEL_FILE)
    try:
        content = json.loads(archive.read(row))
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON: {error}') from None
    pairs = content.get('labels') if isinstance(content, dict) else ()
    about = content.get(ABOUT_KEY) if isinstance(content, dict) else None
    about = about if isinstance(about, dict) else {}
    if pairs is None:
        return None, about
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise UserError(f'{where} does not say which image has which label; it should read like {LABEL_EXAMPLE}')
    labels = dict(pairs)
    problems = [f'{where} {problem}' for problem in _label_problems(pairs, labels, names)]
    if problems:
        raise UserError(problems)
    return np.fromiter((labels[name] for name in names), np.int64, len(names)), about


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


def shape_text(height: int, width: int, channels: int) -> str:
    """How messages write the shape of an image: `64x48 RGB`, width first."""
    return f'{width}x{height} {CHANNEL_NAMES[channels]}'


def is_zip_name(dest: str | os.PathLike) -> bool:
    """Whether output of that name is a zip rather than a folder."""
    return Path(dest).suffix.lower() == '.zip'
