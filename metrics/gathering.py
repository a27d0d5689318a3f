"""One pass over a set of images: every detector sees each batch once, every collector keeps what metrics need."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from dnnlib.errors import UserError
from metrics.detectors import Detector, load_detector
from metrics.statistics import FeatureStatistics
from torch_utils import distributed
from torch_utils.tensor_files import library_versions


@dataclass(frozen=True)
class ImageSet:
    """What a set of images is, known before its first image is read.

    Attributes:
        name: The data set's name, for people.
        count: Number of images in the whole set, over all ranks.
        image_shape: (C, H, W) of every image.
        num_classes: Number of classes, 0 where the images have no labels.
        fingerprint: Changes with the images, as the data set reader says; None for images that are being made.
    """

    name: str
    count: int
    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str | None = None


class Batch(NamedTuple):
    """Some images of a set.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: Class numbers int64 [N], or None.
        indices: Place of each image in the whole set, int64 [N] in 0..count-1; each occurs once over all ranks.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    indices: torch.Tensor


class Collector(Protocol):
    """What a metric keeps of a set of images, made as Collector(count of the whole set, F, device)."""

    count: int

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu'): ...

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Take the features [N, F] of a batch."""

    def all_reduce(self) -> None:
        """Join what all ranks have; every rank calls it, also one that has seen nothing."""


class SplitStatistics:
    """Statistics of the images at even and at odd places; those of all are their union.

    The distance of the two halves shows what the number of images alone does to a metric.

    Attributes:
        even, odd: FeatureStatistics of the halves.
    """

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu'):
        del count  # sums need no room for each image
        self.even = FeatureStatistics(num_features, device)
        self.odd = FeatureStatistics(num_features, device)

    @property
    def count(self) -> int:
        """Number of images seen."""
        return self.even.count + self.odd.count

    def all(self) -> FeatureStatistics:
        """Statistics of both halves together."""
        union = FeatureStatistics(len(self.even.mean), self.even.mean.device)
        union.merge(self.even)
        union.merge(self.odd)
        return union

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Add the features [N, F] of a batch to the halves that its images belong to."""
        odd = (batch.indices % 2 == 1).to(features.device)
        self.even.update(features[~odd])
        self.odd.update(features[odd])

    def all_reduce(self) -> None:
        """Join the statistics of all ranks."""
        self.even.all_reduce()
        self.odd.all_reduce()


class LabelledFeatures:
    """The features and labels of every image, in the order of the set: 4 * count * F bytes on every rank.

    Attributes:
        features: float32 [count, F].
        labels: int64 [count], -1 where an image has none.
        count: Number of images seen.
    """

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu'):
        self.features = torch.zeros(count, num_features, device=device)
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)
        self.count = 0

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Put the features [N, F] and labels of a batch in their places."""
        places = batch.indices.to(self.features.device)
        self.features[places] = features
        self.labels[places] = -1 if batch.labels is None else batch.labels.to(self.labels.device)
        self.count += len(places)

    def all_reduce(self) -> None:
        """Fill the places that other ranks have seen; elsewhere each rank holds zeros."""
        distributed.all_reduce_sum(self.features)
        distributed.all_reduce_sum(self.labels)
        self.count = int(distributed.all_reduce_sum(self.labels.new_tensor([self.count])).item())


class Need(NamedTuple):
    """What a metric needs of both sets of images: a collector of the features of a detector."""

    detector: str
    collector: type[Collector]


@dataclass(frozen=True)
class Gathered:
    """What one pass over a set of images has left, the same on every rank.

    Attributes:
        about: What the set is.
        identities: Identity of every detector that was used, by name.
        collected: What was kept, by need.
        versions: Of the libraries that computed it.
    """

    about: ImageSet
    identities: dict[str, str]
    collected: dict[Need, Collector]
    versions: dict[str, str] = field(default_factory=library_versions)


def gather(about: ImageSet, batches: Iterable[Batch], needs: Iterable[Need], device: torch.device | str) -> Gathered:
    """Read a set of images once and keep what `needs` ask for. Every rank must call it, with images or without.

    Args:
        about: The whole set.
        batches: This rank's share; the shares of all ranks make up the set. It must not use collectives itself.
        needs: From `needs_of`; the same on every rank.
        device: Where features are computed and kept.

    Raises:
        UserError: on every rank, where any of them cannot read an image, meets another shape than that of the set,
            or gets features that are not finite; also where a detector cannot be loaded.
    """
    needs = list(dict.fromkeys(needs))
    detectors = {need.detector: load_detector(need.detector, device) for need in needs}
    sizes = {name: detector.num_features(about.image_shape) for name, detector in detectors.items()}
    collected = {need: need.collector(about.count, sizes[need.detector], device) for need in needs}
    problem = None
    try:
        for batch in batches:
            _update(about, batch, detectors, collected, device)
    except (UserError, OSError) as error:
        problem = str(error)
    _raise_together(problem, device)
    for need, collector in collected.items():
        collector.all_reduce()
        assert collector.count == about.count, f'{need}: {collector.count} images seen of {about.count}'
    return Gathered(about, {name: detector.identity for name, detector in detectors.items()}, collected)


def _update(
    about: ImageSet,
    batch: Batch,
    detectors: dict[str, Detector],
    collected: dict[Need, Collector],
    device: torch.device | str,
) -> None:
    """Give one batch to every detector, and its features to the collectors that need them."""
    shape = tuple(batch.images.shape[1:])
    if shape != tuple(about.image_shape):
        raise UserError(
            f'image {batch.indices[0]} of {about.name} is {format_shape(shape)}, '
            f'the others are {format_shape(about.image_shape)}'
        )
    images = batch.images.to(device)
    for name, detector in detectors.items():
        features = detector(images)
        bad = ~features.isfinite().all(dim=1).cpu()
        if bad.any():
            raise UserError(
                f'image {batch.indices[bad][0]} of {about.name} has features that are not finite (detector {name})'
            )
        for need, collector in collected.items():
            if need.detector == name:
                collector.update(features, batch)


def format_shape(image_shape: Iterable[int]) -> str:
    """Write (C, H, W) for people: `3x64x64 (channels x height x width)`."""
    return 'x'.join(map(str, image_shape)) + ' (channels x height x width)'


def _raise_together(problem: str | None, device: torch.device | str, room: int = 1024) -> None:
    """Raise UserError on every rank if any has a problem: the others would wait for it, and only rank 0 is heard."""
    table = torch.zeros(distributed.world_size(), room, dtype=torch.int32, device=device)
    if problem is not None:
        text = torch.tensor(list(problem.encode()[:room]), dtype=torch.int32, device=device)
        table[distributed.rank(), : len(text)] = text
    rows = distributed.all_reduce_sum(table).cpu().tolist()
    problems = [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in rows if any(row)]
    if problems:
        raise UserError(dict.fromkeys(problems))
