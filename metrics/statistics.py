"""Count, mean and covariance of a stream of feature vectors, in float64, over any number of batches and ranks."""

import torch

from torch_utils import distributed


class FeatureStatistics:
    """Count n, mean m [F] and scatter S [F, F] = sum_i (x_i - m)(x_i - m)^T of feature vectors, all float64.

    Only centred moments are kept, so nothing cancels however far the mean is from zero. Sets a and b join by

        n = n_a + n_b,  d = m_b - m_a,  m = m_a + (n_b / n) d,  S = S_a + S_b + (n_a n_b / n) d d^T

    Args:
        num_features: F.
        device: Where the sums are kept: the features' device (with NCCL, a GPU).
    """

    def __init__(self, num_features: int, device: torch.device | str = 'cpu'):
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """Add a batch of features [N, F] of any floating-point dtype; N may be 0."""
        assert features.ndim == 2 and features.shape[1] == len(self.mean), f'[N, F] expected, got {features.shape}'
        if len(features) == 0:
            return
        features = features.to(torch.float64)
        mean = features.mean(dim=0)
        centred = features - mean
        self._join(len(features), mean, centred)

    def merge(self, other: 'FeatureStatistics') -> None:
        """Add everything that `other` has seen; `other` stays as it is."""
        if other.count:
            self.scatter += other.scatter
            self._join(other.count, other.mean, other.mean.new_zeros(0, len(other.mean)))

    def _join(self, count: int, mean: torch.Tensor, centred: torch.Tensor) -> None:
        """Add `count` vectors given by their mean [F] and rows whose products make up their scatter [K, F]."""
        total = self.count + count
        shift = mean - self.mean
        # The term of the shift is one more row, so that one product updates the large matrix.
        rows = torch.cat([centred, (self.count * count / total) ** 0.5 * shift[None]])
        self.scatter.addmm_(rows.T, rows)
        self.mean += count / total * shift
        self.count = total

    def all_reduce(self) -> None:
        """Join the statistics of all ranks; every rank, with data or without, must call it and gets the same."""
        sums = distributed.all_reduce_sum(torch.cat([self.count * self.mean, self.mean.new_tensor([self.count])]))
        total = round(sums[-1].item())
        if total == 0:
            return
        shift = self.mean - sums[:-1] / total
        self.scatter += self.count * torch.outer(shift, shift)  # about the common mean; 0 on ranks without data
        distributed.all_reduce_sum(self.scatter)
        self.mean = sums[:-1] / total
        self.count = total

    def covariance(self) -> torch.Tensor:
        """The unbiased covariance S / (n - 1): float64 [F, F]; at least two vectors must have been seen."""
        assert self.count >= 2, f'no covariance of {self.count} vectors'
        return self.scatter / (self.count - 1)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """`mean` [F], `scatter` [F, F] = covariance * (count - 1), `count`."""
        return {'mean': self.mean, 'scatter': self.scatter, 'count': torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> 'FeatureStatistics':
        """The inverse of `to_tensors`."""
        made = cls(0)
        made.mean, made.scatter, made.count = tensors['mean'], tensors['scatter'], int(tensors['count'])
        return made
