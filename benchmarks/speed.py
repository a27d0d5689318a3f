"""EDM2+'s promise of speed, kept: the papers' formulation against what users get, side by side in one run.

python -m benchmarks.speed
python -m benchmarks.speed --device=cuda --precisions=fp32,bf16 --compile --json=speed.json
python -m benchmarks.speed --networks=edm2-img64-s,edm2plus-img64-s,edm-imagenet64-adm,sid2-img64-small

As the formulation, weights are normalized in every call, MP-SiLU and MP-sums are computed as they are written, features
are channels-first, nothing is compiled; training overwrites weights in every call, too, differentiates by autograd
alone, cleans every gradient and takes Adam as PyTorch has it by default. Users get what `generate.py` and `train.py`
do. Ratios are medians over rounds in which all cases are measured in turn, each to the reference as the formulation in
float32 of the same round. On a CPU, evaluations of the formulation run in a process of their own.
"""

import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import click
import torch

from dnnlib import cli
from networks.complexity import complexity
from networks.denoiser import Denoiser
from networks.edm2 import unet
from networks.edm2.magnitude import MPConv, normalize
from sampling.portions import Execution, evaluating
from torch_utils import distributed
from torch_utils.allocator import keep_freed_memory
from training import update
from training.inputs import training_inputs
from training.monitor.timing import PhaseTimer
from training.optimizer import Optimizer
from training.presets.table import get_preset

REFERENCE = 'edm2-img64-s'
TABLE4 = {'latency': 0.998 / 2.069, 'throughput': 1 / 1.3, 'memory': 0.87}  # EDM2+ to EDM2; the first on a CPU


