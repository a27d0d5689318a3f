"""Recipes of EDM (EDM table 2 and appendix F), and one that runs anywhere."""

import dataclasses

from dataset.augment.edm import EDMAugment
from diffusion.levels import LogNormal
from networks.config import NetworkConfig
from networks.edm.adm import ADMConfig
from networks.edm.song import SongConfig
from sampling.config import SamplerConfig
from sampling.samplers import Heun
from training.config import Averages, TrainConfig
from training.methods.denoising import DenoisingConfig
from training.optimizer import Optimizer

Mi = 2**20

# By the names of the formulations that they come from: DDPM++ and NCSN++. EDM trains both alike.
NETWORKS = {
    'vp': SongConfig(model_channels=128),
    've': SongConfig(
        model_channels=128, embedding='fourier', channel_mult_noise=2, encoder='residual', taps=(1, 3, 3, 1)
    ),
}


HEUN = Heun(noise_always=True)  # so that seeds agree with EDM's where there is churn


def _preset(
    architecture: SongConfig | ADMConfig, side: int, label_dim: int, augment: EDMAugment | None, lr: float,
    batch: int, iterations: int, halflife: int, sampler: SamplerConfig, result: str, **changes,
) -> TrainConfig:  # fmt: skip
    return TrainConfig(
        network=NetworkConfig((side, side), 3, label_dim, architecture, augment_dim=augment.dim if augment else 0),
        optimizer=Optimizer(lr, rampup=10_000_000, beta2=0.999, nonfinite='clamp'),
        duration=batch * iterations,
        batch=batch,
        method=DenoisingConfig(LogNormal(-1.2, 1.2)),
        ema=Averages(halflife=halflife),
        augment=augment,
        sampler=sampler,
        snapshot=5 * Mi // 2,
        checkpoint=25 * Mi,
        status=200 * 1024,
        preview=5 * Mi // 2,
        result=result,
        **changes,
    )


def _cifar10(network: str, label_dim: int, result: str) -> TrainConfig:
    architecture = dataclasses.replace(NETWORKS[network], channel_mult=(2, 2, 2), dropout=0.13)
    sampler = SamplerConfig(18, HEUN)
    return _preset(architecture, 32, label_dim, EDMAugment(0.12), 1e-3, 512, 390_625, 500_000, sampler, result)


def _faces(network: str, dropout: float, result: str) -> TrainConfig:
    architecture = dataclasses.replace(NETWORKS[network], channel_mult=(1, 2, 2, 2), dropout=dropout)
    sampler = SamplerConfig(40, HEUN)
    return _preset(architecture, 64, 0, EDMAugment(0.15), 2e-4, 256, 781_250, 500_000, sampler, result)


# Configuration F of EDM table 2, each for 200 million images; FID with 35 evaluations of CIFAR-10, 79 of the others.
#     torchrun --nproc_per_node=8 train.py --preset=edm-cifar10-cond-vp --data=cifar10.zip --outdir=runs/NAME
_TABLE_2 = {
    'edm-cifar10-cond-vp': _cifar10('vp', 10, 'FID 1.79'),
    'edm-cifar10-cond-ve': _cifar10('ve', 10, 'FID 1.79'),
    'edm-cifar10-uncond-vp': _cifar10('vp', 0, 'FID 1.97'),
    'edm-cifar10-uncond-ve': _cifar10('ve', 0, 'FID 1.98'),
    'edm-ffhq64-vp': _faces('vp', 0.05, 'FID 2.39'),
    'edm-ffhq64-ve': _faces('ve', 0.05, 'FID 2.53'),
    'edm-afhqv2-64-vp': _faces('vp', 0.25, 'FID 1.96'),
    'edm-afhqv2-64-ve': _faces('ve', 0.25, 'FID 2.16'),
}

# EDM section 5: ADM on ImageNet-64, for 2.5 billion images in half precision; FID with 511 evaluations.
#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm-imagenet64-adm --data=imagenet64.zip --outdir=runs/x
_IMAGENET64 = _preset(
    ADMConfig(), 64, 1000, None, 1e-4, 4096, 610_352, 50_000_000,
    SamplerConfig(256, dataclasses.replace(HEUN, S_churn=40.0, S_min=0.05, S_max=50.0, S_noise=1.003)),
    'FID 1.36', precision='fp16', loss_scaling=100.0,
)  # fmt: skip

# The 1797 handwritten digits that scikit-learn carries, 8x8 pixels, in minutes on two CPU cores.
_DIGITS = TrainConfig(
    network=NetworkConfig(
        (8, 8), 1, 10,
        SongConfig(model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.0),
        augment_dim=EDMAugment(xflip=0.0, yflip=0.0).dim,
    ),
    optimizer=Optimizer(2e-3, rampup=4 * 1024, beta2=0.999, nonfinite='clamp'),
    duration=64 * 1024,
    batch=64,
    method=DenoisingConfig(LogNormal(-1.2, 1.2)),
    ema=Averages(halflife=4 * 1024),
    augment=EDMAugment(xflip=0.0, yflip=0.0),  # mirrored digits are none: fd_pixels 0.11 instead of 0.22
    sampler=SamplerConfig(18, HEUN),
    snapshot=2 * 1024,
    checkpoint=16 * 1024,
    status=1024,
    preview=16 * 1024,
)  # fmt: skip

PRESETS: dict[str, TrainConfig] = {'edm-digits': _DIGITS, **_TABLE_2, 'edm-imagenet64-adm': _IMAGENET64}
