"""Sources that keep many images in one file: CIFAR-10, MNIST, tables of parquet or Arrow."""

import functools
import gzip
import io
import json
import lzma
import math
import os
import re
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dataset.files.archive import image_errors
from dataset.sources.source import InMemory, Source
from dnnlib.errors import UserError
from torch_utils.pickles import read_pickle

CIFAR10 = 'cifar-10-batches-py'
LONGEST_NAMES = 2**16  # bytes of all classes together
LARGEST_BATCH = 2**28  # bytes; those of CIFAR-10 have 31 MB
TABLE_ENDINGS = ('.parquet', '.arrow')
DAMAGES = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    struct.error,
)  # what gzip and tarfile raise of broken files


# --- CIFAR-10 ---


def open_cifar10(path: str) -> Source:
    """The 50000 training images of `cifar-10-python.tar.gz`: 32x32 RGB, 10 classes.

    Raises:
        UserError: where the file is damaged, or not that.
    """
    batches = _cifar10_members(path)
    try:
        for batch, meta in batches:  # before NumPy sees them: lists within lists could keep it busy forever
            _check_types([batch[b'data']], np.ndarray)
            _check_types(batch[b'labels'], int)
            _check_types(meta[b'label_names'], bytes)
            assert sum(map(len, meta[b'label_names'])) <= LONGEST_NAMES
        images = np.concatenate([batch[b'data'].astype(np.uint8, casting='safe') for batch, _ in batches])
        images = images.reshape(-1, 3, 32, 32)
        labels = np.concatenate([np.asarray(batch[b'labels'], np.int64) for batch, _ in batches])
        names = [name.decode() for name in meta[b'label_names']]
        assert len(images) == len(labels) > 0 and labels.min() >= 0 and labels.max() < len(names)
    except (KeyError, TypeError, ValueError, OverflowError, AssertionError):
        raise UserError(f'{path} does not hold CIFAR-10 as it should') from None
    return Source(
        name='cifar-10',
        names=[f'{path}:{i}' for i in range(len(images))],
        labels=labels,
        class_names=names,
        read=InMemory(np.ascontiguousarray(images.transpose(0, 2, 3, 1))),
        bytes_on_disk=Path(path).stat().st_size,
    )


def _check_types(values: Any, kind: type) -> None:
    """Make sure that values from a pickle are a list of one kind."""
    if type(values) is not list or any(type(value) is not kind for value in values):
        raise TypeError(f'no list of {kind.__name__}')


def _cifar10_members(path: str) -> list[tuple[dict, dict]]:
    """The training batches in order, each with batches.meta."""
    found: dict[str, Any] = {}
    try:
        with tarfile.open(path, 'r:*') as archive:
            for member in archive:
                base = member.name.removeprefix('./')
                if re.fullmatch(rf'{CIFAR10}/(data_batch_\d|batches\.meta)', base) and member.isfile():
                    if member.size > LARGEST_BATCH:  # a header may claim anything, and zeros compress well
                        raise UserError(f'{path}: {base} has {member.size} bytes; it does not belong there')
                    data = archive.extractfile(member).read()
                    found[base.split('/')[1]] = read_pickle(data, where=f'{path}/{base}')
            while archive.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
    except DAMAGES as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise UserError(f'{path} is cut short or damaged: {error}') from None
    meta = found.pop('batches.meta', None)
    if meta is None or not found:
        raise UserError(f'{path} does not hold {CIFAR10}/data_batch_1, ... and {CIFAR10}/batches.meta')
    return [(found[name], meta) for name in sorted(found)]


# --- MNIST ---


def is_idx(path: str) -> bool:
    """Whether a name is that of images in MNIST's format."""
    return re.search(r'images[-.]idx3-ubyte(\.gz)?$', path) is not None


def open_idx(path: str) -> Source:
    """The images of `train-images-idx3-ubyte.gz`, with the labels of `train-labels-idx1-ubyte.gz` beside it.

    Raises:
        UserError: where one of the two is damaged or missing, or they do not belong together.
    """
    label_path = Path(path).with_name(
        Path(path).name.replace('images-idx3', 'labels-idx1').replace('images.idx3', 'labels.idx1')
    )
    if not label_path.exists():
        raise UserError(f'the labels of {path} are missing: {label_path} does not exist')
    images, labels = _read_idx(path, 3), _read_idx(str(label_path), 1)
    if len(images) != len(labels) or not images.size:
        raise UserError(f'{path} has {len(images)} images, {label_path} {len(labels)} labels')
    return Source(
        name=Path(path).name.split('.')[0].removesuffix('-images-idx3-ubyte'),
        names=[f'{path}:{i}' for i in range(len(images))],
        labels=labels.astype(np.int64),
        class_names=None,
        read=InMemory(images),
        bytes_on_disk=Path(path).stat().st_size + label_path.stat().st_size,
    )


