"""What `benchmarks.gpu_check` checks: functions that yield lines of its page, one of which this runs.

python -m benchmarks.machine_checks golden --device=cuda

The same lines run on a CPU and on a GPU; what a GPU alone has is in `torch.cuda` calls behind one condition each.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.check_lines import EVALUATED, TRAINED, Line, apart, busy, timed, within
from benchmarks.rank_checks import ranks
from dataset.order import Batch
from dataset.reader import ImageDataset
from dnnlib import cli
from networks.denoiser import PRECISIONS, Denoiser
from networks.edm2.branches import BRANCHES
from networks.edm2.magnitude import MPConv
from networks.folding import settled
from tests.golden_networks import RELATIVE, golden_evaluation, golden_inputs, golden_net, golden_training
from tests.helpers import make_archive, state_tensors
from torch_utils import distributed
from torch_utils.tf32 import tf32 as tf32_allowed
from training.cost import USABLE, device_memory, fitting_micro_batch, format_bytes
from training.cost import memory as estimate
from training.loop import train
from training.monitor.log import read_stats
from training.monitor.timing import PhaseTimer
from training.optimizer import Optimizer
from training.presets.table import get_preset, make_config
from training.state import TrainState, state_files
from training.step import Stepper

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / 'tests/golden/edm2.json'


def machine(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """What this is."""
    what = f'PyTorch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}'
    if device.type == 'cpu':
        yield Line(f'CPU, {os.cpu_count()} cores', what, 'adds', torch.ones(3, device=device).sum().item() == 3)
    for i in range(torch.cuda.device_count() if device.type == 'cuda' else 0):
        about = torch.cuda.get_device_properties(i)
        name = f'{about.name}, {format_bytes(about.total_memory)}, compute capability {about.major}.{about.minor}'
        versions = f'{what}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}'
        yield Line(f'GPU {i}: {name}', versions, 'adds', torch.ones(3, device=f'cuda:{i}').sum().item() == 3)


def golden(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """Networks of the golden file: evaluated and trained for three steps in every precision."""
    expected = json.loads(GOLDEN.read_text(encoding='utf-8'))['nets']
    for precision in PRECISIONS:
        worst: dict[str, tuple[float, str]] = {}
        for name in BRANCHES if precision == 'fp32' and not quick else ('A', 'G*'):
            for what, value in golden_errors(name, precision, device, expected[name]).items():
                if what not in worst or not value <= worst[what][0]:  # NaN is the worst
                    worst[what] = value, name
        for what, (value, name) in worst.items():
            exact, rough = EVALUATED if 'evaluation' in what else TRAINED, RELATIVE.get(precision, 0.0)
            # The backward pass doubles the layers, and Adam makes as much of a small gradient as of a large one.
            most = (1 if 'float32' in what else 4) * rough or exact
            least = 1e-5 if rough and 'float32' in what else 0.0  # less would not be this precision
            yield within(f'golden networks, {precision}, {what}', value, most, f'worst {name}', least)


def golden_errors(name: str, precision: str, device: torch.device, expected: dict) -> dict[str, float]:
    """Of one golden network."""
    exact, net = golden_net(name).eval(), golden_net(name).eval()
    net.precision = precision
    net = net.to(device)
    with torch.no_grad():
        D, D_exact = net(*golden_inputs(device)).cpu(), exact(*golden_inputs())
    evaluated = golden_evaluation(net)
    optimizer = Optimizer(lr=0.01).build(net)
    optimizer.param_groups[0]['lr'] = 0.01
    trained, after = golden_training(net, optimizer), expected['train']
    norms = {n: trained['grad_norm_step0'][n] / norm for n, norm in after['grad_norm_step0'].items()}
    outputs = {name: value for name, value in after.items() if 'grad_norm' not in name}
    return {
        'evaluation to golden values': apart(evaluated, {name: expected[name] for name in evaluated}),
        'evaluation to float32 on the CPU': ((D - D_exact).norm() / D_exact.norm()).item(),
        'losses and images of three steps': apart(trained, outputs),
        'norms of gradients': apart(norms, dict.fromkeys(norms, 1.0)),
    }


@torch.no_grad()
def tf32(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """What `--tf32` changes: on a GPU something, but less than bf16 does; on a CPU nothing."""
    preset = 'edm2plus-digits' if device.type == 'cpu' else 'edm2plus-img64-xs'
    net = busy(Denoiser(get_preset(preset).network).eval())
    x = torch.randn(2, *net.config.image_shape, generator=torch.Generator().manual_seed(0))
    exact, net = net(x, torch.ones(2)), net.to(device)
    found = []
    for allowed in (False, True):
        with tf32_allowed(allowed):
            found.append(net(x.to(device), torch.ones(2, device=device)).cpu())
    without, rounded = (((D - exact).norm() / exact.norm()).item() for D in found)
    if device.type == 'cpu':
        yield Line(f'--tf32, {preset}', f'{rounded:.2g}', '0: a CPU has none', torch.equal(*found))
        return
    yield within(f'float32 without --tf32 to that of the CPU, {preset}', without, EVALUATED)
    if torch.cuda.get_device_capability(device) < (8, 0):
        yield Line(f'--tf32, {preset}', f'{rounded:.2g}', '', None, 'this GPU has none')
    else:
        yield within(f'--tf32 to float32 of the CPU, {preset}', rounded, RELATIVE['bf16'], least=EVALUATED)


def operations(call: Callable[[], object], device: torch.device, word: str) -> str:
    """Operators with a word in their name that a call runs, each with the kernels of the device that it launches."""
    timed(call, device)  # a library may try kernels the first time
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == 'cuda')]) as profiler:
        timed(call, device)
    found: dict[str, list[str]] = {}
    for event in profiler.events() or ():
        if event.name.startswith('aten::') and word in event.name:
            kernels = found.setdefault(event.name.removeprefix('aten::'), [])
            kernels += [kernel.name[:80] for kernel in event.kernels if kernel.name[:80] not in kernels]
    wrappers = {'scaled_dot_product_attention', 'conv2d', 'convolution', '_convolution', 'convolution_backward'}
    chosen = {name: kernels for name, kernels in found.items() if kernels or name not in wrappers}
    return '; '.join(name + (f' [{", ".join(kernels)}]' if kernels else '') for name, kernels in chosen.items())


def kernels(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """Which attention and which depthwise convolutions PyTorch chooses, and whether their layout is the fast one."""
    for preset in ('edm2plus-digits', 'edm-digits', 'sid2-digits'):
        for precision in ('fp32',) if quick else PRECISIONS:
            net = busy(Denoiser(get_preset(preset).network, precision=precision).eval().to(device))
            inputs = torch.ones(2, *net.config.image_shape, device=device), torch.ones(2, device=device)
            found = operations(lambda net=net, inputs=inputs: net(*inputs).sum().backward(), device, 'attention')
            one = bool(found) and 'attention_math' not in found
            yield Line(f'attention, {preset}, {precision}', found, 'one kernel, not written out (math)', one)
    images, channels, side = (2, 64, 8) if quick else (16, 576, 32)
    for precision, dtype in PRECISIONS.items():
        what = f'depthwise convolution, {precision}, {images} x {channels} x {side} x {side}, forward and backward'
        if device.type == 'cpu' and precision == 'fp16' and not quick:
            yield Line(what, '', '', None, 'a CPU has no kernel for it, and takes minutes')
            continue
        layer = MPConv(channels, channels, kernel=3, groups=channels).to(device)
        layer.reset_parameters(torch.Generator().manual_seed(0))
        x = torch.randn(images, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        xs = [x.to(memory_format=layout).requires_grad_() for layout in (torch.channels_last, torch.contiguous_format)]
        calls = [lambda x=x, layer=layer: layer(x).sum().backward() for x in xs]
        found = operations(calls[0], device, 'conv')
        rounds = [[timed(call, device) for call in calls] for _ in range(5 if quick else 20)]
        last, first = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        measured = f'channels-last {last:.3g} ms, channels-first {first:.3g} ms: {found}'
        if quick:
            yield Line(what, measured, '', None, 'too small to be timed')
        else:
            yield Line(what, measured, 'channels-last, which is used, at most 1.2 times the other', last <= 1.2 * first)


def compiled(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """torch.compile against eager execution, which rounds elsewhere."""
    if device.type == 'cpu' and not any(map(shutil.which, ('c++', 'g++', 'clang++'))):
        yield Line('compiled', '', '', None, 'no C++ compiler on this machine')
        return
    for precision in ('fp32',) if quick else ('fp32', 'bf16'):
        net, start = golden_net('G*').eval().to(device), time.perf_counter()
        net.precision = precision
        with torch.no_grad():
            D = torch.compile(net, dynamic=False)(*golden_inputs(device)).cpu()
            note = f'G*, first call after {time.perf_counter() - start:.0f} s'
            exact = net(*golden_inputs(device)).cpu()
        value = ((D - exact).norm() / exact.norm()).item()
        yield within(f'compiled to eager, {precision}, evaluation', value, RELATIVE.get(precision, EVALUATED), note)
    if quick:
        yield Line('compiled to eager, fp32, gradients', '', '', None, 'takes minutes: not with --quick')
        return
    gradients = []
    for how in (torch.compile, lambda net: net):
        net = golden_net('G*').train().to(device)
        with settled(net):  # as a training step does
            how(net)(*golden_inputs(device)).square().mean().backward()
        gradients.append({name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None})
    yield within('compiled to eager, fp32, gradients', apart(*gradients), TRAINED, 'G*')


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    """How many tensors differ by a bit or more, in words; a NaN differs from itself."""
    names = [name for name in a.keys() | b.keys() if not (name in a and name in b and torch.equal(a[name], b[name]))]
    return f'{len(names)} of {len(a)} tensors differ' + (f', such as {min(names)}' if names else '')


def resume(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """A run that was stopped and resumed against one that was not; states against themselves."""
    dataset, n = ImageDataset(make_archive(folder / 'data.zip', count=30, classes=10)), 1024 if quick else 4096
    changes = dict.fromkeys(('duration', 'snapshot', 'checkpoint', 'preview', 'status'), n)
    changes |= {'channels': 32, 'batch': 128, 'rampup': n // 4}
    config = make_config('edm2plus-digits', changes, dataset, str(folder / 'data.zip')).check()

    def run(name: str, slice_: int) -> dict[str, torch.Tensor]:
        (folder / name).mkdir()
        for _ in range(n // slice_):
            with contextlib.redirect_stdout(sys.stderr):
                train(dataclasses.replace(config, slice=slice_), dataset, folder / name, device)
        return state_tensors(folder / name)

    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    with sdpa_kernel(SDPBackend.MATH):  # fused attention's gradients are not
        whole = run('whole', n)
        found = differing(whole, run('halves', n // 2))
    yield Line('stopped and resumed, deterministic algorithms', found, '0', found.startswith('0 '))
    state = TrainState(dataclasses.replace(config, slice=n), device)
    state.load(state_files(folder / 'whole')[-1])
    (folder / 'again').mkdir()
    state.stats.collect()
    state.saving(folder / 'again')()
    found = differing(whole, state_tensors(folder / 'again'))
    yield Line('a state, loaded and written again', found, '0', found.startswith('0 '))
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    first = run('first', n) if not quick else {}
    for what, slice_ in (('uninterrupted twice', n), ('stopped and resumed', n // 2)) if not quick else ():
        what, found = f'{what}, algorithms chosen by speed', differing(first, run(what, slice_))
        why = '' if device.type == 'cpu' else 'a GPU may then add in another order, even in two uninterrupted runs'
        yield Line(what, found, '' if why else '0', None if why else found.startswith('0 '), why)


def memory(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """Peak memory of training against what the dry run tells, as many images at once as it says fit, at most 16."""
    presets = ('edm2plus-img64-small',) if device.type == 'cpu' else ('edm2-img64-s', 'edm2plus-img64-s')
    for preset, precision in itertools.product(presets, ('fp32',) if device.type == 'cpu' else ('fp32', 'bf16')):
        config = dataclasses.replace(get_preset(preset), batch=2 if quick else 16, precision=precision)
        parts = estimate(config, 1)
        batch = fitting_micro_batch(config, 1, device_memory(device), parts)
        config = dataclasses.replace(config, batch=batch)
        before = peak(device, anew=True)
        images = torch.zeros(batch, *config.network.image_shape, dtype=torch.uint8)
        batches = itertools.repeat(Batch(images, torch.zeros(batch, dtype=torch.int64), torch.arange(batch)))
        step = Stepper(TrainState(config, device), batches, PhaseTimer(device))
        timed(step, device)  # makes Adam's moments, and tries kernels that need more
        peak(device, anew=True)
        timed(step, device)
        used = peak(device) - before
        planned = sum(size * batch if name == 'activations' else size for name, size in parts.items())
        note, what = f'{format_bytes(used)} to {format_bytes(planned)}', f'{preset}, {precision}, {batch} images'
        # --batch-gpu is chosen so that the estimate takes USABLE of the memory: the peak must fit the whole.
        yield within(f'peak memory to the estimate, {what}', used / planned, 1 / USABLE, note, least=0.5)
        del step


def peak(device: torch.device, anew: bool = False) -> int:
    """Most bytes held so far; on a GPU since it was asked for anew."""
    if device.type == 'cpu':
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    if anew:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


def scripts(folder: Path, *commands: list[str]) -> Iterator[Line]:
    """Scripts of ours, one after another, in a folder."""
    for script, *words in commands:
        start = time.perf_counter()
        environment = os.environ | {'PYTHONPATH': str(ROOT)}
        head = ['-m', script] if '.py' not in script else [str(ROOT / script)]
        subprocess.run([sys.executable, *head, *words], cwd=folder, check=True, stdout=sys.stderr, env=environment)
        yield Line(f'{script} {words[0]}', f'{time.perf_counter() - start:.0f} s', 'ends well', True)


def demo(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """The digits: made, trained on, generated, measured."""
    small = ['--duration=1Ki', '--snapshot=1Ki', '--checkpoint=1Ki', '--preview=1Ki', '--status=256'] if quick else []
    on = [f'--device={device}', *(['--steps=4'] if quick else [])]
    net, images = f'--net=run/phema-{"0000001" if quick else "0000049"}-0.120.safetensors', 100 if quick else 1000
    yield from scripts(
        folder,
        ['dataset_tool.py', 'convert', '--source=digits', '--dest=digits.zip'],
        ['train.py', '--preset=edm2plus-digits', '--data=digits.zip', '--outdir=run', on[0], *small],
        ['reconstruct_phema.py', '--indir=run', '--outstd=0.120'],
        ['generate.py', net, '--seeds=0-9', '--class=0-9', '--outdir=samples', *on],
        ['calculate_metrics.py', 'gen', net, '--ref=digits.zip', '--metrics=fd_pixels,class_agreement',
         f'--seeds=0-{images - 1}', '--json=metrics.json', '--record=metrics.jsonl', *on],
    )  # fmt: skip
    stats = read_stats(folder / 'run')
    speed = f'{statistics.median(r["images_per_second"] for r in stats):.0f} images/s'
    falls = stats[-1]['loss'] < stats[0]['loss']
    yield Line('demo, loss', f'{stats[0]["loss"]:.3g} to {stats[-1]["loss"]:.3g} ({speed})', 'falls', falls)
    count = len(list((folder / 'samples').rglob('*.png')))
    yield Line('demo, generated images', f'{count}', '10', count == 10)
    found = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))['metrics']
    # README.md's are 0.055 and 0.962; of real digits, halves are 0.07 apart and 0.969 agree.
    distance, agreement = (found[name]['value'] for name in ('fd_pixels', 'class_agreement'))
    measured = f'fd_pixels {distance:.3g}, class_agreement {agreement:.3g}'
    if quick:
        yield Line('demo, metrics', measured, '', None, 'so short a training teaches nothing')
    else:
        yield Line('demo, metrics', measured, 'at most 0.1, at least 0.93', distance <= 0.1 and agreement >= 0.93)


def speed(device: torch.device, quick: bool, folder: Path) -> Iterator[Line]:
    """What `benchmarks.speed` measures: a ratio is to EDM2-S as the papers write it, in float32."""
    few = ['--networks=edm2plus-digits', '--reference=edm2plus-digits', '--batches=2,2', '--rounds=1'] if quick else []
    more = ['--precisions=fp32,bf16', '--batches=32,8'] if device.type == 'cuda' and not quick else []
    words = [f'--device={device}', '--json=speed.json', '--rounds=3', *few, *more]  # the last of a kind counts
    yield from scripts(folder, ['benchmarks.speed', *words])
    for row in json.loads((folder / 'speed.json').read_text(encoding='utf-8')):
        what = f'{row["what"]}, {row["network"]} as {row["as"]}, {row["precision"]}, batch {row["batch"]}'
        ratio = f', ratio {row["ratio"]:.3f}' if row['ratio'] else ''
        measured = (f'{1e3 * row["seconds"]:.1f} ms' if row['seconds'] else format_bytes(row['bytes'])) + ratio
        if quick or row['as'] == 'formulation' or 'plus' not in row['network']:
            yield Line(what, measured, '', None, 'for comparison')
        else:
            yield Line(what, measured, 'a ratio below 1', row['ratio'] < 1)


CHECKS = {
    check.__name__: check for check in (machine, golden, tf32, kernels, resume, ranks, memory, demo, speed, compiled)
}


@click.command()
@click.argument('name', type=click.Choice(list(CHECKS)))
@click.option('--device', help='cpu or cuda; by default the GPU where there is one.')
@click.option('--quick', is_flag=True, help='Small sizes.')
@click.option('--folder', default='.', type=click.Path(path_type=Path, exists=True), help='For what it writes.')
def main(name, device, quick, folder):
    """Run one check; its lines are printed as JSON, between what else is said."""
    with distributed.session(device) as place:
        for line in CHECKS[name](place, quick, folder):
            distributed.print0('\n' + json.dumps(vars(line)))


if __name__ == '__main__':
    cli.run(main)
