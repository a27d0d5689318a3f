"""Measuring something whose value is known: closed forms, and halves of a data set, which are of one distribution."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from dnnlib.errors import UserError
from evaluation.measure import Evaluator, MeasureConfig
from metrics.baselines import BASELINES, reference_file
from metrics.collectors import Sample, Sums
from metrics.detectors import DETECTORS, load_detectors
from metrics.frechet import fd, fd_infinity
from metrics.gathering import Gathered
from metrics.image_sets import ImageBatch
from metrics.inception_score import class_features, inception_score
from metrics.kid import kernel_distance
from metrics.manifolds import manifold_overlap
from metrics.reading import Images, Subset, describe
from metrics.registry import METRICS, require_packages, select_metrics
from metrics.results import evaluate
from torch_utils import distributed
from torch_utils.random import stream

ERRORS = 4  # standard errors that a measured value may be off
ENOUGH = 4  # images for each feature, below which nothing is expected of a distance
METRICS_OF_HALVES = {
    'pixels': ('fd_pixels', 'kid_pixels', 'prdc_pixels'),
    'inception': ('fid', 'kid', 'prdc', 'fid_infinity'),
    'dinov2': ('fd_dinov2', 'kid_dinov2', 'prdc_dinov2', 'fd_infinity_dinov2'),
}


@dataclasses.dataclass(frozen=True)
class Check:
    """Something measured beside what is known of it; `slack` is how far off it may be, None where only people judge."""

    what: str
    expected: float
    measured: float
    slack: float | None

    @property
    def passed(self) -> bool:
        """Whether the two agree."""
        return self.slack is None or abs(self.measured - self.expected) <= self.slack

    def __str__(self) -> str:
        verdict = ('ok' if self.passed else 'WRONG') if self.slack is not None else ''
        slack = '' if self.slack is None else f' ± {self.slack:.2g}'
        return f'{self.what:<44} {self.expected:>12.6g}{slack:<10} {self.measured:>12.6g}  {verdict}'.rstrip()


def closed_forms() -> Iterator[Check]:
    """Statistics of features that are made so that their values are known."""
    normal = torch.randn(5000, 10, dtype=torch.float64, generator=stream('selftest'))
    normal -= normal.mean(dim=0)
    white = normal @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(normal.T))).T  # mean 0, covariance I
    real, known = _collect(Sums, white), 10 * (0.1**2 + 0.2**2)
    yield Check('fd of N(0, I) and N(0.1, 1.2^2 I)', known, fd(real, _collect(Sums, 1.2 * white + 0.1))['value'], 1e-9)
    drawn = torch.randn(5000, 10, dtype=torch.float64, generator=stream('selftest', 1))
    found = fd_infinity(real, _collect(Sums, 1.2 * drawn + 0.1, groups=10))
    yield Check('fd_infinity of 5000 draws of the same', known, found['value'], ERRORS * found['standard_error'])
    one, two = (_collect(Sample, torch.full((20, 2), value)) for value in (1.0, 2.0))
    yield Check('kid of two points', 79, kernel_distance(one, two)['value'], 1e-9)
    balanced = 100 * torch.eye(5)[torch.arange(50_000) % 5]
    found = inception_score(None, _collect(Sums, class_features(balanced), groups=10))
    yield Check('is of five sure classes', 5, found['value'], 0.01)
    itself = _collect(Sample, normal[:500])
    for figure, known in (('precision', 1), ('recall', 1), ('density', 6 / 5), ('coverage', 1)):
        yield Check(f'{figure} of a set and itself', known, manifold_overlap(itself, itself)[figure], 1e-9)


def _collect(kind: type, features: torch.Tensor, **arguments) -> Sums | Sample:
    kept = kind(len(features), features.shape[1], **arguments)
    kept.update(features, ImageBatch(torch.empty(0), None, torch.arange(len(features))))
    return kept


def expected_distance(covariance: torch.Tensor, *counts: int) -> float:
    """Mean Fréchet distance of two samples of one normal distribution, to first order in 1 / count.

        (1/n + 1/m) (tr S + 1/2 sum_ij l_i l_j (1 + [i = j]) / (l_i + l_j))

    with eigenvalues l of S [F, F]: the variance of the means, which is exact for any distribution, and that of the
    covariances in the metric that the distance has for small differences. One count is for a sample and the
    distribution itself.
    """
    values = torch.linalg.eigvalsh(covariance.cpu().double()).clamp(min=0)
    pairs = values[:, None] * values / (values[:, None] + values).clamp(min=1e-300)
    spread = values.sum() + 0.5 * (pairs.sum() + pairs.diagonal().sum())
    return (sum(1 / n for n in counts) * spread).item()


def halves(config: MeasureConfig, images: Images, device: torch.device) -> tuple[list[Check], list[str]]:
    """Random halves of a data set against each other, for every detector that is available without a download.

    Where `config` has references, the whole set is measured against them too: of the same images the distance is 0.

    Returns:
        The checks, and what could not be checked. Every rank calls it; only rank 0's checks are complete.
    """
    checks, missing = [], []
    for ref in config.refs:
        if ref not in BASELINES and '://' not in ref:
            reference_file(ref)  # a mistyped path is a mistake, not something that could not be checked
    order = torch.randperm(len(images), generator=stream('halves', len(images)))
    parts = [Subset(images, half.sort().values.tolist(), f'half {i}') for i, half in enumerate(order.chunk(2))]
    for name in DETECTORS:
        offline = dataclasses.replace(config.detectors, offline=True)
        try:
            chosen = select_metrics(METRICS_OF_HALVES[name])
            require_packages(chosen)
            load_detectors([name], device, offline)
        except UserError as error:
            missing.append(f'{name}: {error}')
            continue
        evaluator = Evaluator(dataclasses.replace(config, metrics=chosen, refs=(), detectors=offline), device)
        real, made = evaluator.stored(parts[0], reference=True), evaluator.stored(parts[1])
        if distributed.rank() == 0:
            checks += _judge(evaluate(chosen, real, made)['metrics'], real, missing)
    for ref in config.refs:
        found, problems = _against(config, ref, images, device)
        checks += found
        missing += [f'{images.name} against {ref}: {problem}' for problem in problems]
    return checks, missing


def _against(config: MeasureConfig, ref: str, images: Images, device: torch.device) -> tuple[list[Check], list[str]]:
    """Fréchet distances of images to a reference, for people to judge, and why some are missing; for all ranks."""
    chosen, problems = {}, []
    for name, metric in config.metrics.items():
        one = {name: metric}
        try:
            if metric.statistic.compute is not fd:
                raise UserError('it has no known value; fid and other Fréchet distances have')
            require_packages(one)
            evaluator = Evaluator(dataclasses.replace(config, metrics=one, refs=(ref,)), device)
            evaluator.prepare(describe(images))
            chosen |= one
        except (UserError, OSError) as error:
            problems.append(f'{name}: {error}')
    known = set.intersection(*(set(text.split(',')) for text in distributed.gather_text(','.join(chosen))))
    chosen = {name: metric for name, metric in chosen.items() if name in known}
    if not chosen:
        return [], problems
    evaluator = Evaluator(dataclasses.replace(config, metrics=chosen, refs=(ref,)), device)
    evaluator.prepare(describe(images))
    numbers = [pair for result in evaluator.results(evaluator.stored(images)) for pair in result['metrics'].items()]
    return [Check(f'{name} of {images.name} and {ref}', 0, n['value'], None) for name, n in numbers], problems


def _judge(metrics: dict[str, dict[str, Any]], real: Gathered, missing: list[str]) -> Iterator[Check]:
    """What halves are known to give, up to chance: features are no normal distribution, so distances may double."""
    for name, numbers in metrics.items():
        metric, n, m = METRICS[name], numbers['num_reference'], numbers['num_images']
        title = f'{name} of halves of {n} and {m} images'
        if metric.reference.kind == 'sample' and 'standard_error' in numbers:
            yield Check(title, 0, numbers['value'], ERRORS * (numbers['standard_error'] or math.inf))
        elif metric.reference.kind == 'sample':
            n, m, k = (numbers[key] for key in ('real_used', 'images_used', 'density_neighbours'))
            yield Check(f'{name}: density', 1, numbers['density'], 8 / math.sqrt(n))
            covered = 1 - math.comb(n - 1, k) / math.comb(n + m - 1, k)
            yield Check(f'{name}: coverage', covered, numbers['coverage'], 8 / math.sqrt(n))
        else:
            covariance = real.collected[metric.reference].union().covariance()
            if min(n, m) < ENOUGH * len(covariance):
                missing.append(f'{name}: {ENOUGH * len(covariance)} images in each half are needed, there are {n}')
                continue
            error = numbers.get('standard_error')
            known = expected_distance(covariance, n) if error else expected_distance(covariance, n, m)
            yield Check(title, known, numbers['value'], known + ERRORS * (error or 0))
