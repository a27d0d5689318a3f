"""Recipes of EDM2 and EDM2+: the papers' tables, one row for a preset, and one that runs anywhere."""

import dataclasses
from typing import Any

from diffusion.levels import LogNormal
from diffusion.weightings import Sigmoid
from networks.config import UNCERTAINTY_CHANNELS, NetworkConfig
from networks.edm2.config import EDM2Config
from sampling.config import SamplerConfig
from training.config import TrainConfig
from training.methods.denoising import DenoisingConfig
from training.methods.moment_matching import MomentMatchingConfig
from training.optimizer import Optimizer

Mi = 2**20


def _imagenet(
    block: str, channels: int, lr: float, dropout: float, duration: int, result: str = '', *, img_channels: int = 3,
    decay: float = 35000, P_mean: float = -0.8, P_std: float = 1.6,
) -> TrainConfig:  # fmt: skip
    """A row of EDM2 table 6: ImageNet at 64x64, or its latents; `duration` in Mi images."""
    architecture = EDM2Config(channels, block=block, dropout=dropout)
    return TrainConfig(
        network=NetworkConfig((64, 64), img_channels, 1000, architecture, uncertainty=UNCERTAINTY_CHANNELS),
        optimizer=Optimizer(lr, decay, rampup=10_000_000),
        duration=duration * Mi,
        batch=2048,
        method=DenoisingConfig(LogNormal(P_mean, P_std)),
        result=result,
    )


def _with_block(preset: TrainConfig, block: str, **changes) -> TrainConfig:
    """A preset with another residual branch; other changes are fields of the architecture."""
    architecture = dataclasses.replace(preset.network.architecture, block=block, **changes)
    return dataclasses.replace(preset, network=dataclasses.replace(preset.network, architecture=architecture))


# EDM2 table 6, one row per model size. The result is FID without guidance at the EMA length that EDM2 publishes for it.
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2-img64-s --data=imagenet64.zip --outdir=runs/NAME
_EDM2_IMG64 = {
    'xs': _imagenet('A', 128, 0.0120, 0.00, 1024),
    's': _imagenet('A', 192, 0.0100, 0.00, 1024, 'FID 1.58 at EMA 0.075'),
    'm': _imagenet('A', 256, 0.0090, 0.10, 2048, 'FID 1.43 at EMA 0.060'),
    'l': _imagenet('A', 320, 0.0080, 0.10, 1024, 'FID 1.33 at EMA 0.040'),
    'xl': _imagenet('A', 384, 0.0070, 0.10, 640, 'FID 1.33 at EMA 0.040'),
}

# The same for 64x64x4 latents of ImageNet-512. The paper has no xxs: half of xs, with the learning rate that the other
# sizes' pattern 1 / sqrt(channels) gives.
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2-img512-s --data=img512-sd.zip --outdir=runs/NAME
_LATENTS: dict[str, Any] = {'img_channels': 4, 'decay': 70000, 'P_mean': -0.4, 'P_std': 1.0}
_EDM2_IMG512 = {
    'xxs': _imagenet('A', 64, 0.0170, 0.00, 2048, **_LATENTS),
    'xs': _imagenet('A', 128, 0.0120, 0.00, 2048, 'FID 3.53 at EMA 0.135', **_LATENTS),
    's': _imagenet('A', 192, 0.0100, 0.00, 2048, 'FID 2.56 at EMA 0.130', **_LATENTS),
    'm': _imagenet('A', 256, 0.0090, 0.10, 2048, 'FID 2.25 at EMA 0.100', **_LATENTS),
    'l': _imagenet('A', 320, 0.0080, 0.10, 1792, 'FID 2.06 at EMA 0.085', **_LATENTS),
    'xl': _imagenet('A', 384, 0.0070, 0.10, 1280, 'FID 1.96 at EMA 0.085', **_LATENTS),
    'xxl': _imagenet('A', 448, 0.0065, 0.10, 896, 'FID 1.91 at EMA 0.070', **_LATENTS),
}

# EDM2+ section 4: EDM2's recipe for ImageNet-64 with the G* block, a later decay and a longer run; the paper has
# S, L and XL, the other sizes follow the pattern. It names latents as future work: there, EDM2's rows with the block.
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2plus-img64-s --data=imagenet64.zip --outdir=runs/NAME
_EDM2PLUS_IMG64 = {
    'xs': _imagenet('G*', 128, 0.0120, 0.00, 2048, decay=70000),
    's': _imagenet('G*', 192, 0.0100, 0.00, 2048, 'FID 1.58', decay=70000),
    'm': _imagenet('G*', 256, 0.0090, 0.10, 2048, decay=70000),
    'l': _imagenet('G*', 320, 0.0080, 0.10, 2048, 'FID 1.33', decay=70000),
    'xl': _imagenet('G*', 384, 0.0070, 0.10, 640, 'FID 1.33', decay=70000),
}
_EDM2PLUS_IMG512 = {
    size: dataclasses.replace(_with_block(preset, 'G*'), result='')
    for size, preset in _EDM2_IMG512.items()
    if size != 'xxs'
}

