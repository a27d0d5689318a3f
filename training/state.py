"""The whole state of a run between two steps, and its files."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, is_constant, save_network
from torch_utils.tensor_files import TensorFile, save_tensors
from training.config import KIMG, TrainConfig, refuse_differences
from training.phema import PowerEMA

KIND = 'training state'


class TrainState:
    """Network, optimizer, EMAs and position of a run. Random streams need no state: they follow nimg.

    Args:
        config: Of the run.
        device: Where it lives.

    Attributes:
        net: The network in training mode.
        optimizer: Adam.
        ema: Power-function averages of the network.
        nimg: Images trained on.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config = config
        self.nimg = 0
        self.net = Denoiser(config.network, seed=config.seed, precision=config.precision).train().to(device)
        self.ema = PowerEMA(self.net.state_dict(), config.ema_stds)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.0, betas=(0.9, 0.99), eps=1e-8, foreach=True)

    def saving(self, folder: Path) -> Callable[[], None]:
        """Copy everything to the host's memory now.

        Returns:
            What writes it to `training-state-KIMG.safetensors`, then drops all but the newest states; training may
            go on meanwhile.
        """
        tensors = {f'net/{name}': t for name, t in self.net.state_dict().items()}
        for std, average in self.ema.averages.items():
            tensors |= {f'ema/{std}/{name}': t for name, t in average.items()}
        for name, p in self.net.named_parameters():
            tensors |= {f'optimizer/{key}/{name}': t for key, t in self.optimizer.state[p].items()}
        copies = {name: _host_copy(t) for name, t in tensors.items()}
        header = {'kind': KIND, 'nimg': self.nimg, 'config': self.config.to_json()}
        path, keep = folder / f'training-state-{self.nimg // KIMG:07d}.safetensors', self.config.keep

        def write() -> None:
            save_tensors(path, copies, header)
            for old in state_files(folder)[:-keep] if keep else []:
                old.unlink()

        return write

    def load(self, path: Path, allow_rounding: bool = False) -> None:
        """Restore what `saving` wrote; see `refuse_differences` for `allow_rounding`.

        Raises:
            UserError: where the file cannot be read, or the run it comes from is another one (a line per difference).
        """
        with TensorFile(path, KIND) as file:
            if file.header.get('kind') != KIND:
                raise UserError(f'{path} is not a {KIND}')
            refuse_differences(path.parent, file.header['config'], self.config, allow_rounding)
            tensors = dict(file.items())
            self.nimg = file.header['nimg']
        self.net.load_state_dict({name: tensors[f'net/{name}'] for name in self.net.state_dict()})
        for std, average in self.ema.averages.items():
            for name, t in average.items():
                t.copy_(tensors[f'ema/{std}/{name}'])
        self._load_optimizer(tensors)

    def _load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        keys = sorted({name.split('/')[1] for name in tensors if name.startswith('optimizer/')})
        saved: dict[str, Any] = self.optimizer.state_dict()
        saved['state'] = {
            i: {key: tensors[f'optimizer/{key}/{name}'] for key in keys}
            for i, (name, _) in enumerate(self.net.named_parameters())
        }
        self.optimizer.load_state_dict(saved)

    def saving_snapshots(self, folder: Path) -> Callable[[], None]:
        """Copy the EMAs to the host's memory now, parameters in FP16 as EDM2 publishes them.

        Returns:
            What writes each to `network-snapshot-KIMG-STD.safetensors`.
        """
        snapshots = []
        for std, average in self.ema.averages.items():
            info = NetworkInfo(self.config.network, self.nimg, std, self.config.preset, self.config.dataset)
            name = f'network-snapshot-{self.nimg // KIMG:07d}-{std:.3f}.safetensors'
            copies = {n: _host_copy(t if is_constant(n) else t.to(torch.float16)) for n, t in average.items()}
            snapshots.append((folder / name, copies, info))

        def write() -> None:
            for path, copies, info in snapshots:
                save_network(path, copies, info, dtype=torch.float16)

        return write

    def averaged_net(self, std: float) -> Denoiser:
        """A network of its own with one EMA's weights, in evaluation mode."""
        with torch.device('meta'):
            net = Denoiser(self.config.network, precision=self.config.precision)
        net.load_state_dict({name: t.clone() for name, t in self.ema.averages[std].items()}, assign=True)
        return net.eval().requires_grad_(False)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to('cpu', copy=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left half-written."""
    for path in folder.glob('.*.tmp'):
        if path.name.startswith(('.training-state-', '.network-snapshot-')):
            path.unlink(missing_ok=True)


def state_files(folder: str | os.PathLike) -> list[Path]:
    """Training states in a run folder, oldest first."""
    found = [path for path in Path(folder).iterdir() if re.fullmatch(r'training-state-\d+\.safetensors', path.name)]
    return sorted(found, key=lambda path: int(path.stem.rsplit('-', 1)[1]))
