"""Measuring networks on the fly: images are generated, seen by the detectors, and forgotten."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from dataset.reader import ImageDataset
from dnnlib.download import local_file
from metrics.detectors import Detector, DetectorOptions, load_detectors
from metrics.gathering import Batch, Gathered, ImageSet, Need, gather
from metrics.published import is_published, load_published
from metrics.reading import Images, NpzImages, batch_range, describe, read_batches
from metrics.reference import SUFFIX, load_reference
from metrics.registry import check_sets, evaluate, needs_of, select_metrics
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.encoders import Encoder, PixelEncoder
from sampling.pipeline import SamplerConfig, generate
from torch_utils import distributed

VAE_FACTOR = 8  # side of a picture over that of its latents


class NetworkMeasure:
    """Measures one network after the other against the same reference, on all ranks together.

    Args:
        metrics: Names.
        ref: Reference file, published statistics or the real images; None for metrics that need none.
        device: Of this rank.
        seeds: An image for each.
        config: How they are generated.
        encoder: Makes images of samples.
        batch: Images at a time.
        options: Where detectors find their weights.

    Raises:
        UserError: where a metric is unknown or cannot be computed here.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        ref: str | None,
        device: torch.device,
        seeds: Sequence[int],
        config: SamplerConfig,
        encoder: Encoder,
        batch: int = 64,
        options: DetectorOptions | None = None,
    ):
        self.metrics = select_metrics(metrics)
        self.ref, self.device, self.seeds, self.config = ref, device, list(seeds), config
        self.encoder, self.batch = encoder, batch
        self.detectors = load_detectors((need.detector for need in needs_of(self.metrics)), device, options)
        self._reference: Gathered | None = None

    def prepare(self, network: NetworkConfig) -> None:
        """Read the reference, once, and find out early that such networks cannot be held to it; every rank calls it.

        Raises:
            UserError: where they cannot.
        """
        about = self._about(network)
        if self.ref is None or not any(metric.reference for metric in self.metrics.values()):
            check_sets(self.metrics, None, about)
            return
        if self._reference is None:
            self._reference = open_reference(self.ref, self.metrics, self.detectors, self.device, self.batch)
        check_sets(self.metrics, self._reference.about, about)

    def __call__(
        self, net: Denoiser, guiding_net: Denoiser | None = None, guidance: float | None = None
    ) -> dict[str, Any]:
        """Metrics of a network, by name, on rank 0; elsewhere nothing. Every rank calls it.

        Args:
            net: In evaluation mode, on `device`.
            guiding_net: For guidance.
            guidance: Its weight, in place of the config's.
        """
        self.prepare(net.config)
        config = self.config
        if guidance is not None:
            config = dataclasses.replace(config, guidance=guidance)

        def make(seeds: list[int], batch_size: int):
            return generate(net, seeds, config, guiding_net, batch_size=batch_size, encoder=self.encoder)

        needs = needs_of(self.metrics)
        batches = made(make, self.seeds, self.batch)
        gathered = gather(self._about(net.config), batches, needs, self.device, self.detectors)
        return evaluate(self.metrics, self._reference, gathered)['metrics'] if distributed.rank() == 0 else {}

    def _about(self, network: NetworkConfig) -> ImageSet:
        return ImageSet(
            'generated images',
            len(self.seeds),
            made_shape(network, 'rgb' if isinstance(self.encoder, PixelEncoder) else 'latents'),
            network.label_dim,
        )


def made_shape(network: NetworkConfig, encoder: str) -> tuple[int, int, int]:
    """(C, H, W) of the pictures that a network makes with the encoder of that name."""
    channels, (height, width) = network.img_channels, network.img_resolution
    return (channels, height, width) if encoder == 'rgb' else (3, VAE_FACTOR * height, VAE_FACTOR * width)


def made(make: Callable, seeds: list[int], batch_size: int) -> Iterator[Batch]:
    """This rank's batches of generated images; see `batch_range` for why they do not depend on the ranks.

    Args:
        make: (seeds, batch_size) -> batches of `sampling.pipeline.generate`.
        seeds: An image for each, over all ranks.
        batch_size: Images at a time.
    """
    mine = batch_range(len(seeds), batch_size)
    with tqdm(total=len(seeds), desc='images', unit='img', disable=True if distributed.rank() else None) as bar:
        for k in mine:
            chosen = seeds[k * batch_size : (k + 1) * batch_size]
            for images in make(seeds=chosen, batch_size=batch_size):
                indices = torch.arange(k * batch_size, k * batch_size + len(chosen))
                yield Batch(images.images, images.labels, indices, [f'seed {seed}' for seed in chosen])
            bar.update(min(len(chosen) * distributed.world_size(), bar.total - bar.n))


def open_images(path: str) -> Images:
    """The reader for a folder, a zip or an `.npz`."""
    return NpzImages(path) if path.lower().endswith('.npz') else ImageDataset(path)


def is_file_of_statistics(path: str) -> bool:
    """Whether a reference is a file made before, ours or another's, rather than images."""
    return path.endswith(SUFFIX) or is_published(path)


def load_statistics(path: str, needs: Iterable[Need], detectors: Mapping[str, Detector]) -> Gathered:
    """Read a reference file, ours or a published one.

    Raises:
        UserError: where it lacks something, or was made with other detectors.
    """
    return (load_reference if path.endswith(SUFFIX) else load_published)(path, needs, detectors)


def open_reference(ref: str, metrics, detectors, device: torch.device, batch: int, workers: int = 0) -> Gathered:
    """Load a reference file, or gather what the metrics need of a data set; every rank calls it.

    Raises:
        UserError: where it lacks something, or is no reference.
    """
    path, needs = str(local_file(ref)), needs_of(metrics, reference=True)
    if is_file_of_statistics(path):
        return load_statistics(path, needs, detectors)
    images = open_images(path)
    return gather(describe(images), read_batches(images, batch, 'reference', workers), needs, device, detectors)
