"""Magnitude-preserving operations (EDM2 appendix B): outputs have unit magnitude where the inputs have."""

import itertools
import math

import torch
from torch import nn

from networks.folding import Folding
from networks.layout import conv2d

NORM_EPS = 1e-4  # keeps normalize() defined at zero
SILU_RMS = 0.596  # root mean square of silu(x) for x ~ N(0, 1), as EDM2 rounds it


def normalize(x: torch.Tensor, dims: tuple[int, ...] | None = None) -> torch.Tensor:
    """Scale to unit root mean square over `dims` (EDM2 eq. 47): x / (eps + norm(x) sqrt(numel(norm) / numel(x))).

    Args:
        x: Any shape; the norm is taken in float32 (or float64 if x is), the result has x's dtype.
        dims: Dimensions under one norm; by default all but the first, a weight's fan-in.
            `(1,)` on a feature map is pixel norm (EDM2 eq. 30).
    """
    return x / _divisor(x, tuple(range(1, x.ndim)) if dims is None else dims).to(x.dtype)


def _divisor(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    return torch.add(NORM_EPS, norm, alpha=math.sqrt(norm.numel() / x.numel()))


class NormalizedWeight(torch.autograd.Function):
    """normalize(w) scale, with the gradient in closed form: 6 passes over the weight instead of autograd's 17.

    With d = eps + a |w| for each output channel, a = 1 / sqrt(fan-in): dL/dw = (scale / d) (G - w a (G . w) / (|w| d)).
    """

    @staticmethod
    def forward(ctx, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """[Cout, ...] -> the same shape, in its dtype."""
        divisor = _divisor(weight, tuple(range(1, weight.ndim)))
        ctx.save_for_backward(weight, divisor)
        ctx.scale = scale
        normalized = weight / divisor
        return normalized if scale == 1 else normalized.mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The weight's gradient, in its memory layout."""
        weight, divisor = ctx.saved_tensors
        dot = torch.linalg.vecdot(G.flatten(1), weight.flatten(1)).view_as(divisor)
        length = (divisor - NORM_EPS).clamp(min=torch.finfo(divisor.dtype).tiny)  # a |w|; where w = 0, so is dot
        factor = ctx.scale / divisor
        along = -factor * dot / (divisor * length * weight[0].numel())
        return (weight * along).addcmul_(G, factor), None


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU scaled to unit magnitude for standard normal input (EDM2 eq. 81)."""
    return nn.functional.silu(x) / SILU_RMS


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Blend two tensors of equal shape, b with weight t in [0, 1] (EDM2 eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_sum_gains(t: float) -> tuple[float, float]:
    """What `mp_sum` multiplies a and b by."""
    return (1 - t) / math.hypot(1 - t, t), t / math.hypot(1 - t, t)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Concatenate [N, Ca, H, W] and [N, Cb, H, W] along channels, b contributing with weight t (EDM2 eq. 103)."""
    Na, Nb = a.shape[1], b.shape[1]
    scale = math.sqrt((Na + Nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(Na)), b * (scale * t / math.sqrt(Nb))], dim=1)


class MPConv(Folding):
    """Convolution or linear layer with weight normalization and no bias (EDM2 eq. 66 and algorithm 1).

    Weights start as N(0, 1). In training mode the stored weight is first overwritten by its normalized version
    ("forced" weight normalization), so its magnitude cannot grow; then, always, the weight used is
    normalize(weight) gain / sqrt(fan_in), cast to the input's dtype.

    Args:
        in_channels, out_channels: Channels; for a depthwise convolution they are equal.
        kernel: Side length of the square kernel with `same` padding; 0 makes a linear layer on [N, C].
        groups: Groups of channels that do not mix; `in_channels` makes it depthwise.
    """

    forced = True

    def __init__(self, in_channels: int, out_channels: int, kernel: int, groups: int = 1):
        super().__init__()
        assert in_channels % groups == 0 and out_channels % groups == 0
        self.groups = groups
        window = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *window))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weight from N(0, 1) (on the CPU, whatever the device)."""
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """[N, Cin, H, W] -> [N, Cout, H, W], or [N, Cin] -> [N, Cout] for a linear layer, in x's dtype."""
        if self.training and not self.settled:
            # Inductor would make other weights and gradients of it. As a decorator, `disable` takes a second to import.
            torch.compiler.disable(self.settle)() if torch.compiler.is_compiling() else self.settle()
        w = self.weight_for(x, gain)
        return x @ w.t() if w.ndim == 2 else conv2d(x, w, self.groups, self.is_packed)

    def of_upsampled(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """`forward` of x with every pixel made 2x2, by 2x2 kernels: float [N, Cin, H, W] -> [N, Cout, 2 H, 2 W].

        Of the 3x3 pixels under a kernel several are the same, so that their weights add up: two rows (columns) of
        weights for an even row (column) of the result, two others for an odd one.
        """
        weight = self.weight_for(x, gain, compute=self.weight_of_upsampled)
        four = conv2d(x, weight, 1, self.is_packed).unflatten(1, (2, 2, -1))
        n, _, _, channels, h, w = four.shape
        shape, layout = (n, channels, 2 * h - 2, 2 * w - 2), torch.channels_last
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for i, j in itertools.product((0, 1), repeat=2):
            y[:, :, i::2, j::2] = four[:, i, j, :, i : i + h - 1, j : j + w - 1]
        return y

    def settle(self) -> None:
        """Overwrite the stored weight by its normalized version."""
        if self.forced:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight))

    def used_weight(self, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """What the input is multiplied with, float32."""
        scale = gain / math.sqrt(self.weight[0].numel())
        if torch.compiler.is_compiling():  # a compiler fuses by itself what autograd does
            return normalize(self.weight) * scale
        if isinstance(scale, torch.Tensor):
            return NormalizedWeight.apply(self.weight, 1.0) * scale
        return NormalizedWeight.apply(self.weight, scale)

    def weight_of_upsampled(self, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """`used_weight` [Cout, Cin, 3, 3] -> [4 Cout, Cin, 2, 2], for even and odd rows and columns of the result."""
        w = self.used_weight(gain)
        sums = w.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # of an even or odd row, 2 of 3 rows
        return torch.einsum('ipk,jql,ockl->ijocpq', sums, sums, w).flatten(0, 2)
