"""Statistics that others publish: `.npz` of EDM and ADM, `.pkl` of EDM2; where they are, and how they are read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.download import download, local_file
from dnnlib.errors import UserError, unknown_choice
from dnnlib.files import atomic_path
from metrics.collectors import Sums
from metrics.detectors import Detector
from metrics.gathering import Gathered, Need
from metrics.image_sets import ImageSet
from metrics.npz import npz_array, npz_members
from metrics.statistics import FeatureStatistics
from torch_utils.pickles import Call, read_pickle, to_array, to_pickle

NVIDIA = 'https://nvlabs-fi-cdn.nvidia.com'
ADM = 'https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet'
CROP = 'center-crop-dhariwal'
IMAGENET = 1_281_167  # training images
# Where the arrays of a file are -> our features.
PICKLED = {'fid': 'inception', 'fd_dinov2': 'dinov2'}
ARRAYS = {('mu', 'sigma'): 'inception', ('mu_s', 'sigma_s'): 'spatial'}


@dataclass(frozen=True)
class Baseline:
    """Published statistics of a training set, which the file itself says nothing of.

    Args:
        url: Where they are published; its SHA-256 is kept at the first download.
        count: Number of images.
        side: Of the square RGB images.
        transform: Of `dataset_tool.py`, by which they were made.
    """

    url: str
    count: int
    side: int
    transform: str = CROP


BASELINES = {
    'edm2-img64': Baseline(f'{NVIDIA}/edm2/dataset-refs/img64.pkl', IMAGENET, 64),
    'edm2-img512': Baseline(f'{NVIDIA}/edm2/dataset-refs/img512.pkl', IMAGENET, 512),
    'edm-cifar10': Baseline(f'{NVIDIA}/edm/fid-refs/cifar10-32x32.npz', 50_000, 32, 'none'),
    'edm-imagenet64': Baseline(f'{NVIDIA}/edm/fid-refs/imagenet-64x64.npz', IMAGENET, 64),
    'adm-imagenet256': Baseline(f'{ADM}/256/VIRTUAL_imagenet256_labeled.npz', IMAGENET, 256),
}


def reference_file(ref: str, offline: bool = False) -> Path:
    """The file or folder that a path, a URL or a name of BASELINES stands for, downloaded if need be."""
    if known := _known(ref):
        return download(known.url, offline=offline)
    path = local_file(ref, offline)
    if not path.exists():
        raise UserError(f'{ref} is no file or folder; {unknown_choice("baseline", ref, BASELINES)}')
    return path


def _known(ref: str) -> Baseline | None:
    return None if Path(ref).exists() else BASELINES.get(ref)


def has_statistics(path: str | os.PathLike) -> bool:
    """Whether a file holds published statistics, by its name and, of an `.npz`, by what is in it."""
    suffix = Path(path).suffix.lower()
    return suffix == '.pkl' or (suffix == '.npz' and {'mu', 'sigma'} <= npz_members(path).keys())


def load_baseline(
    ref: str, needs: Iterable[Need], detectors: Mapping[str, Detector], offline: bool = False
) -> Gathered:
    """Read what `needs` ask for from published statistics.

    `.npz`: arrays `mu` [2048] and `sigma` [2048, 2048] of Inception features, perhaps `mu_s` and `sigma_s` of spatial
    ones. `.pkl`: a dict such as {'fid': {'mu', 'sigma'}, 'fd_dinov2': {...}}, or {'mu', 'sigma'}; read without running
    anything in it. Such files tell little of their images: their number, where a `.pkl` has `num_images`; number and
    shape are known of BASELINES.
    """
    path = os.fspath(reference_file(ref, offline))
    statistics, count = _read_pickle(path) if path.lower().endswith('.pkl') else (_read_npz(path), None)
    collected, problems = {}, []
    for need in needs:
        detector = detectors[need.detector]
        if need.features not in statistics or need.kind != 'statistics':
            holds = ', '.join(sorted(statistics)) or 'nothing'
            problems.append(
                f'{path} holds means and covariances of {holds} only, and a metric needs {need.features}/{need.kind}'
            )
        elif detector.standard is False:
            problems.append(
                f'{path} was made with the published weights of {need.detector}, and here it has others: '
                f'{detector.identity}'
            )
        elif len(statistics[need.features]['mu']) != (size := detector.num_features((3, 1, 1))[need.features]):
            problems.append(f'{path} has {len(statistics[need.features]["mu"])} features, {need.features} has {size}')
        else:
            collected[need] = _collected(**statistics[need.features])
    if problems:
        raise UserError(dict.fromkeys(problems))
    about = ImageSet(Path(path).name, count, None, 0)
    if known := _known(ref):
        about = ImageSet(ref, known.count, (3, known.side, known.side), 0, made_with={'transform': known.transform})
    return Gathered(about, {need.detector: None for need in collected}, collected, {})


def _read_npz(path: str) -> dict[str, dict[str, np.ndarray]]:
    members = npz_members(path)
    return {
        features: _check(path, {'mu': npz_array(path, mu), 'sigma': npz_array(path, sigma)})
        for (mu, sigma), features in ARRAYS.items()
        if {mu, sigma} <= members.keys()
    }


def save_baseline(path: str | os.PathLike, real: Gathered) -> None:
    """Write means and covariances as EDM2's tools read them, a pickle of a dict: the one pickle that is written here.

    Raises:
        UserError: where there are none that they know.
    """
    found: dict[str, Any] = {}
    for name, features in PICKLED.items():
        if (need := Need(features, 'statistics')) in real.collected:
            statistics = real.collected[need].union()
            found[name] = {'mu': statistics.mean.numpy(), 'sigma': statistics.covariance().numpy()}
    if not found:
        raise UserError(f'{path}: EDM2 reads {" and ".join(PICKLED)} only; give --metrics')
    with atomic_path(path) as beside:
        beside.write_bytes(to_pickle({'num_images': real.about.count, **found}))


def _read_pickle(path: str) -> tuple[dict[str, dict[str, np.ndarray]], int | None]:
    """Statistics by features, and the number of images, where the file tells."""
    content = read_pickle(path)
    if isinstance(content, dict) and 'mu' in content:
        content = {'fid': content}
    if not isinstance(content, dict) or not any(name in content for name in PICKLED):
        raise UserError(f'{path} is not a metric reference: it has no entry {" or ".join(PICKLED)}')
    count = content.get('num_images')
    found = {features: _check(path, content[name]) for name, features in PICKLED.items() if name in content}
    return found, count if type(count) is int and count > 0 else None


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


def _collected(mu: np.ndarray, sigma: np.ndarray) -> Sums:
    """As if two images had made them: the count enters the covariance only, which is given."""
    made = Sums(0, 0)
    tensors = {'mean': torch.tensor(mu), 'scatter': torch.tensor(sigma), 'count': torch.tensor(2)}
    made.groups = [FeatureStatistics.from_tensors(tensors)]
    return made
