"""Measuring stored images, and networks by the images that they generate, against references."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch

from dataset.reader import ImageDataset
from dnnlib.download import file_sha256
from dnnlib.errors import UserError
from dnnlib.progress import progress
from metrics.baselines import has_statistics, load_baseline, reference_file
from metrics.detectors import DetectorOptions, load_detectors
from metrics.gathering import Gathered, gather
from metrics.image_sets import ImageBatch, ImageSet
from metrics.npz import NpzImages
from metrics.reading import Images, batch_range, describe, read_batches
from metrics.reference import SUFFIX, load_reference
from metrics.registry import Metric, check_sets, memory_notes, needs_of
from metrics.results import evaluate
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.encoders import Encoder
from networks.folding import folded
from sampling.config import SamplerConfig
from sampling.pipeline import generate
from sampling.portions import EAGER, Execution
from torch_utils import distributed

GPU_WORKERS = 4  # processes that decode beside a GPU; beside a CPU detector they would only take its cores


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """What to measure, and against what.

    Args:
        metrics: From `select_metrics`.
        refs: Reference files, published statistics or real images; none for metrics that need none.
        detectors: Where detectors find their weights.
        batch: Images at a time.
        workers: Processes that decode stored images; None: GPU_WORKERS beside a GPU, else none.
    """

    metrics: dict[str, Metric]
    refs: tuple[str, ...] = ()
    detectors: DetectorOptions = dataclasses.field(default_factory=DetectorOptions)
    batch: int = 64
    workers: int | None = 0

    def check(self, images: ImageSet) -> None:
        """Find what can be wrong before detectors are loaded and images are read.

        Raises:
            UserError: where the metrics cannot hold these images to the references.
        """
        if self.refs and not any(metric.reference for metric in self.metrics.values()):
            raise UserError(f'{", ".join(self.metrics)} needs no reference: use calc or gen without --ref')
        if not self.refs:
            check_sets(self.metrics, None, images)
        for ref in self.refs:
            path = str(reference_file(ref, self.detectors.offline))
            if not is_file_of_statistics(path):
                check_sets(self.metrics, describe(open_images(path)), images)


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a network makes the images that are measured.

    Args:
        seeds: An image for each.
        sampler: Steps, noise levels, guidance weight.
        encoder: Makes images of samples.
        guiding_net: For guidance.
        classes: To cycle through; None draws them.
        name: What messages and records call the images.
        execution: How networks are evaluated.
    """

    seeds: Sequence[int]
    sampler: SamplerConfig
    encoder: Encoder
    guiding_net: Denoiser | None = None
    classes: Sequence[int] | None = None
    name: str = 'generated images'
    execution: Execution = EAGER

    def describe(self, network: NetworkConfig) -> ImageSet:
        """The images that such a network makes, before it makes them."""
        return ImageSet(self.name, len(self.seeds), self.encoder.image_shape(network.image_shape), network.label_dim)

    def batches(self, net: Denoiser, batch_size: int) -> Iterator[ImageBatch]:
        """This rank's batches of images; see `batch_range` for why they do not depend on the number of ranks."""
        nets = {net, self.guiding_net} - {None}
        with folded(nets), progress(len(self.seeds), 'images', shown=distributed.rank() == 0) as advance:
            for k in batch_range(len(self.seeds), batch_size):
                indices = torch.arange(k * batch_size, min((k + 1) * batch_size, len(self.seeds)))
                seeds = [self.seeds[i] for i in indices.tolist()]
                how = (self.sampler, self.guiding_net, self.classes, batch_size, self.encoder, self.execution)
                (made,) = generate(net, seeds, *how)
                yield ImageBatch(made.images, made.labels, indices, [f'seed {seed}' for seed in seeds])
                advance(len(seeds) * distributed.world_size())


