"""Images, or latents, and class labels of a dataset archive, for training."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from dataset.files.archive import Archive, encoder_of, shape_text
from dataset.files.index import open_index
from dnnlib.errors import UserError


class ImageDataset(torch.utils.data.Dataset):
    """Images of a folder or a zip, with the labels of its `dataset.json` if it has one (see dataset/files/archive.py).

    `dataset[i]` is a tensor and its class index, -1 without labels. The tensor is uint8 [C, H, W], or, of latents,
    float32 [8, H, W]: mean and standard deviation, from which every visit draws (training/inputs.py). Images are in
    the order of their names, and are decoded when they are asked for; opening reads the file list, the labels and one
    image, or, of a large dataset opened before, an index that lies beside it (dataset/files/index.py). Safe to use
    in the workers of a DataLoader. A UserError names a file that is damaged or of another shape than the first.

    Args:
        path: Folder or zip.
        xflip: Double the dataset, as EDM does: item N + i is the mirror image, left to right, of item i.

    Attributes:
        path: As given.
        name: The last part of the path, without `.zip`.
        names: Names of the N image files, sorted.
        image_shape: (C, H, W) of every image as a network sees it; C is 1 or 3, or 4 of latents.
        encoder: Name of the encoder (networks/encoders.py) between the images and what a network sees: `rgb` of images.
        labels: Class indices of the files, int64 [N], or None.
        num_classes: Highest class index + 1; 0 without labels.
        class_names: Name of each class, or None.
        made_with: What `dataset_tool.py` noted of how it was made; {} where there is no such note.
        fingerprint: 16 hexadecimal digits that change with names, file sizes, labels or `xflip`; see `DatasetIndex`.
    """

    def __init__(self, path: str | os.PathLike, xflip: bool = False):
        self.path = os.fspath(path)
        self.name = Path(self.path).resolve().name.removesuffix('.zip')
        index = open_index(self.path)
        self._archive = Archive(self.path, index.files)
        self.names = index.files.names
        self.labels, self.class_names = index.labels.classes, index.labels.class_names
        self.made_with = index.labels.made_with
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.xflip = xflip
        self.fingerprint = _mirrored(index.fingerprint) if xflip else index.fingerprint
        first = self._archive.read_pixels(0)
        self._shape: tuple[int, int, int] = first.shape  # as stored
        self.encoder = encoder_of(first)
        self.image_shape = first.shape if self.encoder == 'rgb' else (first.shape[0] // 2, *first.shape[1:])
        if xflip and self.encoder != 'rgb':
            raise UserError(f'{self.path} holds latents, which cannot be mirrored; encode mirrored images instead')

    def __len__(self) -> int:
        return (1 + self.xflip) * len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.read(index)
        return torch.from_numpy(image), -1 if self.labels is None else int(self.labels[index % len(self.names)])

    def read(self, index: int) -> np.ndarray:
        """The image, or the latents, as an array."""
        flipped, index = divmod(range(len(self))[index], len(self.names))
        image = self._archive.read_pixels(index)
        if image.shape != self._shape:
            here, there = (shape_text(h, w, c) for c, h, w in (image.shape, self._shape))
            where = self._archive.where(self.names[index])
            raise UserError(f'{where} is {here}, but {self.names[0]} is {there}; all images must be alike')
        return np.ascontiguousarray(image[:, :, ::-1]) if flipped else image


def _mirrored(fingerprint: str) -> str:
    return hashlib.blake2b(f'{fingerprint} xflip'.encode(), digest_size=8).hexdigest()


def open_dataset(path: str, use_labels: bool, xflip: bool = False) -> tuple[ImageDataset, int]:
    """Open the training data and tell the number of classes to train with, 0 for none."""
    dataset = ImageDataset(path, xflip)
    if use_labels and not dataset.num_classes:
        raise UserError(f'{path} has no labels; train with --cond=False, or convert folders of classes')
    return dataset, dataset.num_classes if use_labels else 0
