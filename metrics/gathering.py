"""One pass over a set of images: every detector sees each batch once, every collector keeps what metrics need."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dnnlib.errors import UserError
from metrics.collectors import Sample, Sums, make_collector
from metrics.detectors import FEATURES, Detector
from metrics.image_sets import ImageBatch, ImageSet, format_shape
from torch_utils import distributed
from torch_utils.tensor_files import library_versions


class Need(NamedTuple):
    """What a metric needs of a set of images: a collector, one of `KINDS`, of one of `FEATURES`."""

    features: str
    kind: str

    @property
    def detector(self) -> str:
        """Name of the detector that gives these features."""
        return FEATURES[self.features]


@dataclass(frozen=True)
class Gathered:
    """What one pass over a set of images has left, the same on every rank.

    Attributes:
        about: What the set is.
        identities: Identity of every detector that was used, by name; None where published statistics give none.
        collected: What was kept, by need.
        versions: Of the libraries that computed it.
        duplicates: How many images are copies, pixel by pixel, of another one of the set.
        content: 16 hexadecimal digits that change with any pixel of any image; None where it is not known.
    """

    about: ImageSet
    identities: dict[str, str | None]
    collected: dict[Need, Sums | Sample]
    versions: dict[str, str] = field(default_factory=library_versions)
    duplicates: int = 0
    content: str | None = None


def gather(
    about: ImageSet,
    batches: Iterable[ImageBatch],
    needs: Iterable[Need],
    device: torch.device | str,
    detectors: Mapping[str, Detector],
) -> Gathered:
    """Read a set of images once and keep what `needs` ask for. Every rank must call it, with images or without.

    Args:
        about: The whole set.
        batches: This rank's share; the shares of all ranks make up the set. It must not use collectives itself.
        needs: The same on every rank.
        device: Where features are computed and kept.
        detectors: From `load_detectors`, on `device`.
    """
    needs = list(dict.fromkeys(needs))
    used = {need.detector: detectors[need.detector] for need in needs}
    sizes = {name: size for each in used.values() for name, size in each.num_features(about.image_shape).items()}
    collected = {need: make_collector(need.kind, about.count, sizes[need.features], device) for need in needs}
    hashes = torch.zeros(about.count, dtype=torch.int64, device=device)
    problem = ''
    try:
        for batch in batches:
            _update(about, batch, used, collected, device)
            hashes[batch.indices.to(device)] = _hash(batch.images).to(device)
    except (UserError, OSError) as error:
        problem = str(error)
    if problems := [text for text in distributed.gather_text(problem) if text]:
        raise UserError(dict.fromkeys(problems), everywhere=True)
    for need, collector in collected.items():
        collector.all_reduce()
        assert collector.count == about.count, f'{need}: {collector.count} images seen of {about.count}'
    hashes = distributed.all_reduce_sum(hashes).cpu()
    identities = {name: detector.identity for name, detector in used.items()}
    content = hashlib.blake2b(hashes.numpy().tobytes(), digest_size=8).hexdigest()
    return Gathered(about, identities, collected, duplicates=about.count - len(hashes.unique()), content=content)


def _update(
    about: ImageSet,
    batch: ImageBatch,
    detectors: Mapping[str, Detector],
    collected: Mapping[Need, Sums | Sample],
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
    features = {name: found for each in detectors.values() for name, found in each(images).items()}
    for need, collector in collected.items():
        bad = ~features[need.features].isfinite().all(dim=1).cpu()
        if bad.any():
            name = call(int(bad.nonzero()[0]))
            raise UserError(f'{name} of {about.name} has features that are not finite (detector {need.detector})')
        collector.update(features[need.features], batch)


def _hash(images: torch.Tensor) -> torch.Tensor:
    """64 bits for each image, int64 [N]; equal images have equal ones, and others by a chance of 2^-64 a pair."""
    digests = (hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images.cpu().numpy())
    return torch.tensor([int.from_bytes(digest, 'little', signed=True) for digest in digests], dtype=torch.int64)
