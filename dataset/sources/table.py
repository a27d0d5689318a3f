"""Where the images of a dataset come from: embedded sets by name, or the user's files."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from dataset.files.archive import NPY, Archive, decode_npy, encoder_of
from dataset.files.labels import LABEL_FILE, Labels, read_labels
from dataset.sources.cifar10 import open_cifar10
from dataset.sources.embedded import HELD_OUT, open_digits, open_mnist5k, open_photos
from dataset.sources.image_files import load_image, source_formats
from dataset.sources.mnist import is_idx, open_idx
from dataset.sources.source import Source
from dataset.sources.tables import open_tables, table_files
from dnnlib.errors import UserError, printable, unknown_choice

IMAGENET = 'ILSVRC/Data/CLS-LOC/train'


def open_source(source: str) -> Source:
    """Open an embedded source by its name, or a path as the first kind of files in SOURCES that takes it."""
    if source in EMBEDDED:
        return EMBEDDED[source](source)
    if not source or not Path(source).exists():  # Path('') is the current folder
        problem = unknown_choice('source', source, EMBEDDED)
        raise UserError(f'--source={printable(source)} is neither a file nor a folder; {problem}')
    return next(open_kind for takes, open_kind in SOURCES.values() if takes(source))(source)


def _read(archive: Archive, rows: list[int], index: int) -> PIL.Image.Image:
    """An image of a folder or a zip."""
    where = archive.where(archive.files.names[rows[index]])
    data = archive.read(rows[index])
    if not where.lower().endswith(NPY):
        return load_image(data, where)
    pixels = decode_npy(data, where)
    if encoder_of(pixels) != 'rgb':
        raise UserError(f'{where} holds latents; only images can be converted')
    return PIL.Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _file(archive: Archive, rows: list[int], index: int) -> bytes:
    return archive.read(rows[index])


def _archive(path: str, color: str = 'keep') -> Source:
    """The images of a folder or a zip; `dataset.json` gives the labels where it exists, else class folders do."""
    archive = Archive(path)
    rows = archive.rows_ending({*source_formats(), NPY})
    names = [archive.files.names[row] for row in rows]
    labels = (_folder_labels if archive.files.find(LABEL_FILE) is None else read_labels)(archive, names)
    return Source(
        name=Path(path).resolve().name.removesuffix('.zip'),
        names=[archive.where(name) for name in names],
        labels=labels.classes,
        class_names=labels.class_names,
        read=functools.partial(_read, archive, rows),
        bytes_on_disk=Path(path).stat().st_size if Path(path).is_file() else int(archive.files.sizes.sum()),
        file=functools.partial(_file, archive, rows),
        color=color,
        made_with=labels.made_with,
    )


def _imagenet(path: str) -> Source:
    """The training images of an ImageNet tree, 1000 folders; the few grayscale ones become RGB as the others are."""
    folder = Path(path, IMAGENET)
    source = _archive(str(folder if folder.is_dir() else path), color='rgb')
    return dataclasses.replace(source, name='imagenet')


def _is_imagenet(path: str) -> bool:
    return Path(path, IMAGENET).is_dir() or (Path(path).is_dir() and Path(path).resolve().as_posix().endswith(IMAGENET))


def _folder_labels(archive: Archive, names: list[str]) -> Labels:
    """Number the class folders in sorted order; a class folder is the first one in which the paths differ."""
    paths = [name.split('/')[:-1] for name in names]
    depth = 0
    while all(path[depth : depth + 1] == paths[0][depth : depth + 1] != [] for path in paths):
        depth += 1
    folders = [path[depth] if len(path) > depth else None for path in paths]
    if None in folders:
        if len(set(folders)) == 1:
            return Labels()
        loose, sorted_in = (names[[folder is None for folder in folders].index(here)] for here in (True, False))
        problem = f'but {archive.where(loose)} is in none; move it, or give all labels in {LABEL_FILE}'
        raise UserError(f'{archive.where(sorted_in)} is in a class folder, {problem}')
    class_names = sorted(set(folders))
    index = {name: i for i, name in enumerate(class_names)}
    return Labels(np.array([index[folder] for folder in folders], np.int64), class_names)


# Sources that need no files, by the names by which they are asked for.
EMBEDDED: dict[str, Callable[[str], Source]] = {
    'digits': open_digits,
    'photos': open_photos,
    'mnist5k': open_mnist5k,
    HELD_OUT: open_mnist5k,
}
# Kinds of files: whether a path that exists is one, and what opens it; the first counts. A new source is one row.
SOURCES: dict[str, tuple[Callable[[str], bool], Callable[[str], Source]]] = {
    'ImageNet tree': (_is_imagenet, _imagenet),
    'cifar-10-python.tar.gz': (lambda path: path.endswith(('.tar.gz', '.tgz', '.tar')), open_cifar10),
    'MNIST images-idx3-ubyte.gz': (is_idx, open_idx),
    'parquet or Arrow': (lambda path: bool(table_files(path)), open_tables),
    'folder or zip': (lambda path: True, _archive),
}


def balanced_order(source: Source) -> list[int]:
    """All indices, one of each class in turn, so that every beginning of the list has the classes in balance.

    Within a class the images are scattered, always in the same way: neighbours are often frames of one film.
    """
    labels = np.zeros(len(source.names), np.int64) if source.labels is None else source.labels
    scattered = sorted(range(len(labels)), key=lambda i: hashlib.blake2b(str(i).encode()).digest())
    turns, seen = {}, collections.Counter()
    for i in scattered:
        turns[i] = seen[labels[i]]
        seen[labels[i]] += 1
    return sorted(scattered, key=lambda i: (turns[i], labels[i]))


def class_lines(labels: np.ndarray | None, class_names: list[str] | None, most: int = 20) -> list[str]:
    """A line for each class with its number of images, for people to check; of many classes, the first `most`."""
    if labels is None:
        return ['no labels']
    classes, counts = np.unique(labels, return_counts=True)
    lines = []
    for label, count in zip(classes[:most], counts[:most], strict=True):
        name = f' ({printable(class_names[label])})' if class_names else ''
        lines.append(f'class {label}{name}: {count} images')
    if len(classes) > most:
        lines.append(f'... {len(classes)} classes in all, with {counts.min()} to {counts.max()} images each')
    return lines
