"""What a run will cost, told before it starts and without a GPU."""

import math

import torch

from networks.complexity import complexity, kept_for_gradients
from networks.denoiser import PRECISIONS, Denoiser
from training.config import TrainConfig


def plan(config: TrainConfig, world_size: int) -> list[tuple[str, str]]:
    """Sizes of a run, as pairs of what it is and how much.

    Args:
        config: The run, already checked for this number of ranks.
        world_size: Number of ranks.
    """
    cost = complexity(config.network)
    with torch.device('meta'):
        net = Denoiser(config.network)
    numbers = sum(t.numel() for t in net.state_dict().values())
    micro, emas = config.micro_batch_for(world_size), _emas(config)
    snapshots = math.ceil(config.duration / config.snapshot)
    states = math.ceil(config.duration / config.checkpoint)
    kept = min(states, config.keep) if config.keep else states
    state_bytes = 4 * (numbers * (1 + emas) + 2 * cost.parameters)  # weights, averages, two moments
    snapshot = PRECISIONS[config.snapshot_precision].itemsize * numbers
    rows = [
        ('parameters', f'{cost.parameters / 1e6:.2f} M'),
        ('one forward pass', f'{cost.operations / 1e9:.2f} GFLOPs (a multiply-accumulate counts as one)'),
        ('steps', f'{config.duration // config.batch} of {config.batch} images'),
        ('ranks', f'{world_size}: {config.batch // world_size} images each per step, {micro} at once'),
        ('snapshots', f'{snapshots} times {emas}, {format_bytes(snapshot)} each, '
                      f'{format_bytes(snapshot * snapshots * emas)} together'),
        ('states', f'{states}, of which {kept} stay, {format_bytes(state_bytes)} each, '
                   f'{format_bytes(state_bytes * kept)} together'),
    ]  # fmt: skip
    parts = memory(config, world_size, cost.parameters)
    shares = ', '.join(f'{name} {format_bytes(size)}' for name, size in parts.items())
    rows.append(('memory of one GPU', f'about {format_bytes(sum(parts.values()))} ({shares}; without the allocator)'))
    return rows


def memory(config: TrainConfig, world_size: int, parameters: int) -> dict[str, int]:
    """Estimate of the bytes that training holds on each device, by what they are for.

    Counted are the tensors of the algorithm: what libraries need for themselves and what fragmentation wastes come on
    top, and torch.compile may need less.
    """
    activations, weights = kept_for_gradients(config.network, config.precision)
    copies = 1 + 1 + 2 + _emas(config)  # weights, gradients, two moments, averages
    copies += 1 if world_size > 1 else 0  # buckets in which gradients travel
    return {
        'parameters, gradients, optimizer, EMAs': 4 * parameters * copies,
        'normalized weights': weights,
        'activations': config.micro_batch_for(world_size) * activations,
    }


def _emas(config: TrainConfig) -> int:
    """Number of averages that are tracked."""
    return len(config.ema.stds) + (config.ema.halflife is not None)


def format_bytes(size: float) -> str:
    """For people: GiB, or MiB where that is less than a tenth."""
    return f'{size / 2**30:.1f} GiB' if size > 0.1 * 2**30 else f'{size / 2**20:.1f} MiB'
