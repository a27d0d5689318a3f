"""What DDPM++, NCSN++ and ADM share: where the blocks of the U-Net are, and what a block does."""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn

from networks.dropout import Dropout
from networks.edm.layers import Conv2d, GroupNorm, Init, Linear
from networks.interface import LARGEST, Interface

MOST_LEVELS = 16  # configs also come from files that nobody vouches for
MOST_BLOCKS = 64


class Place(NamedTuple):
    """A block's place in the U-Net; `resample` is `keep`, `up` or `down`."""

    name: str
    in_channels: int
    out_channels: int
    resample: str
    attention: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The numbers that all of EDM's U-Nets have.

    Args:
        model_channels: Width of the first level, where `channel_mult` is 1.
        channel_mult: Width of each level relative to it, finest first.
        channel_mult_emb: Width of the embedding relative to it.
        num_blocks: Blocks per level.
        attn_resolutions: Levels whose shorter side is in this list have attention.
        dropout: Share of features dropped in training.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    channel_mult_emb: int = 4
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float = 0.1

    @property
    def width(self) -> int:
        """Features per pixel of the finest level."""
        return self.model_channels * self.channel_mult[0]

    def layout(self, interface: Interface, first: int, attend_once: bool) -> tuple[list[Place], list[Place]]:
        """The blocks of encoder and decoder in order of execution; the first convolution comes before them.

        Every block of the encoder, and that convolution, feeds one `block` of the decoder, last first.

        Args:
            first: Channels behind the first convolution.
            attend_once: Attention in the last block only of a level of the decoder, instead of in all.
        """
        height, breadth = interface.img_resolution
        levels = [(height >> i, breadth >> i, self.model_channels * mult) for i, mult in enumerate(self.channel_mult)]
        encoder, decoder, width, skips = [], [], first, [first]
        for level, (height, breadth, channels) in enumerate(levels):
            name, attention = f'{height}x{breadth}', min(height, breadth) in self.attn_resolutions
            if level:
                encoder.append(Place(f'{name}_down', width, width, 'down', False))
                skips.append(width)
            for i in range(self.num_blocks):
                encoder.append(Place(f'{name}_block{i}', width, channels, 'keep', attention))
                skips.append(channels)
                width = channels
        for level, (height, breadth, channels) in reversed(list(enumerate(levels))):
            name, attention = f'{height}x{breadth}', min(height, breadth) in self.attn_resolutions
            if level == len(levels) - 1:
                decoder.append(Place(f'{name}_in0', width, width, 'keep', True))
                decoder.append(Place(f'{name}_in1', width, width, 'keep', False))
            else:
                decoder.append(Place(f'{name}_up', width, width, 'up', False))
            for i in range(self.num_blocks + 1):
                here = attention and (i == self.num_blocks or not attend_once)
                decoder.append(Place(f'{name}_block{i}', width + skips.pop(), channels, 'keep', here))
                width = channels
        return encoder, decoder

    def value_problems(self, interface: Interface) -> list[str]:
        """What is wrong with the numbers, whatever the network; where there is none, `layout` works."""
        found = [
            f'{name} must be at least 1, not {getattr(self, name)}'
            for name in ('model_channels', 'channel_mult_emb', 'num_blocks')
            if getattr(self, name) < 1
        ]
        if not self.channel_mult or min(self.channel_mult) < 1:
            found.append(f'channel_mult needs one factor of at least 1 for each level, not {self.channel_mult}')
        widest = self.model_channels * max(*self.channel_mult, self.channel_mult_emb, 1)
        if widest > LARGEST or len(self.channel_mult) > MOST_LEVELS or self.num_blocks > MOST_BLOCKS:
            found.append(
                f'widths above {LARGEST}, more than {MOST_LEVELS} levels or {MOST_BLOCKS} blocks in one are not built'
            )
        if not 0 <= self.dropout < 1:
            found.append(f'dropout must be in [0, 1), not {self.dropout}')
        factor = 2 ** max(len(self.channel_mult) - 1, 0)
        for name, side in zip(('height', 'width'), interface.img_resolution, strict=True):
            if side < factor or side % factor:
                near = max(round(side / factor), 1) * factor
                found.append(
                    f'{len(self.channel_mult)} levels need a {name} divisible by {factor}, not {side} (try {near})'
                )
        return found


