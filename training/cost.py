"""What a run will cost, told before it starts and without a GPU."""

import math
import os

import torch

from networks.complexity import complexity, kept_for_gradients
from networks.denoiser import PRECISIONS, Denoiser
from training.config import TrainConfig

USABLE = 0.8  # share of a device's memory that the tensors counted here may take
PLANNED = (24, 80)  # GiB of the GPUs to plan for, where there is none here


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
    emas = _emas(config)
    snapshots = math.ceil(config.duration / config.snapshot)
    states = math.ceil(config.duration / config.checkpoint)
    kept = min(states, config.keep) if config.keep else states
    # averages; weights, two moments
    state_bytes = 4 * (numbers * emas + config.method.trained * (numbers + 2 * cost.parameters))
    snapshot = PRECISIONS[config.snapshot_precision].itemsize * numbers
    rows = [
        ('parameters', f'{cost.parameters / 1e6:.2f} M'),
        ('one forward pass', f'{cost.operations / 1e9:.2f} GFLOPs (a multiply-accumulate counts as one)'),
        ('steps', f'{config.duration // config.batch} of {config.batch} images'),
        ('ranks', f'{world_size}: {config.batch // world_size} images each per step'),
        ('snapshots', f'{snapshots} times {emas}, {format_bytes(snapshot)} each, '
                      f'{format_bytes(snapshot * snapshots * emas)} together'),
        ('states', f'{states}, of which {kept} stay, {format_bytes(state_bytes)} each, '
                   f'{format_bytes(state_bytes * kept)} together'),
    ]  # fmt: skip
    sizes = memory(config, world_size)
    for available in [0.0] if config.micro_batch else _available():
        micro = config.micro_batch or fitting_micro_batch(config, world_size, available, sizes)
        parts = {name: size * micro if name == 'activations' else size for name, size in sizes.items()}
        shares = ', '.join(f'{name} {format_bytes(size)}' for name, size in parts.items())
        total = f'about {format_bytes(sum(parts.values()))} with --batch-gpu={micro} ({shares}; without the allocator)'
        gpu = '' if config.micro_batch else f', {available / 2**30:.0f} GiB'
        rows.append((f'memory of one GPU{gpu}', total))
    return rows


def _available() -> list[float]:
    """Memory of the GPUs to plan for: this machine's, or some."""
    if torch.cuda.is_available():
        return [device_memory(torch.device('cuda'))]
    return [size * 2**30 for size in PLANNED]


def device_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory; for a CPU, half of the machine's."""
    if device.type == 'cuda':
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2


def fitting_micro_batch(config: TrainConfig, world_size: int, available: float, sizes: dict[str, int]) -> int:
    """How many images a rank can process at once: its share of the batch, or a power of two that divides that.

    Args:
        config: The run, already checked for this number of ranks.
        world_size: Number of ranks.
        available: Bytes of the device's memory.
        sizes: What `memory` says.

    Returns:
        1 where even that does not fit.
    """
    share = config.batch // world_size
    fixed = sum(size for name, size in sizes.items() if name != 'activations')
    most = (USABLE * available - fixed) / sizes['activations']
    return next((n for n in (share, *_powers(share)) if n <= most), 1)


def _powers(number: int) -> list[int]:
    """The powers of two that divide a number, largest first."""
    return [2**i for i in reversed(range(number.bit_length())) if number % 2**i == 0]


def memory(config: TrainConfig, world_size: int) -> dict[str, int]:
    """Estimate of the bytes that training holds on each device, by what they are for; activations for one image.

    Counted are the tensors of the algorithm: what libraries need for themselves and what fragmentation wastes come on
    top, and torch.compile may need less.
    """
    with torch.device('meta'):
        parameters = sum(p.numel() for p in Denoiser(config.network).parameters())
    activations, weights = kept_for_gradients(config.network, config.precision)
    method = config.method
    weights *= 3 if world_size == 1 and config.precision != 'fp32' else 1  # gathered gradients want them in float32
    copies = method.trained * (1 + 1 + 2) + method.frozen + _emas(config)  # weights, gradients, two moments; averages
    copies += method.trained if world_size > 1 else 0  # buckets in which gradients travel
    return {
        'parameters, gradients, optimizer, EMAs': 4 * parameters * copies,
        'normalized weights': weights,
        'activations': activations,
    }


def _emas(config: TrainConfig) -> int:
    """Number of averages that are tracked."""
    return len(config.ema.stds) + (config.ema.halflife is not None)


def format_bytes(size: float) -> str:
    """For people: GiB, or MiB where that is less than a tenth."""
    return f'{size / 2**30:.1f} GiB' if size > 0.1 * 2**30 else f'{size / 2**20:.1f} MiB'
