"""MNIST and what else comes in IDX files."""

import math
import re
import struct
from pathlib import Path

import numpy as np

from dataset.sources.source import InMemory, Source
from dataset.sources.unpacked import read_unpacked
from dnnlib.errors import UserError

LARGEST = 3 * 2**28  # bytes, unpacked; the largest set of the kind, EMNIST's, has 550 MB


def is_idx(path: str) -> bool:
    """Whether a name is that of images in MNIST's format."""
    return re.search(r'images[-.]idx3-ubyte(\.gz)?$', path) is not None


def open_idx(path: str) -> Source:
    """The images of `train-images-idx3-ubyte.gz`, with the labels of `train-labels-idx1-ubyte.gz` beside it."""
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
        read=InMemory(images),
        bytes_on_disk=Path(path).stat().st_size + label_path.stat().st_size,
    )


def _read_idx(path: str, dimensions: int) -> np.ndarray:
    """An array of bytes: 0, 0, type 8, number of dimensions, each as big-endian 32 bits, then the content."""
    data, start = read_unpacked(path, LARGEST), 4 + 4 * dimensions
    magic, shape = data[:4], struct.unpack(f'>{dimensions}I', data[4:start].ljust(4 * dimensions, b'\0'))
    if magic != bytes([0, 0, 8, dimensions])[: len(data)]:
        raise UserError(f'{path} is not a file of bytes in {dimensions} dimensions, such as those of MNIST')
    if len(data) != start + math.prod(shape):
        raise UserError(f'{path} is cut short or damaged: {len(data)} bytes, {start + math.prod(shape)} expected')
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