# EDM2+ tables 1 and 2: edm2plus-img64-s with other residual branches (B with twice the width).
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2plus-img64-s-d --data=imagenet64.zip --outdir=runs/D
_ABLATIONS = {
    name: _imagenet(block, 384 if block == 'B' else 192, 0.0100, 0.00, 2048, result, decay=70000)
    for name, block, result in (
        ('b', 'B', 'FID 1.81'),
        ('c', 'C', 'FID 1.75'),
        ('d', 'D', 'FID 1.57'),
        ('dstar', 'D*', 'FID 1.60'),
        ('e', 'E', 'FID 1.63'),
        ('ek7', 'E7', 'FID 1.64'),
        ('f', 'F', 'FID 1.68'),
        ('fstar', 'F*', 'FID 1.60'),
        ('g', 'G', 'FID 1.66'),
    )
}

# The 1797 handwritten digits that scikit-learn carries, 8x8 pixels, in minutes on two CPU cores.
DIGITS = TrainConfig(
    network=NetworkConfig((8, 8), 1, 10, EDM2Config(64, (1, 2), 1, (4,), 32), uncertainty=UNCERTAINTY_CHANNELS),
    optimizer=Optimizer(0.0200, decay=180, rampup=4 * 1024),
    duration=48 * 1024,
    batch=64,
    method=DenoisingConfig(LogNormal(-0.4, 1.2)),
    sampler=SamplerConfig(steps=18),  # more make no better digits: docs/sampling.md
    snapshot=2 * 1024,
    checkpoint=16 * 1024,
    status=1024,
    preview=16 * 1024,
)
# Its network into 8 steps, as fast: --teacher=demo/run/phema-0000049-0.120.safetensors
DIGITS_DISTILLED = dataclasses.replace(
    DIGITS,
    optimizer=Optimizer(0.0050, decay=180, rampup=512, beta1=0.0, eps=1e-12),
    method=MomentMatchingConfig(weighting=Sigmoid(2.0)),
    duration=24 * 1024,
    batch=32,
)


def _small(side: int, architecture: EDM2Config, lr: float, duration: int) -> TrainConfig:
    """For some thousands of images, one GPU or patience: a smaller batch, with ramp-up and decay at EDM2's shares.

    EDM2-S rises over 0.9 % of its run and decays after 6.7 %; small datasets want dropout. `duration` in Mi images.
    """
    steps = duration * Mi // 256
    return TrainConfig(
        network=NetworkConfig((side, side), 3, 0, architecture, uncertainty=UNCERTAINTY_CHANNELS),
        optimizer=Optimizer(lr, decay=round(0.067 * steps), rampup=duration * Mi // 128),
        duration=duration * Mi,
        batch=256,
        method=DenoisingConfig(LogNormal(-0.8, 1.6)),
        snapshot=duration * Mi // 32,
        checkpoint=duration * Mi // 32,
        status=duration * Mi // 4096,  # 1024 images at 32 pixels: less than a minute on a CPU
        preview=duration * Mi // 32,
    )


# One's own pictures: 2.6 M parameters, which a CPU trains in a day, and 22 M. Learning rates by 1 / sqrt(channels).
_SMALL = {
    'edm2plus-img32-tiny': _small(32, EDM2Config(48, (1, 2, 2), 3, (8,), 48, dropout=0.1), 0.0200, 4),
    'edm2plus-img64-small': _small(64, EDM2Config(96, (1, 2, 3, 3), 2, (16, 8), 32, dropout=0.1), 0.0140, 16),
}

PRESETS: dict[str, TrainConfig] = {
    'edm2plus-digits': DIGITS,
    'edm2plus-digits-distilled': DIGITS_DISTILLED,
    **_SMALL,
    **{f'edm2-img64-{size}': preset for size, preset in _EDM2_IMG64.items()},
    **{f'edm2-img512-{size}': preset for size, preset in _EDM2_IMG512.items()},
    **{f'edm2plus-img64-{size}': preset for size, preset in _EDM2PLUS_IMG64.items()},
    **{f'edm2plus-img512-{size}': preset for size, preset in _EDM2PLUS_IMG512.items()},
    **{f'edm2plus-img64-s-{name}': preset for name, preset in _ABLATIONS.items()},
}
