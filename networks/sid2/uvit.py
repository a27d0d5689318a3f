"""The Residual U-ViT (SiD2 section 2.3): one skip for each level, around the whole network inside it.

SiD2 leaves much of its inside to the reader. Taken here: patches are cut and joined without overlap, by linear layers;
ResBlocks and the embedding are those of progressive distillation's code base, where SiD2 comes from; transformer blocks
are sequential, normalize q and k, and turn them by their position in the image (axial RoPE), which needs no parameters.
Every block begins as the identity, and the network as F = 0.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import gelu, pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention, silu

from networks.dropout import Dropout
from networks.fourier import FourierFeatures
from networks.interface import Interface
from networks.sid2.config import UViTConfig, group_count

ROPE_BASE = 100.0  # wavelengths from 2 pi positions to almost this many times more


class Linear(nn.Module):
    """Linear layer over the last dimension, or convolution of [N, C, H, W]; weights are cast to the input's dtype.

    Args:
        in_channels, out_channels: Channels.
        kernel: Side length of the square kernel with `same` padding; 0 makes it act on the last dimension.
        bias: Whether it has one; it begins at 0.
        std: Of the initial output for standard normal input.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0, bias: bool = True, std: float = 1.0):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *([kernel] * 2 if kernel else [])))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weight (on the CPU, whatever the device)."""
        with torch.no_grad():
            fan_in = self.weight[0].numel()
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * (self.std / math.sqrt(fan_in)))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., Cin] -> [..., Cout], or [N, Cin, H, W] -> [N, Cout, H, W], in x's dtype."""
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        if weight.ndim == 2:
            return nn.functional.linear(x, weight, bias)
        return nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


class GroupNorm(nn.Module):
    """Normalization over each of at most 32 groups of channels, in x's dtype.

    Args:
        channels: Of [N, C, H, W].
        affine: Whether a trained scale and shift of each channel follow.
    """

    def __init__(self, channels: int, affine: bool = True):
        super().__init__()
        self.groups = group_count(channels)
        self.weight = nn.Parameter(torch.empty(channels)) if affine else None
        self.bias = nn.Parameter(torch.empty(channels)) if affine else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Scale 1 and shift 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the same shape."""
        affine = (None, None) if self.weight is None else (self.weight.to(x.dtype), self.bias.to(x.dtype))
        return nn.functional.group_norm(x, self.groups, *affine)


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, times a trained gain where it has `channels`."""

    def __init__(self, channels: int = 0):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(channels)) if channels else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Gain 1."""
        if self.gain is not None:
            nn.init.ones_(self.gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., C] -> the same shape, in x's dtype."""
        x = x * (x.float().square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype)
        return x if self.gain is None else x * self.gain.to(x.dtype)


