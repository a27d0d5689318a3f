"""What a training run is: built from a preset and flags, checked whole before anything starts."""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusion.levels import LogNormal
from dnnlib.errors import UserError, unknown_choice
from ema.power import STD_LIMIT
from networks.config import NetworkConfig
from networks.denoiser import PRECISIONS
from training.optimizer import LearningRate
from training.presets.edm2 import Preset, get_preset, network_config

# Fields that a continued run may change: none of them alters what is learned from the next image. The dataset is told
# by its fingerprint, not its name.
FREE_TO_CHANGE = {
    'data',
    'dataset',
    'duration',
    'slice',
    'snapshot',
    'snapshot_precision',
    'checkpoint',
    'keep',
    'status',
    'preview',
    'nonfinite_steps',
    'workers',
}
# Fields that leave the mathematics as they are but not the rounding (nor which features dropout drops: its masks belong
# to micro-batches); a continued run may change them when told to.
ROUNDING = {'micro_batch', 'precision', 'compile'}
KIMG = 1000  # file names of snapshots and states count in thousands of images


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. All intervals and times are in images.

    Args:
        preset: Name of the recipe it was made from.
        data: Path of the dataset archive.
        encoder: What turns the network's output into images, as the dataset says; see `networks.encoders`.
        dataset: Name of the dataset.
        fingerprint: Of the dataset's content.
        network: What is trained.
        levels: Distribution of noise levels.
        learning_rate: Over time.
        duration: Length of the run.
        batch: Images in a step, over all ranks and accumulation rounds.
        micro_batch: Images that one rank processes at once; None for as many as its share of the batch.
        ema_stds: Lengths of the power-function EMAs.
        ema_halflife: Images over which a traditional EMA beside them forgets half; None for none.
        ema_rampup: Share of the training time that its half-life may be at most; 0 for no such bound.
        snapshot, checkpoint, status, preview: Intervals of EMA snapshots, full states, status lines, sample grids.
        slice: Images after which this process stops, to be continued by another; None for no such limit.
        keep: Newest full states that stay on disk; 0 for all.
        snapshot_precision: Of the parameters in EMA snapshots.
        loss_scaling: Factor on the loss before its gradient, against underflow in FP16.
        nonfinite_steps: Steps in a row with gradients that are not finite after which the run stops; 0 for never.
        held_out: Share of the data that is not trained on but evaluated at every snapshot.
        precision: Of the network's features.
        compile: Whether to compile the network.
        seed: Of initial weights, data order and noise.
        workers: Processes that load data beside each rank.
        init: Network file, path or URL, whose weights the run began with; None where they were drawn.
    """

    preset: str
    data: str
    dataset: str
    fingerprint: str
    network: NetworkConfig
    levels: LogNormal
    learning_rate: LearningRate
    duration: int
    batch: int
    encoder: str = 'rgb'
    micro_batch: int | None = None
    ema_stds: tuple[float, ...] = (0.050, 0.100)
    ema_halflife: int | None = None
    ema_rampup: float = 0.05
    snapshot: int = 8 * 2**20
    checkpoint: int = 128 * 2**20
    status: int = 128 * 2**10
    preview: int = 8 * 2**20
    slice: int | None = None
    keep: int = 2
    snapshot_precision: str = 'fp16'
    loss_scaling: float = 1.0
    nonfinite_steps: int = 100
    held_out: float = 0.0
    precision: str = 'fp32'
    compile: bool = False
    seed: int = 0
    workers: int = 0
    init: str | None = None

    def micro_batch_for(self, world_size: int) -> int:
        """Images that one rank processes at once when there are `world_size` of them."""
        return self.batch // world_size if self.micro_batch is None else self.micro_batch

    @property
    def elements(self) -> int:
        """C H W of an image."""
        height, width = self.network.img_resolution
        return self.network.img_channels * height * width

    def check(self, world_size: int = 1) -> 'TrainConfig':
        """Return self.

        Raises:
            UserError: with all problems, if there are any.
        """
        if found := [*self.network.problems(), *self._problems(), *self._batch_problems(world_size)]:
            raise UserError(found)
        return self

    def _problems(self) -> list[str]:
        if self.batch < 1:
            return [f'the batch must be at least 1, not {self.batch}']
        found = []
        rates = {**dataclasses.asdict(self.learning_rate), **dataclasses.asdict(self.levels)}
        found += [f'{name} must be a finite number, not {v}' for name, v in rates.items() if not math.isfinite(v)]
        for name in ('duration', 'slice', 'snapshot', 'checkpoint', 'status', 'preview'):
            interval = getattr(self, name)
            if interval is not None and (interval < self.batch or interval % self.batch):
                near = _nearest_multiples(interval, self.batch)
                found.append(f'{name} must be a multiple of the batch ({self.batch} images), not {interval} ({near})')
        for name in ('snapshot', 'checkpoint'):
            if getattr(self, name) < KIMG:
                found.append(f'{name} must be at least {KIMG} images, for its files are named by thousands')
        for std in self.ema_stds:
            if not 0 < std < STD_LIMIT:
                found.append(f'EMA lengths must be between 0 and {STD_LIMIT:.4f}, not {std}')
        if len({f'{std:.3f}' for std in self.ema_stds}) < max(len(self.ema_stds), 1):
            found.append(
                f'EMA lengths must differ in their first three decimals, at least one is needed: {self.ema_stds}'
            )
        for name in ('precision', 'snapshot_precision'):
            if getattr(self, name) not in PRECISIONS:
                found.append(unknown_choice(name.replace('_', ' '), getattr(self, name), PRECISIONS))
        if self.ema_halflife is not None and self.ema_halflife <= 0:
            found.append(f'the half-life of the traditional EMA must be positive, not {self.ema_halflife}')
        if not 0 <= self.ema_rampup <= 1:
            found.append(f'the ramp-up of the traditional EMA must be a share of the training, not {self.ema_rampup}')
        if self.learning_rate.ref <= 0 or self.learning_rate.decay < 0 or self.learning_rate.rampup < 0:
            found.append(
                f'a positive learning rate, decay and ramp-up of at least 0 are needed, not {self.learning_rate}'
            )
        if self.levels.P_std <= 0:
            found.append(f'P_std must be positive, not {self.levels.P_std}')
        if not 0 <= self.seed < 2**63:
            found.append(f'seed must be between 0 and 2^63 - 1, not {self.seed}')
        last = self.duration % self.snapshot
        if 0 < last < KIMG:
            found.append(f'the last snapshot would come {last} images after the one before; {KIMG} are needed')
        for name in ('workers', 'keep', 'nonfinite_steps'):
            if getattr(self, name) < 0:
                found.append(f'{name} must be at least 0, not {getattr(self, name)}')
        if not 0 < self.loss_scaling < math.inf:
            found.append(f'the loss scaling must be positive and finite, not {self.loss_scaling}')
        if not 0 <= self.held_out < 1:
            found.append(f'the share of held-out images must be at least 0 and less than 1, not {self.held_out}')
        return found

    def _batch_problems(self, world_size: int) -> list[str]:
        share, rest = divmod(self.batch, world_size)
        if self.batch < 1:
            return []
        if rest:
            near = _nearest_multiples(self.batch, world_size)
            return [f'the batch must be a multiple of the number of ranks ({world_size}), not {self.batch} ({near})']
        micro = self.micro_batch_for(world_size)
        if micro < 1 or share % micro:
            near = [n for n in range(1, share + 1) if share % n == 0]
            near = sorted(near, key=lambda n: (abs(n - micro), n))[:2]
            hint = ' or '.join(map(str, near))
            return [f'{share} images per step and rank are no multiple of batch-gpu {micro} (try {hint})']
        return []

    def to_json(self) -> dict[str, Any]:
        """As plain values, for the run folder and the training states."""
        return dataclasses.asdict(self)


def differences(old: dict[str, Any], new: dict[str, Any], free: Collection[str] = (), prefix: str = '') -> list[str]:
    """One line for each field in which two configs (as JSON values) differ, those `free` to change left out."""
    lines = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, free, f'{prefix}{name}.')
        elif prefix + name not in free and _plain(a) != _plain(b):
            lines.append(f'{prefix}{name} is {b}, was {a}')
    return lines


def refuse_differences(folder: Path, old: dict[str, Any], config: TrainConfig, allow_rounding: bool = False) -> None:
    """Make sure that a run folder's config, as JSON values, is that of this run.

    Args:
        folder: For the message.
        old: What lies there; fields that it lacks, being older than they are, had their defaults.
        config: Of this run.
        allow_rounding: Whether fields that change the rounding alone may differ.

    Raises:
        UserError: with a line for each difference.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    old = old | {name: value for name, value in defaults.items() if name not in old}
    changed = differences(old, config.to_json(), FREE_TO_CHANGE | ROUNDING)
    rounding = differences(old, config.to_json(), FREE_TO_CHANGE)
    rounding = [] if allow_rounding else [line for line in rounding if line not in changed]
    if changed or rounding:
        hint = ['--allow-rounding lets the latter change' if changed else '--allow-rounding lets these change']
        raise UserError([f'{folder} holds a run with another config', *changed, *rounding, *(hint if rounding else [])])


