"""The table of metrics, and their evaluation from what one pass over each set of images has left."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dnnlib.errors import UserError, unknown_choice
from metrics.class_agreement import class_agreement, require_sklearn
from metrics.collectors import ClassScores, FeatureSample, LabelledFeatures, SplitStatistics, Statistics
from metrics.dino import require_transformers
from metrics.frechet import frechet_distance
from metrics.gathering import Gathered, Need
from metrics.image_sets import ImageSet, format_shape
from metrics.inception_score import inception_score
from metrics.kid import kernel_distance
from metrics.precision_recall import memory as precision_recall_memory
from metrics.precision_recall import precision_recall
from metrics.statistics import FeatureStatistics

FEW_IMAGES = 2048  # below it a Fréchet distance is mostly bias


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        need: What is gathered of the real and of the generated images.
        compute: Pure function (collected of real images, of generated images) -> numbers.
        line: Those numbers as people read them.
        about: What it is, in a few words.
        figures: Which numbers are summed up over repeats.
        labels: Whether both sets must be labelled.
        same_shape: Whether both sets must be of one shape; elsewhere another shape is only warned about.
        reference: Whether there is a reference at all.
        require: Raises UserError where something to install is missing.
        memory: Bytes that `compute` takes beside what was gathered, of (real images, images, F).
    """

    need: Need
    compute: Callable[[Any, Any], dict[str, Any]]
    line: Callable[[dict[str, Any]], str]
    about: str
    figures: tuple[str, ...] = ('value',)
    labels: bool = False
    same_shape: bool = False
    reference: bool = True
    require: Callable[[], None] = lambda: None
    memory: Callable[[int | None, int, int], int] = lambda num_real, num_images, num_features: 0


def _distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    return frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


def _fd(real: Statistics, images: Statistics) -> dict[str, Any]:
    """Fréchet distance of the images to the real ones."""
    return {'value': _distance(real.all(), images.all())}


def _fd_halves(real: SplitStatistics, images: SplitStatistics) -> dict[str, Any]:
    """Fréchet distance of the images to the real ones, and of one half of the real ones to the other."""
    return {
        'value': _distance(real.all(), images.all()),
        'real_halves': _distance(real.even, real.odd),
        'real_halves_counts': [real.even.count, real.odd.count],
    }


def _plus_minus(value: float, error: float | None, digits: int) -> str:
    return f'{value:.{digits}f}' + ('' if error is None else f' ± {error:.{digits}f}')


