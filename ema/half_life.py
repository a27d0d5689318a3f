"""The traditional exponential moving average, with a half-life, as EDM tracks it."""

from collections.abc import Mapping

import torch


def halflife_beta(halflife: float, rampup: float, nimg: int, delta: int) -> float:
    """Share of the old average kept in an update: 0.5^(delta / h), h = min(halflife, rampup * nimg); 0 if h is.

    Args:
        halflife: Images over which the weight of the past halves.
        rampup: Share of the training time that the half-life may be at most; 0 for no such bound.
        nimg: Images before the update.
        delta: Images since the update before.
    """
    h = min(halflife, rampup * nimg) if rampup else halflife
    return 0.5 ** (delta / h) if h > 0 else 0.0


class HalfLifeEMA:
    """Running exponential average of a network's parameters; buffers are copied.

    Args:
        tensors: Named parameters and buffers; the average begins with their values.
        halflife, rampup: See `halflife_beta`.

    Attributes:
        average: name -> tensor. Plain tensors, so nothing can put them into training mode.
    """

    @torch.no_grad()
    def __init__(self, tensors: Mapping[str, torch.Tensor], halflife: float, rampup: float = 0.05):
        self.halflife, self.rampup = halflife, rampup
        self.average = {name: t.detach().clone() for name, t in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, torch.Tensor], nimg: int, delta: int) -> None:
        """Average in the values that `tensors` have after `nimg` images, `delta` images after the last update."""
        weight = 1 - halflife_beta(self.halflife, self.rampup, nimg - delta, delta)
        torch._foreach_lerp_(list(self.average.values()), [tensors[name].detach() for name in self.average], weight)
