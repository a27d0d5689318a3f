"""Reference files: statistics of a data set together with what they are of."""

import os
from collections.abc import Iterable
from dataclasses import asdict

from dnnlib.errors import UserError
from metrics.detectors import load_detector
from metrics.gathering import Gathered, ImageSet, Need, SplitStatistics
from metrics.statistics import FeatureStatistics
from torch_utils.tensor_files import TensorFile, save_tensors

SUFFIX = '.safetensors'
KIND = 'metric reference'
HALVES = ('even', 'odd')


def save_reference(path: str | os.PathLike, real: Gathered) -> None:
    """Write the statistics of every detector in `real`, whole or not at all.

    Tensors, for each detector and each half of the images (at even and at odd places), float64: `pixels.even.mean`
    [F], `pixels.even.scatter` [F, F] = covariance * (count - 1). Header: kind, the fields of ImageSet, and for
    each detector its identity and the counts of the halves. All images are the union of the halves.
    """
    tensors, detectors = {}, {}
    for need, collected in real.collected.items():
        assert isinstance(collected, SplitStatistics), f'a reference file holds no {need.collector.__name__}'
        halves = {half: getattr(collected, half) for half in HALVES}
        for half, statistics in halves.items():
            tensors[f'{need.detector}.{half}.mean'] = statistics.mean
            tensors[f'{need.detector}.{half}.scatter'] = statistics.scatter
        counts = {half: statistics.count for half, statistics in halves.items()}
        detectors[need.detector] = {'identity': real.identities[need.detector], 'counts': counts}
    save_tensors(path, tensors, {'kind': KIND, 'images': asdict(real.about), 'detectors': detectors})


def load_reference(path: str | os.PathLike, needs: Iterable[Need]) -> Gathered:
    """Read what `needs` ask for from a file of `save_reference`.

    Raises:
        UserError: where it is no such file, lacks a detector, was made with a detector of other identity, or where
            a metric needs more of the images than their statistics.
        OSError: where it cannot be read.
    """
    with TensorFile(path, KIND) as file:
        if file.header.get('kind') != KIND:
            raise UserError(f'{file.path} is not a {KIND} but a {file.header.get("kind", "file of unknown kind")}')
        about = ImageSet(**{**file.header['images'], 'image_shape': tuple(file.header['images']['image_shape'])})
        identities, collected = {}, {}
        for need in needs:
            if need.collector is not SplitStatistics:
                raise UserError(
                    f'{file.path} holds statistics only, and a metric needs the images themselves: '
                    f'give the data set {about.name} instead'
                )
            if need.detector not in file.header['detectors']:
                made_with = ', '.join(file.header['detectors'])
                raise UserError(f'{file.path} has no statistics for {need.detector!r}, only for {made_with}')
            identities[need.detector] = file.header['detectors'][need.detector]['identity']
            _check_identity(file.path, need.detector, identities[need.detector])
            collected[need] = _statistics(file, need.detector)
    return Gathered(about, identities, collected, file.header['versions'])


def _check_identity(path: str, detector: str, identity: str) -> None:
    """Refuse features of a detector that only shares the name of ours."""
    ours = load_detector(detector).identity
    if identity != ours:
        raise UserError(
            f'{path} was made with another detector: {identity!r}, here it is {ours!r}; make it again from its data set'
        )


def _statistics(file: TensorFile, detector: str) -> SplitStatistics:
    split = SplitStatistics(0, 0)
    for half in HALVES:
        statistics = FeatureStatistics(0)
        statistics.mean = file.get(f'{detector}.{half}.mean')
        statistics.scatter = file.get(f'{detector}.{half}.scatter')
        statistics.count = file.header['detectors'][detector]['counts'][half]
        setattr(split, half, statistics)
    return split