METRICS: dict[str, Metric] = {
    'fid': Metric(
        need=Need('inception', Statistics),
        compute=_fd,
        line=lambda n: f'{n["value"]:.4f}',
        about='Fréchet distance of Inception-v3 features',
    ),
    'fd_dinov2': Metric(
        need=Need('dinov2', Statistics),
        compute=_fd,
        line=lambda n: f'{n["value"]:.4f}',
        about='Fréchet distance of DINOv2 ViT-L/14 features',
        require=require_transformers,
    ),
    'kid': Metric(
        need=Need('inception', FeatureSample),
        compute=kernel_distance,
        line=lambda n: (
            _plus_minus(n['value'], n['standard_error'], 6)
            + f' (standard error over {n["blocks"]} blocks of {n["block_size"]})'
        ),
        about='kernel distance of Inception-v3 features, unbiased',
    ),
    'is': Metric(
        need=Need('inception', ClassScores),
        compute=inception_score,
        line=lambda n: _plus_minus(n['value'], n['std'], 4) + f' (deviation over {n["splits"]} parts)',
        about='Inception score; needs no reference',
        reference=False,
    ),
    'precision_recall': Metric(
        need=Need('inception', FeatureSample),
        compute=precision_recall,
        line=lambda n: (
            f'precision {n["precision"]:.4f}, recall {n["recall"]:.4f} '
            f'(k={n["neighbours"]}, {n["images_used"]} images, {n["real_used"]} real)'
        ),
        about='overlap of nearest-neighbour manifolds of Inception-v3 features',
        figures=('precision', 'recall'),
        memory=precision_recall_memory,
    ),
    'fd_pixels': Metric(
        need=Need('pixels', SplitStatistics),
        compute=_fd_halves,
        line=lambda n: (
            f'{n["value"]:.5f} (halves of the reference: {n["real_halves"]:.5f} at N={n["real_halves_counts"][0]})'
        ),
        about='Fréchet distance of 8x8 pixels; nothing to download',
        same_shape=True,
    ),
    'class_agreement': Metric(
        need=Need('pixels', LabelledFeatures),
        compute=class_agreement,
        line=lambda n: (
            f'{n["value"]:.2%} (the classifier is right on {n["held_out_accuracy"]:.2%} of held-out real images)'
        ),
        about='share of images that a classifier gives the class asked for',
        labels=True,
        same_shape=True,
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


def needs_of(metrics: dict[str, Metric], reference: bool = False) -> list[Need]:
    """What `gather` shall keep for these metrics, each once; with `reference`, of the reference."""
    return list(dict.fromkeys(m.need for m in metrics.values() if m.reference or not reference))


def check_sets(metrics: dict[str, Metric], real: ImageSet | None, images: ImageSet) -> None:
    """Refuse two sets that cannot be compared, before their images are read.

    Args:
        metrics: From `select_metrics`.
        real: The reference; None where the metrics need none.
        images: The images.

    Raises:
        UserError: with all problems: shapes that differ, too few images, labels missing.
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
        unlabelled = [which.name for which in (real, images) if which and metric.labels and not which.num_classes]
        problems.extend(f'{name} needs labels, and {which} has none' for which in unlabelled)
    if problems:
        raise UserError(problems)


def reference_problems(real: ImageSet) -> list[str]:
    """What keeps a set of real images from being a reference, if anything."""
    if real.count is not None and real.count < 4:
        return [f'the reference {real.name} has {real.count} image(s); at least 4 are needed, 2 in each half']
    return []


def memory_notes(
    metrics: dict[str, Metric], num_real: int | None, num_images: int | None, features: dict[str, int]
) -> list[str]:
    """What keeping features, and computing with them, takes: a line for each where it is more than 64 MiB.

    Args:
        metrics: From `select_metrics`.
        num_real: Number of real images; None where there are none, or it is not known.
        num_images: Number of images; None where only a reference is gathered and nothing is computed.
        features: F of each detector.
    """
    notes = []
    counts = (num_real, num_images)
    for need in needs_of(metrics):
        size = sum(need.collector.memory(count, features[need.detector]) for count in counts if count)
        if need.collector in (FeatureSample, LabelledFeatures) and size > 2**26:
            names = ', '.join(name for name, metric in metrics.items() if metric.need == need)
            notes.append(f'{names}: keeps features, {size / 2**30:.2f} GiB on every rank')
    for name, metric in metrics.items():
        size = metric.memory(num_real, num_images, features[metric.need.detector]) if num_images else 0
        if size > 2**26:
            notes.append(f'{name}: {size / 2**30:.2f} GiB more on rank 0 while it is computed')
    return notes


def evaluate(metrics: dict[str, Metric], real: Gathered | None, images: Gathered) -> dict[str, Any]:
    """Compute the metrics. No collectives: rank 0 alone may call it.

    Args:
        metrics: From `select_metrics`.
        real: What was gathered of the reference, or loaded; None where the metrics need none.
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
        kept = None
        if metric.reference:
            assert real.identities[detector] in (None, images.identities[detector]), 'loading lets no other pass'
            kept = real.collected[metric.need]
        numbers = metric.compute(kept, images.collected[metric.need])
        counts = {'num_images': images.about.count, 'num_reference': real.about.count if metric.reference else None}
        results[name] = {**numbers, **counts}
    return {'metrics': results, 'detectors': images.identities, 'warnings': _warnings(metrics, real, images)}


def set_warnings(which: Gathered) -> list[str]:
    """What there is to say of one set of images: JPEGs and copies in it."""
    found, about = [], which.about
    if about.jpegs:
        found.append(
            f'{about.name}: {about.jpegs} of {about.count} images are JPEGs; compression alone moves these metrics, '
            'measure PNGs'
        )
    if which.duplicates:
        found.append(f'{about.name}: {which.duplicates} of {about.count} images are copies of others in it')
    return found


def _warnings(metrics: dict[str, Metric], real: Gathered | None, images: Gathered) -> list[str]:
    if real is None:
        return set_warnings(images)
    few, unlike = _few(metrics, images.about, real.about), _unlike(images.about, real.about)
    return few + set_warnings(images) + set_warnings(real) + unlike


def _few(metrics: dict[str, Metric], images: ImageSet, real: ImageSet) -> list[str]:
    distances = [name for name, metric in metrics.items() if metric.need.collector in (Statistics, SplitStatistics)]
    counted = [which for which in (images, real) if which.count is not None and which.count < FEW_IMAGES]
    few = [f'{which.count} images of {which.name}' for which in counted]
    if not distances or not few:
        return []
    return [
        f'{", ".join(distances)}: only {" and ".join(few)}; below {FEW_IMAGES} the distance is biased upwards, '
        'so compare it only with values of as many images'
    ]


def _unlike(images: ImageSet, real: ImageSet) -> list[str]:
    """Shapes and transforms that differ, where both are known."""
    found = []
    if real.image_shape and tuple(real.image_shape) != tuple(images.image_shape):
        found.append(
            f'{images.name} is {format_shape(images.image_shape)}, the reference {real.name} '
            f'{format_shape(real.image_shape)}: the resize is part of what is measured'
        )
    ours, theirs = (_transform(which.made_with) for which in (images, real))
    if ours and theirs and ours != theirs:
        found.append(f'{images.name} was made with the transform {ours}, the reference {real.name} with {theirs}')
    return found


def _transform(made_with: Mapping[str, Any]) -> str | None:
    """The last transform that changed the pixels: a data set may have been made from one that was transformed."""
    while made_with.get('transform') == 'none' and isinstance(made_with.get('before'), dict):
        made_with = made_with['before']
    return made_with.get('transform')


def summarize(metrics: dict[str, Metric], runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """min, mean, max and spread (max - min) of the figures of each metric over several results of `evaluate`."""

    def over_runs(values: list[float]) -> dict[str, float]:
        low, high = min(values), max(values)
        return {'min': low, 'mean': sum(values) / len(values), 'max': high, 'spread': high - low}

    return {
        name: {figure: over_runs([run['metrics'][name][figure] for run in runs]) for figure in metric.figures}
        for name, metric in metrics.items()
    }


def format_result(name: str, numbers: dict[str, Any]) -> str:
    """One line for people: name, value, and the numbers of images beside it."""
    reference = f', reference {_n(numbers["num_reference"])}' if METRICS[name].reference else ''
    return f'{name:<16} {METRICS[name].line(numbers)}  {_n(numbers["num_images"])}{reference}'


def format_summary(name: str, summary: dict[str, dict[str, float]], num_images: int, repeats: int) -> str:
    """One line for people: min, mean and spread of a metric over repeats, with the number of images of each."""
    figures = ', '.join(
        f'{"" if figure == "value" else figure + " "}min {s["min"]:.5g}, mean {s["mean"]:.5g}, max {s["max"]:.5g}, '
        f'spread {s["spread"]:.2g}'
        for figure, s in summary.items()
    )
    return f'{name:<16} {figures}  {_n(num_images)} x {repeats}'


def _n(count: int | None) -> str:
    return 'N unknown' if count is None else f'N={count}'