def _read_idx(path: str, dimensions: int) -> np.ndarray:
    """An array of bytes: 0, 0, type 8, number of dimensions, each as big-endian 32 bits, then the content."""
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
            data = file.read()
        head = struct.unpack_from(f'>4B{dimensions}I', data)
    except DAMAGES as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise UserError(f'{path} is cut short or damaged: {error}') from None
    shape = head[4:]
    if head[:4] != (0, 0, 8, dimensions):
        raise UserError(f'{path} is no file of bytes in {dimensions} dimensions, as MNIST has them')
    start = 4 + 4 * dimensions
    if len(data) - start != math.prod(shape):
        raise UserError(f'{path} is cut short or damaged: it has {len(data) - start} bytes for {list(shape)}')
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# --- Parquet and Arrow ---


@dataclass(frozen=True)
class TableImages:
    """Reads images from tables; a process keeps the part of a table that it read last.

    Attributes:
        files: Tables, in order.
        column: Where the images are.
        starts: First image of every part (row group, record batch), ascending.
        parts: (index of the file, index of the part in it) of each.
    """

    files: tuple[str, ...]
    column: str
    starts: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]

    def file(self, index: int) -> bytes:
        """The image's file, as it lies in the table."""
        part = int(np.searchsorted(self.starts, index, side='right')) - 1
        which, group = self.parts[part]
        try:
            cell = _table_part(self.files[which], group, self.column)[index - self.starts[part]].as_py()
        except (_pyarrow().ArrowException, OSError) as error:
            raise _damaged_table(self.files[which], error) from None
        data = cell.get('bytes') if isinstance(cell, dict) else cell
        if not data:
            raise UserError(f'{self.files[which]}:{index} has no image')
        return data

    def __call__(self, index: int) -> PIL.Image.Image:
        part = int(np.searchsorted(self.starts, index, side='right')) - 1
        return load_image(self.file(index), f'{self.files[self.parts[part][0]]}:{index}')


@functools.lru_cache(maxsize=2)
def _table_part(path: str, group: int, column: str) -> Any:
    if path.endswith('.parquet'):
        return _pyarrow('parquet').ParquetFile(path).read_row_group(group, columns=[column]).column(0)
    return _open_arrow(path)[group].column(column)


@functools.lru_cache(maxsize=64)
def _open_arrow(path: str) -> list:
    """The record batches of an Arrow file, in either of its two formats; they are mapped, not read."""
    arrow, ipc = _pyarrow(), _pyarrow('ipc')
    source = arrow.memory_map(path)
    try:
        reader = ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except arrow.ArrowInvalid:
        source.seek(0)
        return list(ipc.open_stream(source))


def _pyarrow(module: str = '') -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet and Arrow need pyarrow: install this project's extra `parquet`") from None
    return getattr(pyarrow, module) if module else pyarrow


def table_files(path: str) -> list[str]:
    """The tables in a folder without images, in order: those of the training split where names tell splits apart."""
    if path.endswith(TABLE_ENDINGS):
        return [path]
    files = []
    for folder, _, names in os.walk(path):
        if any(os.path.splitext(name)[1].lower() in source_formats() for name in names):  # noqa: PTH122 (a million)
            return []
        files += [os.path.join(folder, name) for name in names if name.endswith(TABLE_ENDINGS)]  # noqa: PTH118
    return sorted(file for file in files if re.search(r'(^|[-_./])train', file[len(path) :])) or sorted(files)


