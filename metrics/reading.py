"""From stored images to a rank's batches: data sets of any reader, parts of them, and the .npz files of evaluators."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from dnnlib.errors import UserError
from metrics.image_sets import Batch, ImageSet
from torch_utils import distributed

JPEGS = ('.jpg', '.jpeg')


class Images(Protocol):
    """What a reader of images offers; `dataset.reader.ImageDataset` does, and `NpzImages`.

    Attributes:
        name: For people.
        names: Of every image, in order.
        image_shape: (C, H, W).
        num_classes: 0 without labels.
        fingerprint: Changes with the images.

    A reader may also have `made_with`, a dict of how the data set was made (`transform`), and `encoder`, which is 'rgb'
    where its items are images.
    """

    name: str
    names: Sequence[str]
    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """uint8 [C, H, W] and the class, -1 without labels."""


class Part:
    """Images first..last-1 of a set, as a set of its own."""

    def __init__(self, images: Images, first: int, last: int):
        self._images, self._first = images, first
        self.name = f'{images.name} {first}-{last - 1}'
        self.names = images.names[first:last]
        self.image_shape, self.num_classes = images.image_shape, images.num_classes
        self.fingerprint = f'{images.fingerprint} {first}-{last - 1}'
        self.made_with, self.encoder = getattr(images, 'made_with', {}), getattr(images, 'encoder', 'rgb')

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._images[self._first + index]


class NpzImages:
    """The `.npz` that ADM's evaluator reads: `arr_0` uint8 [N, H, W, C], and perhaps labels [N] in `arr_1`.

    What was stored uncompressed (as `np.savez` does) is read image by image; compressed arrays are held in memory.

    Args:
        path: The file.

    Raises:
        UserError: where it is no such file; nothing in it is unpickled.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self.name = Path(self.path).name.removesuffix('.npz')
        members = npz_members(self.path)
        if 'arr_0' not in members:
            raise UserError(f'{self.path} holds no images: it has no arr_0, only {", ".join(members) or "nothing"}')
        self._array = npz_array(self.path, 'arr_0')
        if self._array.dtype != np.uint8 or self._array.ndim != 4 or self._array.shape[3] not in (1, 3):
            raise UserError(
                f'{self.path} holds no images: arr_0 is {self._array.dtype} {self._array.shape}, not uint8 [N, H, W, C]'
            )
        self._labels = npz_array(self.path, 'arr_1') if 'arr_1' in members else None
        count, height, width, channels = self._array.shape
        if self._labels is not None and (self._labels.shape != (count,) or self._labels.dtype.kind not in 'iu'):
            raise UserError(f'{self.path}: arr_1 is {self._labels.dtype} {self._labels.shape}, not a class per image')
        if count == 0:
            raise UserError(f'{self.path} holds no images: arr_0 is empty')
        self.names = range(count)
        self.image_shape = (channels, height, width)
        self.num_classes = 0 if self._labels is None else int(self._labels.max()) + 1
        self.fingerprint = f'crc32 {members["arr_0"]:08x}'

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = np.array(self._array[index]).transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(image)), -1 if self._labels is None else int(self._labels[index])


def npz_members(path: str | os.PathLike) -> dict[str, int]:
    """Names of the arrays in an `.npz`, with the CRC-32 of each.

    Raises:
        UserError: where it is no zip.
        OSError: where it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return {info.filename.removesuffix('.npy'): info.CRC for info in file.infolist()}
    except zipfile.BadZipFile as error:
        raise UserError(f'{os.fspath(path)} is not an .npz file: {error}') from None


def npz_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """An array of an `.npz`: mapped where it is stored uncompressed, read otherwise. Objects are refused.

    Raises:
        UserError: where it cannot be read as an array of numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f'{name}.npy')
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran, dtype = header[version](member)
                skipped = member.tell()
            if dtype.hasobject:
                raise ValueError('it holds objects, which are not unpickled')
            if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
                with archive.open(info) as member:
                    return np.lib.format.read_array(member, allow_pickle=False)
        with open(path, 'rb') as file:
            file.seek(info.header_offset + 26)
            lengths = np.frombuffer(file.read(4), '<u2')  # of the name and the extra field, in the local header
        start = info.header_offset + 30 + int(lengths.sum()) + skipped
        return np.memmap(path, dtype, 'r', start, shape, 'F' if fortran else 'C')
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f'{os.fspath(path)}: the array {name} cannot be read: {error}') from None


def describe(images: Images) -> ImageSet:
    """What is known of a set before its first image is read.

    Raises:
        UserError: where it holds latents.
    """
    if (encoder := getattr(images, 'encoder', 'rgb')) != 'rgb':
        raise UserError(
            f'{images.name} holds latents (encoder {encoder}), and metrics measure images: give the images that the '
            'latents were made from'
        )
    jpegs = sum(PurePosixPath(str(name)).suffix.lower() in JPEGS for name in images.names)
    shape, made_with = tuple(images.image_shape), dict(getattr(images, 'made_with', None) or {})
    return ImageSet(
        images.name, len(images), shape, images.num_classes, images.fingerprint, jpegs=jpegs, made_with=made_with
    )


class _Batches(torch.utils.data.Dataset):
    """Batch k of a set as one item, so that DataLoader's workers decode whole batches."""

    def __init__(self, images: Images, batch_size: int, mine: range):
        self.images, self.batch_size, self.mine = images, batch_size, mine

    def __len__(self) -> int:
        return len(self.mine)

    def __getitem__(self, i: int) -> Batch | str:
        if i >= len(self):
            raise IndexError(i)
        start = self.mine[i] * self.batch_size
        indices = torch.arange(start, min(start + self.batch_size, len(self.images)))
        try:
            pixels, labels = zip(*(self.images[k] for k in indices.tolist()), strict=True)
        except (UserError, OSError) as error:
            return str(error)  # an exception would come out of a worker with its traceback in the message
        names = [str(self.images.names[k]) for k in indices.tolist()]
        return Batch(torch.stack(pixels), torch.tensor(labels), indices, names)


def batch_range(count: int, batch_size: int) -> range:
    """Numbers of this rank's batches.

    Batch k has images k * batch_size and on, whatever the number of ranks: features depend, in their last bits, on the
    batch that an image is in.
    """
    return range(distributed.rank(), -(-count // batch_size), distributed.world_size())


def read_batches(images: Images, batch_size: int, title: str, workers: int = 0) -> Iterator[Batch]:
    """This rank's batches of a set, with a progress bar on rank 0.

    Args:
        images: The set.
        batch_size: Images at a time.
        title: Of the progress bar.
        workers: Processes that decode; 0 decodes in between.

    Raises:
        UserError: where an image cannot be read or is unlike the first.
    """
    source = _Batches(images, batch_size, batch_range(len(images), batch_size))
    loader = torch.utils.data.DataLoader(
        source, batch_size=None, num_workers=min(workers, len(source)), generator=torch.Generator()
    )
    with tqdm(total=len(images), desc=title, unit='img', disable=True if distributed.rank() else None) as bar:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
            bar.update(min(len(batch.images) * distributed.world_size(), bar.total - bar.n))
