"""Images and class labels of a dataset archive, for training."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import UserError
from training.archive import Archive, read_labels, shape_text

MODE_CHANNELS = {'L': 1, 'RGB': 3}  # Pillow's names of 8-bit grayscale and colour


class ImageDataset(torch.utils.data.Dataset):
    """Images of a folder or a zip, with the labels of its `dataset.json` if it has one (see training/archive.py).

    `dataset[i]` is a uint8 tensor [C, H, W] and its class index, -1 without labels. Images are in the order of
    their names, and are decoded when they are asked for; opening reads the file list, the labels and one image.
    Safe to use in the workers of a DataLoader.

    Args:
        path: Folder or zip.

    Attributes:
        path: As given.
        name: The last part of the path, without `.zip`.
        names: Names of the image files, sorted.
        image_shape: (C, H, W) of every image; C is 1 or 3.
        labels: Class indices, int64 [N], or None.
        num_classes: Highest class index + 1; 0 without labels.
        fingerprint: 16 hexadecimal digits that change with names, file sizes or labels.

    Raises:
        UserError: where the archive, its `dataset.json` or its first image cannot be used; on reading an image, where
            that is damaged or of another shape than the first.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.name = Path(self.path).resolve().name.removesuffix('.zip')
        if not Path(self.path).exists():
            how = f'python dataset_tool.py convert --source=digits --dest={self.path}'
            raise UserError(f'dataset {self.path} does not exist; make one, for instance with: {how}')
        self._archive = Archive(self.path)
        self.names = self._archive.image_names()
        self.labels = read_labels(self._archive, self.names)
        self.num_classes = 0 if self.labels is None else int(self.labels.max()) + 1
        self.fingerprint = self._fingerprint()
        self.image_shape: tuple[int, int, int] = self._decode(0).shape

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self._decode(index)
        if image.shape != self.image_shape:
            here, there = (shape_text(h, w, c) for c, h, w in (image.shape, self.image_shape))
            where = self._archive.where(self.names[index])
            raise UserError(f'{where} is {here}, but {self.names[0]} is {there}; all images must be alike')
        return torch.from_numpy(image), -1 if self.labels is None else int(self.labels[index])

    def _decode(self, index: int) -> np.ndarray:
        """The image as uint8 [C, H, W] in memory of its own."""
        image = self._archive.read_image(self.names[index])
        if image.mode not in MODE_CHANNELS:
            where = self._archive.where(self.names[index])
            raise UserError(f'{where} is of mode {image.mode}, not 8-bit L or RGB; see dataset_tool.py convert')
        pixels = np.asarray(image).reshape(image.height, image.width, MODE_CHANNELS[image.mode])
        return pixels.transpose(2, 0, 1).copy(order='C')

    def _fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for i, name in enumerate(self.names):
            label = None if self.labels is None else int(self.labels[i])
            digest.update(repr((name, self._archive.sizes[name], label)).encode(errors='surrogateescape'))
        return digest.hexdigest()
