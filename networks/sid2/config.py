"""What a Residual U-ViT is made of."""

import dataclasses

from networks.interface import LARGEST, Interface

MOST_BLOCKS = 64


def group_count(channels: int) -> int:
    """Groups of a group norm: 32, but at least four channels in each."""
    return max(min(32, channels // 4), 1)


@dataclasses.dataclass(frozen=True)
class UViTConfig:
    """A Residual U-ViT (SiD2 section 2.3 and appendix A.4). The defaults are the paper's at 128x128 (small variant).

    The parameters do not depend on the resolution of the images, so that a network can be finetuned at a higher one.

    Args:
        channels: Width of each level, finest first; the last level is the middle.
        down_blocks, up_blocks: Blocks of each level but the middle, on the way down (E) and on the way up (D).
        mid_blocks: Blocks of the middle.
        res_levels: So many of the finest levels are made of ResBlocks, the others of transformer blocks.
        dropout: Share of the features dropped in the blocks of each level.
        patch: Pixels on the side of a patch; images become patches of 3 patch^2 channels first.
        emb_channels: Width of the embedding of noise level and class.
        channels_per_head: Width of an attention head.
        mlp_ratio: Width of a transformer block's hidden layer relative to its level.
        resample_kernel: Kernel of the linear layer between two levels; 1 or 3.
    """

    channels: tuple[int, ...] = (128, 256, 512, 1024)
    down_blocks: tuple[int, ...] = (3, 3, 3)
    up_blocks: tuple[int, ...] = (3, 3, 3)
    mid_blocks: int = 16
    res_levels: int = 2
    dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1)
    patch: int = 1
    emb_channels: int = 1024
    channels_per_head: int = 64
    mlp_ratio: int = 4
    resample_kernel: int = 1

    @property
    def width(self) -> int:
        """Features of the finest level for each pixel of an image."""
        return max(self.channels[0] // self.patch**2, 1)

    def problems(self, interface: Interface) -> list[str]:
        """Everything that is wrong with this config for images of a shape, in words; empty if it can be built."""
        found = [
            f'{name} must be from {least} to {most}, not {getattr(self, name)}'
            for name, least, most in (
                ('mid_blocks', 1, MOST_BLOCKS),
                ('res_levels', 0, len(self.channels)),
                ('patch', 1, LARGEST),
                ('emb_channels', 4, LARGEST),
                ('channels_per_head', 4, LARGEST),
                ('mlp_ratio', 1, MOST_BLOCKS),
            )
            if not least <= getattr(self, name) <= most
        ]
        if self.resample_kernel not in (1, 3):
            found.append(f'resample_kernel must be 1 or 3, not {self.resample_kernel}')
        levels = len(self.channels)
        if not 1 <= levels <= 16 or not all(1 <= c <= LARGEST for c in self.channels):
            return [*found, f'channels needs a width from 1 to {LARGEST} for each of 1 to 16 levels']
        for name, length in (('down_blocks', levels - 1), ('up_blocks', levels - 1), ('dropout', levels)):
            if len(getattr(self, name)) != length:
                found.append(f'{levels} levels need {length} numbers of {name}, not {len(getattr(self, name))}')
        if not all(0 <= n <= MOST_BLOCKS for n in (*self.down_blocks, *self.up_blocks)):
            found.append(f'down_blocks and up_blocks must be from 0 to {MOST_BLOCKS}')
        if not all(0 <= p < 1 for p in self.dropout):
            found.append(f'dropout must be in [0, 1) at each level, not {self.dropout}')
        return found or self._shape_problems(interface)

    def _shape_problems(self, interface: Interface) -> list[str]:
        found = []
        factor = self.patch * 2 ** (len(self.channels) - 1)
        for name, side in zip(('height', 'width'), interface.img_resolution, strict=True):
            if side < factor or side % factor:
                near = max(round(side / factor), 1) * factor
                found.append(
                    f'{len(self.channels)} levels and patches of {self.patch} need a {name} divisible by {factor}, '
                    f'not {side} (try {near})'
                )
        for level, channels in enumerate(self.channels):
            if channels % group_count(channels):
                found.append(f'{channels} channels do not divide into {group_count(channels)} groups for normalization')
            if level >= self.res_levels and channels % self.channels_per_head:
                found.append(
                    f'heads of {self.channels_per_head} do not divide the {channels} channels of level {level}'
                )
        if self.channels_per_head % 4:
            found.append(f'channels_per_head must be divisible by 4, not {self.channels_per_head}')
        return found
