"""The dataset layout on disk: image files in a folder or a zip, and `dataset.json` with their labels (labels.py).

A folder and a zip hold the same files:

    00000/img00000000.png
    00000/img00000001.png
    ...
    dataset.json
"""

import contextlib
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from dataset.files.file_table import FileTable, list_folder, list_zip
from dataset.files.zip_format import DamagedZipError, check_name, read_member
from dnnlib.errors import UserError, printable
from dnnlib.files import read_regular

IMAGE_FORMATS = {'.png': 'PNG', '.jpg': 'JPEG', '.jpeg': 'JPEG', '.webp': 'WEBP', '.bmp': 'BMP'}
FORMATS = tuple(sorted(set(IMAGE_FORMATS.values())))
NPY = '.npy'
ENDINGS = frozenset({*IMAGE_FORMATS, NPY})
MODE_CHANNELS = {'L': 1, 'RGB': 3}  # Pillow's names of 8-bit grayscale and colour
LATENT_CHANNELS = 8  # four of mean, four of standard deviation
CHANNEL_NAMES = {1: 'grayscale', 3: 'RGB', LATENT_CHANNELS: 'latents'}
LARGEST_FILE = 2**28  # bytes, unpacked, of an image; as many as Pillow's limit on pixels allows
LARGEST_LATENT = 1e4  # those of photographs stay below 100


class Archive:
    """The files of a folder or a zip, readable from any process.

    Hidden files, and the `__MACOSX` folders that macOS puts into zips, are left out.

    Args:
        path: A folder (links inside it are followed) or a zip.
        files: Those that are to be read, where they are known already.

    Attributes:
        path: As given.
        files: All of them, sorted by name.
        folders: Below a folder, where it was looked into, '' and names that end in `/`; and their times, see
            `list_folder`.
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
        """What messages call a file."""
        return f'{self.path}/{printable(name)}'

    def rows_ending(self, endings: Container[str]) -> list[int]:
        """Rows in `files` of images: those whose names have one of these endings, in lower case; at least one."""
        rows = []
        for row, name in enumerate(self.files.names):
            if os.path.splitext(name)[1].lower() in endings:  # noqa: PTH122
                rows.append(row)
            elif not self._is_folder:  # a damaged name may have hidden an image, or its labels
                with self._errors(row):
                    check_name(self._descriptor(), name, int(self.files.offsets[row]))
        if not rows:
            raise UserError(f'{self.path} holds no images ({", ".join(sorted(endings))})')
        return rows

    def read(self, row: int, most: int = LARGEST_FILE) -> bytes:
        """The content of the file in that row of `files`; one of more than `most` bytes, unpacked, is refused."""
        with self._errors(row):
            if self._is_folder:
                return read_regular(Path(self.path, self.files.names[row]), most)
            return self._read_member(row, most)

    @contextlib.contextmanager
    def _errors(self, row: int) -> Iterator[None]:
        where = self.where(self.files.names[row])
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, where) from None
        except DamagedZipError as error:
            raise UserError(f'{where} cannot be read from its zip: {error}') from None

    def read_pixels(self, row: int) -> np.ndarray:
        """Decode an image file of a data set.

        Returns:
            uint8 [C, H, W] with one or three channels, or, of latents, float32 [8, H, W]: mean and standard deviation.
        """
        name = self.files.names[row]
        data, where = self.read(row), self.where(name)
        return decode_npy(data, where) if name.lower().endswith(NPY) else decode_image(data, where)

    def _read_member(self, row: int, most: int) -> bytes:
        table = self.files
        if table.sizes[row] > most:
            raise DamagedZipError(f'it unpacks to {table.sizes[row]} bytes, more than the {most} that are read')
        columns = (table.offsets, table.packed, table.sizes, table.crcs, table.methods)
        return read_member(self._descriptor(), table.names[row], *(int(column[row]) for column in columns))

    def _descriptor(self) -> int:
        if self._file < 0:  # a fork inherits it, which does no harm: reading by place has no position to share
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, 'O_CLOEXEC', 0))
        return self._file


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decode an image file to uint8 [C, H, W] in memory of its own, without following its EXIF orientation."""
    with image_errors(where), PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
    if image.mode not in MODE_CHANNELS:
        raise UserError(f'{where} is of mode {image.mode}, not 8-bit L or RGB; see dataset_tool.py convert')
    pixels = np.asarray(image).reshape(image.height, image.width, MODE_CHANNELS[image.mode])
    return pixels.transpose(2, 0, 1).copy(order='C')


def decode_npy(data: bytes, where: str) -> np.ndarray:
    """Decode a NumPy file to uint8 [C, H, W], C 1 or 3, or latents, float32 [8, H, W]; nothing is unpickled."""
    file = io.BytesIO(data)
    try:
        oldest = np.lib.format.read_magic(file) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if oldest else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # NumPy lets through whatever Python's parser and tokenizer raise
        raise UserError(f'{where} cannot be decoded: {printable(error)}') from None
    kinds = (('u1', 3, 1), ('u1', 3, 3), ('f4', 3, LATENT_CHANNELS))
    if (dtype.str[1:], len(shape), *shape[:1]) not in kinds or 0 in shape:
        raise UserError(
            f'{where} is {dtype} {printable(list(shape))}; uint8 [1 or 3, H, W] are images, '
            f'float32 [{LATENT_CHANNELS}, H, W] latents (mean, standard deviation)'
        )
    have, needed = len(data) - file.tell(), math.prod(shape) * dtype.itemsize
    if have != needed:
        raise UserError(f'{where} cannot be decoded: it has {have} bytes for {dtype} {printable(list(shape))}')
    flat = np.frombuffer(data, dtype, offset=file.tell())
    array = np.array(flat.reshape(shape, order='F' if fortran else 'C'), dtype.newbyteorder('='), order='C')
    if encoder_of(array) != 'rgb' and not np.abs(array).max() < LARGEST_LATENT:  # also where it is NaN
        raise UserError(f'{where} holds latents that are not finite, or beyond {LARGEST_LATENT:g}')
    return array


def encoder_of(array: np.ndarray) -> str:
    """Name of the encoder (networks/encoders.py) whose output is stored: float32 are latents, uint8 images."""
    return 'stabilityvae' if array.dtype == np.float32 else 'rgb'


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


def shape_text(height: int, width: int, channels: int) -> str:
    """How messages write the shape of an image: `64x48 RGB`, width first."""
    return f'{width}x{height} {CHANNEL_NAMES[channels]}'


def is_zip_name(dest: str | os.PathLike) -> bool:
    """Whether output of that name is a zip rather than a folder."""
    return Path(dest).suffix.lower() == '.zip'
