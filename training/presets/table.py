"""All recipes by name, and how a run is made of one: a preset is a training config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dataset.reader import ImageDataset
from dnnlib.configs import replaced
from dnnlib.errors import choose
from training.config import TrainConfig
from training.presets import edm, edm2, ladder, sid2

PRESETS: dict[str, TrainConfig] = {
    name: dataclasses.replace(preset, preset=name)
    for table in (edm2.PRESETS, edm.PRESETS, ladder.PRESETS, sid2.PRESETS)
    for name, preset in table.items()
}

# Flags of train.py that stand for a field with a name or a place of its own; the others have the field's name.
FIELDS = {
    'channels': 'network.architecture.model_channels',
    **{
        name: f'network.architecture.{name}'
        for name in ('channel_mult', 'num_blocks', 'attn_resolutions', 'channels_per_head', 'block', 'dropout')
    },
    'teacher': 'method.teacher',
    'steps_student': 'method.steps',
    'P_mean': 'method.levels.P_mean',
    'P_std': 'method.levels.P_std',
    'lr': 'optimizer.lr',
    'decay': 'optimizer.decay',
    'rampup': 'optimizer.rampup',
    'clip': 'optimizer.clip',
    'ema_stds': 'ema.stds',
    'ema_halflife': 'ema.halflife',
    'ema_rampup': 'ema.rampup',
}


def get_preset(name: str) -> TrainConfig:
    """Look a preset up."""
    return choose('preset', name, PRESETS)


def make_config(
    preset: str, overrides: Mapping[str, Any], dataset: ImageDataset | None = None, data: str = '', cond: bool = True
) -> TrainConfig:
    """The config of a run.

    Args:
        preset: Name.
        overrides: Values by flag (see FIELDS) or by dotted field.
        dataset: What it is trained on; None for the data that the preset is made for.
        data: Its path.
        cond: Whether to use its classes.
    """
    config = get_preset(preset)
    network = config.network
    if dataset is not None:
        network = dataclasses.replace(
            network,
            img_resolution=dataset.image_shape[1:],
            img_channels=dataset.image_shape[0],
            label_dim=dataset.num_classes,
        )
        config = dataclasses.replace(
            config,
            data=data,
            dataset=dataset.name,
            fingerprint=dataset.fingerprint,
            class_names=tuple(dataset.class_names or ()) if cond else (),
            encoder=dataset.encoder,
        )
    if not cond:
        network = dataclasses.replace(network, label_dim=0)
    config = dataclasses.replace(config, network=network)
    changes = {FIELDS.get(name, name): value for name, value in overrides.items()}
    config = replaced(config, dict(sorted(changes.items(), key=lambda item: item[0].count('.'))))  # a whole, then parts
    # The network is told of augmentations where there are some.
    return replaced(config, {'network.augment_dim': 0 if config.augment is None else config.augment.dim})
