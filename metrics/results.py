"""Metrics computed from what one pass over each set of images has left: numbers, warnings, lines for people."""

from collections.abc import Mapping
from typing import Any

from metrics.gathering import Gathered
from metrics.image_sets import ImageSet, format_shape
from metrics.registry import METRICS, Metric


def evaluate(metrics: dict[str, Metric], real: Gathered | None, images: Gathered) -> dict[str, Any]:
    """Compute the metrics. No collectives: rank 0 alone may call it.

    Args:
        metrics: From `select_metrics`.
        real: What was gathered of the reference, or loaded; None where the metrics need none.
        images: What was gathered of the images.

    Returns:
        What JSON can say: `metrics` (numbers by name, each with `num_images` and `num_reference`), `detectors`
        (identities), `warnings` (sentences).
    """
    results = {}
    for name, metric in metrics.items():
        kept = None
        if metric.reference:
            detector = metric.need.detector
            assert real.identities[detector] in (None, images.identities[detector]), 'loading lets no other pass'
            kept = real.collected[metric.reference]
        numbers = metric.statistic.compute(kept, images.collected[metric.need])
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
    few = _few(metrics, images.about, real and real.about)
    if real is None:
        return few + set_warnings(images)
    return few + set_warnings(images) + set_warnings(real) + _unlike(images.about, real.about)


def _few(metrics: dict[str, Metric], images: ImageSet, real: ImageSet | None) -> list[str]:
    """A sentence for all metrics of one kind that have fewer images than they need."""
    found: dict[tuple, list[str]] = {}
    for name, metric in metrics.items():
        statistic, sets = metric.statistic, [images, *([real] if metric.reference else [])]
        few = tuple(f'{s.count} images of {s.name}' for s in sets if s.count is not None and s.count < statistic.few)
        if few:
            found.setdefault((few, statistic.few, statistic.because), []).append(name)
    return [
        f'{", ".join(names)}: only {" and ".join(few)}; below {least} {because}, so compare it only with values of as '
        'many images'
        for (few, least, because), names in found.items()
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


def summarize_runs(metrics: dict[str, Metric], runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """min, mean, max and spread (max - min) of the figures of each metric over several results of `evaluate`."""

    def over_runs(values: list[float]) -> dict[str, float]:
        low, high = min(values), max(values)
        return {'min': low, 'mean': sum(values) / len(values), 'max': high, 'spread': high - low}

    return {
        name: {figure: over_runs([run['metrics'][name][figure] for run in runs]) for figure in metric.statistic.figures}
        for name, metric in metrics.items()
    }


def format_result(name: str, numbers: dict[str, Any]) -> str:
    """One line for people: name, value, and the numbers of images beside it."""
    reference = f', reference {_n(numbers["num_reference"])}' if METRICS[name].reference else ''
    return f'{name:<16} {METRICS[name].statistic.line(numbers)}  {_n(numbers["num_images"])}{reference}'


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