def width_problems(places: list[Place]) -> list[str]:
    """Widths that group norms cannot divide, each once."""
    found = []
    for channels in dict.fromkeys(width for place in places for width in (place.in_channels, place.out_channels)):
        groups = GroupNorm.groups(channels)
        if not groups or channels % groups:
            unit = max(groups, 4)
            near = max(round(channels / unit), 1) * unit
            found.append(f'{channels} channels do not divide into {max(groups, 1)} groups of at least 4 (try {near})')
    return found


@dataclasses.dataclass(frozen=True)
class Style:
    """What the blocks of a network have in common.

    Args:
        emb_channels: Width of the embedding.
        dropout: Share of features dropped in training.
        init, init_zero, init_attention: Of most layers, of those that begin at (almost) zero, of queries and the like.
        eps: Of the group norms.
        adaptive_scale: The embedding scales and shifts normalized features, instead of being added before.
        skip_scale: Factor of every sum of a residual.
        resample_proj: Whether a resampled skip path has a 1x1 convolution even where the width stays.
        taps: Of the resampling filter.
        channels_per_head: Of the attention; None for one head.
        clip: Largest feature that leaves a block; None for any.
    """

    emb_channels: int
    dropout: float
    init: Init
    init_zero: Init
    init_attention: Init
    eps: float
    adaptive_scale: bool
    skip_scale: float
    resample_proj: bool
    taps: tuple[int, ...] = (1, 1)
    channels_per_head: int | None = None
    clip: float | None = None


class Block(nn.Module):
    """A residual block with group norms, resampling in its first convolution, and attention where asked."""

    def __init__(self, place: Place, style: Style):
        super().__init__()
        self.style = style
        in_channels, out_channels, init = place.in_channels, place.out_channels, style.init
        resampling = {'resample': place.resample, 'taps': style.taps}
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, init, **resampling)
        self.affine = Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1), init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.dropout = Dropout(style.dropout)
        self.conv1 = Conv2d(out_channels, out_channels, 3, style.init_zero)
        self.skip = None
        if in_channels != out_channels or place.resample != 'keep':
            weighted = in_channels != out_channels or style.resample_proj
            self.skip = Conv2d(in_channels, out_channels, 1 if weighted else 0, init, **resampling)
        self.attention = place.attention
        if place.attention:
            self.norm2 = GroupNorm(out_channels, style.eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, style.init_attention)
            self.proj = Conv2d(out_channels, out_channels, 1, style.init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W], float32 [N or 1, emb_channels] -> [N, out_channels, H', W'] in x's dtype."""
        silu, style = nn.functional.silu, self.style
        h = self.conv0(silu(self.norm0(x)))
        a = self.affine(emb)[:, :, None, None].to(x.dtype)
        if style.adaptive_scale:
            scale, shift = a.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + a)
        h = self.conv1(self.dropout(silu(h)))
        x = self._sum(h, x if self.skip is None else self.skip(x))
        if self.attention:
            x = self._sum(self.proj(self._attend(self.qkv(self.norm2(x)))), x)
        return x if style.clip is None else x.clip(-style.clip, style.clip)

    def _sum(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b if self.style.skip_scale == 1 else (a + b) * self.style.skip_scale

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """softmax(q k / sqrt(d)) v of qkv [N, 3 C, H, W] with channels in the order (head, channel, {q, k, v})."""
        n, c3, h, w = qkv.shape
        head = self.style.channels_per_head or c3 // 3
        # {q, k, v}, N, heads, H W, d: attention in one kernel wants d without gaps
        q, k, v = qkv.reshape(n, c3 // 3 // head, head, 3, h * w).permute(3, 0, 1, 4, 2).contiguous()
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(2, 3).reshape(n, c3 // 3, h, w)
