"""Snapshots of a run to networks of any EMA length, streamed from disk."""

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from dnnlib.errors import UserError, printable
from dnnlib.files import read_regular
from ema.power import STD_LIMIT, Combination, solve
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, fitting_network, open_network
from torch_utils.tensor_files import MappedTensors
from torch_utils.threads import one_thread_each

FILES_AT_ONCE = 16  # snapshots that are combined in one multiplication
LARGEST_LENGTHS = 2**20  # bytes of a file of lengths
ELEMENTS_AT_ONCE = 2**14  # of a tensor; with the files above they fit into a core's cache


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A network file with a tracked EMA in it.

    Args:
        path: Of the file.
        info: What it says of itself.
        dtype: In which its parameters are stored.
    """

    path: str
    info: NetworkInfo
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A network to reconstruct.

    Args:
        label: Names it in file names.
        lengths: (pattern of parameter names, EMA length), the first that matches a name counts.
    """

    label: str
    lengths: tuple[tuple[str, float], ...]

    @classmethod
    def of_length(cls, std: float) -> 'Wanted':
        """One length for all parameters."""
        return cls(f'{std:.3f}', (('*', std),))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> 'Wanted':
        """Read a JSON object of patterns and lengths, such as {"unet.enc.*": 0.05, "*": 0.10}."""
        try:
            values = json.loads(read_regular(path, LARGEST_LENGTHS))
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path} is not JSON: {error}') from None
        if not isinstance(values, dict) or not values or not all(type(v) in (int, float) for v in values.values()):
            raise UserError(f'{path} must hold patterns and lengths, such as {{"unet.enc.*": 0.05, "*": 0.10}}')
        return cls(Path(path).stem, tuple(values.items()))

    @property
    def std(self) -> float | None:
        """The length, if there is but one."""
        return self.lengths[0][1] if len({std for _, std in self.lengths}) == 1 else None

    def length_of(self, name: str) -> float:
        """EMA length of a parameter."""
        return next(std for pattern, std in self.lengths if fnmatch.fnmatchcase(name, pattern))

    def problems(self, names: Collection[str]) -> list[str]:
        """What keeps it from being reconstructed for parameters of those names."""
        found = []
        for pattern, std in self.lengths:
            if not 0 < std < STD_LIMIT:
                found.append(f'EMA lengths must be between 0 and {STD_LIMIT:.4f}, not {printable(std)}')
            if not fnmatch.filter(names, pattern):
                found.append(f'{self.label}: no parameter has a name like {printable(pattern)}')
        left = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self.lengths)]
        if left:
            found.append(f'{self.label}: no pattern matches {left[0]}; add "*" for the rest')
        return found


def find_snapshots(folder: str | os.PathLike, stds: Collection[float] | None = None) -> list[Snapshot]:
    """All snapshots of a run folder, by time and length: ours, `network-snapshot-*.safetensors`, or published ones.

    The latter are the pickles `network-snapshot-KIMG-STD.pkl`, where a file of ours does not have the same name.

    Args:
        folder: Of the run.
        stds: Use those of these lengths only.
    """
    published, ours = (
        {path.stem: path for path in Path(folder).iterdir() if path.match(f'network-snapshot-*{ending}')}
        for ending in ('.pkl', '.safetensors')
    )
    paths = sorted((published | ours).values())
    if not paths:
        raise UserError(f'{folder} holds no network-snapshot-*.safetensors; is it the folder of a training run?')
    snapshots = [_describe(path) for path in tqdm(paths, desc='snapshots', unit='file', disable=None)]
    if stds is not None:
        there = {s.info.ema_std for s in snapshots}
        missing = [std for std in stds if std not in there]
        if missing:
            has = ', '.join(str(std) for std in sorted(there, key=lambda std: std or 0))
            raise UserError([f'{folder} has no snapshots of length {std}, but of {has}' for std in missing])
        snapshots = [s for s in snapshots if s.info.ema_std in stds]
    first, found, keys = snapshots[0], [], {}
    for s in snapshots:
        if s.info.config != first.info.config:
            found.append(f'{s.path} is of another network than {first.path}')
        if not s.info.ema_std or not 0 < s.info.ema_std < STD_LIMIT or s.info.nimg <= 0:
            found.append(f'{s.path} is no power-function EMA')
        if (other := keys.setdefault((s.info.nimg, s.info.ema_std), s)) is not s:
            found.append(f'{s.path} has the time and length of {other.path}')
    if found:
        raise UserError(found)
    return sorted(snapshots, key=lambda s: (s.info.nimg, s.info.ema_std))


