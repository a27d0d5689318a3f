"""What a network is: enough to build it, stored in every network file."""

import dataclasses
import math
from typing import Any

from dnnlib.errors import UserError, unknown_choice
from networks.edm2.branches import BRANCHES

# Configs also come from files that nobody vouches for: beyond these, building one would take minutes or overflow.
MOST_LEVELS = 16
MOST_BLOCKS = 64
LARGEST = 2**20


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """An EDM2 or EDM2+ denoiser (EDM2 figure 22, EDM2+ figures 2 and 3).

    Args:
        img_resolution: (height, width) in pixels (or latents).
        img_channels: Channels of the images.
        label_dim: Number of classes; 0 makes an unconditional network.
        model_channels: Width of the first level.
        channel_mult: Width of each level relative to `model_channels`.
        num_blocks: Blocks per level.
        attn_resolutions: Levels whose shorter side is in this list have attention in their blocks.
        channels_per_head: Width of an attention head.
        block: Residual branch: a letter of `networks.edm2.branches.BRANCHES`; `A` is EDM2, `G*` is EDM2+.
        dropout: Share of features dropped in training.
        sigma_data: Expected standard deviation of the training data.
    """

    img_resolution: tuple[int, int]
    img_channels: int
    label_dim: int
    model_channels: int
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64
    block: str = 'G*'
    dropout: float = 0.0
    sigma_data: float = 0.5

    @property
    def levels(self) -> list[tuple[int, int, int]]:
        """(height, width, channels) of each level, finest first."""
        height, width = self.img_resolution
        return [(height >> i, width >> i, self.model_channels * mult) for i, mult in enumerate(self.channel_mult)]

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of a level have self-attention."""
        height, width, _ = self.levels[level]
        return min(height, width) in self.attn_resolutions

    def problems(self) -> list[str]:
        """Everything that is wrong with this config, in words; empty if it can be built."""
        if found := self._type_problems():
            return found
        found = [
            f'{name} must be at least {least}, not {getattr(self, name)}'
            for name, least in (
                ('img_channels', 1),
                ('label_dim', 0),
                ('model_channels', 1),
                ('num_blocks', 1),
                ('channels_per_head', 1),
            )
            if getattr(self, name) < least
        ]
        if not self.channel_mult or min(self.channel_mult) < 1:
            found.append(f'channel_mult needs one factor of at least 1 for each level, not {self.channel_mult}')
        numbers = (*self.img_resolution, self.img_channels, self.label_dim, self.channels_per_head)
        widths = [self.model_channels * mult for mult in self.channel_mult]
        if max(*numbers, *widths) > LARGEST or len(self.channel_mult) > MOST_LEVELS or self.num_blocks > MOST_BLOCKS:
            found.append(
                f'sizes and widths above {LARGEST}, more than {MOST_LEVELS} levels or {MOST_BLOCKS} blocks in one '
                f'are not built'
            )
        if not 0 <= self.dropout < 1:
            found.append(f'dropout must be in [0, 1), not {self.dropout}')
        if not 1 / LARGEST <= self.sigma_data <= LARGEST:  # its square must be a number, too
            found.append(f'sigma_data must be between {1 / LARGEST:.0e} and {LARGEST:.0e}, not {self.sigma_data}')
        if self.block not in BRANCHES:
            found.append(unknown_choice('block', self.block, BRANCHES))
        return found or self._shape_problems()

    def _type_problems(self) -> list[str]:
        """What has another type than its field: configs also come from files."""
        found = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                fits, wanted = type(value) is int, 'a whole number'
            elif field.type is float:
                fits, wanted = type(value) in (int, float) and math.isfinite(value), 'a finite number'
            elif field.type is str:
                fits, wanted = isinstance(value, str), 'a name'
            else:
                fits, wanted = (
                    isinstance(value, tuple) and all(type(v) is int for v in value),
                    'a list of whole numbers',
                )
            if not fits:
                found.append(f'{field.name} must be {wanted}, not {value!r}')
        if not found and len(self.img_resolution) != 2:
            found.append(f'img_resolution must be a height and a width, not {self.img_resolution}')
        return found

    def _shape_problems(self) -> list[str]:
        found = []
        factor = 2 ** (len(self.channel_mult) - 1)
        for name, side in zip(('height', 'width'), self.img_resolution, strict=True):
            if side < factor or side % factor:
                near = max(round(side / factor), 1) * factor
                found.append(
                    f'{len(self.channel_mult)} levels need a {name} divisible by {factor}, not {side} (try {near})'
                )
        for level, (height, width, channels) in enumerate(self.levels):
            lowest = level == len(self.channel_mult) - 1  # its in0 block always has attention
            if (lowest or self.has_attention(level)) and channels % self.channels_per_head:
                found.append(
                    f'the attention at {height}x{width} has {channels} channels, '
                    f'which heads of {self.channels_per_head} do not divide'
                )
        return found

    def check(self) -> 'NetworkConfig':
        """Return self.

        Raises:
            UserError: with all problems, if there are any.
        """
        if found := self.problems():
            raise UserError(found)
        return self

    def to_json(self) -> dict[str, Any]:
        """As plain values for a header; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'NetworkConfig':
        """Rebuild a config that `to_json` wrote, and check it.

        Raises:
            UserError: for unknown, missing or impossible fields.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        found = [unknown_choice('field', name, fields) for name in values if name not in fields]
        found += [f'missing field {name!r}' for name in sorted(required - values.keys())]
        if found:
            raise UserError(found)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}).check()