def _nearest_multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return f'try {below + unit}' if below <= 0 else f'try {below} or {below + unit}'


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def from_preset(
    name: str,
    *,
    data: str,
    dataset: str,
    fingerprint: str,
    image_shape: tuple[int, int, int],
    label_dim: int,
    overrides: dict[str, Any],
    encoder: str = 'rgb',
) -> TrainConfig:
    """Make the config of a run.

    Args:
        name: Of the preset.
        data, dataset, fingerprint: Path, name and content hash of the dataset.
        image_shape: (C, H, W) of its images.
        label_dim: Its number of classes, 0 to train without labels.
        encoder: Of the dataset.
        overrides: Values that replace the preset's or the defaults, by the names of `Preset` and `TrainConfig`.

    Raises:
        UserError: where there is no such preset.
    """
    preset = get_preset(name)
    in_preset = {field.name for field in dataclasses.fields(Preset)}
    preset = dataclasses.replace(preset, **{k: v for k, v in overrides.items() if k in in_preset})
    rest = {k: v for k, v in overrides.items() if k not in in_preset}
    network = dataclasses.replace(
        network_config(preset), img_resolution=image_shape[1:], img_channels=image_shape[0], label_dim=label_dim
    )
    return TrainConfig(
        preset=name,
        data=data,
        dataset=dataset,
        fingerprint=fingerprint,
        network=network,
        levels=LogNormal(preset.P_mean, preset.P_std),
        learning_rate=LearningRate(preset.lr, preset.decay, preset.rampup),
        encoder=encoder,
        duration=preset.duration,
        batch=preset.batch,
        snapshot=preset.snapshot,
        checkpoint=preset.checkpoint,
        status=preset.status,
        preview=preset.preview,
        **rest,
    )