def _describe(path: Path) -> Snapshot:
    """Open a snapshot and make sure that it holds what its network needs."""
    with open_network(path) as file:
        net = fitting_network(file)
        name = next(name for name, _ in net.named_parameters() if 'weight' in name)
        dtype = file.get(name).dtype
    if not dtype.is_floating_point:
        raise UserError(f'{path}: {name} is of {dtype}, not floating-point numbers')
    return Snapshot(os.fspath(path), file.info, dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to reconstruct some networks.

    Attributes:
        snapshots: Those that are used, by time and length.
        nimg: Training time of the results.
        wanted: The networks.
        combinations: By EMA length.
    """

    snapshots: list[Snapshot]
    nimg: int
    wanted: list[Wanted]
    combinations: dict[float, Combination]

    @classmethod
    def make(cls, snapshots: Sequence[Snapshot], wanted: Sequence[Wanted], nimg: int | None = None) -> 'Plan':
        """Solve for all lengths.

        Args:
            snapshots: As found.
            wanted: The networks.
            nimg: Time wanted, between the first snapshot and the last; None for that of the last. Whole thousands also
                stand for the snapshot that they name.
        """
        names = [name for name, _ in _network(snapshots[0]).named_parameters()]
        first, last = snapshots[0].info.nimg, snapshots[-1].info.nimg
        nimg = last if nimg is None else nimg
        if nimg % 1000 == 0:  # 4194k may be 4 Mi: names of files have thousands, rounded down
            nimg = next((s.info.nimg for s in snapshots if s.info.nimg // 1000 == nimg // 1000), nimg)
        found = [problem for each in wanted for problem in each.problems(names)]
        labels = [each.label for each in wanted]
        if len(set(labels)) < len(labels):
            found.append(
                f'EMA lengths must differ in their first three decimals, which name the files: {", ".join(labels)}'
            )
        if not first <= nimg <= last:
            found.append(f'there is no snapshot at or before {nimg} images; the first is at {first}, the last at {last}'
                         if nimg < first else f'training ended at {last} images, before {nimg}')  # fmt: skip
        if found:
            raise UserError(list(dict.fromkeys(found)))
        used = [s for s in snapshots if s.info.nimg <= nimg]
        in_t, in_std = [s.info.nimg for s in used], [s.info.ema_std for s in used]
        stds = dict.fromkeys(std for each in wanted for _, std in each.lengths)
        return cls(used, nimg, list(wanted), {std: solve(in_t, in_std, nimg, std) for std in stds})

    def warnings(self) -> list[str]:
        """What to doubt of the results."""
        found = []
        epsilon = max(torch.finfo(s.dtype).eps for s in self.snapshots)
        for std, combination in self.combinations.items():
            if combination.error > 0.1:
                near = self.snapshots[-1].info.nimg
                why = 'more snapshots are needed, or it lies too far from the stored lengths'
                why = why if near == self.nimg else f'the nearest snapshot before it is at {near} images'
                found.append(f'length {std:g}: the profile is {combination.error:.0%} from the one wanted; {why}')
            if (rounding := combination.amplification * epsilon / 2) > 0.01:
                found.append(
                    f'length {std:g}: rounding of the snapshots is amplified {combination.amplification:.0f} times, '
                    f'to as much as {rounding:.1%} of a weight; snapshots of more precision help'
                )
        return found

    def passes(self, memory: float) -> list[list[Wanted]]:
        """Split what is wanted so that each part fits into `memory` bytes; a part has at least one network."""
        numbers = sum(p.numel() for p in _network(self.snapshots[0]).parameters())
        fit = max(int(min(memory / (numbers * self._dtype.itemsize), len(self.wanted))), 1)
        return [self.wanted[i : i + fit] for i in range(0, len(self.wanted), fit)]

    @property
    def _dtype(self) -> torch.dtype:
        """To add up in: float64, but float32 for 16-bit snapshots, whose rounding is 10^4 times that of float32."""
        return torch.float32 if all(s.dtype.itemsize == 2 for s in self.snapshots) else torch.float64

    def reconstruct(self, memory: float = math.inf) -> Iterator[tuple[Wanted, NetworkInfo, dict[str, torch.Tensor]]]:
        """Combine the snapshots. Every one of them is read once in each pass.

        In memory are the networks of a pass and pieces of what is read (published pickles are mapped as a whole).

        Args:
            memory: Bytes that the networks of a pass may take.

        Yields:
            What was wanted, its header, and its float32 weights, in the order of `wanted`.
        """
        parts = self.passes(memory)
        last = self.snapshots[-1].info
        net = _network(self.snapshots[0])
        names = [name for name, _ in net.named_parameters()]
        for part in parts:
            totals = self._combine(names, part, len(parts))
            with open_network(self.snapshots[-1].path) as file:
                constants = {name: file.get(name).float() for name, _ in net.named_buffers()}
            for i, each in enumerate(part):
                lengths = None if each.std else each.lengths
                info = dataclasses.replace(last, nimg=self.nimg, ema_std=each.std, ema_lengths=lengths)
                yield each, info, {name: total[i].float() for name, total in totals.items()} | constants

    def _combine(self, names: list[str], part: list[Wanted], parts: int) -> dict[str, torch.Tensor]:
        """Weighted sums of all snapshots, [len(part), ...] for each parameter."""
        net = dict(_network(self.snapshots[0]).named_parameters())
        totals = {name: torch.zeros(len(part), *net[name].shape, dtype=self._dtype) for name in names}
        coefficients = {
            name: torch.from_numpy(
                np.stack([self.combinations[each.length_of(name)].coefficients for each in part])
            ).to(self._dtype)
            for name in names
        }
        title = 'combining' if parts == 1 else f'combining, one of {parts} passes'
        with (
            one_thread_each() as pool,  # threads that share such small pieces are slower
            tqdm(total=len(self.snapshots), desc=title, unit='file', disable=None) as bar,
        ):
            for start in range(0, len(self.snapshots), FILES_AT_ONCE):
                block = self.snapshots[start : start + FILES_AT_ONCE]
                with contextlib.ExitStack() as stack:
                    files = [stack.enter_context(_reader(snapshot)) for snapshot in block]
                    jobs = [
                        pool.submit(_add, totals[name], coefficients[name][:, start : start + len(block)], name, files)
                        for name in names
                    ]
                    for job in jobs:
                        job.result()
                bar.update(len(block))
        self._check_finite(totals)
        return totals

    def _check_finite(self, totals: dict[str, torch.Tensor]) -> None:
        bad = [name for name, total in totals.items() if not math.isfinite(float(total.sum()))]
        for name in bad:
            for snapshot in self.snapshots:
                with open_network(snapshot.path) as file:
                    if not file.get(name).isfinite().all():
                        raise UserError(f'{snapshot.path}: {name} holds numbers that are not finite')


def _network(snapshot: Snapshot) -> torch.nn.Module:
    """Its network on the meta device."""
    with torch.device('meta'):
        return Denoiser(snapshot.info.config)


@contextlib.contextmanager
def _reader(snapshot: Snapshot) -> Iterator[MappedTensors | SimpleNamespace]:
    """The tensors of a snapshot, flat, as `MappedTensors` gives them, of published files too."""
    if snapshot.path.endswith('.safetensors'):
        with MappedTensors(snapshot.path) as file:
            yield file
    else:
        with open_network(snapshot.path) as file:
            yield SimpleNamespace(get=lambda name: file.get(name).reshape(-1), release=lambda name: None)


def _add(total: torch.Tensor, coefficients: torch.Tensor, name: str, files: list) -> None:
    """total [networks, ...] += coefficients [networks, files] @ (files, the tensor `name` of each), piece by piece."""
    total = total.view(len(total), -1)
    width = min(total.shape[1], ELEMENTS_AT_ONCE)
    converted = torch.empty(len(files), width, dtype=total.dtype)
    stored = [file.get(name).split(width) for file in files]
    for sums, *pieces in zip(total.split(width, dim=1), *stored, strict=True):
        block = converted[:, : sums.shape[1]]
        torch._foreach_copy_(list(block), pieces)  # one call for all: threads then rarely wait for the interpreter
        sums.addmm_(coefficients, block)
    for file in files:
        file.release(name)