def as_written(layer: MPConv, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
    """The weight of EDM2's algorithm 1, whatever is kept."""
    return (normalize(layer.weight) * (gain / math.sqrt(layer.weight[0].numel()))).to(x.dtype)


def default_adam(config: Optimizer, net: torch.nn.Module) -> torch.optim.Adam:
    """Neither fused nor told how to go through the parameters."""
    return torch.optim.Adam(net.parameters(), 0.0, (config.beta1, config.beta2), config.eps)


def every_gradient(parameters: list[torch.nn.Parameter], *_) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace what is not finite, parameter by parameter, and measure nothing."""
    for p in parameters:
        if p.grad is not None:
            torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
    return torch.zeros(len(parameters)), torch.zeros(())


@contextlib.contextmanager
def formulation() -> Iterator[None]:
    """Let networks of EDM2's kind, and their training, be what the papers write."""
    mine = {
        (update, 'settled'): lambda *_: contextlib.nullcontext(),
        (update, 'clean_gradients'): every_gradient,
        (Optimizer, 'build'): default_adam,
        (unet.Block, 'fused'): False,
        (unet, 'features_format'): lambda *_: torch.contiguous_format,
        (MPConv, 'weight_for'): as_written,
        (MPConv, 'is_packed'): property(lambda layer: False),
    }
    ours = {key: getattr(*key) for key in mine}
    try:
        for key, value in mine.items():
            setattr(*key, value)
        yield
    finally:
        for key, value in ours.items():
            setattr(*key, value)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row to be: what is measured, of which network, and the call that does it once for `batch` images."""

    what: str
    network: str
    how: str
    precision: str
    compiled: bool
    batch: int
    call: Callable[[], object]

    def seconds(self, device: torch.device) -> float:
        """Of one call."""
        training = self.what == 'train'
        if training:  # sampling leaves the allocator as it is, on either side
            keep_freed_memory(self.how == 'users')
        with formulation() if self.how == 'formulation' else contextlib.nullcontext():
            if training and device.type == 'cpu':
                self.call()  # fills the memory that is kept
            _wait(device)
            start = time.perf_counter()
            self.call()
            _wait(device)
        return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def noise(*shape: int) -> torch.Tensor:
    """Standard normal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def network_of(preset: str, precision: str, device: torch.device) -> Denoiser:
    """Of a preset, with gains at which no part is silent."""
    net = Denoiser(get_preset(preset).network, precision=precision).eval().requires_grad_(False).to(device)
    for name, p in net.named_parameters():
        if name.endswith('_gain'):
            torch.nn.init.ones_(p)
    return net


def one_evaluation(
    net: Denoiser, batch: int, execution: Execution, stack: contextlib.ExitStack
) -> Callable[[], object]:
    """As the sampling pipeline does it, weights folded; `stack` ends that."""
    (portions,) = stack.enter_context(evaluating([net], batch, execution))
    x = noise(batch, *net.config.image_shape).to(net.device)
    labels = torch.eye(net.config.label_dim, device=net.device)[[0] * batch] if net.config.label_dim else None
    sigma = torch.tensor(1.0, device=net.device)
    return lambda: portions(x, sigma, labels)


def written_evaluation(net: Denoiser, batch: int) -> Callable[[], object]:
    """As the papers write it, within `formulation`."""
    x, sigma = noise(batch, *net.config.image_shape).to(net.device), torch.ones(batch, device=net.device)
    return torch.inference_mode()(lambda: net(x, sigma))


def _serve(pipe: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    network = functools.cache(lambda *preset: network_of(*preset, torch.device('cpu')))
    call = functools.cache(lambda *preset, batch: written_evaluation(network(*preset), batch))
    with formulation(), contextlib.suppress(EOFError):
        while True:
            *preset, batch = pipe.recv()
            call(*preset, batch=batch)()
            pipe.send(None)


@contextlib.contextmanager
def process_of_its_own() -> Iterator[Callable[[str, str, int], object]]:
    """A function that evaluates the formulation of a preset, in a precision, on a CPU, where nothing else runs.

    It makes all weights anew in every call. In a process in which networks have freed memory before, that is at hand
    for them, and saves a fifth of the time; the papers' code has no such neighbours.
    """
    context = multiprocessing.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
    process.start()
    theirs.close()
    try:
        yield lambda *key: (ours.send(key), ours.recv())
    finally:
        ours.close()
        process.join()


def one_step(preset: str, precision: str, batch: int, compiled: bool, device: torch.device) -> Callable[[], object]:
    """A training step of random images, optimizer included; augmentation and averages are left out."""
    config = get_preset(preset)
    config = dataclasses.replace(config, batch=batch, precision=precision, compile=compiled, augment=None)
    method, timer = config.method.build(config, device), PhaseTimer(device)
    channels, *side = config.network.image_shape
    stored = (noise(batch, channels, *side) * 50 + 128).clip(0, 255).byte()
    inputs = training_inputs(stored, torch.zeros(batch, dtype=torch.int64), range(batch), config, device)
    return lambda: (method.step(iter([inputs]), 0, timer), method.net.zero_grad())  # other cases want the memory


def cases_of(preset: str, precision: str, compiled: bool, many: int, device, stack, elsewhere) -> Iterator[Case]:
    """Evaluations of one image and of many, of one network."""
    net = network_of(preset, precision, device)
    for what, batch in (('latency', 1), ('throughput', many)):
        call = one_evaluation(net, batch, Execution(compiled=compiled), stack)
        yield Case(what, preset, 'users', precision, compiled, batch, call)
        if not compiled and isinstance(net.unet, unet.UNet):
            there = functools.partial(elsewhere, preset, precision, batch)
            call = there if device.type == 'cpu' else written_evaluation(net, batch)
            yield Case(what, preset, 'formulation', precision, False, batch, call)


def training_rows(
    variant: tuple[str, str, bool], batch: int, device: torch.device, borrowed: str | None, rounds: int, reference: str
) -> list[dict]:
    """Steps of one variant, beside `borrowed` as the formulation; a step holds gradients and moments, so no more."""
    preset, precision, compiled = variant
    step = one_step(preset, precision, batch, compiled, device)
    cases = [Case('train', preset, 'users', precision, compiled, batch, step)]
    if not compiled and preset.startswith('edm2'):
        cases.append(formulated_step(preset, precision, batch, device))
    more = [formulated_step(borrowed, 'fp32', batch, device)] if borrowed else []
    return measure(cases + more, reference, rounds, device)[: len(cases)]


def formulated_step(preset: str, precision: str, batch: int, device: torch.device) -> Case:
    """A training step as the papers write it."""
    with formulation():  # which builds another optimizer
        step = one_step(preset, precision, batch, False, device)
    return Case('train', preset, 'formulation', precision, False, batch, step)


def measure(cases: list[Case], reference: str, rounds: int, device: torch.device) -> list[dict]:
    """Rows: medians of seconds, and of ratios to the reference as the formulation."""
    base = next((c for c in cases if (c.network, c.how, c.precision) == (reference, 'formulation', 'fp32')), None)
    times = {id(case): [] for case in cases}
    memory = {}
    for round_ in range(rounds + 1):  # the first one warms up
        for case in cases:
            if device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)  # by the networks of all cases
            seconds = case.seconds(device)
            times[id(case)] += [seconds] * (round_ > 0)
            if device.type == 'cuda':
                peak = torch.cuda.max_memory_allocated(device)
                memory[id(case)] = peak - held + 4 * complexity(get_preset(case.network).network).parameters
    rows = []
    for case in cases:
        about = {'what': case.what, 'network': case.network, 'as': case.how, 'precision': case.precision}
        about |= {'compiled': case.compiled, 'batch': case.batch}
        pairs = zip(times[id(case)], times[id(base)] if base else [math.nan] * rounds, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        rows.append({**about, 'seconds': statistics.median(times[id(case)]), 'ratio': ratio if base else None})
        if case.what == 'throughput' and memory:
            used, whole = memory[id(case)], memory[id(base)] if base else None
            rows.append({**about, 'what': 'memory', 'seconds': None, 'bytes': used, 'ratio': whole and used / whole})
    return rows


def gemm(device: torch.device, side: int = 1024) -> float:
    """Multiply-accumulates of this machine in float32, per second."""
    a, times = noise(side, side).to(device), []
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        times.append(time.perf_counter() - start)
    return side**3 / min(times)


def show(rows: list[dict], limits: dict[str, float]) -> None:
    """Print them, per image, with the limit by matrix products and what the paper's table 4 has."""
    print(
        '| what | network | as | precision | compiled | batch | ms per image | ratio | times the GEMM limit | paper |'
    )
    print('|---|---|---|---|---|---:|---:|---:|---:|---:|')
    for row in rows:
        each = row['seconds'] / row['batch'] if row['seconds'] else math.nan
        limit = limits[row['network']] * (3 if row['what'] == 'train' else 1)
        paper = TABLE4.get(row['what'], math.nan) if 'plus' in row['network'] else math.nan
        cells = [
            row['what'],
            row['network'],
            row['as'],
            row['precision'],
            'yes' if row['compiled'] else '',
            row['batch'],
        ]
        numbers = f'{1e3 * each:.1f} | {row["ratio"] or math.nan:.3f} | {each / limit:.2f} | {paper:.2f}'
        print('| ' + ' | '.join(map(str, cells)) + f' | {numbers} |'.replace('nan', ''))


@click.command()
@click.option('--networks', default=f'{REFERENCE},edm2plus-img64-s', show_default=True, help='Presets.')
@click.option('--precisions', default='fp32', show_default=True, help='Such as fp32,bf16.')
@click.option('--compile', 'compiling', is_flag=True, help='Measure compiled networks, too (minutes).')
@click.option('--what', default='latency,throughput,train', show_default=True, help='Kinds of rows.')
@click.option('--batches', default='8,4', show_default=True, help='Images at a time: sampling, training.')
@click.option('--rounds', default=5, show_default=True, type=click.IntRange(min=1))
@click.option('--reference', default=REFERENCE, show_default=True, help='Preset that ratios refer to.')
@click.option('--device', help='cpu or cuda; by default the GPU where there is one.')
@click.option('--json', 'dest', type=click.Path(path_type=Path), help='Write the rows to this file.')
def main(networks, precisions, compiling, what, batches, rounds, reference, device, dest):
    """Measure, print, write."""
    batches = tuple(map(int, batches.split(',')))
    with distributed.session(device) as place:
        print(f'{place}, torch {torch.__version__}, {torch.get_num_threads()} threads\n')
        rows = []
        variants = [
            (name, precision, compiled)
            for name in networks.split(',')
            for precision in precisions.split(',')
            for compiled in ((False, True) if compiling else (False,))
        ]
        wanted = what.split(',')
        with contextlib.ExitStack() as stack:
            sampled = variants if {'latency', 'throughput'} & set(wanted) else ()
            elsewhere = stack.enter_context(process_of_its_own()) if sampled else None
            cases = [case for variant in sampled for case in cases_of(*variant, batches[0], place, stack, elsewhere)
                     if case.what in wanted]  # fmt: skip
            for kind in dict.fromkeys(case.what for case in cases):
                rows += measure([case for case in cases if case.what == kind], reference, rounds, place)
            del cases
        base = (reference, 'fp32', False)
        for variant in variants if 'train' in wanted else ():
            borrowed = reference if base in variants and variant != base and reference.startswith('edm2') else None
            rows += training_rows(variant, batches[1], place, borrowed, rounds, reference)
        rate = gemm(place)
        costs = {name: complexity(get_preset(name).network).operations for name in networks.split(',')}
    show(rows, {name: cost / rate for name, cost in costs.items()})
    if dest:
        dest.write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    cli.run(main)
