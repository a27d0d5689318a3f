"""The rows of the study: networks of like cost, and what each is trained with."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from dataset.reader import ImageDataset
from networks.complexity import complexity
from networks.config import NetworkConfig
from training.config import TrainConfig
from training.optimizer import Optimizer
from training.presets.table import make_config

STDS = (0.050, 0.100, 0.150, 0.200)  # EMA lengths that are measured; the first two are tracked
STD = 0.100  # of what is measured over training time
BATCH = 32
GRID = (1.0, 2.0, 4.0)  # learning rates tried first, relative to the preset's
MOST_RATES = 5  # that are tried of a row


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the study is.

    Args:
        width: Channels of the finest level of A and of the branches of EDM2+.
        images: That A is trained on; the others also see as many as its operations pay for.
        trial: Images of a run that a learning rate is judged by.
        samples: Generated images of a measurement.
        steps: Of the sampler.
        epochs: Of the classifier.
    """

    width: int
    images: int
    trial: int
    samples: int
    steps: int
    epochs: int

    @property
    def snapshot(self) -> int:
        """Interval of snapshots in images."""
        return max(self.images // 16, 1024)


FULL = Scale(width=32, images=12 * 1024, trial=3 * 1024, samples=500, steps=10, epochs=8)
QUICK = Scale(width=16, images=2 * 1024, trial=1024, samples=50, steps=4, epochs=2)


@dataclasses.dataclass(frozen=True)
class Row:
    """A network and its recipe.

    Args:
        preset: Recipe for digits of 8x8 pixels, which is adapted to 16x16.
        settings: (width) -> fields of the config that differ from the preset's.
        same_width: Whether the width is A's, as in the paper, rather than the one with nearly A's operations.
    """

    preset: str
    settings: Callable[[int], dict]
    same_width: bool = False


def _block(letter: str) -> Row:
    """EDM2 with a residual branch."""
    return Row(
        'edm2plus-digits', lambda width: {'channels': width, 'block': letter, 'attn_resolutions': (8,)}, same_width=True
    )


# EDM2+'s table 2, then the other families. None has augmented images, so that all learn from the same ones.
ROWS = {
    **{letter: _block(letter) for letter in ('A', 'D*', 'F', 'F*', 'G', 'G*')},
    'EDM': Row('edm-digits', lambda width: {'channels': width, 'attn_resolutions': (8,), 'augment': None}),
    'SiD2': Row(
        'sid2-digits',
        lambda width: {
            'network.architecture.channels': (width, 2 * width),
            'network.architecture.channels_per_head': 16,
            'method.levels.resolution': 16,
            'sampler.disc.resolution': 16,
        },
    ),
}
WIDTHS = range(8, 257, 8)


def slug(name: str) -> str:
    """A row's name as that of a folder."""
    return name.replace('*', 'star')


def closest(operations: Callable[[int], int | None], widths: Sequence[int], target: int) -> int:
    """The width whose operations come closest to `target`; those with None cannot be built, and more cost more."""
    found: dict[int, int] = {}
    for width in widths:
        count = operations(width)
        if count is not None:
            found[width] = abs(count - target)
            if count > target:
                break
    return min(found, key=lambda width: (found[width], width))


def operations(config: NetworkConfig) -> int:
    """Of a forward pass, in the papers' convention."""
    return complexity(config).operations


def config_of(name: str, dataset: ImageDataset, data: str, scale: Scale, width: int | None = None) -> TrainConfig:
    """The config of a row, at the preset's learning rate; of the width that makes it comparable with A."""
    row = ROWS[name]
    if width is None:
        width = scale.width if row.same_width else _matched_width(name, dataset, data, scale)
    config = make_config(row.preset, row.settings(width), dataset, data)
    edm2 = row.preset == 'edm2plus-digits'
    # EDM2's rate rises over a sixteenth of A's run and falls after a quarter; the others' recipes leave it constant.
    decay = scale.images / 4 / BATCH if edm2 else 0
    optimizer = dataclasses.replace(config.optimizer, decay=decay, rampup=scale.images // 16)
    return dataclasses.replace(
        config,
        optimizer=optimizer,
        batch=BATCH,
        ema=dataclasses.replace(config.ema, stds=STDS[:2], halflife=None),
        snapshot=scale.snapshot,
        checkpoint=4 * scale.snapshot,
        status=1024,
        keep=1,
    )


def _matched_width(name: str, dataset: ImageDataset, data: str, scale: Scale) -> int:
    target = operations(config_of('A', dataset, data, scale).network)

    def cost(width: int) -> int | None:
        network = config_of(name, dataset, data, scale, width).network
        return None if network.problems() else operations(network)

    return closest(cost, WIDTHS, target)


def at_rate(config: TrainConfig, factor: float, seed: int) -> TrainConfig:
    """The config with a learning rate of the grid and a seed."""
    optimizer: Optimizer = dataclasses.replace(config.optimizer, lr=factor * config.optimizer.lr)
    return dataclasses.replace(config, optimizer=optimizer, seed=seed)


def next_rate(errors: Mapping[float, float]) -> float | None:
    """The learning rate to try after those with these errors: beyond the best one, where it is the least or largest.

    None where enough were tried.
    """
    if missing := [factor for factor in GRID if factor not in errors]:
        return missing[0]
    best = min(errors, key=errors.__getitem__)
    beyond = {min(errors): best / 2, max(errors): best * 2}
    return beyond.get(best) if len(errors) < MOST_RATES else None


def durations(own: int, of_a: int, scale: Scale) -> tuple[int, int]:
    """Images of as many as A's, and of as many operations (no fewer images), whole snapshots both.

    Args:
        own, of_a: Operations of the row's network, and of A's.
        scale: Of the study.
    """
    paid = round(scale.images * of_a / own / scale.snapshot) * scale.snapshot
    return scale.images, max(paid, scale.images)
