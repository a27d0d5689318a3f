"""What a network costs: parameters, floating-point operations, memory; counted on the meta device, without weights.

The convention is that of EDM2 appendix D.5: one forward pass at batch 1 of the formulas as they are written, weight
normalization included. A multiply-accumulate counts as one operation.
"""

import dataclasses
import functools
import re
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.dropout import seed_dropout

aten = torch.ops.aten

# Operations for each element of the output, where that is all that matters.
PER_OUTPUT = {
    **dict.fromkeys((aten.add, aten.mul, aten.div, aten.sqrt, aten.log, aten.cos, aten.pow, aten.reciprocal), 1),
    aten.silu: 3,
    aten.gelu: 4,
    **dict.fromkeys((aten.lerp, aten.clamp), 2),
    **dict.fromkeys((aten.avg_pool2d, aten.upsample_nearest2d), 4),
}
MATRIX_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}  # and which argument is the left factor
# Reshapes, copies, casts, indexing and constants cost nothing.
FREE = {
    *(aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.expand, aten.unsqueeze, aten.select),
    *(aten.clone, aten._to_copy, aten.cat, aten.ones_like, aten.new_zeros, aten.unbind, aten.slice, aten.empty_like),
    *(aten.detach, aten.alias, aten.split, aten.repeat, aten.arange, aten.linspace, aten.roll, aten.index),
    *(aten.pixel_shuffle, aten.pixel_unshuffle, aten.argmin),
}

# Results of these share no memory with others; in Python, their meta kernels take as long as small networks do.
SLOW = {
    *(aten.add, aten.mul, aten.div, aten.pow, aten.clamp, aten.lerp, aten.linalg_vector_norm, aten._safe_softmax),
    *(aten.native_group_norm, aten.convolution, aten.cat, aten.silu),
}


def operation_cost(func: Any, args: tuple, out: Any) -> tuple[str, int, int]:
    """Kind, operations and multiply-accumulates of one operator call.

    An operator that nobody has assigned a cost counts one for each element of its output, under its own name.
    """
    packet, size = func.overloadpacket, out.numel() if isinstance(out, torch.Tensor) else 0
    kind = packet.__name__.strip('_')
    if packet is aten.convolution:
        x, weight, _, stride, _, _, transposed, _, groups = args
        macs = (x.numel() if transposed else size) * weight[0].numel()  # weight: [Cout, Cin / groups, kh, kw]
        depthwise = groups > 1
        if weight.shape[1] == 1 and stride[0] > 1:
            return 'resampling', weight[0].numel() * size, 0
        kind = 'depthwise convolution' if depthwise else f'{weight.shape[2]}x{weight.shape[3]} convolution'
        return kind, macs, macs
    if packet in MATRIX_PRODUCTS:
        macs = size * args[MATRIX_PRODUCTS[packet]].shape[-1]
        return 'linear', macs, macs
    if packet in (aten.linalg_vector_norm, aten.mean):
        return 'norm', args[0].numel(), 0
    if packet is aten.native_group_norm:  # mean, variance, then one scale and shift, which hold the trained ones
        return 'norm', 4 * size, 0
    if packet in PER_OUTPUT:
        return kind, PER_OUTPUT[packet] * size, 0
    if packet in FREE:
        return kind, 0, 0
    return kind, size, 0


