"""The whole state of a run between two steps, and its files."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError, printable
from ema.half_life import HalfLifeEMA
from ema.power import PowerEMA
from networks.denoiser import PRECISIONS, Denoiser
from networks.files import NetworkInfo, build_network, save_network
from torch_utils.finite import nonfinite, some
from torch_utils.tensor_files import TensorFile, UnreadableFileError, save_tensors
from training.config import KIMG, TrainConfig, refuse_differences
from training.monitor.step_stats import PendingStats

KIND = 'training state'
ADAM = ('step', 'exp_avg', 'exp_avg_sq')  # what Adam keeps of a parameter


@dataclasses.dataclass(frozen=True)
class StateInfo:
    """What a training state says of itself: the images seen, and the run's config as plain values."""

    nimg: int
    config: dict[str, Any]


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
            What writes it to `training-state-KIMG.safetensors`, then drops all but the newest states, none while
            gradients are not finite; training may continue meanwhile.
        """
        copies = {name: _host_copy(t) for name, t in self._tensors().items()}
        header = {'kind': KIND, 'nimg': self.nimg, 'config': self.config.to_json()}
        path, keep = folder / state_name(self.nimg), 0 if self.stats.current_streak() else self.config.keep

        def write() -> None:
            save_tensors(path, copies, header)
            others = [other for other in state_files(folder) if other != path]
            for old in others[: max(len(others) - keep + 1, 0)] if keep else []:
                old.unlink()

        return write

    def load(self, path: Path, allow_rounding: bool = False) -> None:
        """Restore what `saving` wrote; see `refuse_differences` for `allow_rounding`.

        Raises:
            UnreadableFileError: where the file is damaged, lacks something, or holds what is not finite; nothing is
                loaded then.
            UserError: where the run it comes from is another one (a line per difference).
        """
        with TensorFile(path, KIND, verify=True) as file:
            info = file.about(StateInfo)
            if info.nimg < 0 or state_name(info.nimg) != path.name:
                raise UnreadableFileError(f'{path} is the state at {info.nimg} images, which its name does not say')
            refuse_differences(path.parent, info.config, self.config, allow_rounding)
            tensors = dict(file.items())
            self._check(path, tensors)
        for key, net in self.method.networks.items():
            net.load_state_dict({name: tensors[f'{key}/{name}'] for name in net.state_dict()})
            self._load_optimizer(key, tensors)
        for prefix, average in self._averages().items():
            for name, t in average.items():
                t.copy_(tensors[f'{prefix}/{name}'])
        self.stats.load({name: tensors[f'stats/{name}'] for name in self.stats.NAMES})
        self.nimg = info.nimg

    def nonfinite(self) -> list[str]:
        """Names of weights, averages and what the optimizers keep that are not finite; waits for the device."""
        return nonfinite({name: t for name, t in self._tensors().items() if not name.startswith('stats/')})

    def update_averages(self) -> None:
        """Average in the weights as they are after a step, every `config.ema_every` steps."""
        delta = self.config.ema_every * self.config.batch
        if self.nimg % delta:
            return
        weights = self.net.state_dict()
        self.ema.update(weights, self.nimg, delta)
        if self.traditional is not None:
            self.traditional.update(weights, self.nimg, delta)

    def _averages(self) -> dict[str, dict[str, torch.Tensor]]:
        """All averages, by the name they have in a state."""
        averages = {f'ema/{std}': average for std, average in self.ema.averages.items()}
        return averages if self.traditional is None else {**averages, 'ema/half-life': self.traditional.average}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything, by the name it has in a state."""
        tensors: dict[str, torch.Tensor] = {}
        for key, net in self.method.networks.items():
            tensors |= {f'{key}/{name}': t for name, t in net.state_dict().items()}
            states = self.method.optimizers[key].state
            for name, p in net.named_parameters():  # a parameter without a gradient has none
                tensors |= {f'optimizer/{key}/{name}/{kind}': t for kind, t in states.get(p, {}).items()}
        for prefix, average in self._averages().items():
            tensors |= {f'{prefix}/{name}': t for name, t in average.items()}
        return tensors | {f'stats/{name}': t for name, t in self.stats.tensors().items()}

    def _check(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Make sure that all is there, of the right shape and type, and finite, before anything is overwritten."""
        expected = {name: t for name, t in self._tensors().items() if not name.startswith('optimizer/')}
        for key, net in self.method.networks.items():
            for name, p in net.named_parameters():
                prefix = f'optimizer/{key}/{name}'
                if any(f'{prefix}/{kind}' in tensors for kind in ADAM):
                    expected |= {f'{prefix}/{kind}': p if kind != 'step' else torch.zeros(()) for kind in ADAM}
        for name, t in expected.items():
            there = tensors.get(name)
            if there is None or there.dtype != t.dtype or not _same_shape(there, t, name.startswith('stats/')):
                raise UnreadableFileError(f'{path} lacks {name}, or has it in another shape or type')
        if unknown := sorted(tensors.keys() - expected.keys()):
            raise UnreadableFileError(f'{path} holds {printable(unknown[0])}, which this run does not have')
        if bad := nonfinite({name: t for name, t in tensors.items() if not name.startswith('stats/')}):
            raise UnreadableFileError(f'{path} holds values that are not finite, in {some(bad)}')

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

        for path, copies, _ in snapshots:
            if bad := nonfinite(copies):
                raise UserError(f'{path.name} would hold values that are not finite, in {some(bad)}; nothing was saved')

        def write() -> None:
            for path, copies, about in snapshots:
                save_network(path, copies, about, dtype=None)

        return write

    def averaged_net(self, std: float) -> Denoiser:
        """A network of its own with one EMA's weights, in evaluation mode."""
        weights = {name: t.clone() for name, t in self.ema.averages[std].items()}
        return build_network(self.config.network, weights, self.net.device, self.config.precision)


def _same_shape(a: torch.Tensor, b: torch.Tensor, any_length: bool) -> bool:
    return a.ndim == b.ndim and a.shape[any_length:] == b.shape[any_length:]


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to('cpu', copy=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left half-written."""
    ours = ('training-state-', 'network-', 'samples-', 'config.', 'stats.', 'metrics.', 'loss.')
    for path in folder.glob('.*.tmp'):
        if path.name.removeprefix('.').startswith(ours):
            path.unlink(missing_ok=True)


def state_name(nimg: int) -> str:
    """Name of the file of a state."""
    return f'training-state-{nimg // KIMG:07d}.safetensors'


def state_files(folder: str | os.PathLike) -> list[Path]:
    """Training states in a run folder, oldest first."""
    found = [path for path in Path(folder).iterdir() if re.fullmatch(r'training-state-\d+\.safetensors', path.name)]
    return sorted(found, key=_kimg)


def _kimg(path: Path) -> int:
    return int(path.stem.rsplit('-', 1)[1])


def way_back(folder: Path, nimg: int) -> str:
    """How to return to the last state at or before `nimg`, in words."""
    good = [path for path in state_files(folder) if _kimg(path) * KIMG <= nimg]
    newer = [path.name for path in state_files(folder) if path not in good]
    if not good:
        return 'there is no good state to go back to'
    first = f'remove {", ".join(newer)}; then ' if newer else ''
    return (
        f'the last good state is {good[-1]}: {first}the same command resumes from it; if it stops here again, '
        'begin another run with --init=SNAPSHOT and a lower --lr'
    )