class ResBlock(nn.Module):
    """x + conv(dropout(silu(film(norm(conv(silu(norm(x)))))))), film by the embedding; at first the identity."""

    def __init__(self, channels: int, dropout: float, config: UViTConfig):
        super().__init__()
        self.norm0 = GroupNorm(channels)
        self.conv0 = Linear(channels, channels, kernel=3)
        self.norm1 = GroupNorm(channels, affine=False)
        self.film = Linear(config.emb_channels, 2 * channels)
        self.dropout = Dropout(dropout)
        self.conv1 = Linear(channels, channels, kernel=3, std=0.0)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W], float32 [N, emb_channels] -> [N, C, H, W]."""
        scale, shift = self.film(emb).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        y = self.norm1(self.conv0(silu(self.norm0(x)))) * (1 + scale) + shift
        return x + self.conv1(self.dropout(silu(y)))


class TransformerBlock(nn.Module):
    """Self-attention, then an MLP, each a branch with RMS norm and film by the embedding; at first the identity."""

    def __init__(self, channels: int, dropout: float, config: UViTConfig):
        super().__init__()
        self.head_shape = (channels // config.channels_per_head, config.channels_per_head)
        self.film = Linear(config.emb_channels, 4 * channels)
        self.norm = RMSNorm()
        self.qkv = Linear(channels, 3 * channels)
        self.q_norm = RMSNorm(config.channels_per_head)
        self.k_norm = RMSNorm(config.channels_per_head)
        self.attn_out = Linear(channels, channels, std=0.0)
        self.mlp_in = Linear(channels, config.mlp_ratio * channels)
        self.dropout = Dropout(dropout)
        self.mlp_out = Linear(config.mlp_ratio * channels, channels, std=0.0)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W], float32 [N, emb_channels] -> [N, C, H, W]."""
        height, width = x.shape[2:]
        film = self.film(emb).to(x.dtype)[:, None].chunk(4, dim=2)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)  # [N, H W, C], the same memory where it is channels_last
        x = x + self._attention(self.norm(x) * (1 + film[0]) + film[1], height, width)
        y = self.norm(x) * (1 + film[2]) + film[3]
        x = x + self.mlp_out(self.dropout(gelu(self.mlp_in(y))))
        return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)

    def _attention(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """[N, H W, C] -> the same shape."""
        q, k, v = self.qkv(x).unflatten(2, (3, *self.head_shape)).permute(2, 0, 3, 1, 4)  # [N, heads, H W, d] each
        angles = positions(height, width, q.shape[-1], x.device)
        y = scaled_dot_product_attention(turn(self.q_norm(q), angles), turn(self.k_norm(k), angles), v)
        return self.attn_out(y.transpose(1, 2).flatten(2))


def positions(height: int, width: int, channels: int, device: torch.device) -> torch.Tensor:
    """Angles of rotary position embedding, half of them by row and half by column, float32 [H W, channels / 2]."""
    freqs = (1 / ROPE_BASE) ** torch.linspace(0, 1, channels // 4 + 1, device=device)[:-1]
    rows, columns = (torch.arange(side, device=device)[:, None] * freqs for side in (height, width))
    return torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=1)


def turn(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn pairs of channels (i, i + d / 2) of [..., L, d] by angles [L, d / 2], so that q.k knows distances alone."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class UViT(nn.Module):
    """F of the preconditioned denoiser.

    Args:
        config: What to build; already checked.
        interface: What goes in and comes out.
    """

    def __init__(self, config: UViTConfig, interface: Interface):
        super().__init__()
        emb_channels, widths = config.emb_channels, config.channels
        self.config, self.interface = config, interface
        self.emb_fourier = FourierFeatures(emb_channels // 4)
        self.emb_noise = nn.Sequential(
            Linear(emb_channels // 4, emb_channels), nn.SiLU(), Linear(emb_channels, emb_channels)
        )
        # Labels are one-hot: a class adds a row of the weight, of magnitude 1 at first.
        self.emb_label = self.emb_augment = None
        if interface.label_dim:
            self.emb_label = Linear(interface.label_dim, emb_channels, bias=False, std=math.sqrt(interface.label_dim))
        if interface.augment_dim:
            self.emb_augment = Linear(interface.augment_dim, emb_channels, bias=False)
        self.patch_in = Linear(interface.in_channels * config.patch**2, widths[0], kernel=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level in range(len(widths) - 1):
            self.down.append(self._blocks(level, config.down_blocks[level]))
            self.up.append(self._blocks(level, config.up_blocks[level]))
        self.mid = self._blocks(len(widths) - 1, config.mid_blocks)
        # Without bias: no change inside is no change outside.
        kernel, steps = config.resample_kernel, list(itertools.pairwise(widths))
        self.shrink = nn.ModuleList(Linear(fine, coarse, kernel, bias=False) for fine, coarse in steps)
        self.grow = nn.ModuleList(Linear(coarse, fine, kernel, bias=False) for fine, coarse in steps)
        self.norm_out = GroupNorm(widths[0])
        self.patch_out = Linear(widths[0], interface.out_channels * config.patch**2, kernel=1, std=0.0)

    def _blocks(self, level: int, count: int) -> nn.ModuleList:
        block = ResBlock if level < self.config.res_levels else TransformerBlock
        channels, dropout = self.config.channels[level], self.config.dropout[level]
        return nn.ModuleList(block(channels, dropout, self.config) for _ in range(count))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights and constants, on the CPU whatever the device."""
        for module in self.modules():
            if isinstance(module, Linear | GroupNorm | RMSNorm | FourierFeatures):
                module.reset_parameters(generator)

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """Named parts in order of execution, each named by the resolution of what it makes."""
        height, width = (side // self.config.patch for side in self.interface.img_resolution)
        sizes = [f'{height >> i}x{width >> i}' for i in range(len(self.config.channels))]
        yield f'{sizes[0]}_in', self.patch_in
        for level, blocks in enumerate(self.down):
            yield from ((f'{sizes[level]}_down{i}', block) for i, block in enumerate(blocks))
            yield f'{sizes[level + 1]}_shrink', self.shrink[level]
        yield from ((f'{sizes[-1]}_mid{i}', block) for i, block in enumerate(self.mid))
        for level, blocks in reversed(list(enumerate(self.up))):
            yield f'{sizes[level]}_grow', self.grow[level]
            yield from ((f'{sizes[level]}_up{i}', block) for i, block in enumerate(blocks))
        yield f'{sizes[0]}_out', self.patch_out

    def embed(
        self, c_noise: torch.Tensor, labels: torch.Tensor | None, augment: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Noise levels, classes (None: none of them) and augmentations -> float32 [N, emb_channels]."""
        emb = self.emb_noise(self.emb_fourier(c_noise.float()))
        for layer, given in ((self.emb_label, labels), (self.emb_augment, augment)):
            if layer is not None and given is not None:
                emb = emb + layer(given.float())
        return silu(emb)

    def body(self, x: torch.Tensor, emb: torch.Tensor, level: int = 0) -> torch.Tensor:
        """All levels from `level` inwards, [N, channels[level], H, W] -> the same shape (SiD2 eq. 5).

        f(x) = f_up(U(f_mid(D h) - D h) + h) with h = f_down(x): only what the inner network changes is enlarged.
        """
        if level == len(self.down):
            for block in self.mid:
                x = block(x, emb)
            return x
        for block in self.down[level]:
            x = block(x, emb)
        inner = self.shrink[level](nn.functional.avg_pool2d(x, 2))
        change = self.grow[level](self.body(inner, emb, level + 1) - inner)
        x = x + nn.functional.interpolate(change, scale_factor=2, mode='nearest')
        for block in self.up[level]:
            x = block(x, emb)
        return x

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N, C, H, W] in any float dtype, float32 [N], [N, label_dim], [N, augment_dim] -> [N, out_channels, H, W]."""
        emb = self.embed(c_noise, labels, augment)
        x = pixel_unshuffle(x, self.config.patch).contiguous(memory_format=torch.channels_last)
        x = self.body(self.patch_in(x), emb)
        return pixel_shuffle(self.patch_out(silu(self.norm_out(x))), self.config.patch)
