"""The whole state of a run between two steps, and its files."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ema.half_life import HalfLifeEMA
from ema.power import PowerEMA
from networks.denoiser import PRECISIONS, Denoiser
from networks.files import NetworkInfo, build_network, save_network
from torch_utils.tensor_files import TensorFile, UnreadableFileError, save_tensors
from training.config import KIMG, TrainConfig, refuse_differences
from training.monitor.step_stats import PendingStats

KIND = 'training state'
ADAM = ('step', 'exp_avg', 'exp_avg_sq')  # what Adam keeps of a parameter


class TrainState:
    """Networks, optimizers, EMAs and position of a run. Random streams need no state: they follow nimg.

    Args:
        config: Of the run.
        device: Where it lives.

    Attributes:
        method: What is trained and how, see `training.methods.table`.
        net: The network that the run is for: the method's first.
        ema: Power-function averages of `net`.
        traditional: Exponential average of `net`, or None.
        stats: What goes into the next status line.
        nimg: Images trained on.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config = config
        self.nimg = 0
        self.method = config.method.build(config, device)
        self.net: Denoiser = next(iter(self.method.networks.values()))
        self.begin_averages()
        self.stats = PendingStats(len(self.parameters()))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All that is trained, by name; those of the first network without its name."""
        return {
            name if i == 0 else f'{key}/{name}': p
            for i, (key, net) in enumerate(self.method.networks.items())
            for name, p in net.named_parameters()
        }

    def begin_averages(self) -> None:
        """Let all averages begin with the weights as they are."""
        weights, config = self.net.state_dict(), self.config.ema
        self.ema = PowerEMA(weights, config.stds)
        self.traditional = None if config.halflife is None else HalfLifeEMA(weights, config.halflife, config.rampup)

    def saving(self, folder: Path) -> Callable[[], None]:
        """Copy everything to the host's memory now, the statistics as they were last collected.

        Returns:
            What writes it to `training-state-KIMG.safetensors`, then drops all but the newest states; training may
            continue meanwhile.
        """
        copies = {name: _host_copy(t) for name, t in self._tensors().items()}
        header = {'kind': KIND, 'nimg': self.nimg, 'config': self.config.to_json()}
        path, keep = folder / f'training-state-{self.nimg // KIMG:07d}.safetensors', self.config.keep

        def write() -> None:
            save_tensors(path, copies, header)
            others = [other for other in state_files(folder) if other != path]
            for old in others[: max(len(others) - keep + 1, 0)] if keep else []:
                old.unlink()

        return write

    def load(self, path: Path, allow_rounding: bool = False) -> None:
        """Restore what `saving` wrote; see `refuse_differences` for `allow_rounding`.

        Raises:
            UnreadableFileError: where the file cannot be read or lacks something; nothing is loaded then.
            UserError: where the run it comes from is another one (a line per difference).
        """
        with TensorFile(path, KIND) as file:
            if file.header.get('kind') != KIND or not {'nimg', 'config'} <= file.header.keys():
                raise UnreadableFileError(f'{path} is not a {KIND}')
            refuse_differences(path.parent, file.header['config'], self.config, allow_rounding)
            tensors = dict(file.items())
            self._check(path, tensors)
            nimg = file.header['nimg']
        for key, net in self.method.networks.items():
            net.load_state_dict({name: tensors[f'{key}/{name}'] for name in net.state_dict()})
            self._load_optimizer(key, tensors)
        for prefix, average in self._averages().items():
            for name, t in average.items():
                t.copy_(tensors[f'{prefix}/{name}'])
        self.stats.load({name: tensors[f'stats/{name}'] for name in self.stats.NAMES})
        self.nimg = nimg

    def update_averages(self) -> None:
        """Average in the weights as they are after a step."""
        weights = self.net.state_dict()
        self.ema.update(weights, self.nimg, self.config.batch)
        if self.traditional is not None:
            self.traditional.update(weights, self.nimg, self.config.batch)

    def _averages(self) -> dict[str, dict[str, torch.Tensor]]:
        """All averages, by the name they have in a state."""
        averages = {f'ema/{std}': average for std, average in self.ema.averages.items()}
        return averages if self.traditional is None else {**averages, 'ema/half-life': self.traditional.average}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything, by the name it has in a state."""
        tensors = {}
        for key, net in self.method.networks.items():
            tensors |= {f'{key}/{name}': t for name, t in net.state_dict().items()}
            states = self.method.optimizers[key].state
            for name, p in net.named_parameters():  # a parameter without a gradient has none
                tensors |= {f'optimizer/{key}/{name}/{kind}': t for kind, t in states.get(p, {}).items()}
        for prefix, average in self._averages().items():
            tensors |= {f'{prefix}/{name}': t for name, t in average.items()}
        return tensors | {f'stats/{name}': t for name, t in self.stats.tensors().items()}

    def _check(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Make sure that all is there, and of the right shape, before anything is overwritten."""
        shapes: dict[str, torch.Size | None] = {}
        for key, net in self.method.networks.items():
            shapes |= {f'{key}/{name}': t.shape for name, t in net.state_dict().items()}
            for name, p in net.named_parameters():
                prefix = f'optimizer/{key}/{name}'
                if any(f'{prefix}/{kind}' in tensors for kind in ADAM):
                    shapes |= {f'{prefix}/{kind}': p.shape if kind != 'step' else torch.Size() for kind in ADAM}
        for prefix, average in self._averages().items():
            shapes |= {f'{prefix}/{name}': t.shape for name, t in average.items()}
        for name, t in self.stats.tensors().items():
            shapes[f'stats/{name}'] = t.shape if name == 'streak' else None
        for name, shape in shapes.items():
            if name not in tensors or (shape is not None and tensors[name].shape != shape):
                raise UnreadableFileError(f'{path} lacks {name}, or has it in another shape')

    def _load_optimizer(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        optimizer = self.method.optimizers[key]
        saved: dict[str, Any] = optimizer.state_dict()
        names = [name for name, _ in self.method.networks[key].named_parameters()]
        prefixes = {i: f'optimizer/{key}/{name}' for i, name in enumerate(names)}
        saved['state'] = {
            i: {kind: tensors[f'{prefix}/{kind}'].clone() for kind in ADAM}  # not in the mapped file
            for i, prefix in prefixes.items()
            if f'{prefix}/step' in tensors
        }
        optimizer.load_state_dict(saved)

    def saving_snapshots(self, folder: Path) -> Callable[[], None]:
        """Copy the EMAs to the host's memory now, parameters in `config.snapshot_precision`.

        Returns:
            What writes each power-function EMA to `network-snapshot-KIMG-STD.safetensors`, and a traditional one to
            `network-ema-KIMG.safetensors`.
        """
        config, kimg, dtype = self.config, f'{self.nimg // KIMG:07d}', PRECISIONS[self.config.snapshot_precision]
        about = (config.preset, config.dataset, config.encoder)
        sampler, names = config.sampler.to_json(), config.class_names
        info = NetworkInfo(config.network, self.nimg, None, *about, sampler=sampler, class_names=names)
        averages = [
            (f'network-snapshot-{kimg}-{std:.3f}', average, dataclasses.replace(info, ema_std=std))
            for std, average in self.ema.averages.items()
        ]
        if self.traditional is not None:
            halflife = dataclasses.replace(info, ema_halflife=config.ema.halflife)
            averages.append((f'network-ema-{kimg}', self.traditional.average, halflife))
        constants = dict(self.net.named_buffers())
        snapshots = [
            (
                folder / f'{name}.safetensors',
                {n: _host_copy(t if n in constants else t.to(dtype)) for n, t in average.items()},
                about,
            )
            for name, average, about in averages
        ]

        def write() -> None:
            for path, copies, about in snapshots:
                save_network(path, copies, about, dtype=None)

        return write

    def averaged_net(self, std: float) -> Denoiser:
        """A network of its own with one EMA's weights, in evaluation mode."""
        weights = {name: t.clone() for name, t in self.ema.averages[std].items()}
        return build_network(self.config.network, weights, self.net.device, self.config.precision)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to('cpu', copy=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left half-written."""
    ours = ('training-state-', 'network-', 'samples-', 'config.', 'stats.', 'metrics.', 'loss.')
    for path in folder.glob('.*.tmp'):
        if path.name.removeprefix('.').startswith(ours):
            path.unlink(missing_ok=True)


def state_files(folder: str | os.PathLike) -> list[Path]:
    """Training states in a run folder, oldest first."""
    found = [path for path in Path(folder).iterdir() if re.fullmatch(r'training-state-\d+\.safetensors', path.name)]
    return sorted(found, key=lambda path: int(path.stem.rsplit('-', 1)[1]))
