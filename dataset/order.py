"""Which image comes when: an infinite shuffled sequence that does not depend on the number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from dnnlib.signals import ignore_stop_signals
from torch_utils.random import stream


def epoch_order(dataset_size: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of 0 .. dataset_size-1 that is one pass over the data, int64 [dataset_size]."""
    return torch.randperm(dataset_size, generator=stream(seed, 'order', epoch))


@dataclass(frozen=True)
class BatchOrder:
    """The micro-batches of one rank, in order, endlessly.

    Training images are numbered from 0 over the whole run. Number i is image `epoch_order(N, seed, i // N)[i % N]`
    of the N in the dataset. A step at `nimg` trains on numbers nimg .. nimg+batch-1; in its round a, rank r takes the
    `micro_batch` numbers from nimg + (a * world_size + r) * micro_batch on. So together the ranks visit the same
    sequence whatever their number, and a run may start, or go on, at any number without replaying what came before.

    Iteration yields lists of (image number, dataset index), each of length `micro_batch`.

    Args:
        dataset_size: Number of images in the dataset.
        seed: Of the run; gives the order.
        batch: Images in a step, over all ranks and rounds.
        micro_batch: Images that one rank takes at once; batch = rounds * world_size * micro_batch.
        rank: This process's number.
        world_size: Number of processes.
        start_nimg: Images trained on before.
    """

    dataset_size: int
    seed: int
    batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    start_nimg: int = 0

    def __post_init__(self):
        assert self.dataset_size > 0 and self.start_nimg >= 0 and 0 <= self.rank < self.world_size, self
        assert self.batch > 0 and self.batch % (self.world_size * self.micro_batch) == 0, self

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, None
        # A step ends where the next begins, so the rounds of all steps are evenly spaced.
        first = self.start_nimg + self.rank * self.micro_batch
        while True:
            pairs = []
            for number in range(first, first + self.micro_batch):
                if number // self.dataset_size != epoch:
                    epoch = number // self.dataset_size
                    permutation = epoch_order(self.dataset_size, self.seed, epoch)
                pairs.append((number, int(permutation[number % self.dataset_size])))
            yield pairs
            first += self.world_size * self.micro_batch


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        images: uint8 [B, C, H, W].
        labels: Class indices, int64 [B]; -1 where the dataset has none.
        numbers: Place of each image in the run, int64 [B]; the key of its random streams.
    """

    images: torch.Tensor
    labels: torch.Tensor
    numbers: torch.Tensor

    def pin_memory(self) -> 'Batch':
        """The same in page-locked memory, from which copies to a GPU need not be waited for; DataLoader calls it."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.numbers.pin_memory())


def make_loader(
    dataset: ImageDataset, order: BatchOrder, workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Read the micro-batches of `order` in turn, in `workers` processes beside this one or in this one if 0.

    With `pin_memory` batches lie in page-locked memory, for copies to a GPU that nothing waits for.

    The global random state stays as it is. The workers live as long as the iterator; closing it ends them.

    Raises:
        UserError, OSError: on reaching an image that cannot be used, from whichever process read it.
    """
    assert order.dataset_size == len(dataset), f'order of {order.dataset_size} images for a dataset of {len(dataset)}'
    loader = torch.utils.data.DataLoader(
        _BatchReader(dataset),
        sampler=order,
        batch_size=None,  # the sampler's items are whole micro-batches
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_leave_stopping_to_the_parent,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one, a loader draws from the global stream as it starts
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _BatchReader(torch.utils.data.Dataset):
    """A dataset of micro-batches, indexed by the lists that BatchOrder yields.

    An error that names a file is returned, for `make_loader` to raise: raised in a worker, it would reach the main
    process with a traceback for a message.
    """

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, pairs: list[tuple[int, int]]) -> Batch | Exception:
        try:
            images, labels = zip(*(self.dataset[index] for _, index in pairs), strict=True)
        except (UserError, OSError) as error:
            return error
        return Batch(torch.stack(images), torch.tensor(labels), torch.tensor([number for number, _ in pairs]))


def _leave_stopping_to_the_parent(worker: int) -> None:
    ignore_stop_signals()


def _as_it_is(batch: Batch | Exception) -> Batch | Exception:
    return batch
