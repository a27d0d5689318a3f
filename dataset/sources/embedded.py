"""Data that a Python package carries."""

from pathlib import Path

import numpy as np

from dataset.sources.source import InMemory, Source
from dnnlib.errors import UserError

PHOTO_CROP, PHOTO_STRIDE = 64, 16


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


def _scikit_learn(source: str):
    try:
        import sklearn.datasets
    except ImportError:
        raise UserError(f"--source={source} needs scikit-learn: install this project's extra `demo`") from None
    return sklearn.datasets
