"""What a U-Net of EDM2 or EDM2+ is made of."""

import dataclasses

from dnnlib.errors import unknown_choice
from networks.edm2.branches import BRANCHES
from networks.interface import LARGEST, Interface

# Configs also come from files that nobody vouches for: beyond these, building one would take minutes or overflow.
MOST_LEVELS = 16
MOST_BLOCKS = 64


@dataclasses.dataclass(frozen=True)
class EDM2Config:
    """The U-Net of EDM2 or EDM2+ (EDM2 figure 22, EDM2+ figures 2 and 3).

    Args:
        model_channels: Width of the first level.
        channel_mult: Width of each level relative to `model_channels`.
        num_blocks: Blocks per level.
        attn_resolutions: Levels whose shorter side is in this list have attention in their blocks.
        channels_per_head: Width of an attention head.
        block: Residual branch: a letter of `networks.edm2.branches.BRANCHES`; `A` is EDM2, `G*` is EDM2+.
        dropout: Share of features dropped in training.
    """

    model_channels: int
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    block: str = 'G*'
    dropout: float = 0.0

    @property
    def width(self) -> int:
        """Features per pixel of the finest level."""
        return self.model_channels * self.channel_mult[0]

    def levels(self, interface: Interface) -> list[tuple[int, int, int]]:
        """(height, width, channels) of each level, finest first."""
        height, width = interface.img_resolution
        return [(height >> i, width >> i, self.model_channels * mult) for i, mult in enumerate(self.channel_mult)]

    def has_attention(self, height: int, width: int) -> bool:
        """Whether the blocks of a level of that size have self-attention."""
        return min(height, width) in self.attn_resolutions

    def problems(self, interface: Interface) -> list[str]:
        """Everything that is wrong with this config, in words; empty if it can be built."""
        found = [
            f'{name} must be at least 1, not {getattr(self, name)}'
            for name in ('model_channels', 'num_blocks', 'channels_per_head')
            if getattr(self, name) < 1
        ]
        if not self.channel_mult or min(self.channel_mult) < 1:
            found.append(f'channel_mult needs one factor of at least 1 for each level, not {self.channel_mult}')
        widths = [self.model_channels * mult for mult in self.channel_mult]
        if (
            max(self.channels_per_head, *widths, 0) > LARGEST
            or len(self.channel_mult) > MOST_LEVELS
            or self.num_blocks > MOST_BLOCKS
        ):
            found.append(
                f'widths above {LARGEST}, more than {MOST_LEVELS} levels or {MOST_BLOCKS} blocks in one are not built'
            )
        if not 0 <= self.dropout < 1:
            found.append(f'dropout must be in [0, 1), not {self.dropout}')
        if self.block not in BRANCHES:
            found.append(unknown_choice('block', self.block, BRANCHES))
        if interface.augment_dim:
            found.append('the U-Net of EDM2 takes no augmentation labels')
        return found or self._shape_problems(interface)

    def _shape_problems(self, interface: Interface) -> list[str]:
        found = []
        factor = 2 ** (len(self.channel_mult) - 1)
        for name, side in zip(('height', 'width'), interface.img_resolution, strict=True):
            if side < factor or side % factor:
                near = max(round(side / factor), 1) * factor
                found.append(
                    f'{len(self.channel_mult)} levels need a {name} divisible by {factor}, not {side} (try {near})'
                )
        levels = self.levels(interface)
        for level, (height, width, channels) in enumerate(levels):
            lowest = level == len(levels) - 1  # its in0 block always has attention
            if (lowest or self.has_attention(height, width)) and channels % self.channels_per_head:
                near = max(n for n in range(1, self.channels_per_head + 1) if channels % n == 0)
                found.append(
                    f'the attention at {height}x{width} has {channels} channels, which heads of '
                    f'{self.channels_per_head} do not divide (try channels_per_head {near})'
                )
        return found
