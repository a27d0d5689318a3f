"""A network as one safetensors file: weights, and in the header everything that is needed to rebuild it."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib.download import local_file
from dnnlib.errors import UserError, quoted
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.published.file import PublishedFile
from torch_utils.pickles import looks_like_pickle
from torch_utils.tensor_files import TensorFile, save_tensors

KIND = 'network file'
_NAME = re.compile(r'(?!training-state).+-(\d{7,})(-[^-]+)?\.safetensors$')  # PREFIX-KIMG-STD, or PREFIX-KIMG


@dataclasses.dataclass(frozen=True)
class NetworkInfo:
    """What a network file says of itself.

    Args:
        config: Enough to rebuild the network.
        nimg: Training images seen.
        ema_std: Length of the power-function EMA, relative to nimg; None for raw weights.
        preset: Name of the training preset.
        dataset: Name of the training data.
        encoder: What turns its output into images, see `networks.encoders.ENCODERS`.
        ema_lengths: Patterns of parameter names and their lengths, where they differ.
        ema_halflife: Half-life of a traditional EMA, in images.
        sampler: How it is sampled where nothing else is asked for: `sampling.config.SamplerConfig` as plain values.
        class_names: Of all classes, where the training data named them.
    """

    config: NetworkConfig
    nimg: int
    ema_std: float | None
    preset: str
    dataset: str = ''
    encoder: str = 'rgb'
    ema_lengths: tuple[tuple[str, float], ...] | None = None
    ema_halflife: int | None = None
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()

    def to_header(self) -> dict[str, Any]:
        """As plain values, which `NetworkFile` reads."""
        return {'kind': KIND, **dataclasses.asdict(self), 'config': self.config.to_json()}


class NetworkFile(TensorFile):
    """An open network file of ours: what it says of itself, and its tensors one by one.

    Attributes:
        info: From its header.

    Raises:
        UserError: where it is not a network file.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path, KIND)
        self.info = self.about(NetworkInfo, config=NetworkConfig.from_json)


class PublishedNetworkFile(PublishedFile):
    """The same for the pickle of a network that NVIDIA published for EDM or EDM2."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self.info = NetworkInfo(
            self.config, self.nimg, self.ema_std, self.preset, self.dataset, self.encoder, sampler=self.sampler
        )


def network_path(source: str | os.PathLike, offline: bool = False) -> Path:
    """The network file that a path or URL names, downloaded if need be; of a run folder, its newest one.

    Of files of the same training time, that is the one written last: a reconstruction, where there are some.

    Raises:
        UserError: where a folder holds none, or a URL is not available.
    """
    path = local_file(source, offline)
    if not path.is_dir():
        return path
    found = [
        (int(match[1]), file.stat().st_mtime, file) for file in path.iterdir() if (match := _NAME.match(file.name))
    ]
    if not found:
        raise UserError(f'there is no network file in the folder {path}')
    return max(found)[2]


def open_network(source: str | os.PathLike, offline: bool = False) -> NetworkFile | PublishedNetworkFile:
    """Open a network file: ours, or a published pickle, of which no code is run.

    Args:
        source: Path of a file or of a run folder, or https URL; see `dnnlib.download` for what becomes of the latter.
        offline: Only look for a URL in the download cache.

    Raises:
        UserError: where it is no network file, or not available.
        OSError: where it cannot be read.
    """
    path = network_path(source, offline)
    with open(path, 'rb') as file:
        published = looks_like_pickle(file.read(8))
    return (PublishedNetworkFile if published else NetworkFile)(path)


def save_network(
    path: str | os.PathLike,
    weights: dict[str, torch.Tensor],
    info: NetworkInfo,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Write a network file, whole or not at all.

    Args:
        path: Where.
        weights: State dict of the denoiser.
        info: Goes into the header.
        dtype: To store the parameters in; None keeps theirs. Buffers (Fourier features) are stored as they are:
            they are constants.
    """
    constants = constant_names(info.config)
    stored = {name: t if name in constants or dtype is None else t.to(dtype) for name, t in weights.items()}
    save_tensors(path, stored, info.to_header())


def constant_names(config: NetworkConfig) -> set[str]:
    """Names of a network's tensors that are constants, such as random frequencies, rather than trained parameters."""
    with torch.device('meta'):
        return {name for name, _ in Denoiser(config).named_buffers()}


def read_info(source: str | os.PathLike, offline: bool = False) -> NetworkInfo:
    """Read what a network file says of itself, without its weights; see `open_network`.

    Raises:
        UserError: where it is not a network file.
        OSError: where it cannot be read.
    """
    with open_network(source, offline) as file:
        return file.info


def fitting_network(file: NetworkFile | PublishedNetworkFile, precision: str = 'fp32') -> Denoiser:
    """The network of an open file, still without weights (on the meta device), if the file's tensors fit it.

    Raises:
        UserError: listing those that are missing, unknown or of another shape.
    """
    with torch.device('meta'):
        net = Denoiser(file.info.config, precision=precision)
    shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    names = set(file.names)
    found = [f'tensor {quoted(name)} is missing' for name in sorted(shapes.keys() - names)]
    found += [f'tensor {quoted(name)} is unknown' for name in sorted(names - shapes.keys())]
    for name in sorted(shapes.keys() & names):
        if (shape := tuple(file.shape(name))) != shapes[name]:
            found.append(f'tensor {quoted(name)} has shape {quoted(shape)}, expected {shapes[name]}')
    if found:
        raise UserError(found, where=file.path)
    return net


def build_network(
    config: NetworkConfig, weights: Mapping[str, torch.Tensor], device: torch.device | str, precision: str = 'fp32'
) -> Denoiser:
    """A network with those weights, in evaluation mode, in float32 and without gradients.

    Args:
        config: Of the network.
        weights: All its tensors by name; they are used as they are where they need no conversion.
        device, precision: As for `load_network`.
    """
    with torch.device('meta'):
        net = Denoiser(config, precision=precision)
    net.load_state_dict({name: t.to(device, torch.float32) for name, t in weights.items()}, assign=True)
    return net.eval().requires_grad_(False)


def load_network(
    source: str | os.PathLike, device: torch.device | str = 'cpu', precision: str = 'fp32', offline: bool = False
) -> tuple[Denoiser, NetworkInfo]:
    """Rebuild a network from its file alone, in evaluation mode, with float32 weights and no gradients.

    Args:
        source: Path or https URL of a file written by `save_network`, or of a published pickle of EDM or EDM2.
        device: Where to put it.
        precision: Of the features, see `Denoiser`.
        offline: Only look for a URL in the download cache.

    Raises:
        UserError: where it is not a network file, or its tensors do not fit its config.
        OSError: where it cannot be read.
    """
    with open_network(source, offline) as file:
        net = fitting_network(file, precision)
        weights = {name: file.get(name).to(device, torch.float32) for name in net.state_dict()}
        net.load_state_dict(weights, assign=True)
        return net.eval().requires_grad_(False), file.info
