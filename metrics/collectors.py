"""What metrics keep of a set of images: sums for those that sums suffice for, a bounded number of features for others.

Every collector is made as `Collector(count of the whole set, F, device, detector)`, sees batches of features, and is
joined over the ranks once. `to_tensors` and `from_tensors` are for reference files.
"""

from typing import Any, Protocol

import torch

from metrics.image_sets import Batch
from metrics.statistics import FeatureStatistics
from torch_utils import distributed
from torch_utils.random import stream

MOST_FEATURES = 50_000  # that are kept of a set
SCORE_SPLITS = 10


class Collector(Protocol):
    """The interface of all collectors.

    Attributes:
        kind: Its name in reference files.
        count: Number of images seen, over all ranks after `all_reduce`.
    """

    kind: str
    count: int

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu', detector: Any = None): ...

    @staticmethod
    def memory(count: int, num_features: int) -> int:
        """Bytes that it takes on every rank."""

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Take the features [N, F] of a batch."""

    def all_reduce(self) -> None:
        """Join what all ranks have; every rank calls it, also one that has seen nothing."""

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that it holds, for a reference file."""

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'Collector':
        """The inverse of `to_tensors`."""


class Statistics:
    """Mean and covariance of all images: what a Fréchet distance needs.

    Attributes:
        statistics: FeatureStatistics.
    """

    kind = 'statistics'

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu', detector: Any = None):
        del count, detector  # sums need no room for each image
        self.statistics = FeatureStatistics(num_features, device)

    @staticmethod
    def memory(count: int, num_features: int) -> int:
        """8 * F * F."""
        return 8 * num_features**2

    @property
    def count(self) -> int:
        """Number of images seen."""
        return self.statistics.count

    def all(self) -> FeatureStatistics:
        """Of all images."""
        return self.statistics

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Add the features [N, F] of a batch."""
        self.statistics.update(features)

    def all_reduce(self) -> None:
        """Join the statistics of all ranks."""
        self.statistics.all_reduce()

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`mean` [F], `scatter` [F, F] = covariance * (count - 1), `count`."""
        return self.statistics.to_tensors()

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'Statistics':
        """The inverse of `to_tensors`."""
        made = cls(0, 0)
        made.statistics = FeatureStatistics.from_tensors(tensors)
        return made


