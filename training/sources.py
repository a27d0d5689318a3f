"""Where the images of a dataset come from: embedded sets by name, or the user's folder or zip."""

import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from dnnlib.errors import UserError, unknown_choice
from training.archive import LABEL_FILE, Archive, read_labels, shape_text
from training.transforms import TRANSFORMS, normalize, to_uint8


@dataclass(frozen=True)
class Source:
    """Images that can be read one by one.

    Attributes:
        names: What messages call each image.
        labels: Class indices, int64 [N], or None.
        class_names: Name of each class, where the source has such names.
        read: Gives an image by its index, in any mode that `transforms.normalize` takes.
        bytes_on_disk: Size of the files, 0 for an embedded source.
    """

    names: list[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    read: Callable[[int], PIL.Image.Image]
    bytes_on_disk: int


def open_source(source: str) -> Source:
    """Open an embedded source by its name in SOURCES, or a folder or zip by its path.

    Raises:
        UserError: where there is no such source, or it cannot be used.
    """
    if source in SOURCES:
        return SOURCES[source]()
    if not Path(source).exists():
        problem = unknown_choice('source', source, SOURCES)
        raise UserError(f'--source={source} is neither a file nor a folder, and no embedded set: {problem}')
    return _archive(source)


def _archive(path: str) -> Source:
    """The images of a folder or a zip; `dataset.json` gives the labels where it exists, else class folders do."""
    archive = Archive(path)
    names = archive.image_names()
    if LABEL_FILE in archive.sizes:
        labels, class_names = read_labels(archive, names), None
    else:
        labels, class_names = _folder_labels(archive, names)
    return Source(
        names=[archive.where(name) for name in names],
        labels=labels,
        class_names=class_names,
        read=lambda i: archive.read_image(names[i]),
        bytes_on_disk=Path(path).stat().st_size if Path(path).is_file() else sum(archive.sizes.values()),
    )


def _folder_labels(archive: Archive, names: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Number the class folders in sorted order; a class folder is the first one in which the paths differ."""
    paths = [name.split('/')[:-1] for name in names]
    depth = 0
    while all(path[depth : depth + 1] == paths[0][depth : depth + 1] != [] for path in paths):
        depth += 1
    folders = [path[depth] if len(path) > depth else None for path in paths]
    if None in folders:
        if len(set(folders)) == 1:
            return None, None
        loose, sorted_in = (names[[folder is None for folder in folders].index(here)] for here in (True, False))
        problem = f'but {archive.where(loose)} is in none; move it, or give all labels in {LABEL_FILE}'
        raise UserError(f'{archive.where(sorted_in)} is in a class folder, {problem}')
    class_names = sorted(set(folders))
    index = {name: i for i, name in enumerate(class_names)}
    return np.array([index[folder] for folder in folders], np.int64), class_names


def _digits() -> Source:
    """The 1797 handwritten digits that scikit-learn carries, 8x8, values 0-16 scaled to 0-255 as floats."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("--source=digits needs scikit-learn: install this project's extra `demo`") from None
    data = load_digits()
    pixels = data.images.astype(np.float32) * (255 / 16)
    return Source(
        names=[f'digits/{i}' for i in range(len(pixels))],
        labels=data.target.astype(np.int64),
        class_names=None,
        read=lambda i: PIL.Image.fromarray(pixels[i]),
        bytes_on_disk=0,
    )


# Embedded sources; a new one is one entry.
SOURCES: dict[str, Callable[[], Source]] = {'digits': _digits}


def read_images(
    source: Source, indices: Iterable[int], size: tuple[int, int] | None = None, transform: str = 'none'
) -> Iterator[np.ndarray]:
    """Read images of a source as uint8 [H, W, C], all of the shape of the first.

    Args:
        source: See `open_source`.
        indices: Which images, in this order.
        size: (width, height) to bring them to; None keeps theirs, and then `transform` must be `none`.
        transform: How, a name in TRANSFORMS.

    Raises:
        UserError: naming the image that is broken, of a mode that cannot be used, or of another shape.
    """
    assert size is not None or transform == 'none', f'{transform} needs a size'
    first = None
    for i in indices:
        image = normalize(source.read(i), source.names[i])
        if size is not None:
            image = TRANSFORMS[transform](image, size, source.names[i])
        pixels = to_uint8(image)
        first = first or (source.names[i], pixels.shape)
        if pixels.shape != first[1]:
            mend = 'choose a --resolution' if pixels.shape[:2] != first[1][:2] else 'make them all grayscale or all RGB'
            here, there = shape_text(*pixels.shape), shape_text(*first[1])
            raise UserError(f'{source.names[i]} is {here}, but {first[0]} is {there}; {mend}')
        yield pixels


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
        name = f' ({class_names[label]})' if class_names else ''
        lines.append(f'class {label}{name}: {count} images')
    if len(classes) > most:
        lines.append(f'... {len(classes)} classes in all, with {counts.min()} to {counts.max()} images each')
    return lines
