"""What ranks compute together, for `benchmarks.machine_checks`."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.check_lines import TRAINED, Line, apart, busy, within
from dnnlib.configs import replaced
from torch_utils import distributed
from training.inputs import training_inputs
from training.methods.denoising import DenoisingLoss
from training.monitor.timing import PhaseTimer
from training.presets.table import get_preset


def ranks(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """Sums over ranks, and a gradient by all of them against one process's; torchrun starts it."""
    if not dist.is_initialized():  # one rank has no group otherwise
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
    rank, n = distributed.rank(), distributed.world_size()
    name = f'{"NCCL" if device.type == "cuda" else "gloo"}, {n} rank{"s"[: n > 1]}'
    total = distributed.all_reduce_sum(torch.full((2**20,), rank + 1.0, device=device))
    sum_ = n * (n + 1) / 2
    yield Line(f'{name}, sum', f'{total.min():g} to {total.max():g}', f'{sum_:g}', bool((total == sum_).all()))
    config, gradients = dataclasses.replace(get_preset('edm2plus-digits'), batch=8 * n), []
    stored = torch.randint(0, 256, (8 * n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for rows in (slice(rank, None, n), slice(None)):  # this rank's images, then all by itself
        numbers, method = list(range(8 * n))[rows], config.method.build(config, device)
        busy(method.net)
        inputs = training_inputs(stored[rows], torch.tensor(numbers) % 10, numbers, config, device)
        if not gradients:
            method.step(iter([inputs]), 0, PhaseTimer(device))  # its learning rate is 0
        else:
            _, losses, _ = DenoisingLoss(method.net, config.method)(*method.draw(method.net, inputs, 0))
            (losses.sum() / config.batch).backward()
        gradients.append({name: p.grad.cpu() for name, p in method.net.named_parameters()})
    worst = distributed.all_reduce_max(torch.tensor(apart(*gradients), dtype=torch.float64, device=device)).item()
    yield within(f'{name}, gradient to that of one process', worst, TRAINED)
    if n > 1:
        yield overlap(name, device, quick)


def overlap(name: str, device: torch.device, quick: bool) -> Line:
    """How much of the travel of gradients between ranks the backward pass hides, with 5 buckets of 25 MiB."""
    rank, n = distributed.rank(), distributed.world_size()
    images = 8 if device.type == 'cpu' else 512
    config = dataclasses.replace(get_preset('edm2plus-digits'), batch=images * n)
    if not quick:
        config = dataclasses.replace(config, network=replaced(config.network, {'architecture.model_channels': 256}))
    method, numbers = config.method.build(config, device), list(range(rank, images * n, n))
    busy(method.net)
    stored = torch.zeros(images, 1, 8, 8, dtype=torch.uint8)
    inputs, shares = training_inputs(stored, torch.tensor(numbers) % 10, numbers, config, device), []
    for step in range(5):
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == 'cuda')]) as profiler:
            method.step(iter([inputs]), 0, PhaseTimer(device))
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
        shares += [hidden(profiler.events() or (), device)] * (step > 1)  # buckets are arranged after the first
    share = statistics.median(shares)
    what = f'{name}, travel of gradients beside the backward pass'
    why = 'too small to be timed' if quick else 'the profiler saw none' if math.isnan(share) else ''
    return Line(what, f'{share:.0%}', 'at least 50%', None if why else share >= 0.5, why)


def hidden(events: Iterable[FunctionEvent], device: torch.device) -> float:
    """Share of the time in which sums of gradients travel during which something is computed, too."""
    if device.type == 'cuda':
        kernels = [event for event in events if event.device_type.name == 'CUDA']
        travel = [event for event in kernels if 'nccl' in event.name.lower()]
        work = [event for event in kernels if 'nccl' not in event.name.lower()]
    else:
        travel = [event for event in events if event.name == 'gloo:all_reduce']
        work = [event for event in events if event.name.startswith('autograd::engine::evaluate_function')]
    spans, computing = ([(e.time_range.start, e.time_range.end) for e in some] for some in (travel, work))
    both = sum(max(0, min(b, d) - max(a, c)) for a, b in spans for c, d in computing)
    return both / sum(b - a for a, b in spans) if spans else math.nan