class SplitStatistics:
    """Statistics of the images at even and at odd places; those of all are their union.

    The distance of the two halves shows what the number of images alone does to a metric.

    Attributes:
        even, odd: FeatureStatistics of the halves.
    """

    kind = 'halves'

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu', detector: Any = None):
        del count, detector
        self.even = FeatureStatistics(num_features, device)
        self.odd = FeatureStatistics(num_features, device)

    @staticmethod
    def memory(count: int, num_features: int) -> int:
        """16 * F * F."""
        return 16 * num_features**2

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

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Those of the halves: `even.mean`, ..., `odd.count`."""
        halves = {'even': self.even, 'odd': self.odd}
        return {f'{half}.{name}': t for half, s in halves.items() for name, t in s.to_tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'SplitStatistics':
        """The inverse of `to_tensors`."""
        made = cls(0, 0)
        for half in ('even', 'odd'):
            mine = {name.removeprefix(f'{half}.'): t for name, t in tensors.items() if name.startswith(half)}
            setattr(made, half, FeatureStatistics.from_tensors(mine))
        return made


class _KeptFeatures:
    """Rows of features at places that are known beforehand, zero until they are seen, joined by summing over ranks."""

    def __init__(self, rows: int, num_features: int, device: torch.device | str):
        self.features = torch.zeros(rows, num_features, device=device)
        self.count = 0

    def all_reduce(self) -> None:
        """Fill the places that other ranks have seen; elsewhere each rank holds zeros."""
        distributed.all_reduce_sum(self.features)
        count = torch.tensor([self.count], device=self.features.device)
        self.count = int(distributed.all_reduce_sum(count).item())


class LabelledFeatures(_KeptFeatures):
    """The features and labels of every image, in the order of the set.

    Attributes:
        features: float32 [count, F].
        labels: int64 [count], -1 where an image has none.
        count: Number of images seen.
    """

    kind = 'labelled'

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu', detector: Any = None):
        del detector
        super().__init__(count, num_features, device)
        self.labels = torch.zeros(count, dtype=torch.int64, device=device)

    @staticmethod
    def memory(count: int, num_features: int) -> int:
        """4 * count * F."""
        return 4 * count * num_features

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Put the features [N, F] and labels of a batch in their places."""
        places = batch.indices.to(self.features.device)
        self.features[places] = features
        self.labels[places] = -1 if batch.labels is None else batch.labels.to(self.labels.device)
        self.count += len(places)

    def all_reduce(self) -> None:
        """Fill the places that other ranks have seen."""
        super().all_reduce()
        distributed.all_reduce_sum(self.labels)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`features` and `labels`."""
        return {'features': self.features, 'labels': self.labels}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'LabelledFeatures':
        """The inverse of `to_tensors`."""
        made = cls(0, 0)
        made.features, made.labels = tensors['features'], tensors['labels']
        made.count = len(made.labels)
        return made


class FeatureSample(_KeptFeatures):
    """The features of at most 50,000 images, in an order shuffled once and for all: 4 * min(count, 50000) * F bytes.

    Which images, and in which order, depends on the size of the set alone. The first k of them are a random sample of
    the set, as KID's blocks and precision and recall need it, however the images are sorted.

    Attributes:
        features: float32 [min(count, 50000), F].
        count: Number of images seen, kept or not.
    """

    kind = 'sample'

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu', detector: Any = None):
        del detector
        super().__init__(min(count, MOST_FEATURES), num_features, device)
        self._order = shuffled(count, 'feature sample')

    @staticmethod
    def memory(count: int, num_features: int) -> int:
        """4 * min(count, 50000) * F."""
        return 4 * min(count, MOST_FEATURES) * num_features

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Put the features [N, F] of those images that are kept in their places."""
        places = self._order[batch.indices]
        kept = places < len(self.features)
        self.features[places[kept].to(features.device)] = features[kept.to(features.device)]
        self.count += len(places)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`features`, and the `count` that they are a sample of."""
        return {'features': self.features, 'count': torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'FeatureSample':
        """The inverse of `to_tensors`."""
        made = cls(0, 0)
        made.features, made.count = tensors['features'], int(tensors['count'])
        return made


class ClassScores:
    """Sums over the class probabilities p [N, K] of the images in ten random parts: what the Inception score needs.

    Attributes:
        probabilities: Sum of p, float64 [S, K], S = min(10, count).
        negentropy: Sum of sum_k p_k log p_k, float64 [S].
        counts: Images in each part, float64 [S].
    """

    kind = 'class scores'

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu', detector: Any = None):
        self._logits = detector.logits
        splits = min(SCORE_SPLITS, count)
        self._split = shuffled(count, 'inception score') * splits // max(count, 1)
        classes = detector.logits(torch.zeros(0, num_features, device=device)).shape[1]
        self.probabilities = torch.zeros(splits, classes, dtype=torch.float64, device=device)
        self.negentropy = torch.zeros(splits, dtype=torch.float64, device=device)
        self.counts = torch.zeros(splits, dtype=torch.float64, device=device)

    @staticmethod
    def memory(count: int, num_features: int) -> int:
        """Some sums."""
        return 8 * SCORE_SPLITS * num_features

    @property
    def count(self) -> int:
        """Number of images seen."""
        return round(self.counts.sum().item())

    def update(self, features: torch.Tensor, batch: Batch) -> None:
        """Add the class probabilities of a batch to the parts that its images belong to."""
        logarithms = self._logits(features).double().log_softmax(dim=1)
        probabilities = logarithms.exp()
        split = self._split[batch.indices].to(features.device)
        self.probabilities.index_add_(0, split, probabilities)
        self.negentropy.index_add_(0, split, (probabilities * logarithms).sum(dim=1))
        self.counts += split.bincount(minlength=len(self.counts))

    def all_reduce(self) -> None:
        """Join the sums of all ranks."""
        for sums in (self.probabilities, self.negentropy, self.counts):
            distributed.all_reduce_sum(sums)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Never asked for: a reference has no part in the Inception score."""
        raise AssertionError('a reference file holds no class scores')

    from_tensors = None


def shuffled(count: int, purpose: str) -> torch.Tensor:
    """A permutation int64 [count] that is the same for every set of that size."""
    return torch.randperm(count, generator=stream(purpose, count))
