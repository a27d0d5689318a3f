"""From stored images to a rank's batches: data sets of any reader, and parts of them."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Protocol

import torch

from dnnlib.errors import UserError
from dnnlib.progress import progress
from metrics.image_sets import ImageBatch, ImageSet
from torch_utils import distributed
from torch_utils.random import stream

JPEGS = ('.jpg', '.jpeg')


class Images(Protocol):
    """What a reader of images offers; `dataset.reader.ImageDataset` does, and `metrics.npz.NpzImages`.

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


class Subset:
    """Some images of a set, as a set of its own.

    Args:
        images: The set.
        indices: Places in it.
        label: Tells people which, and a fingerprint.
    """

    def __init__(self, images: Images, indices: Sequence[int], label: str):
        self._images, self._indices = images, indices
        self.name = f'{images.name} {label}'
        self.names = [images.names[i] for i in indices]
        self.image_shape, self.num_classes = images.image_shape, images.num_classes
        self.fingerprint = f'{images.fingerprint} {label}'
        self.made_with, self.encoder = getattr(images, 'made_with', {}), getattr(images, 'encoder', 'rgb')

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._images[self._indices[index]]


def random_subset(images: Images, num: int, seed: int) -> Images:
    """`num` images at random, each at most once, in the order of the set: which depends on the seed and its size."""
    if num > len(images):
        raise UserError(f'{images.name} has {len(images)} images, fewer than --subset={num}')
    order = torch.randperm(len(images), generator=stream(seed, 'subset', len(images)))
    return Subset(images, order[:num].sort().values.tolist(), f'{num} of seed {seed}')


def split_evenly(images: Images, parts: int) -> list[Images]:
    """Consecutive parts of equal size."""
    size, rest = divmod(len(images), parts)
    if rest:
        raise UserError(f'{images.name} has {len(images)} images, which {parts} repeats do not divide evenly')
    if parts == 1:
        return [images]
    return [Subset(images, range(i, i + size), f'{i}-{i + size - 1}') for i in range(0, len(images), size)]


def describe(images: Images) -> ImageSet:
    """What is known of a set before its first image is read."""
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

    def __getitem__(self, i: int) -> ImageBatch | str:
        if i >= len(self):
            raise IndexError(i)
        start = self.mine[i] * self.batch_size
        indices = torch.arange(start, min(start + self.batch_size, len(self.images)))
        try:
            pixels, labels = zip(*(self.images[k] for k in indices.tolist()), strict=True)
        except (UserError, OSError) as error:
            return str(error)  # an exception would come out of a worker with its traceback in the message
        names = [str(self.images.names[k]) for k in indices.tolist()]
        return ImageBatch(torch.stack(pixels), torch.tensor(labels), indices, names)


def batch_range(count: int, batch_size: int) -> range:
    """Numbers of this rank's batches.

    Batch k has images k * batch_size and on, whatever the number of ranks: features depend, in their last bits, on
    the batch that an image is in.
    """
    return range(distributed.rank(), -(-count // batch_size), distributed.world_size())


def read_batches(images: Images, batch_size: int, title: str, workers: int = 0) -> Iterator[ImageBatch]:
    """This rank's batches of a set, with a progress bar on rank 0.

    Args:
        images: The set.
        batch_size: Images at a time.
        title: Of the progress bar.
        workers: Processes that decode; 0 decodes in between.
    """
    source = _Batches(images, batch_size, batch_range(len(images), batch_size))
    loader = torch.utils.data.DataLoader(
        source, batch_size=None, num_workers=min(workers, len(source)), generator=torch.Generator()
    )
    with progress(len(images), title, shown=distributed.rank() == 0) as advance:
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch
            advance(len(batch.images) * distributed.world_size())
