"""A network as one safetensors file: weights, and in the header everything that is needed to rebuild it."""

import dataclasses
import os
from typing import Any

import torch

from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from torch_utils.tensor_files import TensorFile, save_tensors

KIND = 'network file'


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
    """

    config: NetworkConfig
    nimg: int
    ema_std: float | None
    preset: str
    dataset: str = ''
    encoder: str = 'rgb'

    def to_header(self) -> dict[str, Any]:
        """As plain values; `from_header` is its inverse."""
        return {'kind': KIND, **dataclasses.asdict(self), 'config': self.config.to_json()}

    @classmethod
    def from_header(cls, header: dict[str, Any], path: str) -> 'NetworkInfo':
        """Read a header.

        Raises:
            UserError: naming the file, where the header is not that of a network.
        """
        if header.get('kind') != KIND:
            raise UserError(f'{path} is not a {KIND} but a {header.get("kind", "file of unknown kind")}')
        try:
            config = NetworkConfig.from_json(header['config'])
            encoder = str(header.get('encoder', 'rgb'))  # files of before there were others do not say
            return cls(config, header['nimg'], header['ema_std'], header['preset'], header['dataset'], encoder)
        except KeyError as error:
            raise UserError(f'{path}: the header lacks {error.args[0]!r}') from None
        except (TypeError, AttributeError) as error:
            raise UserError(f'{path}: the header cannot be read: {error}') from None
        except UserError as error:
            raise UserError([f'{path}: {problem}' for problem in error.problems]) from None


def save_network(
    path: str | os.PathLike,
    weights: dict[str, torch.Tensor],
    info: NetworkInfo,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a network file, whole or not at all.

    Args:
        path: Where.
        weights: State dict of the denoiser.
        info: Goes into the header.
        dtype: To store the parameters in. Buffers (Fourier features) stay float32: they are constants.
    """
    stored = {name: t if is_constant(name) else t.to(dtype) for name, t in weights.items()}
    save_tensors(path, stored, info.to_header())


def is_constant(name: str) -> bool:
    """Whether a tensor of a network is a constant buffer (frequencies and phases) rather than a parameter."""
    return name.endswith(('.freqs', '.phases'))


def read_info(path: str | os.PathLike) -> NetworkInfo:
    """Read what a network file says of itself, without its weights.

    Raises:
        UserError: where it is not a network file.
        OSError: where it cannot be read.
    """
    with TensorFile(path, KIND) as file:
        return NetworkInfo.from_header(file.header, file.path)


def load_network(
    path: str | os.PathLike, device: torch.device | str = 'cpu', precision: str = 'fp32'
) -> tuple[Denoiser, NetworkInfo]:
    """Rebuild a network from its file alone, in evaluation mode, with float32 weights and no gradients.

    Args:
        path: A file written by `save_network`.
        device: Where to put it.
        precision: Of the features, see `Denoiser`.

    Raises:
        UserError: where it is not a network file, or its tensors do not fit its config.
        OSError: where it cannot be read.
    """
    with TensorFile(path, KIND) as file:
        info = NetworkInfo.from_header(file.header, file.path)
        with torch.device('meta'):
            net = Denoiser(info.config, precision=precision)
        shapes = {name: tuple(t.shape) for name, t in net.state_dict().items()}
        found = [f'{file.path}: tensor {name!r} is missing' for name in sorted(shapes.keys() - set(file.names))]
        found += [f'{file.path}: tensor {name!r} is unknown' for name in sorted(set(file.names) - shapes.keys())]
        if found:
            raise UserError(found)
        weights = {name: tensor.to(device, torch.float32) for name, tensor in file.items()}
    for name, tensor in weights.items():
        if tuple(tensor.shape) != shapes[name]:
            found.append(f'{path}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shapes[name]}')
    if found:
        raise UserError(found)
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False), info
