"""What a training run is; a preset is one too. Checked whole before anything starts."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from dataset.augment.table import AUGMENTS
from dnnlib.configs import differences, tagged, to_json
from dnnlib.errors import UserError, unknown_choice
from ema.power import STD_LIMIT
from networks.config import NetworkConfig
from networks.denoiser import PRECISIONS
from sampling.config import SamplerConfig
from training.methods.table import METHODS
from training.optimizer import LARGEST, Optimizer

# Fields that a resumed run may change: none of them alters what is learned from the next image. A dataset and a
# teacher are told by their fingerprints, not their names.
FREE_TO_CHANGE = {
    'data',
    'dataset',
    'class_names',
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
    'sampler',
    'method.teacher',
    'result',
}
# Fields that leave the mathematics as they are but not the rounding; a resumed run may change them when told to.
ROUNDING = {'micro_batch', 'precision', 'compile', 'tf32'}
KIMG = 1000  # file names of snapshots and states count in thousands of images
LAST_OF_EDM2_ALONE = '9b41b86'  # the commit before there were several families: configs had another shape


@dataclasses.dataclass(frozen=True)
class Averages:
    """Which averages of the weights are tracked.

    Args:
        stds: Lengths of the power-function EMAs.
        halflife: Images over which a traditional EMA beside them forgets half; None for none.
        rampup: Share of the training time that its half-life may be at most; 0 for no such bound.
    """

    stds: tuple[float, ...] = (0.050, 0.100)
    halflife: int | None = None
    rampup: float = 0.05

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [
            f'EMA lengths must be between 0 and {STD_LIMIT:.4f}, not {std}'
            for std in self.stds
            if not 0 < std < STD_LIMIT
        ]
        if len({f'{std:.3f}' for std in self.stds}) < max(len(self.stds), 1):
            found.append(f'EMA lengths must differ in their first three decimals, at least one is needed: {self.stds}')
        if self.halflife is not None and self.halflife <= 0:
            found.append(f'the half-life of the traditional EMA must be positive, not {self.halflife}')
        if not 0 <= self.rampup <= 1:
            found.append(f'the ramp-up of the traditional EMA must be a share of the training, not {self.rampup}')
        return found


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, or the recipe for one. All intervals and times are in images.

    Args:
        network: What is trained; in a preset, for the data that it is made for.
        optimizer: With its numbers and the learning rate over time.
        duration: Length of the run.
        batch: Images in a step, over all ranks and accumulation rounds.
        method: What is minimized and how, see `training.methods.table`.
        ema: Averages of the weights.
        ema_every: Steps from one update of the averages to the next.
        augment: How images are augmented, see `dataset.augment`; None for not at all.
        label_dropout: Share of the images whose class is withheld, for guidance by the network itself.
        xflip: Whether every image is also there mirrored.
        sampler: How the network is sampled where nothing else is asked for; it travels with the network's files.
        preset: Name of the recipe it was made from.
        data: Path of the dataset archive.
        dataset: Name of the dataset.
        fingerprint: Of the dataset's content.
        class_names: Of its classes, where they have names.
        encoder: What turns the network's output into images, as the dataset says; see `networks.encoders`.
        micro_batch: Images that one rank processes at once; None for as many as its share of the batch.
        snapshot, checkpoint, status, preview: Intervals of EMA snapshots, full states, status lines, sample grids.
        slice: Images after which this process stops, to be resumed by another; None for no such limit.
        keep: Newest full states that stay on disk; 0 for all.
        snapshot_precision: Of the parameters in EMA snapshots.
        loss_scaling: Factor on the loss before its gradient, against underflow in FP16.
        nonfinite_steps: Steps in a row with gradients that are not finite after which the run stops; 0 for never.
        held_out: Share of the data that is not trained on but evaluated at every snapshot.
        precision: Of the network's features.
        compile: Whether to compile the network.
        tf32: Whether a GPU may round factors of float32 products to 10 bits of mantissa.
        seed: Of initial weights, data order and noise.
        workers: Processes that load data beside each rank.
        init: Network file, path or URL, whose weights the run began with; None where they were drawn.
        result: What a paper reports for this recipe.
    """

    network: NetworkConfig
    optimizer: Optimizer
    duration: int
    batch: int
    method: Any = tagged(METHODS, default=METHODS['denoising']())
    ema: Averages = Averages()
    ema_every: int = 1
    augment: Any = tagged(AUGMENTS, default=None)
    label_dropout: float = 0.0
    xflip: bool = False
    sampler: SamplerConfig = SamplerConfig()
    preset: str = ''
    data: str = ''
    dataset: str = ''
    fingerprint: str = ''
    class_names: tuple[str, ...] = ()
    encoder: str = 'rgb'
    micro_batch: int | None = None
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
    tf32: bool = False
    seed: int = 0
    workers: int = 0
    init: str | None = None
    result: str = ''

    def micro_batch_for(self, world_size: int) -> int:
        """Images that one rank processes at once when there are `world_size` of them."""
        return self.batch // world_size if self.micro_batch is None else self.micro_batch

    @property
    def elements(self) -> int:
        """C H W of an image."""
        return math.prod(self.network.image_shape)

    def check(self, world_size: int = 1) -> 'TrainConfig':
        """Return self."""
        if found := [*self.network.problems(), *self._problems(), *self._batch_problems(world_size)]:
            raise UserError(found)
        return self

    def _problems(self) -> list[str]:
        if self.batch < 1:
            return [f'the batch must be at least 1, not {self.batch}']
        found = [*self.optimizer.problems(), *self.method.problems(self.network), *self.ema.problems()]
        found += [*self.sampler.problems(), *self._augment_problems(), *self._interval_problems()]
        for name in ('precision', 'snapshot_precision'):
            if getattr(self, name) not in PRECISIONS:
                found.append(unknown_choice(name.replace('_', ' '), getattr(self, name), PRECISIONS))
        if not 0 <= self.seed < 2**63:
            found.append(f'seed must be between 0 and 2^63 - 1, not {self.seed}')
        for name in ('workers', 'keep', 'nonfinite_steps'):
            if getattr(self, name) < 0:
                found.append(f'{name} must be at least 0, not {getattr(self, name)}')
        if not 0 < self.loss_scaling <= LARGEST:
            found.append(f'the loss scaling must be positive and finite in float32, not {self.loss_scaling}')
        for name, what in (('held_out', 'held-out images'), ('label_dropout', 'labels to drop')):
            if not 0 <= getattr(self, name) < 1:
                found.append(f'the share of {what} must be at least 0 and less than 1, not {getattr(self, name)}')
        return found

    def _augment_problems(self) -> list[str]:
        dim = 0 if self.augment is None else self.augment.dim
        found = [] if self.augment is None else self.augment.problems()
        if not found and dim != self.network.augment_dim:
            found.append(f'the augmentation has {dim} labels, the network takes {self.network.augment_dim}')
        return found

    def _interval_problems(self) -> list[str]:
        found = []
        for name in ('duration', 'slice', 'snapshot', 'checkpoint', 'status', 'preview'):
            interval = getattr(self, name)
            if interval is not None and (interval < self.batch or interval % self.batch):
                near = _nearest_multiples(interval, self.batch)
                found.append(f'{name} must be a multiple of the batch ({self.batch} images), not {interval} ({near})')
        if self.ema_every < 1:
            found.append(f'ema_every must be at least 1, not {self.ema_every}')
        elif self.ema_every > 1 and any(n % (self.ema_every * self.batch) for n in (self.snapshot, self.duration)):
            found.append(f'snapshot and duration must be multiples of ema_every = {self.ema_every} steps')
        for name in ('snapshot', 'checkpoint'):
            if getattr(self, name) < KIMG:
                found.append(f'{name} must be at least {KIMG} images, for its files are named by thousands')
        last = self.duration % self.snapshot
        if 0 < last < KIMG:
            found.append(f'the last snapshot would come {last} images after the one before; {KIMG} are needed')
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
            divisors = [n for n in range(1, share + 1) if share % n == 0]
            nearest = sorted(divisors, key=lambda n: (abs(n - micro), n))[:2]
            hint = ' or '.join(map(str, nearest))
            return [f'{share} images per step and rank are no multiple of batch-gpu {micro} (try {hint})']
        return []

    def to_json(self) -> dict[str, Any]:
        """As plain values, for the run folder and the training states."""
        return to_json(self)


