"""Layers that compute the weight they use from the one they store, and how to have that done once instead of always."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


class Folding(nn.Module):
    """A layer whose `used_weight(...)` is computed in every call, within `folded` in the first one alone."""

    folding = False
    settled = False
    kept: torch.Tensor | None = None

    def weight_as(self, dtype: torch.dtype, *args) -> torch.Tensor:
        """`used_weight(*args)`, cast to `dtype`."""
        if self.kept is not None and self.kept.dtype == dtype:
            return self.kept
        weight = self.used_weight(*args).to(dtype)
        if self.folding:
            self.kept = weight
        return weight

    def settle(self) -> None:
        """Do to the stored weight what training does before a step; by default nothing."""


@contextlib.contextmanager
def folded(nets: Iterable[nn.Module]) -> Iterator[None]:
    """Let networks in evaluation mode compute their weights once: the same bits, while nothing changes parameters.

    Weights are kept from the first evaluation on, and dropped at the end. Within another `folded` of the same network
    it does nothing.
    """
    layers = [m for net in nets for m in net.modules() if isinstance(m, Folding) and not m.folding]
    for layer in layers:
        assert not layer.training
        layer.folding = True
    try:
        yield
    finally:
        for layer in layers:
            layer.folding, layer.kept = False, None


@contextlib.contextmanager
def settled(net: nn.Module) -> Iterator[None]:
    """`settle` layers in training now, instead of in every call: once for all micro-batches of a step."""
    layers = [m for m in net.modules() if isinstance(m, Folding) and m.training]
    for layer in layers:
        layer.settle()
        layer.settled = True
    try:
        yield
    finally:
        for layer in layers:
            layer.settled = False
