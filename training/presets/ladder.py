"""Recipes of the steps from EDM's ADM to EDM2 (EDM2 table 1, appendix B), and small ones that run anywhere."""

import dataclasses

from diffusion.levels import LogNormal
from networks.config import UNCERTAINTY_CHANNELS, NetworkConfig
from networks.edm.adm import ADMConfig
from networks.edm2.config import EDM2Config
from networks.ladder import LadderConfig
from training.config import Averages, TrainConfig
from training.methods.denoising import DenoisingConfig
from training.optimizer import Optimizer
from training.presets.edm2 import DIGITS

Mi = 2**20

NETWORKS = {
    'a': ADMConfig(clip=256.0),
    'b': ADMConfig(clip=256.0, attn_resolutions=(16, 8)),
    'c': LadderConfig(),
    'd': LadderConfig(weights='normalized'),
    'e': LadderConfig(weights='forced'),
    'f': LadderConfig(weights='forced', group_norm=False),
    'g': EDM2Config(192, block='A'),
}
LEARNING_RATES = {'a': 0.0001, 'b': 0.0002, 'c': 0.0002}  # 0.0100 from D on
# FID without guidance; the paper's text does not tell the EMA lengths of E and F.
RESULTS = {
    'a': 'FID 8.00 at EMA 0.034', 'b': 'FID 7.24 at EMA 0.090', 'c': 'FID 6.96 at EMA 0.075',
    'd': 'FID 3.75 at EMA 0.225', 'e': 'FID 3.02', 'f': 'FID 2.71', 'g': 'FID 2.56 at EMA 0.130',
}  # fmt: skip


def _latents(rung: str) -> TrainConfig:
    """A rung for 64x64x4 latents of ImageNet-512."""
    first = rung == 'a'  # EDM's own recipe
    return TrainConfig(
        network=NetworkConfig((64, 64), 4, 1000, NETWORKS[rung], uncertainty=0 if first else UNCERTAINTY_CHANNELS),
        optimizer=Optimizer(
            LEARNING_RATES.get(rung, 0.0100),
            decay=70000 if rung in 'efg' else 0,
            rampup=10_000_000,
            beta2=0.999 if first else 0.99,
            nonfinite='clamp' if first else 'zero',
        ),
        duration=2048 * Mi,
        batch=4096 if first else 2048,
        method=DenoisingConfig(LogNormal(-1.2, 1.2) if first else LogNormal(-0.4, 1.0)),
        ema=Averages(halflife=50_000_000 if first else None),
        loss_scaling=100.0 if rung in 'abc' else 1.0,
        precision='fp16',
        result=RESULTS[rung],
    )


def _digits(rung: str) -> TrainConfig:
    """A rung for the 1797 handwritten digits that scikit-learn carries, with a network as of `edm2plus-digits`."""
    whole, network = _latents(rung), DIGITS.network
    small = {'model_channels': 32, 'channel_mult': (1, 2), 'num_blocks': 1, 'channels_per_head': 32}
    small |= {'attn_resolutions': (8, 4) if rung == 'a' else (4,)}
    small |= {'channel_mult_emb': 2} if rung == 'f' else {}
    architecture = dataclasses.replace(NETWORKS[rung], **small)
    lr = 0.0020 if rung in LEARNING_RATES else DIGITS.optimizer.lr
    decay = DIGITS.optimizer.decay if whole.optimizer.decay else 0
    return dataclasses.replace(
        DIGITS,
        network=dataclasses.replace(network, architecture=architecture, uncertainty=whole.network.uncertainty),
        optimizer=dataclasses.replace(whole.optimizer, lr=lr, decay=decay, rampup=DIGITS.optimizer.rampup),
        method=whole.method,
        ema=Averages(halflife=4 * 1024 if whole.ema.halflife else None),
        loss_scaling=whole.loss_scaling,
    )


#     torchrun --nnodes=4 --nproc_per_node=8 train.py --preset=edm2-ladder-c --data=img512-sd.zip --outdir=runs/NAME
PRESETS: dict[str, TrainConfig] = {
    **{f'edm2-ladder-{rung}': _latents(rung) for rung in NETWORKS},
    **{f'ladder-{rung}-digits': _digits(rung) for rung in NETWORKS},
}
