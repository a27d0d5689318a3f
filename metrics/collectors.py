"""What is kept of a set of images: sums over groups of them, or the features of some.

A collector is made for the number of images in the whole set, sees batches of features, and is joined over the ranks
once. Which group an image is in, and which images are kept, depends on the size of the set alone.
"""

import torch

from metrics.image_sets import ImageBatch
from metrics.statistics import FeatureStatistics
from torch_utils import distributed
from torch_utils.finite import nonfinite
from torch_utils.random import stream

MOST_FEATURES = 50_000  # that are kept of a set
GROUPS = {'statistics': 1, 'halves': 2, 'tenths': 10}  # kinds of sums
KINDS = (*GROUPS, 'sample')


def make_collector(kind: str, count: int, num_features: int, device: torch.device | str = 'cpu') -> 'Sums | Sample':
    """An empty collector of one of KINDS for `count` images."""
    if kind in GROUPS:
        return Sums(count, num_features, device, GROUPS[kind])
    return Sample(count, num_features, device)


def restore_collector(kind: str, tensors: dict[str, torch.Tensor], num_features: int) -> 'Sums | Sample':
    """The inverse of a collector's `to_tensors`, which must be of so many features.

    Raises:
        KeyError: where one is missing.
        ValueError: where they do not fit each other, or hold what is not finite.
    """
    if 'even.mean' in tensors:  # older files hold halves one by one
        names = ('mean', 'scatter', 'count')
        tensors = {name: torch.stack([tensors[f'{half}.{name}'] for half in ('even', 'odd')]) for name in names}
    if kind in GROUPS:
        groups = 'G' if tensors['mean'].ndim > 1 else ''
        names = {'mean': f'{groups}F', 'scatter': f'{groups}FF', 'count': groups}
    else:
        names = {'features': 'NF', 'count': '', **({'labels': 'N'} if 'labels' in tensors else {})}
    sizes = {'F': num_features}
    for name, letters in names.items():
        shape = tuple(tensors[name].shape)
        if len(shape) != len(letters) or any(sizes.setdefault(c, n) != n for c, n in zip(letters, shape, strict=True)):
            raise ValueError(f'{name} has the wrong shape {shape}')
    if bad := nonfinite(tensors):
        raise ValueError(f'{bad[0]} holds values that are not finite')
    return (Sums if kind in GROUPS else Sample).from_tensors(tensors)


def collector_memory(kind: str, count: int, num_features: int) -> int:
    """Bytes that a collector takes on every rank."""
    if kind in GROUPS:
        return 8 * min(GROUPS[kind], count) * num_features**2
    return 4 * min(count, MOST_FEATURES) * num_features


class Sums:
    """Count, mean and scatter of the features of all images, for each of some random groups of nearly equal size.

    Attributes:
        groups: FeatureStatistics of each group.
    """

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu', groups: int = 1):
        groups = min(groups, count)
        self.groups = [FeatureStatistics(num_features, device) for _ in range(groups)]
        self._group = shuffled(count, 'groups') * groups // max(count, 1)  # of each image, int64 [count]

    @property
    def count(self) -> int:
        """Number of images seen."""
        return sum(group.count for group in self.groups)

    def union(self, without: int | None = None) -> FeatureStatistics:
        """Statistics of all groups together, or of all but one."""
        chosen = [group for i, group in enumerate(self.groups) if i != without]
        if len(chosen) == 1:
            return chosen[0]
        total = FeatureStatistics(len(chosen[0].mean), chosen[0].mean.device)
        for group in chosen:
            total.merge(group)
        return total

    def update(self, features: torch.Tensor, batch: ImageBatch) -> None:
        """Add the features [N, F] of a batch to the groups that its images belong to."""
        places = self._group[batch.indices].to(features.device)
        for i, group in enumerate(self.groups):
            group.update(features[places == i])

    def all_reduce(self) -> None:
        """Join the sums of all ranks; every rank calls it, also one that has seen nothing."""
        for group in self.groups:
            group.all_reduce()

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`mean` [G, F], `scatter` [G, F, F] = covariance * (count - 1), `count` [G]; without G for a single group."""
        parts = [group.to_tensors() for group in self.groups]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {name: t[0] for name, t in stacked.items()} if len(parts) == 1 else stacked

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'Sums':
        """The inverse of `to_tensors`."""
        made = cls(0, 0)
        if tensors['mean'].ndim == 1:
            tensors = {name: tensors[name][None] for name in ('mean', 'scatter', 'count')}
        groups = zip(tensors['mean'], tensors['scatter'], tensors['count'], strict=True)
        made.groups = [
            FeatureStatistics.from_tensors({'mean': mean, 'scatter': scatter, 'count': count})
            for mean, scatter, count in groups
        ]
        return made


class Sample:
    """Features and labels of at most 50,000 images, in a random order: 4 * min(count, 50000) * F bytes.

    The first k of them are a random sample of the set, however its images are sorted.

    Attributes:
        features: float32 [min(count, 50000), F].
        labels: int64 [min(count, 50000)], -1 where an image has none.
        count: Number of images seen, kept or not.
    """

    def __init__(self, count: int, num_features: int, device: torch.device | str = 'cpu'):
        kept = min(count, MOST_FEATURES)
        self.features = torch.zeros(kept, num_features, device=device)
        self.labels = torch.zeros(kept, dtype=torch.int64, device=device)
        self.count = 0
        self._place = shuffled(count, 'feature sample')

    def update(self, features: torch.Tensor, batch: ImageBatch) -> None:
        """Put the features [N, F] and labels of those images that are kept in their places."""
        places = self._place[batch.indices]
        kept = places < len(self.features)
        labels = torch.full_like(places, -1) if batch.labels is None else batch.labels.to(places)
        places = places[kept].to(self.features.device)
        self.features[places] = features[kept.to(features.device)].to(self.features)
        self.labels[places] = labels[kept].to(self.labels.device)
        self.count += len(kept)

    def all_reduce(self) -> None:
        """Fill the places that other ranks have seen; elsewhere each rank holds zeros. Every rank calls it."""
        count = torch.tensor([self.count], device=self.features.device)
        for tensor in (self.features, self.labels, count):
            distributed.all_reduce_sum(tensor)
        self.count = int(count)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`features`, `labels`, and the `count` that they are a sample of."""
        return {'features': self.features, 'labels': self.labels, 'count': torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'Sample':
        """The inverse of `to_tensors`; files of before had no labels."""
        made = cls(0, 0)
        made.features, made.count = tensors['features'], int(tensors['count'])
        made.labels = tensors.get('labels', torch.full((len(made.features),), -1))
        return made


def shuffled(count: int, purpose: str) -> torch.Tensor:
    """A permutation int64 [count] that is the same for every set of that size."""
    return torch.randperm(count, generator=stream(purpose, count))
