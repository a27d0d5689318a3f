"""Layers of the EDM networks. Weights are float32 and cast to the features' dtype at use."""

import dataclasses
import math

import torch
from torch import nn

MAX_GROUPS = 32  # of a group norm
CHANNELS_PER_GROUP = 4  # at least


@dataclasses.dataclass(frozen=True)
class Init:
    """How a layer starts: weight and bias are drawn with standard deviation gain / sqrt(fan).

    Args:
        fan: `in`: inputs of one output (Kaiming); `mean`: the mean of inputs and outputs (Xavier).
        weight, bias: Gains.
        normal: Normal instead of uniform.
    """

    fan: str
    weight: float = 1.0
    bias: float = 0.0
    normal: bool = False

    def draw(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draw `module.weight` ([out, in, ...]) and `module.bias` on the CPU, whatever their device."""
        outputs, inputs, *window = module.weight.shape
        fan = inputs if self.fan == 'in' else (inputs + outputs) / 2
        for tensor, gain in ((module.weight, self.weight), (module.bias, self.bias)):
            if tensor is None:
                continue
            if self.normal:
                z = torch.randn(tensor.shape, generator=generator)
            else:
                z = math.sqrt(3) * (2 * torch.rand(tensor.shape, generator=generator) - 1)
            with torch.no_grad():
                tensor.copy_(z * (gain / math.sqrt(fan * math.prod(window))))


def cast(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """A weight in x's dtype."""
    return None if tensor is None else tensor.to(x.dtype)


class Linear(nn.Module):
    """y = x W^T + b for x [N, in_channels]."""

    def __init__(self, in_channels: int, out_channels: int, init: Init, bias: bool = True):
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw weight and bias."""
        self.init.draw(self, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels] -> [N, out_channels]."""
        return nn.functional.linear(x, cast(self.weight, x), cast(self.bias, x))


class Conv2d(nn.Module):
    """Convolution with zero padding, together with resampling by a small filter; the bias comes last.

    Args:
        in_channels, out_channels: Channels; equal where there is no kernel.
        kernel: Side length: 3, 1, or 0 for resampling alone, which has no weights.
        init: Of weight and bias.
        resample: `keep`, `up` or `down` by two.
        taps: Of the resampling filter along one axis: (1, 1) is the mean of two pixels or their nearest neighbour.
        resample_last: Filter after the kernel instead of before it (`down` only).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        init: Init,
        resample: str = 'keep',
        taps: tuple[int, ...] = (1, 1),
        resample_last: bool = False,
    ):
        super().__init__()
        assert resample in ('keep', 'up', 'down') and (resample == 'down' or not resample_last)
        assert kernel or in_channels == out_channels
        self.init, self.resample, self.taps, self.resample_last = init, resample, taps, resample_last
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(out_channels)) if kernel else None
        side = len(taps)
        self.register_buffer('resample_filter', torch.empty(1, 1, side, side) if resample != 'keep' else None)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw weight and bias; the filter is f f^T / (sum f)^2."""
        if self.weight is not None:
            self.init.draw(self, generator)
        if self.resample_filter is not None:
            f = torch.tensor(self.taps, dtype=torch.float32)
            self.resample_filter.copy_(f.outer(f) / f.sum() ** 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W'] in x's dtype."""
        margin = (len(self.taps) - 1) // 2
        if self.resample != 'keep' and not self.resample_last:
            x = self._filtered(x, margin)
        if self.weight is not None:
            padding = self.weight.shape[-1] // 2 + margin * self.resample_last
            bias = None if self.resample_last else cast(self.bias, x)
            x = nn.functional.conv2d(x, cast(self.weight, x), bias, padding=padding)
        if self.resample_last:
            x = self._filtered(x, 0) + cast(self.bias, x)[:, None, None]
        return x

    def _filtered(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        """Every channel resampled by itself; what lies outside is zero."""
        channels = x.shape[1]
        kernel = cast(self.resample_filter, x).expand(channels, -1, -1, -1)
        if self.resample == 'down':
            return nn.functional.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
        return nn.functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)


class GroupNorm(nn.Module):
    """Group normalization with at least 4 channels in a group, and at most 32 groups.

    Args:
        channels: A multiple of the number of groups.
        eps: Keeps it defined where features are constant.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    @staticmethod
    def groups(channels: int) -> int:
        """Number of groups, 0 where there are too few channels."""
        return min(MAX_GROUPS, channels // CHANNELS_PER_GROUP)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Start as the plain normalization."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, channels, H, W] -> the same in x's dtype."""
        groups = self.groups(self.weight.numel())
        return nn.functional.group_norm(x, groups, cast(self.weight, x), cast(self.bias, x), self.eps)


def positional_embedding(c_noise: torch.Tensor, channels: int, endpoint: bool) -> torch.Tensor:
    """cos and sin of c_noise at frequencies from 1 down to 1/10000, float32 [N] -> [N, channels], cosines first.

    Args:
        endpoint: Whether the last frequency is 1/10000 itself (DDPM++) or the one before it would be (ADM).
    """
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=c_noise.device) / (half - endpoint)
    angles = c_noise[:, None] * 10000**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """cos and sin of 2 pi freqs c_noise with random constant frequencies of standard deviation 16 (NCSN++)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer('freqs', torch.empty(channels // 2))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the frequencies."""
        self.freqs.copy_(16 * torch.randn(self.freqs.shape, generator=generator))

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        """float32 [N] -> [N, channels], cosines first."""
        angles = c_noise[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
