"""Reference files: what metrics need of a data set, together with what it is of."""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from dnnlib.errors import UserError, quoted
from metrics.collectors import Sample, Sums, restore_collector
from metrics.detectors import Detector
from metrics.gathering import Gathered, Need
from metrics.image_sets import ImageSet
from torch_utils.tensor_files import TensorFile, save_tensors

SUFFIX = '.safetensors'
KIND = 'metric reference'


@dataclass(frozen=True)
class Header:
    """What a reference file says of itself; see `Gathered`. Older files have neither of the last two fields."""

    images: ImageSet
    detectors: dict[str, str]
    versions: dict[str, str]
    duplicates: int = 0
    content: str | None = None


def save_reference(path: str | os.PathLike, real: Gathered) -> None:
    """Write everything in `real`, whole or not at all.

    Tensors are called FEATURES/KIND/NAME: `inception/statistics/mean` [F] and `.../scatter` [F, F] = covariance *
    (count - 1), float64; `pixels/halves/mean` [2, F], ...; `inception/sample/features`. Header: kind, the fields of
    ImageSet (name, count, shape, fingerprint of the index, how it was made), the identity of each detector with the
    hash of its weights, the number of duplicates, the fingerprint of the pixels, and the versions of libraries.
    """
    tensors = {
        f'{need.features}/{need.kind}/{name}': tensor
        for need, collected in real.collected.items()
        for name, tensor in collected.to_tensors().items()
    }
    seen = {'detectors': real.identities, 'duplicates': real.duplicates, 'content': real.content}
    save_tensors(path, tensors, {'kind': KIND, 'images': asdict(real.about), **seen})


def read_about(path: str | os.PathLike) -> ImageSet:
    """What set a reference file was made of."""
    with TensorFile(path, KIND) as file:
        return file.about(Header).images


def load_reference(path: str | os.PathLike, needs: Collection[Need], detectors: Mapping[str, Detector]) -> Gathered:
    """Read what `needs` ask for from a file of `save_reference`.

    Args:
        path: The file.
        needs: Of the metrics.
        detectors: From `load_detectors`: those that the images are seen by.
    """
    with TensorFile(path, KIND) as file:
        header = file.about(Header)
        if header.images.image_shape is None:
            raise UserError(f'{file.path} is a damaged {KIND}: it does not say how large its images are')
        identities = {name: header.detectors.get(name) for name in {need.detector for need in needs}}
        problems = [
            f'{path} was made with another detector: {quoted(found, 200)}, here it is {detectors[name].identity!r}; '
            'make it again from its data set'
            for name, found in identities.items()
            if found is not None and found != detectors[name].identity
        ]
        if problems:
            raise UserError(problems)
        collected = {need: _read(file, need, header.images, detectors) for need in needs}
        if unknown := [name for name, found in identities.items() if found is None]:
            raise UserError(f'{path} is a damaged {KIND}: it does not say which {", ".join(unknown)} it was made with')
    return Gathered(header.images, identities, collected, header.versions, header.duplicates, header.content)


def _read(file: TensorFile, need: Need, about: ImageSet, detectors: Mapping[str, Detector]) -> Sums | Sample:
    prefix = f'{need.features}/{need.kind}/'
    names = [name for name in file.names if name.startswith(prefix)]
    if not names:
        holds = ', '.join(sorted({'/'.join(name.split('/')[:2]) for name in file.names}))
        raise UserError(
            f'{file.path} has no {prefix[:-1]}, only {holds}: make it with ref --metrics=..., or give the data set '
            f'{about.name} instead'
        )
    try:
        tensors = {name.removeprefix(prefix): file.get(name) for name in names}
        assert about.image_shape is not None
        sizes = detectors[need.detector].num_features(about.image_shape)
        return restore_collector(need.kind, tensors, sizes[need.features])
    except KeyError as error:
        raise UserError(f'{file.path} is a damaged {KIND}: it lacks {prefix}{error.args[0]}') from None
    except ValueError as error:
        raise UserError(f'{file.path} is a damaged {KIND}: {prefix}{error}') from None
