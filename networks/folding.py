"""Layers that compute the weight they use from the one they store, and how to have that done once instead of always."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from networks.layout import packed


class Folding(nn.Module):
    """A layer whose `used_weight(...)` is computed in every call; `folded` or `gathering`, in the first one alone."""

    groups = 1
    folding = False
    settled = False
    gathering = False
    computed: torch.Tensor | None = None  # of parameters, where what is kept gathers gradients
    kept: torch.Tensor | None = None
    kept_for: tuple = ()
    is_packed = False  # what is kept

    def weight_for(self, x: torch.Tensor, *args, compute: Callable | None = None) -> torch.Tensor:
        """`compute` or `used_weight` of `args`, cast to x's dtype; `folded`, in the layout that is fastest for x."""
        compute = compute or self.used_weight
        if self.gathering and torch.is_grad_enabled():
            if self.kept is None:
                self.computed = compute(*args)
                self.kept = self.computed.detach().requires_grad_(self.computed.requires_grad)
            return self.kept.to(x.dtype)
        if self.folding and self.kept is not None and self.kept_for == (x.dtype, x.shape if self.is_packed else None):
            return self.kept
        weight = compute(*args).to(x.dtype)
        if self.folding:
            weight = packed(weight, x, self.groups)
            self.is_packed = weight.is_mkldnn
            self.kept, self.kept_for = weight, (x.dtype, x.shape if self.is_packed else None)
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
            layer.folding, layer.kept, layer.is_packed = False, None, False


@contextlib.contextmanager
def settled(net: nn.Module, gathering: bool = False) -> Iterator[None]:
    """`settle` layers in training now, instead of in every call: once for all micro-batches of a step.

    Args:
        net: The network.
        gathering: Whether weights are computed once, too. Their gradients then add up, and reach the parameters at the
            end: the same to rounding, for 8 bytes of memory for each parameter.
    """
    layers = [m for m in net.modules() if isinstance(m, Folding) and m.training]
    for layer in layers:
        layer.settle()
        # All of them, or a compiler finds some only in the second step, and compiles anew.
        layer.settled, layer.gathering, layer.computed, layer.kept = True, gathering, None, None
    try:
        yield
        used = [layer for layer in layers if layer.kept is not None and layer.kept.grad is not None]
        torch.autograd.backward([layer.computed for layer in used], [layer.kept.grad for layer in used])
    finally:
        for layer in layers:
            layer.settled, layer.gathering, layer.computed, layer.kept = False, False, None, None
