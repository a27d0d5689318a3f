"""Reference statistics that others publish: `.npz` of EDM and ADM, `.pkl` of EDM2; means and covariances."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import UserError
from metrics.collectors import Statistics
from metrics.detectors import Detector
from metrics.gathering import Gathered, ImageSet, Need
from metrics.reading import npz_array, npz_members
from metrics.statistics import FeatureStatistics
from torch_utils.pickles import Call, read_pickle, to_array

DETECTORS = {'fid': 'inception', 'fd_dinov2': 'dinov2'}  # their names of metrics -> our detectors
SUFFIXES = ('.npz', '.pkl')


def is_published(path: str | os.PathLike) -> bool:
    """Whether a file is a reference of others by its name and, of an `.npz`, by what is in it."""
    suffix = Path(path).suffix.lower()
    return suffix == '.pkl' or (suffix == '.npz' and {'mu', 'sigma'} <= npz_members(path).keys())


def load_published(path: str | os.PathLike, needs: Iterable[Need], detectors: Mapping[str, Detector]) -> Gathered:
    """Read what `needs` ask for from a published reference.

    `.npz`: arrays `mu` [2048] and `sigma` [2048, 2048] of Inception features. `.pkl`: a dict such as
    {'fid': {'mu', 'sigma'}, 'fd_dinov2': {...}}, or {'mu', 'sigma'}; read without running anything in it. Such files
    tell nothing of their images: their number and shape stay unknown.

    Raises:
        UserError: where it lacks what a metric needs, holds something else, or the detector here has other weights
            than the published ones.
        OSError: where it cannot be read.
    """
    path = os.fspath(path)
    statistics = _read_pickle(path) if path.lower().endswith('.pkl') else _read_npz(path)
    collected, problems = {}, []
    for need in needs:
        if need.detector not in statistics or need.collector is not Statistics:
            holds = ', '.join(sorted(statistics))
            problems.append(
                f'{path} holds means and covariances of {holds or "no detector"} only, and a metric needs '
                f'{need.detector}/{need.collector.kind}'
            )
        elif detectors[need.detector].published is False:
            problems.append(
                f'{path} was made with the published weights of {need.detector}, and here it has others: '
                f'{detectors[need.detector].identity}'
            )
        elif len(statistics[need.detector]['mu']) != (size := detectors[need.detector].num_features((3, 1, 1))):
            problems.append(f'{path} has {len(statistics[need.detector]["mu"])} features, {need.detector} has {size}')
        else:
            collected[need] = _collected(**statistics[need.detector])
    if problems:
        raise UserError(dict.fromkeys(problems))
    about = ImageSet(Path(path).name, None, None, 0)
    return Gathered(about, {need.detector: None for need in collected}, collected, {})


def _read_npz(path: str) -> dict[str, dict[str, np.ndarray]]:
    return {'inception': _check(path, {name: npz_array(path, name) for name in ('mu', 'sigma')})}


def _read_pickle(path: str) -> dict[str, dict[str, np.ndarray]]:
    content = read_pickle(path)
    if isinstance(content, dict) and 'mu' in content:
        content = {'fid': content}
    if not isinstance(content, dict) or not any(name in content for name in DETECTORS):
        raise UserError(f'{path} is not a metric reference: it has no entry {" or ".join(DETECTORS)}')
    return {DETECTORS[name]: _check(path, content[name]) for name in DETECTORS if name in content}


def _check(path: str, arrays: object) -> dict[str, np.ndarray]:
    """mu [F] and sigma [F, F], both float64 and finite."""
    found = {name: arrays.get(name) for name in ('mu', 'sigma')} if isinstance(arrays, dict) else {}
    try:
        found = {name: to_array(array) if isinstance(array, Call) else array for name, array in found.items()}
    except UserError as error:
        raise UserError(f'{path} is not a metric reference: {error}') from None
    if not found or any(not isinstance(a, np.ndarray) or a.dtype.kind != 'f' for a in found.values()):
        raise UserError(f'{path} is not a metric reference: mu and sigma must be arrays of floating-point numbers')
    found = {name: np.asarray(array, np.float64) for name, array in found.items()}
    size = found['mu'].size
    if found['mu'].shape != (size,) or found['sigma'].shape != (size, size):
        shapes = f'{found["mu"].shape} and {found["sigma"].shape}'
        raise UserError(f'{path} is not a metric reference: mu and sigma are {shapes}, not [F] and [F, F]')
    if not all(np.isfinite(array).all() for array in found.values()):
        raise UserError(f'{path} has values that are not finite')
    return found


def _collected(mu: np.ndarray, sigma: np.ndarray) -> Statistics:
    """As if two images had made them: the count enters the covariance only, which is given."""
    made = Statistics(0, 0)
    made.statistics = FeatureStatistics.from_tensors(
        {'mean': torch.tensor(mu), 'scatter': torch.tensor(sigma), 'count': torch.tensor(2)}
    )
    return made
