"""What a training step leaves for the status lines: sums on the device, so that no step waits for it."""

import dataclasses
import math
from typing import Any

import torch

from diffusion.noise import LogNormal
from torch_utils import distributed

BINS = 10  # of ln(sigma): half a standard deviation each, the outer two open


def noise_edges(levels: LogNormal) -> list[float]:
    """The BINS - 1 inner borders of the bins of ln(sigma): P_mean + P_std (-2, -1.5, ..., 2)."""
    return [levels.P_mean + levels.P_std * (i / 2 - 2) for i in range(BINS - 1)]


class LossSums:
    """Losses of images by noise level, summed on the device.

    Args:
        edges: From `noise_edges`, float32 [BINS - 1] on the device.

    Attributes:
        sums: float32 [BINS, 3]: number of images, loss, plain weighted squared error.
    """

    def __init__(self, edges: torch.Tensor):
        self.edges = edges
        self.sums = edges.new_zeros(BINS, 3)

    def add(self, sigma: torch.Tensor, losses: torch.Tensor, errors: torch.Tensor) -> None:
        """Count a micro-batch: float32 [N] each."""
        bins = torch.bucketize(sigma.log(), self.edges)
        values = torch.stack([torch.ones_like(losses), losses, errors], dim=1)  # [N, 3]
        self.sums += torch.nn.functional.one_hot(bins, BINS).float().t() @ values


def summarize(sums: list[torch.Tensor], levels: LogNormal, elements: int) -> dict[str, Any]:
    """Average losses over all images and ranks; every rank calls it.

    Args:
        sums: `LossSums.sums` of this rank's steps.
        levels: Distribution of the noise levels.
        elements: C H W of an image.

    Returns:
        `loss` and `mse` per element, and `by_noise`: borders of ln(sigma) between the bins, number of images, loss
        and mse in each (None where there was no image).
    """
    total = distributed.all_reduce_sum(torch.stack(sums).double().sum(dim=0))
    count, loss, error = total.cpu().unbind(dim=1)
    average = {
        'images': [int(n) for n in count],
        'loss': [_ratio(a, n * elements) for a, n in zip(loss, count, strict=True)],
        'mse': [_ratio(a, n * elements) for a, n in zip(error, count, strict=True)],
    }
    return {
        'loss': _ratio(loss.sum(), count.sum() * elements),
        'mse': _ratio(error.sum(), count.sum() * elements),
        'by_noise': {'ln_sigma_edges': noise_edges(levels), **average},
    }


def _ratio(a: torch.Tensor, b: torch.Tensor) -> float | None:
    return (a / b).item() if b else None


@dataclasses.dataclass
class StepStats:
    """One optimizer step.

    Args:
        losses: Of this rank's images.
        learning_rate: Of the step.
        grad_norm: Norm of the gradient of the loss, a tensor on the device.
        nonfinite: Gradient elements that were replaced by 0 in each parameter, int64 on the device.
    """

    losses: LossSums
    learning_rate: float = math.nan
    grad_norm: torch.Tensor | None = None
    nonfinite: torch.Tensor | None = None


class NonfiniteWatch:
    """Counts gradient elements that are not finite, and steps in a row that have some.

    Args:
        names: Of the parameters, in the order of the network.
        limit: Steps in a row after which training makes no sense; 0 for any number.
    """

    def __init__(self, names: list[str], limit: int):
        self.names, self.limit = names, limit
        self.streak = 0

    def record(self, steps: list[StepStats]) -> dict[str, Any]:
        """Number of elements since the last call, and the three parameters with most of them."""
        counts = torch.stack([step.nonfinite for step in steps]).cpu()  # [steps, parameters]
        for bad in counts.any(dim=1).tolist():
            if not self.exceeded():
                self.streak = self.streak + 1 if bad else 0
        by_name = counts.sum(dim=0)
        worst = by_name.argsort(descending=True, stable=True)[:3]
        return {
            'nonfinite': int(by_name.sum()),
            'nonfinite_in': {self.names[i]: int(by_name[i]) for i in worst.tolist() if by_name[i]},
        }

    def exceeded(self) -> bool:
        """Whether there have been `limit` such steps in a row."""
        return bool(self.limit) and self.streak >= self.limit
