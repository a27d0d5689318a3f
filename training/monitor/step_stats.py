"""What a training step leaves for the status lines: sums on the device, so that no step waits for it."""

import dataclasses
import math
from typing import Any

import torch

from torch_utils import distributed

BINS = 10  # of ln(sigma), the outer two open


def noise_edges(levels: Any) -> list[float]:
    """The BINS - 1 inner borders of the bins of ln(sigma), where a normal distribution has -2, -1.5, ..., 2.

    Args:
        levels: See `diffusion.levels`.
    """
    z = torch.tensor([i / 2 - 2 for i in range(BINS - 1)], dtype=torch.float64)
    return levels.from_normal(z).log().tolist()


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


def reduced(sums: list[torch.Tensor]) -> torch.Tensor:
    """Sums of all ranks for each step, float64 [steps, BINS, 3] on the CPU; every rank calls it."""
    return distributed.all_reduce_sum(torch.stack(sums).double()).cpu()


def summarize(total: torch.Tensor, levels: Any, elements: int) -> dict[str, Any]:
    """Average losses over all images.

    Args:
        total: Sums over all steps and ranks, float64 [BINS, 3].
        levels: Distribution of the noise levels.
        elements: C H W of an image.

    Returns:
        `loss` and `mse` per element, and `by_noise`: borders of ln(sigma) between the bins, number of images, loss
        and mse in each (None where there was no image).
    """
    count, loss, error = total.unbind(dim=1)
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
        grad_norm: Norm of the gradient of the loss, a tensor on the device; the same on all ranks.
        nonfinite: Gradient elements that were replaced by 0 in each parameter, int64 on the device, likewise.
    """

    losses: LossSums
    learning_rate: float = math.nan
    grad_norm: torch.Tensor | None = None
    nonfinite: torch.Tensor | None = None


class PendingStats:
    """What the steps since the last status line have left, to go into the next one.

    It belongs to the state of a run: a run that is resumed between two status lines writes the same lines.

    Args:
        parameters: Number of the network's parameters.

    Attributes:
        sums: float64 [steps, BINS, 3], over all ranks.
        grad_norm: float32 [steps].
        nonfinite: int64 [steps, parameters].
        streak: Steps in a row, up to the last one before these, with gradients that were not finite; int64 [].
    """

    NAMES = ('sums', 'grad_norm', 'nonfinite', 'streak')

    def __init__(self, parameters: int):
        self.streak = torch.zeros((), dtype=torch.int64)
        self.parameters = parameters
        self._steps: list[StepStats] = []
        self.clear()

    def clear(self) -> None:
        """Begin the next status line."""
        self._steps.clear()
        self.sums = torch.zeros(0, BINS, 3, dtype=torch.float64)
        self.grad_norm = torch.zeros(0)
        self.nonfinite = torch.zeros(0, self.parameters, dtype=torch.int64)

    def add(self, step: StepStats) -> None:
        """Count a step; nothing waits for the device."""
        self._steps.append(step)

    def collect(self) -> None:
        """Bring the attributes up to date; waits for the device, and every rank calls it."""
        if not self._steps:
            return
        self.sums = torch.cat([self.sums, reduced([step.losses.sums for step in self._steps])])
        self.grad_norm = torch.cat([self.grad_norm, torch.stack([step.grad_norm for step in self._steps]).cpu()])
        self.nonfinite = torch.cat([self.nonfinite, torch.stack([step.nonfinite for step in self._steps]).cpu()])
        self._steps.clear()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What `load` restores, as collected."""
        return {name: getattr(self, name).clone() for name in self.NAMES}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.clear()
        for name in self.NAMES:
            setattr(self, name, tensors[name].clone())

    def current_streak(self) -> int:
        """Steps in a row, up to the last that was collected, with gradients that were not finite."""
        bad = self.nonfinite.any(dim=1).tolist()
        return bad[::-1].index(False) if False in bad else int(self.streak) + len(bad)

    def vanished(self) -> int:
        """Number of steps with finite gradients of which every element was 0."""
        return int(((self.grad_norm == 0) & ~self.nonfinite.any(dim=1)).sum())

    def bad_gradients(self, names: list[str], limit: int) -> tuple[dict[str, Any], bool]:
        """Look at the gradients that were not finite, and count the steps in a row that had some.

        Args:
            names: Of the parameters.
            limit: Steps in a row that are too many; 0 for any number.

        Returns:
            Number of elements and the three parameters with most of them; whether the limit was reached.
        """
        exceeded = False
        for bad in self.nonfinite.any(dim=1).tolist():
            self.streak = self.streak + 1 if bad else torch.zeros_like(self.streak)
            exceeded |= bool(limit) and int(self.streak) >= limit
        by_name = self.nonfinite.sum(dim=0)
        worst = by_name.argsort(descending=True, stable=True)[:3]
        found = {
            'nonfinite': int(by_name.sum()),
            'nonfinite_in': {names[i]: int(by_name[i]) for i in worst.tolist() if by_name[i]},
        }
        return found, exceeded
