"""Snapshots of a run to networks of any EMA length, streamed from disk tensor by tensor."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dnnlib.errors import UserError
from networks.files import NetworkInfo, fitting_network, is_constant, open_network, read_info, save_network
from training.config import KIMG
from training.phema import STD_LIMIT, Combination, combine, solve


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A network file with a tracked EMA in it."""

    path: str
    info: NetworkInfo


def find_snapshots(folder: str | os.PathLike) -> list[Snapshot]:
    """All snapshots of a run folder, by time and length: ours, `network-snapshot-*.safetensors`, or published ones.

    The latter are the pickles `network-snapshot-KIMG-STD.pkl`, where a file of ours does not have the same name.

    Raises:
        UserError: where there are none, one cannot be read, or they are of different networks.
        OSError: where the folder cannot be read.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.match('network-snapshot-*.safetensors'))
    ours = {path.stem for path in paths}
    paths += sorted(p for p in Path(folder).iterdir() if p.match('network-snapshot-*.pkl') and p.stem not in ours)
    if not paths:
        raise UserError(f'{folder} holds no network-snapshot-*.safetensors; is it the folder of a training run?')
    snapshots = [Snapshot(os.fspath(path), read_info(path)) for path in tqdm(paths, unit='file', disable=None)]
    first = snapshots[0]
    found = [
        f'{s.path} is of another network than {first.path}' for s in snapshots if s.info.config != first.info.config
    ]
    found += [f'{s.path} is no power-function EMA' for s in snapshots if not s.info.ema_std or s.info.nimg <= 0]
    keys = {}
    for s in snapshots:
        if (other := keys.setdefault((s.info.nimg, s.info.ema_std), s)) is not s:
            found.append(f'{s.path} has the time and length of {other.path}')
    if found:
        raise UserError(found)
    return sorted(snapshots, key=lambda s: (s.info.nimg, s.info.ema_std))


def plan(snapshots: Sequence[Snapshot], stds: Iterable[float], nimg: int | None = None) -> list[Combination]:
    """How to combine the snapshots into each length at one time.

    Args:
        snapshots: As found.
        stds: Lengths wanted.
        nimg: Time wanted; None for that of the last snapshot.

    Raises:
        UserError: for lengths outside (0, 0.2886) and times without a snapshot.
    """
    stds, times = list(stds), sorted({s.info.nimg for s in snapshots})
    nimg = times[-1] if nimg is None else nimg
    found = [f'EMA lengths must be between 0 and {STD_LIMIT:.4f}, not {std}' for std in stds if not 0 < std < STD_LIMIT]
    if len({f'{std:.3f}' for std in stds}) < len(stds):
        found.append(f'EMA lengths must differ in their first three decimals, which name the files: {stds}')
    if nimg not in times:
        near = min(times, key=lambda t: abs(t - nimg))
        found.append(f'there is no snapshot at {nimg} images; the nearest is at {near}')
    if found:
        raise UserError(found)
    usable = [s for s in snapshots if s.info.nimg <= nimg]
    in_t, in_std = [s.info.nimg for s in usable], [s.info.ema_std for s in usable]
    return [solve(in_t, in_std, nimg, std) for std in stds]


def reconstruct(
    snapshots: Sequence[Snapshot], stds: Sequence[float], folder: Path, nimg: int | None = None
) -> list[tuple[Path, Combination]]:
    """Write a network file for every length to `phema-KIMG-STD.safetensors`, in float32.

    Every snapshot is read once, one tensor at a time; in memory are the networks written and that tensor.

    Returns:
        Path and combination of each, in the order of `stds`.

    Raises:
        UserError: for a length or time that cannot be had, or a snapshot whose tensors cannot be read.
    """
    combinations = plan(snapshots, stds, nimg)
    used = snapshots[: len(combinations[0].coefficients)]  # in order of time
    last = used[-1].info
    networks: list[dict[str, torch.Tensor]] = [{} for _ in stds]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open_network(s.path)) for s in used]
        for file in files:
            fitting_network(file)
        for name in tqdm(files[-1].names, unit='tensor', disable=None):
            if is_constant(name):
                for network in networks:
                    network[name] = files[-1].get(name).float()
                continue
            tensors = [file.get(name) for file in files]
            for network, combination in zip(networks, combinations, strict=True):
                network[name] = combine(tensors, combination.coefficients).float()
    results = []
    for std, network, combination in zip(stds, networks, combinations, strict=True):
        path = folder / f'phema-{last.nimg // KIMG:07d}-{std:.3f}.safetensors'
        save_network(path, network, dataclasses.replace(last, ema_std=std))
        results.append((path, combination))
    return results
