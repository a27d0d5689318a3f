"""Tables of images: parquet and Arrow, as the Hugging Face hub keeps them."""

import bisect
import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from dataset.sources.image_files import load_image, source_formats
from dataset.sources.source import Source
from dnnlib.errors import UserError

TABLE_ENDINGS = ('.parquet', '.arrow')


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

    def _place(self, index: int) -> tuple[str, int, int]:
        """File, index of the part in it, and row in the part of an image."""
        part = bisect.bisect_right(self.starts, index) - 1
        which, group = self.parts[part]
        return self.files[which], group, index - self.starts[part]

    def file(self, index: int) -> bytes:
        """The image's file, as it lies in the table."""
        path, group, row = self._place(index)
        try:
            cell = _table_part(path, group, self.column)[row].as_py()
        except (_pyarrow().ArrowException, OSError) as error:
            raise _damaged_table(path, error) from None
        data = cell.get('bytes') if isinstance(cell, dict) else cell
        if not data:
            raise UserError(f'{path}:{index} has no image')
        return data

    def __call__(self, index: int) -> PIL.Image.Image:
        return load_image(self.file(index), f'{self._place(index)[0]}:{index}')


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
    """Images of parquet or Arrow files as the Hugging Face hub has them: a column of images, one of class indices."""
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
    if len({part is None for part in labels}) > 1:
        raise UserError(f'{path}: some tables have labels, others none')
    labels = None if labels[0] is None else np.concatenate(labels)
    if labels is not None and names and labels.max() >= len(names):
        raise UserError(f'{path} has labels up to {labels.max()}, but names for {len(names)} classes')
    images = TableImages(tuple(files), column, tuple(starts), tuple(parts))
    ends = [*starts[1:], count]
    return Source(
        name=Path(path).resolve().name,
        names=[f'{files[which]}:{i}' for (which, _), *of in zip(parts, starts, ends, strict=True) for i in range(*of)],
        labels=labels,
        class_names=names,
        read=images,
        bytes_on_disk=sum(Path(file).stat().st_size for file in files),
        file=images.file,
    )


def _damaged_table(file: str, error: Exception) -> Exception:
    """The error for a table that cannot be read; pyarrow's errors of damage are OSErrors without a number."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, os.strerror(error.errno), file)
    return UserError(f'{file} is cut short or damaged: {error}'.splitlines()[0])


def _read_columns(file: str) -> tuple[list[str] | None, list[int], np.ndarray | None, str]:
    """Names of the classes, rows of each part, class indices and name of the image column of a table."""
    arrow = _pyarrow()
    if file.endswith('.parquet'):
        table = _pyarrow('parquet').ParquetFile(file)
        schema, groups = table.schema_arrow, range(table.num_row_groups)
        lengths = [table.metadata.row_group(i).num_rows for i in groups]
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