def attention_cost(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    """Operations and multiply-accumulates of softmax(q k / sqrt(d)) v for [N, heads, L, d], written out."""
    scores = q.numel() // q.shape[-1] * k.shape[-2]
    macs = 2 * scores * q.shape[-1]
    return macs + k.numel() + 3 * scores, macs


class _Layout(NamedTuple):
    """All that there is to know of a tensor on the meta device."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _with_layouts(value: Any) -> Any:
    """Layouts in place of tensors."""
    if isinstance(value, torch.Tensor):
        return _Layout(value.shape, value.stride(), value.dtype, value.device)
    return tuple(map(_with_layouts, value)) if isinstance(value, list | tuple) else value


def _without_layouts(value: Any) -> Any:
    """New tensors in place of layouts."""
    if isinstance(value, _Layout):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
    return tuple(map(_without_layouts, value)) if isinstance(value, tuple) else value


@functools.lru_cache(maxsize=None, typed=True)
def _layouts_of_results(func: Any, *args: Any) -> Any:
    """What an operator makes of arguments; networks repeat their calls."""
    return _with_layouts(func(*map(_without_layouts, args)))


class _AttentionCounter(TorchFunctionMode):
    """Counts attention as one operation, whichever operators this machine's implementation is made of."""

    def __init__(self, counter: '_Counter'):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.counter.add('attention', *attention_cost(args[0], args[1]))
        self.counter.paused = True
        out = func(*args, **(kwargs or {}))
        self.counter.paused = False
        return out


class _Counter(TorchDispatchMode):
    """Counts operators while it is active, and the memory of the activations that they make.

    Args:
        weights: Tensors whose memory, and what is computed from them alone, is no activation.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.weights = {t.untyped_storage()._cdata for t in weights}
        self.place = 'embedding'
        self.by_kind: Counter[str] = Counter()
        self.by_place: Counter[str] = Counter()
        self.macs = 0
        self.paused = False
        self.live: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.overloadpacket in SLOW and not kwargs and all(t.is_meta for t in tensors):
            out = _without_layouts(_layouts_of_results(func, *map(_with_layouts, args)))
        else:
            out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, tuple | list) else out
        if not self.paused:
            self.add(*operation_cost(func, args, first))
        inputs = {t.untyped_storage()._cdata for t in tensors}
        from_weights = bool(inputs) and inputs <= self.weights
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._track(tensor.untyped_storage(), from_weights)
        return out

    def add(self, kind: str, operations: int, macs: int) -> None:
        """Count operations at the current place."""
        if operations:
            self.by_kind[kind] += operations
            self.by_place[self.place] += operations
            self.macs += macs

    def _track(self, storage: torch.UntypedStorage, from_weights: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.live or key in self.weights:
            return
        if from_weights:
            self.weights.add(key)
            weakref.finalize(storage, self.weights.discard, key)
            return
        self.live[key] = size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.bytes -= self.live.pop(key, 0)


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What one forward pass at batch 1 costs.

    Attributes:
        parameters: Number of trained weights.
        operations: In the papers' convention.
        macs: Multiply-accumulates of convolutions, linear layers and attention alone.
        peak_bytes: Most memory held at once by activations; parameters and weights computed from them left out.
        by_kind, by_place: Operations by kind of operator, and by resolution.
    """

    parameters: int
    operations: int
    macs: int
    peak_bytes: int
    by_kind: dict[str, int]
    by_place: dict[str, int]


def complexity(config: NetworkConfig, precision: str = 'fp32') -> Complexity:
    """Count what a network costs, without allocating it."""
    net, inputs = _without_weights(config, precision)
    counter = _Counter([*net.parameters(), *net.buffers()])
    hooks = [module.register_forward_pre_hook(_enter(counter, name)) for name, module in net.unet.stages()]
    for module in net.modules():
        if hasattr(module, 'fused'):
            module.fused = False  # count the formulas, not our arrangement of them
    with torch.no_grad(), counter, _AttentionCounter(counter):
        net(*inputs)
    for hook in hooks:
        hook.remove()
    return Complexity(
        parameters=sum(p.numel() for p in net.parameters()),
        operations=sum(counter.by_kind.values()),
        macs=counter.macs,
        peak_bytes=counter.peak,
        by_kind=dict(counter.by_kind.most_common()),
        by_place=dict(counter.by_place),
    )


def _enter(counter: _Counter, name: str):
    match = re.search(r'\d+x\d+', name)

    def hook(module, args):
        counter.place = match[0] if match else name

    return hook


def _without_weights(config: NetworkConfig, precision: str) -> tuple[Denoiser, tuple]:
    """A network on the meta device, and inputs for it at batch 1."""
    with torch.device('meta'):
        net = Denoiser(config, precision=precision).eval()
        x = torch.empty(1, *config.image_shape)
        labels, augment = (torch.empty(1, n) if n else None for n in (config.label_dim, config.augment_dim))
        return net, (x, torch.empty(1), labels, augment)


def saved_bytes(config: NetworkConfig, precision: str = 'fp32') -> int:
    """Bytes of activations that a training pass keeps per image for its gradients, each memory once."""
    return kept_for_gradients(config, precision)[0]


def kept_for_gradients(config: NetworkConfig, precision: str = 'fp32') -> tuple[int, int]:
    """Bytes that a training pass keeps for its gradients, each memory once, without allocating them.

    Returns:
        Of activations, per image, and of what is computed from the weights alone, whatever the batch.
    """
    net, inputs = _without_weights(config, precision)
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that no address is used twice
        return tensor

    seed_dropout(net.train(), 0, [0])
    counter = _Counter([*net.parameters(), *net.buffers()])
    counter.paused = True  # it only tells what comes from weights
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counter:
        net(*inputs)
    given = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers()]}
    sizes = [0, 0]
    for key, storage in saved.items():
        if key not in given:
            sizes[key in counter.weights] += storage.nbytes()
    return sizes[0], sizes[1]
