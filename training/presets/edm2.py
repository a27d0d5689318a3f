"""Training recipes: the papers' tables, one row for a preset, and small ones that run anywhere."""

import dataclasses

from dnnlib.errors import UserError, unknown_choice
from networks.config import NetworkConfig

Mi = 2**20


@dataclasses.dataclass(frozen=True)
class Preset:
    """A recipe: network and training. The defaults are EDM2's ImageNet-64 (EDM2 table 6).

    Args:
        block: Residual branch, see `networks.edm2.branches`.
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
        result: What the papers report for it, on ImageNet with 50,000 images.
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
    result: str = ''
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = 64


# EDM2 table 6, one row per model size. The result is FID without guidance at the EMA length that EDM2 publishes for it.
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2-img64-s --data=imagenet64.zip --outdir=runs/NAME
_EDM2_IMG64 = {
    size: Preset('A', channels, lr, 35000, duration * Mi, dropout, result=result)
    for size, channels, lr, dropout, duration, result in (
        ('xs', 128, 0.0120, 0.00, 1024, ''),
        ('s', 192, 0.0100, 0.00, 1024, 'FID 1.58 at EMA 0.075'),
        ('m', 256, 0.0090, 0.10, 2048, 'FID 1.43 at EMA 0.060'),
        ('l', 320, 0.0080, 0.10, 1024, 'FID 1.33 at EMA 0.040'),
        ('xl', 384, 0.0070, 0.10, 640, 'FID 1.33 at EMA 0.040'),
    )
}

# The same for 64x64x4 latents of ImageNet-512. The paper has no xxs: half of xs, with the learning rate that the other
# sizes' pattern 1 / sqrt(channels) gives.
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2-img512-s --data=img512-sd.zip --outdir=runs/NAME
_IMG512 = Preset('A', 192, 0.0100, decay=70000, duration=2048 * Mi, P_mean=-0.4, P_std=1.0, img_channels=4)
_EDM2_IMG512 = {
    size: dataclasses.replace(_IMG512, channels=channels, lr=lr, dropout=dropout, duration=duration * Mi, result=result)
    for size, channels, lr, dropout, duration, result in (
        ('xxs', 64, 0.0170, 0.00, 2048, ''),
        ('xs', 128, 0.0120, 0.00, 2048, 'FID 3.53 at EMA 0.135'),
        ('s', 192, 0.0100, 0.00, 2048, 'FID 2.56 at EMA 0.130'),
        ('m', 256, 0.0090, 0.10, 2048, 'FID 2.25 at EMA 0.100'),
        ('l', 320, 0.0080, 0.10, 1792, 'FID 2.06 at EMA 0.085'),
        ('xl', 384, 0.0070, 0.10, 1280, 'FID 1.96 at EMA 0.085'),
        ('xxl', 448, 0.0065, 0.10, 896, 'FID 1.91 at EMA 0.070'),
    )
}

# EDM2+ section 4: EDM2's recipe for ImageNet-64 with the G* block, a later decay and a longer run; the paper has
# S, L and XL, the other sizes follow the pattern. It names latents as future work: there, EDM2's rows with the block.
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2plus-img64-s --data=imagenet64.zip --outdir=runs/NAME
_EDM2PLUS_RESULTS = {'s': 'FID 1.58', 'l': 'FID 1.33', 'xl': 'FID 1.33'}
_EDM2PLUS_IMG64 = {
    size: dataclasses.replace(
        preset,
        block='G*',
        decay=70000,
        duration=(640 if size == 'xl' else 2048) * Mi,
        result=_EDM2PLUS_RESULTS.get(size, ''),
    )
    for size, preset in _EDM2_IMG64.items()
}
_EDM2PLUS_IMG512 = {
    size: dataclasses.replace(preset, block='G*', result='') for size, preset in _EDM2_IMG512.items() if size != 'xxs'
}

# EDM2+ tables 1 and 2: edm2plus-img64-s with other residual branches (B with twice the width).
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2plus-img64-s-d --data=imagenet64.zip --outdir=runs/D
_S = _EDM2PLUS_IMG64['s']
_ABLATIONS = {
    'b': dataclasses.replace(_S, block='B', channels=384, result='FID 1.81'),
    'c': dataclasses.replace(_S, block='C', result='FID 1.75'),
    'd': dataclasses.replace(_S, block='D', result='FID 1.57'),
    'dstar': dataclasses.replace(_S, block='D*', result='FID 1.60'),
    'e': dataclasses.replace(_S, block='E', result='FID 1.63'),
    'ek7': dataclasses.replace(_S, block='E7', result='FID 1.64'),
    'f': dataclasses.replace(_S, block='F', result='FID 1.68'),
    'fstar': dataclasses.replace(_S, block='F*', result='FID 1.60'),
    'g': dataclasses.replace(_S, block='G', result='FID 1.66'),
}

# The 1797 handwritten digits that scikit-learn carries, 8x8 pixels, in minutes on two CPU cores.
_DIGITS = Preset(
    'G*',
    channels=64,
    lr=0.0200,
    decay=180,
    duration=48 * 1024,
    batch=64,
    P_mean=-0.4,
    P_std=1.2,
    rampup=4 * 1024,
    snapshot=2 * 1024,
    checkpoint=16 * 1024,
    status=1024,
    preview=16 * 1024,
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
    **{f'edm2-img512-{size}': preset for size, preset in _EDM2_IMG512.items()},
    **{f'edm2plus-img64-{size}': preset for size, preset in _EDM2PLUS_IMG64.items()},
    **{f'edm2plus-img512-{size}': preset for size, preset in _EDM2PLUS_IMG512.items()},
    **{f'edm2plus-img64-s-{name}': preset for name, preset in _ABLATIONS.items()},
}


def get_preset(name: str) -> Preset:
    """Look a preset up.

    Raises:
        UserError: where there is none of that name, naming the near ones.
    """
    if name not in PRESETS:
        raise UserError(unknown_choice('preset', name, PRESETS))
    return PRESETS[name]


def network_config(preset: Preset) -> NetworkConfig:
    """The network of a preset for the data it is made for."""
    return NetworkConfig(
        img_resolution=(preset.resolution, preset.resolution),
        img_channels=preset.img_channels,
        label_dim=preset.label_dim,
        model_channels=preset.channels,
        channel_mult=preset.channel_mult,
        num_blocks=preset.num_blocks,
        attn_resolutions=preset.attn_resolutions,
        channels_per_head=preset.channels_per_head,
        block=preset.block,
        dropout=preset.dropout,
    )