def refuse_differences(folder: Path, old: dict[str, Any], config: TrainConfig, allow_rounding: bool = False) -> None:
    """Make sure that a run folder's config, as JSON values, is that of this run.

    Args:
        folder: For the message.
        old: What lies there; fields that it lacks, being older than they are, had their defaults.
        config: Of this run.
        allow_rounding: Whether fields that change the rounding alone may differ.
    """
    if 'optimizer' not in old:
        raise UserError(f'{folder} holds a run of an older version; commit {LAST_OF_EDM2_ALONE} can resume it')
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    old = old | {name: to_json(value) for name, value in defaults.items() if name not in old}
    changed = differences(old, config.to_json(), FREE_TO_CHANGE | ROUNDING)
    rounding = differences(old, config.to_json(), FREE_TO_CHANGE)
    rounding = [] if allow_rounding else [line for line in rounding if line not in changed]
    if changed or rounding:
        hint = ['--allow-rounding lets the latter change' if changed else '--allow-rounding lets these change']
        raise UserError([f'{folder} holds a run with another config', *changed, *rounding, *(hint if rounding else [])])


def _nearest_multiples(number: int, unit: int) -> str:
    below = number // unit * unit
    return f'try {below + unit}' if below <= 0 else f'try {below} or {below + unit}'
