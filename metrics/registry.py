"""The table of metrics, and their evaluation from what one pass over each set of images has left."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import UserError, unknown_choice
from metrics.class_agreement import class_agreement, require_sklearn
from metrics.frechet import frechet_distance
from metrics.gathering import Gathered, ImageSet, LabelledFeatures, Need, SplitStatistics, format_shape
from metrics.statistics import FeatureStatistics

FEW_IMAGES = 2048  # below it a Fréchet distance is mostly bias


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        need: What is gathered of the real and of the generated images.
        compute: Pure function (collected of real images, of generated images) -> numbers, `value` first.
        line: How those numbers are shown to people, with the names of `compute` in braces.
        labels: Whether both sets must be labelled.
        require: Raises UserError where something to install is missing.
    """

    need: Need
    compute: Callable[[Any, Any], dict[str, Any]]
    line: str
    labels: bool = False
    require: Callable[[], None] = lambda: None


def _fd(real: SplitStatistics, images: SplitStatistics) -> dict[str, Any]:
    """Fréchet distance of the images to the real ones, and of one half of the real ones to the other."""

    def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
        return frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())

    return {
        'value': distance(real.all(), images.all()),
        'real_halves': distance(real.even, real.odd),
        'real_halves_counts': [real.even.count, real.odd.count],
    }


METRICS: dict[str, Metric] = {
    'fd_pixels': Metric(
        need=Need('pixels', SplitStatistics),
        compute=_fd,
        line='{value:.5f} (halves of the reference: {real_halves:.5f} at N={real_halves_counts[0]})',
    ),
    'class_agreement': Metric(
        need=Need('pixels', LabelledFeatures),
        compute=class_agreement,
        line='{value:.2%} (the classifier is right on {held_out_accuracy:.2%} of held-out real images)',
        labels=True,
        require=require_sklearn,
    ),
}


def select_metrics(names: Iterable[str]) -> dict[str, Metric]:
    """The rows of those names, in that order, each once.

    Raises:
        UserError: for every unknown name (with near ones), and where a metric lacks a library.
    """
    names = list(dict.fromkeys(name.strip() for name in names))
    unknown = [unknown_choice('metric', name, METRICS) for name in names if name not in METRICS]
    if unknown:
        raise UserError(unknown)
    for name in names:
        METRICS[name].require()
    return {name: METRICS[name] for name in names}


def needs_of(metrics: dict[str, Metric]) -> list[Need]:
    """What `gather` shall keep for these metrics, each once."""
    return list(dict.fromkeys(metric.need for metric in metrics.values()))


def check_sets(metrics: dict[str, Metric], real: ImageSet, images: ImageSet) -> None:
    """Refuse two sets that cannot be compared, before their images are read.

    Raises:
        UserError: with all problems: shapes that differ, too few images, labels missing.
    """
    problems = []
    if tuple(images.image_shape) != tuple(real.image_shape):
        problems.append(
            f'images of {images.name} are {format_shape(images.image_shape)}, '
            f'those of the reference {real.name} {format_shape(real.image_shape)}'
        )
    if images.count < 2:
        problems.append(f'{images.name} has {images.count} image(s); at least 2 are needed')
    problems.extend(reference_problems(real))
    for name, metric in metrics.items():
        unlabelled = [which.name for which in (real, images) if metric.labels and not which.num_classes]
        problems.extend(f'{name} needs labels, and {which} has none' for which in unlabelled)
    if problems:
        raise UserError(problems)


def reference_problems(real: ImageSet) -> list[str]:
    """What keeps a set of real images from being a reference, if anything."""
    if real.count < 4:
        return [f'the reference {real.name} has {real.count} image(s); at least 4 are needed, 2 in each half']
    return []


def evaluate(metrics: dict[str, Metric], real: Gathered, images: Gathered) -> dict[str, Any]:
    """Compute the metrics. No collectives: rank 0 alone may call it.

    Args:
        metrics: From `select_metrics`.
        real: What was gathered of the reference, or `load_reference`.
        images: What was gathered of the images.

    Returns:
        What JSON can say: `metrics` (numbers by name, each with `num_images` and `num_reference`), `detectors`
        (identities), `warnings` (sentences).

    Raises:
        UserError: where a metric refuses its input.
    """
    results = {}
    for name, metric in metrics.items():
        detector = metric.need.detector
        assert real.identities[detector] == images.identities[detector], 'load_reference lets no other pass'
        numbers = metric.compute(real.collected[metric.need], images.collected[metric.need])
        results[name] = {**numbers, 'num_images': images.about.count, 'num_reference': real.about.count}
    return {'metrics': results, 'detectors': images.identities, 'warnings': _warnings(metrics, real, images)}


def _warnings(metrics: dict[str, Metric], real: Gathered, images: Gathered) -> list[str]:
    distances = [name for name, metric in metrics.items() if metric.need.collector is SplitStatistics]
    few = [f'{which.count} images of {which.name}' for which in (images.about, real.about) if which.count < FEW_IMAGES]
    if not distances or not few:
        return []
    return [
        f'{", ".join(distances)}: only {" and ".join(few)}; below {FEW_IMAGES} the distance is biased upwards, '
        'so compare it only with values of as many images'
    ]


def format_result(name: str, numbers: dict[str, Any]) -> str:
    """One line for people: name, value, and the numbers of images beside it."""
    shown = METRICS[name].line.format(**numbers)
    return f'{name:<16} {shown}  N={numbers["num_images"]}, reference N={numbers["num_reference"]}'
