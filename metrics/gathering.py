"""One pass over a set of images: every detector sees each batch once, every collector keeps what metrics need."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dnnlib.errors import UserError
from metrics.collectors import Collector, LabelledFeatures, SplitStatistics, Statistics
from metrics.detectors import Detector, load_detectors
from metrics.image_sets import Batch, ImageSet, format_shape
from torch_utils import distributed
from torch_utils.tensor_files import library_versions

__all__ = ['Batch', 'Gathered', 'ImageSet', 'LabelledFeatures', 'Need', 'SplitStatistics', 'Statistics', 'gather']


class Need(NamedTuple):
    """What a metric needs of both sets of images: a collector of the features of a detector."""

    detector: str
    collector: type[Collector]


@dataclass(frozen=True)
class Gathered:
    """What one pass over a set of images has left, the same on every rank.

    Attributes:
        about: What the set is.
        identities: Identity of every detector that was used, by name; None where a published reference gives none.
        collected: What was kept, by need.
        versions: Of the libraries that computed it.
        duplicates: How many images are copies, pixel by pixel, of another one of the set.
    """

    about: ImageSet
    identities: dict[str, str | None]
    collected: dict[Need, Collector]
    versions: dict[str, str] = field(default_factory=library_versions)
    duplicates: int = 0


def gather(
    about: ImageSet,
    batches: Iterable[Batch],
    needs: Iterable[Need],
    device: torch.device | str,
    detectors: Mapping[str, Detector] | None = None,
) -> Gathered:
    """Read a set of images once and keep what `needs` ask for. Every rank must call it, with images or without.

    Args:
        about: The whole set.
        batches: This rank's share; the shares of all ranks make up the set. It must not use collectives itself.
        needs: From `needs_of`; the same on every rank.
        device: Where features are computed and kept.
        detectors: From `load_detectors`, on `device`; None loads what is needed.

    Raises:
        UserError: on every rank, where any of them cannot read an image, meets another shape than that of the set,
            or gets features that are not finite; also where a detector cannot be loaded.
    """
    needs = list(dict.fromkeys(needs))
    if detectors is None:
        detectors = load_detectors((need.detector for need in needs), device)
    used = {need.detector: detectors[need.detector] for need in needs}
    sizes = {name: detector.num_features(about.image_shape) for name, detector in used.items()}
    collected = {need: need.collector(about.count, sizes[need.detector], device, used[need.detector]) for need in needs}
    hashes = torch.zeros(about.count, dtype=torch.int64, device=device)
    problem = None
    try:
        for batch in batches:
            _update(about, batch, used, collected, device)
            hashes[batch.indices.to(device)] = _hash(batch.images).to(device)
    except (UserError, OSError) as error:
        problem = str(error)
    raise_together(problem, device)
    for need, collector in collected.items():
        collector.all_reduce()
        assert collector.count == about.count, f'{need}: {collector.count} images seen of {about.count}'
    duplicates = about.count - len(distributed.all_reduce_sum(hashes).unique())
    identities = {name: detector.identity for name, detector in used.items()}
    return Gathered(about, identities, collected, duplicates=duplicates)


def _update(
    about: ImageSet,
    batch: Batch,
    detectors: Mapping[str, Detector],
    collected: dict[Need, Collector],
    device: torch.device | str,
) -> None:
    """Give one batch to every detector, and its features to the collectors that need them."""

    def call(i: int) -> str:
        return batch.names[i] if batch.names else f'image {batch.indices[i]}'

    shape = tuple(batch.images.shape[1:])
    if shape != tuple(about.image_shape):
        raise UserError(
            f'{call(0)} of {about.name} is {format_shape(shape)}, the others are {format_shape(about.image_shape)}'
        )
    if batch.images.dtype != torch.uint8 or shape[0] not in (1, 3):
        raise UserError(
            f'{about.name} holds {format_shape(shape)} of {str(batch.images.dtype).removeprefix("torch.")}; '
            'metrics need grayscale or RGB images of 8 bits (decode latents first)'
        )
    images = batch.images.to(device, non_blocking=True)
    for name, detector in detectors.items():
        features = detector(images)
        bad = ~features.isfinite().all(dim=1).cpu()
        if bad.any():
            i = int(bad.nonzero()[0])
            raise UserError(f'{call(i)} of {about.name} has features that are not finite (detector {name})')
        for need, collector in collected.items():
            if need.detector == name:
                collector.update(features, batch)


def _hash(images: torch.Tensor) -> torch.Tensor:
    """64 bits for each image, int64 [N]; equal images have equal ones, and others by a chance of 2^-64 a pair."""
    digests = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images.cpu().numpy())
    return torch.tensor([int.from_bytes(digest, 'little', signed=True) for digest in digests], dtype=torch.int64)


def raise_together(problem: str | None, device: torch.device | str, room: int = 1024) -> None:
    """Raise UserError on every rank if any has a problem: the others would wait for it, and only rank 0 is heard."""
    table = torch.zeros(distributed.world_size(), room, dtype=torch.int32, device=device)
    if problem is not None:
        text = torch.tensor(list(problem.encode()[:room]), dtype=torch.int32, device=device)
        table[distributed.rank(), : len(text)] = text
    rows = distributed.all_reduce_sum(table).cpu().tolist()
    problems = [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in rows if any(row)]
    if problems:
        raise UserError(dict.fromkeys(problems))
