"""Training recipes: the papers' tables, one row for a preset, and small ones that run anywhere."""

import dataclasses

from dnnlib.errors import UserError, unknown_choice

Mi = 2**20


@dataclasses.dataclass(frozen=True)
class Preset:
    """A recipe: network and training. The defaults are EDM2's ImageNet-64 (EDM2 table 6).

    Args:
        block: Residual branch, see `networks.branches`.
        channels: Width of the network's first level.
        lr: alpha_ref, the highest learning rate.
        decay: t_ref, iterations after which the learning rate falls.
        duration: Training images.
        dropout: Share of features dropped in training.
        batch: Images in a step, over all ranks.
        P_mean, P_std: Of ln(sigma) in training.
        rampup: Images over which the learning rate rises.
        snapshot, checkpoint, status, preview: Images between EMA snapshots, full states, status lines, sample grids.
        resolution, img_channels, label_dim: Of the data it is made for; the dataset decides when there is one.
        channel_mult, num_blocks, attn_resolutions, channels_per_head: See `networks.config.NetworkConfig`.
    """

    block: str
    channels: int
    lr: float
    decay: float
    duration: int
    dropout: float = 0.0
    batch: int = 2048
    P_mean: float = -0.8
    P_std: float = 1.6
    rampup: int = 10_000_000
    snapshot: int = 8 * Mi
    checkpoint: int = 128 * Mi
    status: int = 128 * 1024
    preview: int = 8 * Mi
    resolution: int = 64
    img_channels: int = 3
    label_dim: int = 1000
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64


# EDM2 table 6: one row per model size, ImageNet at 64x64 pixels.
_EDM2_IMG64 = {
    'xs': Preset('A', channels=128, lr=0.0120, decay=35000, duration=1024 * Mi),
    's': Preset('A', channels=192, lr=0.0100, decay=35000, duration=1024 * Mi),
    'm': Preset('A', channels=256, lr=0.0090, decay=35000, duration=2048 * Mi, dropout=0.10),
    'l': Preset('A', channels=320, lr=0.0080, decay=35000, duration=1024 * Mi, dropout=0.10),
    'xl': Preset('A', channels=384, lr=0.0070, decay=35000, duration=640 * Mi, dropout=0.10),
}


def _edm2plus(size: str, edm2: Preset) -> Preset:
    """EDM2+'s recipe: EDM2's with the G* block, a later decay, a longer run (EDM2+ section 4; sizes: our reading)."""
    return dataclasses.replace(edm2, block='G*', decay=70000, duration=(640 if size == 'xl' else 2048) * Mi)


# The 1797 handwritten digits that scikit-learn carries, 8x8 pixels, in minutes on two CPU cores.
_DIGITS = Preset(
    'G*',
    channels=64,
    lr=0.0200,
    decay=300,
    duration=72 * 1024,
    batch=128,
    P_mean=-0.8,
    P_std=1.6,
    rampup=6 * 1024,
    snapshot=4 * 1024,
    checkpoint=12 * 1024,
    status=1024,
    preview=12 * 1024,
    resolution=8,
    img_channels=1,
    label_dim=10,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=32,
)

PRESETS: dict[str, Preset] = {
    'edm2plus-digits': _DIGITS,
    **{f'edm2-img64-{size}': preset for size, preset in _EDM2_IMG64.items()},
    **{f'edm2plus-img64-{size}': _edm2plus(size, preset) for size, preset in _EDM2_IMG64.items()},
}


def get_preset(name: str) -> Preset:
    """Look a preset up.

    Raises:
        UserError: where there is none of that name, naming the near ones.
    """
    if name not in PRESETS:
        raise UserError(unknown_choice('preset', name, PRESETS))
    return PRESETS[name]
