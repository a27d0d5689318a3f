"""The table of metrics: statistics of features. A new statistic is a row of `STATISTICS`, for all features."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import UserError, unknown_choice
from metrics.class_agreement import class_agreement, require_sklearn
from metrics.collectors import collector_memory
from metrics.dino import require_transformers
from metrics.frechet import fd, fd_infinity
from metrics.gathering import Need
from metrics.image_sets import ImageSet, format_shape
from metrics.inception_score import inception_score
from metrics.kid import kernel_distance
from metrics.manifolds import manifold_overlap, overlap_memory

REQUIRED = {'dinov2': require_transformers}  # features -> raises UserError where something to install is missing


@dataclass(frozen=True)
class Statistic:
    """A row of the table.

    Attributes:
        about: What it is, in a few words.
        compute: Pure function (collected of real images, of generated images) -> numbers.
        line: Those numbers as people read them.
        images, reference: Kind of collector for either set; no reference is needed where it has none.
        features: Those that it is of.
        few: Below so many images there is a warning.
        because: What the warning says.
        figures: Which numbers are summed up over repeats.
        labels: Whether both sets must be labelled.
        require: Raises UserError where something to install is missing.
        memory: Bytes that `compute` takes beside what was gathered, of (real images, images, F).
    """

    about: str
    compute: Callable[[Any, Any], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]
    images: str
    reference: str | None
    features: tuple[str, ...] = ('inception', 'dinov2', 'pixels')
    few: int = 2048
    because: str = 'it is biased upwards'
    figures: tuple[str, ...] = ('value',)
    labels: bool = False
    require: Callable[[], None] = lambda: None
    memory: Callable[[int | None, int, int], int] = lambda num_real, num_images, num_features: 0


@dataclass(frozen=True)
class Metric:
    """A statistic of some features."""

    statistic: Statistic
    features: str

    @property
    def need(self) -> Need:
        """What it needs of the images."""
        return Need(self.features, self.statistic.images)

    @property
    def reference(self) -> Need | None:
        """What it needs of the reference; None where it needs none."""
        return self.statistic.reference and Need(self.features, self.statistic.reference)

    @property
    def same_shape(self) -> bool:
        """Whether both sets must be of one shape; with other features another shape is only warned about."""
        return self.features == 'pixels'


def _plus_minus(value: float, error: float | None, digits: int) -> str:
    return f'{value:.{digits}f}' + ('' if error is None else f' ± {error:.{digits}f}')


def _fd_line(n: dict[str, Any]) -> str:
    if 'real_halves' not in n:
        return f'{n["value"]:.4f}'
    return f'{n["value"]:.5f} (halves of the reference: {n["real_halves"]:.5f} at N={n["real_halves_counts"][0]})'


STATISTICS = {
    'fd': Statistic('Fréchet distance', fd, _fd_line, 'statistics', 'statistics', ('inception', 'spatial', 'dinov2')),
    'fd_halves': Statistic(
        'Fréchet distance, and that of halves of the reference', fd, _fd_line, 'statistics', 'halves', ('pixels',)
    ),
    'fd_infinity': Statistic(
        'Fréchet distance extrapolated to infinitely many images',
        fd_infinity,
        lambda n: _plus_minus(n['value'], n['standard_error'], 4) + f' (at N itself {n["finite"]:.4f})',
        'tenths',
        'statistics',
        ('inception', 'spatial', 'dinov2', 'pixels'),
        few=5000,
        because='the extrapolation may be off',
    ),
    'kid': Statistic(
        'kernel distance, unbiased',
        kernel_distance,
        lambda n: (
            _plus_minus(n['value'], n['standard_error'], 6)
            + f' (standard error over {n["blocks"]} blocks of {n["block_size"]})'
        ),
        'sample',
        'sample',
        few=0,
    ),
    'prdc': Statistic(
        'precision, recall, density and coverage of manifolds of nearest neighbours',
        manifold_overlap,
        lambda n: (
            f'precision {n["precision"]:.4f}, recall {n["recall"]:.4f} (k={n["neighbours"]}), density '
            f'{n["density"]:.4f}, coverage {n["coverage"]:.4f} (k={n["density_neighbours"]}), '
            f'{n["images_used"]} images against {n["real_used"]} real'
        ),
        'sample',
        'sample',
        few=10_000,
        because='all four depend on the number of images',
        figures=('precision', 'recall', 'density', 'coverage'),
        memory=overlap_memory,
    ),
    'is': Statistic(
        'Inception score; needs no reference',
        inception_score,
        lambda n: _plus_minus(n['value'], n['std'], 4) + f' (deviation over {n["splits"]} parts)',
        'tenths',
        None,
        ('classes',),
        few=20_000,
        because='it is biased downwards',
    ),
    'class_agreement': Statistic(
        'share of images that a classifier gives the class asked for',
        class_agreement,
        lambda n: f'{n["value"]:.2%} (the classifier is right on {n["held_out_accuracy"]:.2%} of held-out real images)',
        'sample',
        'sample',
        ('pixels',),
        few=0,
        labels=True,
        require=require_sklearn,
    ),
}
SHORT = {
    'fid': 'fd_inception',
    'sfid': 'fd_spatial',
    'fid_infinity': 'fd_infinity_inception',
    'kid': 'kid_inception',
    'prdc': 'prdc_inception',
    'precision_recall': 'prdc_inception',
    'is': 'is_classes',
    'fd_pixels': 'fd_halves_pixels',
    'class_agreement': 'class_agreement_pixels',
}
METRICS = {
    f'{name}_{features}': Metric(statistic, features)
    for name, statistic in STATISTICS.items()
    for features in statistic.features
}
METRICS |= {short: METRICS[name] for short, name in SHORT.items()}


def metrics_table() -> str:
    """All metrics, a line for each statistic with its names."""
    long = {name: short for short, name in SHORT.items() if short != 'precision_recall'}
    names = {s: [f'{s}_{f}' for f in statistic.features] for s, statistic in STATISTICS.items()}
    return '\n'.join(
        f'  {", ".join(long.get(name, name) for name in names[s])}:\n    {statistic.about}'
        for s, statistic in STATISTICS.items()
    )


def select_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The metrics of those names, in that order, each once; `require_packages` checks that they can be computed."""
    names = list(dict.fromkeys(name.strip() for name in names))
    unknown = [unknown_choice('metric', name, METRICS) for name in names if name not in METRICS]
    if unknown:
        raise UserError(unknown)
    return {name: METRICS[name] for name in names}