class Evaluator:
    """Measures one set of images after the other, all ranks together: the one way from images or a network to numbers.

    `prepare` finds mistakes early, `stored` and `generated` gather what metrics need of a set, `results` computes.

    Args:
        config: What to measure.
        device: Of this rank.

    Raises:
        UserError: where a detector cannot be loaded.
    """

    def __init__(self, config: MeasureConfig, device: torch.device):
        self.config, self.device = config, device
        self.detectors = load_detectors((need.detector for need in needs_of(config.metrics)), device, config.detectors)
        self._opened: list[tuple[ImageSet, Gathered | Images]] | None = None

    def prepare(self, images: ImageSet) -> None:
        """Open the references, without reading images, and check that such images can be held to them.

        Raises:
            UserError: where they cannot.
        """
        metrics = self.config.metrics
        first = self._opened is None
        if first:
            self._opened = [self._open(ref) for ref in self.config.refs]
        about = [about for about, _ in self._opened]
        for real in about or [None]:
            check_sets(metrics, real, images)
        if first:
            self.note_memory(max((real.count for real in about if real.count), default=None), images.count, images)

    def read_references(self) -> list[Gathered]:
        """What the metrics need of each reference, read when this is first called; every rank calls it."""
        for i, (about, source) in enumerate(self._opened):
            if not isinstance(source, Gathered):
                self._opened[i] = about, self.stored(source, 'reference', reference=True)
        return [source for _, source in self._opened]

    def stored(self, images: Images, title: str | None = None, reference: bool = False) -> Gathered:
        """Gather what the metrics need of stored images, or of a `reference`."""
        workers = self.config.workers
        if workers is None:
            workers = GPU_WORKERS if self.device.type == 'cuda' else 0
        batches = read_batches(images, self.config.batch, title or images.name, workers)
        return self._gather(describe(images), batches, reference)

    def generated(self, net: Denoiser, how: Generation) -> Gathered:
        """Gather what the metrics need of the images that a network (in evaluation mode) generates."""
        about = how.describe(net.config)
        self.prepare(about)
        self.read_references()
        return self._gather(about, how.batches(net, self.config.batch))

    def network(self, net: Denoiser, how: Generation) -> dict[str, Any]:
        """Metrics of a network, by name, on rank 0; elsewhere nothing. Every rank calls it."""
        results = self.results(self.generated(net, how))
        if len(results) == 1:
            return results[0]['metrics']
        return {
            f'{name} {result["reference"]["name"]}': numbers
            for result in results
            for name, numbers in result['metrics'].items()
        }

    def results(self, images: Gathered) -> list[dict[str, Any]]:
        """`evaluate` against each reference, on rank 0; elsewhere nothing. Every rank calls it."""
        pairs = list(zip(self.config.refs, self.read_references(), strict=True)) or [(None, None)]
        if distributed.rank() != 0:
            return []
        found = []
        for ref, real in pairs:
            result = evaluate(self.config.metrics, real, images)
            result['warnings'] += self._weights_warnings(real)
            result['images'] = {**vars(images.about), 'content': images.content}
            result['reference'] = None if real is None else describe_reference(ref, real)
            found.append(result)
        return found

    def note_memory(self, num_real: int | None, num_images: int | None, about: ImageSet) -> None:
        """Say, on rank 0, what metrics that keep features of such images will take."""
        if distributed.rank() == 0:
            each = (detector.num_features(about.image_shape) for detector in self.detectors.values())
            sizes = {name: size for found in each for name, size in found.items()}
            for note in memory_notes(self.config.metrics, num_real, num_images, sizes):
                click.echo(note, err=True)

    def _open(self, ref: str) -> tuple[ImageSet, Gathered | Images]:
        offline = self.config.detectors.offline
        path = str(reference_file(ref, offline))
        if not is_file_of_statistics(path):
            images = open_images(path)
            return describe(images), images
        needs = needs_of(self.config.metrics, reference=True)
        if path.endswith(SUFFIX):
            real = load_reference(path, needs, self.detectors)
        else:
            real = load_baseline(ref, needs, self.detectors, offline)
        return real.about, real

    def _gather(self, about: ImageSet, batches: Iterator[ImageBatch], reference: bool = False) -> Gathered:
        return gather(about, batches, needs_of(self.config.metrics, reference), self.device, self.detectors)

    def _weights_warnings(self, real: Gathered | None) -> list[str]:
        """What there is to say of detectors whose weights are not certainly the published ones."""
        found = []
        for name, detector in self.detectors.items():
            if detector.standard is False:
                found.append(f'{name} has other weights than the published ones: compare the values with nothing else')
            elif detector.standard is None and real and real.identities.get(name, '') is None:
                found.append(f'{name}: nothing tells whether its weights are those of the published reference')
        return found


def open_images(path: str) -> Images:
    """The reader for a folder, a zip or an `.npz`."""
    return NpzImages(path) if path.lower().endswith('.npz') else ImageDataset(path)


def is_file_of_statistics(path: str) -> bool:
    """Whether a reference is a file made before, ours or another's, rather than images."""
    return path.endswith(SUFFIX) or has_statistics(path)


def describe_reference(ref: str, reference: Gathered) -> dict[str, Any]:
    """The reference for a record, with the SHA-256 of its file if it is one."""
    path = reference_file(ref)
    sha256 = file_sha256(path) if path.is_file() and is_file_of_statistics(str(path)) else None
    about = {**vars(reference.about), 'content': reference.content}
    return {'path': ref, 'sha256': sha256, **about, 'versions': reference.versions}