def open_tables(path: str) -> Source:
    """Images of parquet or Arrow files as the Hugging Face hub has them: a column of images, one of class indices.

    Raises:
        UserError: where pyarrow is missing, or the tables are damaged or have no such columns.
    """
    files = table_files(path)
    arrow = _pyarrow()
    starts, parts, labels, count, column, names = [], [], [], 0, None, None
    for i, file in enumerate(files):
        try:
            named, lengths, classes, here = _read_columns(file)
        except (arrow.ArrowException, OSError) as error:
            raise _damaged_table(file, error) from None
        if here != (column or here):
            raise UserError(f'{file} has its images in {here!r}, but {files[0]} in {column!r}')
        column, names = here, names or named
        for group, length in enumerate(lengths):
            starts.append(count)
            parts.append((i, group))
            count += length
        labels.append(classes)
    if not count:
        raise UserError(f'{path} holds no images')
    if any(part is None for part in labels) and any(part is not None for part in labels):
        raise UserError(f'{path}: some tables have labels, others none')
    labels = None if labels[0] is None else np.concatenate(labels)
    if labels is not None and names and labels.max() >= len(names):
        raise UserError(f'{path} has labels up to {labels.max()}, but names for {len(names)} classes')
    images = TableImages(tuple(files), column, tuple(starts), tuple(parts))
    return Source(
        name=Path(path).resolve().name,
        names=[f'{files[which]}:{i}' for (which, _), start, end in zip(parts, starts, [*starts[1:], count], strict=True)
               for i in range(start, end)],
        labels=labels,
        class_names=names,
        read=images,
        bytes_on_disk=sum(Path(file).stat().st_size for file in files),
        file=images.file,
    )  # fmt: skip


def _damaged_table(file: str, error: Exception) -> Exception:
    """What to say of a table that cannot be read; pyarrow's errors of damage are OSErrors without a number."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno), file)
    return UserError(f'{file} is cut short or damaged: {error}'.splitlines()[0])


def _read_columns(file: str) -> tuple[list[str] | None, list[int], np.ndarray | None, str]:
    """Names of the classes, rows of each part, class indices and name of the image column of a table."""
    arrow = _pyarrow()
    if file.endswith('.parquet'):
        table = _pyarrow('parquet').ParquetFile(file)
        schema, lengths = (
            table.schema_arrow,
            [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)],
        )
    else:
        batches = _open_arrow(file)
        if not batches:
            raise UserError(f'{file} holds no images')
        schema, lengths = batches[0].schema, [batch.num_rows for batch in batches]
    binary = (arrow.types.is_binary, arrow.types.is_large_binary)
    images = [
        field.name for field in schema
        if any(test(field.type) for test in binary)
        or (arrow.types.is_struct(field.type) and field.type.get_field_index('bytes') >= 0)
    ]  # fmt: skip
    whole = [field.name for field in schema if arrow.types.is_integer(field.type)]
    chosen = [name for name in ('label', 'labels') if name in whole] or whole
    if len(images) != 1 or (len(whole) > 1 and chosen == whole):
        raise UserError(f'{file} has the columns {", ".join(schema.names)}; one of images and a `label` are needed')
    if not chosen:
        return None, lengths, None, images[0]
    if file.endswith('.parquet'):
        column = table.read(columns=[chosen[0]]).column(0)
    else:
        column = arrow.chunked_array([batch.column(chosen[0]) for batch in batches])
    classes = np.array(column.to_pylist(), dtype=object)
    if any(type(label) is not int or label < 0 for label in classes):
        raise UserError(f'{file} has labels in `{chosen[0]}` that are not whole numbers from 0 up')
    return _class_names(schema, chosen[0]), lengths, classes.astype(np.int64), images[0]


def _class_names(schema: Any, column: str) -> list[str] | None:
    """Names of the classes in a column, where the `datasets` library has noted them."""
    try:
        features = json.loads(schema.metadata[b'huggingface'])['info']['features']
        return [str(name) for name in features[column]['names']]
    except (TypeError, KeyError, ValueError):
        return None


# --- One image of any format ---

# Never opened: those that run other programs, and those that Pillow knows by name only.
NOT_IMAGES = frozenset({'EPS', 'PDF', 'WMF', 'MPEG', 'BUFR', 'GRIB', 'HDF5'})


@functools.cache
def source_formats() -> dict[str, str]:
    """Endings of image files and the formats they stand for: all that Pillow reads."""
    PIL.Image.init()
    return {
        ending: name for ending, name in PIL.Image.registered_extensions().items()
        if name in PIL.Image.OPEN and name not in NOT_IMAGES
    }  # fmt: skip


def load_image(data: bytes, where: str) -> PIL.Image.Image:
    """Decode an image file whole; of several pictures in it, the first.

    Raises:
        UserError: naming it as `where`, where it is damaged, of an unknown format, a decompression bomb, or of floats,
            the scale of which nothing says.
    """
    formats = sorted(set(source_formats().values()))
    with image_errors(where, formats):
        image = PIL.Image.open(io.BytesIO(data), formats=formats)
        image.load()
    if image.mode == 'F':
        raise UserError(f'{where} has pixels of mode F; convert it to 8-bit grayscale or RGB first')
    return image