def require_packages(metrics: dict[str, Metric]) -> None:
    """Check that the optional packages of these metrics are installed, before any image is read."""
    for metric in metrics.values():
        metric.statistic.require()
        REQUIRED.get(metric.features, lambda: None)()


def needs_of(metrics: dict[str, Metric], reference: bool = False) -> list[Need]:
    """What `gather` shall keep for these metrics, each once; with `reference`, of the reference."""
    needs = [metric.reference if reference else metric.need for metric in metrics.values()]
    return list(dict.fromkeys(need for need in needs if need))


def check_sets(metrics: dict[str, Metric], real: ImageSet | None, images: ImageSet) -> None:
    """Refuse two sets that cannot be compared, before their images are read.

    Args:
        metrics: From `select_metrics`.
        real: The reference; None where the metrics need none.
        images: The images.
    """
    problems = []
    shapes = {tuple(which.image_shape) for which in (real, images) if which is not None and which.image_shape}
    alike = [name for name, metric in metrics.items() if metric.same_shape]
    if len(shapes) > 1 and alike:
        problems.append(
            f'images of {images.name} are {format_shape(images.image_shape)}, '
            f'those of the reference {real.name} {format_shape(real.image_shape)}; '
            f'{alike[0]} compares equal shapes only'
        )
    if images.count < 2:
        problems.append(f'{images.name} has {images.count} image(s); at least 2 are needed')
    if real is not None:
        problems.extend(reference_problems(real))
    for name, metric in metrics.items():
        if real is None and metric.reference:
            problems.append(f'{name} needs a reference: --ref=FILE|DATASET')
        unlabelled = [each.name for each in (real, images) if each and metric.statistic.labels and not each.num_classes]
        problems.extend(f'{name} needs labels, and {which} has none' for which in unlabelled)
        if metric.need.kind == 'tenths' and metric.reference and images.count < 30:
            problems.append(f'{name} needs at least 30 images, three in each tenth; {images.name} has {images.count}')
    if problems:
        raise UserError(problems)


def reference_problems(real: ImageSet) -> list[str]:
    """What keeps a set of real images from being a reference, if anything."""
    if real.count is not None and real.count < 4:
        return [f'the reference {real.name} has {real.count} image(s); at least 4 are needed, 2 in each half']
    return []


def memory_notes(
    metrics: dict[str, Metric], num_real: int | None, num_images: int | None, sizes: dict[str, int]
) -> list[str]:
    """What is kept of images, and computing with it, takes: a line for each metric above 64 MiB.

    Args:
        metrics: From `select_metrics`.
        num_real: Number of real images; None where there are none, or it is not known.
        num_images: Number of images; None where only a reference is gathered and nothing is computed.
        sizes: F of each of the features.
    """
    lines, of_images, of_real = [], needs_of(metrics), needs_of(metrics, reference=True)
    for need in dict.fromkeys([*of_images, *of_real]):
        counts = [n for n, needs in ((num_images, of_images), (num_real, of_real)) if n and need in needs]
        size = sum(collector_memory(need.kind, n, sizes[need.features]) for n in counts)
        if size > 2**26:
            names = ', '.join(name for name, metric in metrics.items() if need in (metric.need, metric.reference))
            lines.append(f'{names}: keeps {size / 2**30:.2f} GiB on every rank')
    for name, metric in metrics.items():
        size = metric.statistic.memory(num_real, num_images, sizes[metric.features]) if num_images else 0
        if size > 2**26:
            lines.append(f'{name}: {size / 2**30:.2f} GiB more on rank 0 while it is computed')
    return lines
