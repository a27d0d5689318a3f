"""Train a diffusion model from a preset: `torchrun train.py --preset=... --data=... --outdir=...`."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

from dataset.reader import ImageDataset, open_dataset
from dnnlib import cli
from dnnlib.configs import parse_setting
from dnnlib.errors import UserError
from dnnlib.files import make_folder, read_object
from dnnlib.images import captioned, image_grid, save_png
from dnnlib.signals import StopSignals
from evaluation.measure import Evaluator, Generation, MeasureConfig
from evaluation.options import measure_config, measure_options
from networks.config import NetworkConfig
from networks.denoiser import EMULATED, Denoiser, is_emulated
from networks.encoders import Encoder, load_encoder
from sampling.config import SamplerConfig
from sampling.pipeline import generate
from torch_utils import distributed
from training.config import KIMG, TrainConfig
from training.cost import device_memory, fitting_micro_batch, format_bytes, memory, plan
from training.initial import check_initial
from training.loop import Measure, Preview, train
from training.methods.table import METHODS
from training.monitor.board import require_tensorboard
from training.presets.table import PRESETS, get_preset, make_config

PREVIEW_STEPS = 18  # of sample grids
ACTIVATIONS_ON_CPU = 4 * 2**30  # bytes of them to plan for, and of what comes with them

EPILOG = """\b
Examples:
  python train.py --preset=edm2plus-digits --data=data/digits.zip --outdir=runs/digits
  python train.py --preset=edm2plus-img64-xl --batch-gpu=32 --precision=fp16 --dry-run --ranks=32
  torchrun --standalone --nproc_per_node=8 train.py --preset=edm2plus-img64-s \\
      --data=imagenet64.zip --outdir=runs/img64-s --batch-gpu=64 --precision=fp16 --compile
  The same command resumes a run that was stopped. See docs/training.md, for Slurm too.
"""

main_group, recipe, execution, output = (
    cli.group(title) for title in ('Main options', 'Recipe', 'Execution', 'Output and intervals')
)


@click.command(cls=cli.GroupedCommand, epilog=EPILOG)
@main_group('--preset', required=True, metavar='NAME', help=f'One of {", ".join(PRESETS)}.')
@main_group('--data', metavar='ZIP|DIR', help='Dataset archive made by dataset_tool.py.')
@main_group('--outdir', metavar='DIR', help='Run folder; a run found in it is resumed.')
@main_group('--init', metavar='FILE|URL', help='Network file to start from, ours or a published EDM or EDM2 pickle.')
@main_group('--cond', type=bool, default=True, show_default=True, help='Train class-conditionally.')
@recipe('--method', metavar='NAME', help=f'{" or ".join(METHODS)}.')
@recipe('--teacher', metavar='FILE|URL', help='Network file to distill, with --method=moment-matching.')
@recipe('--steps-student', type=int, metavar='INT', help='Sampling steps of its student.  [default: 8]')
@recipe('--duration', type=cli.NIMG, help='Length of the run, such as 8Mi.')
@recipe('--batch', type=cli.NIMG, help='Images in a step, over all ranks.')
@recipe('--channels', type=int, metavar='INT', help='Width of the first level of the network.')
@recipe('--channel-mult', type=cli.INTS, help='Width of each level relative to the first, such as 1,2,3,4.')
@recipe('--num-blocks', type=int, metavar='INT', help='Blocks per level.')
@recipe('--attn-resolutions', type=cli.INTS, help='Levels with attention, by the shorter side, such as 16,8.')
@recipe('--channels-per-head', type=int, metavar='INT', help='Width of an attention head.')
@recipe('--dropout', type=float, metavar='FLOAT', help='Share of features dropped.')
@recipe('--P_mean', 'P_mean', type=float, metavar='FLOAT', help='Mean of ln(sigma).')
@recipe('--P_std', 'P_std', type=float, metavar='FLOAT', help='Standard deviation of ln(sigma).')
@recipe('--lr', type=float, metavar='FLOAT', help='Highest learning rate, alpha_ref.')
@recipe('--decay', type=float, metavar='STEPS', help='Steps after which the learning rate falls, t_ref.')
@recipe('--rampup', type=cli.NIMG, help='Images over which the learning rate rises.')
@recipe('--ema', 'ema_stds', type=cli.FLOATS, help='EMA lengths to track, such as 0.05,0.10.')
@recipe('--ema-halflife', type=cli.NIMG, help='Track a traditional EMA too, of this half-life.')
@recipe('--ema-rampup', type=float, metavar='SHARE', help='Of the training so far: its half-life at most.')
@recipe('--ema-every', type=int, metavar='STEPS', help='Update the averages every so many steps.')
@recipe('--held-out', type=float, metavar='SHARE', help='Of the data, to evaluate at snapshots instead of training on.')
@recipe('--clip', type=float, metavar='NORM', help='Largest norm of a gradient.')
@recipe('--label-dropout', type=float, metavar='SHARE', help='Of the images: their class is withheld.')
@recipe('--xflip/--no-xflip', default=None, help='Train on mirrored images too.')
@recipe('--set', 'settings', multiple=True, metavar='FIELD=VALUE', help='Any field of the config that --dry-run shows, '
        'such as optimizer.eps=1e-12 or network.architecture=NAME.')  # fmt: skip
@recipe('--seed', type=int, metavar='INT', help='Of weights, data order and noise.')
@execution(
    '--batch-gpu', 'micro_batch', type=cli.NIMG, help='Images that one rank processes at once; by default what fits.'
)
@execution('--precision', type=str, metavar='fp32|bf16|fp16', help='Of the features.')
@execution('--ls', 'loss_scaling', type=float, metavar='FLOAT', help='Factor on the loss, against underflow in FP16.')
@execution('--compile/--no-compile', default=None, help='Compile the network.')
@execution('--tf32/--no-tf32', default=None, help='On a GPU: faster products of float32, of 10 bits of mantissa.')
@execution('--workers', type=int, metavar='INT', help='Data loading processes beside each rank.')
@execution('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.')
@execution('--offline', is_flag=True, help='Download nothing; a URL comes from the cache.')
@execution('--slice', type=cli.NIMG, help='Stop after so many images, to be resumed by the same command.')
@execution('--nonfinite-steps', type=int, metavar='INT', help='Stop when as many steps in a row had bad gradients.')
@execution('--allow-rounding', is_flag=True, help='Resume although what changes rounding differs.')
@output('--status', type=cli.NIMG, help='Interval of status lines.')
@output('--preview', type=cli.NIMG, help='Interval of sample grids.')
@measure_options(False, 'What the metrics compare with; by default the training data; may be repeated.', output)
@output('--metric-seeds', type=cli.INTS, default='0-49999', show_default=True, help='An image for each.')
@output('--vae', metavar='DIR', help='Folder of the VAE, to show and measure latents without a network.')
@output('--snapshot', type=cli.NIMG, help='Interval of EMA snapshots.')
@output('--snapshot-precision', metavar='fp16|bf16|fp32', help='Of the EMA snapshots.')
@output('--checkpoint', type=cli.NIMG, help='Interval of full states to resume from.')
@output('--keep', type=int, metavar='INT', help='Newest full states that stay; 0 for all.')
@output('--tensorboard', is_flag=True, help='Write events for TensorBoard too.')
@output('-n', '--dry-run', is_flag=True, help='Print the config and what the run will cost, and stop.')
@output('--ranks', type=click.IntRange(min=1), help='Number of GPUs to plan for with --dry-run.')
def main(
    preset,
    data,
    outdir,
    offline,
    cond,
    device,
    dry_run,
    ranks,
    allow_rounding,
    tensorboard,
    vae,
    metric_seeds,
    settings,
    **flags,
):
    """Train a diffusion model, or resume the run found in --outdir.

    Numbers of images may be written as 4096, 200k or 8Mi. What is not given comes from the preset.
    """
    measuring = measure_config(flags, offline=offline)
    flags['micro_batch'] = flags['micro_batch'] or None  # 0 of EDM2: no limit
    overrides = {name: value for name, value in flags.items() if value is not None} | dict(map(parse_setting, settings))
    if dry_run:
        world_size = ranks or int(os.environ.get('WORLD_SIZE', '1'))
        config, _ = resolve(preset, data, cond, overrides, world_size, offline)
        click.echo(json.dumps(config.to_json(), indent=2))
        click.echo('\n' + '\n'.join(f'{name:<28}{value}' for name, value in plan(config, world_size)))
        if get_preset(preset).result:
            click.echo(f'{"the paper reports":<28}{get_preset(preset).result}')
        return
    get_preset(preset)
    missing = [f"Missing option '--{name}'" for name, v in (('data', data), ('outdir', outdir)) if v is None]
    if missing:
        raise UserError(missing)
    if ranks is not None:
        raise UserError('--ranks is for --dry-run; otherwise torchrun tells their number')
    if tensorboard:
        require_tensorboard()
    world_size = int(os.environ.get('WORLD_SIZE', '1'))
    config, dataset = resolve(preset, data, cond, overrides, world_size, offline)
    with StopSignals(last=True) as signals, distributed.session(device) as chosen:
        measure = make_measure(config, chosen, measuring, metric_seeds, vae) if measuring.metrics else None
        folder = make_folder(outdir)
        notes = [f'command: python {shlex.join(sys.argv)}']
        if is_emulated(config.precision, chosen):
            notes.append(f'warning: {EMULATED}')
            distributed.print0(notes[-1])
        config = with_micro_batch(config, folder, chosen, notes)
        train(
            config,
            dataset,
            folder,
            chosen,
            preview=make_preview(config, chosen, folder, vae),
            measure=measure,
            allow_rounding=allow_rounding,
            tensorboard=tensorboard,
            signals=signals,
            notes=notes,
        )


def resolve(
    preset: str, data: str | None, cond: bool, overrides: dict, world_size: int, offline: bool
) -> tuple[TrainConfig, ImageDataset | None]:
    """The config of a run, checked, and its dataset; without data, for those that the preset is made for, and None."""
    expected = get_preset(preset).network.image_shape
    dataset = open_dataset(data, cond, make_config(preset, overrides).xflip)[0] if data else None
    if dataset and dataset.image_shape != expected:
        click.echo(
            f'warning: {preset} is made for images of shape {expected}, these are {dataset.image_shape}', err=True
        )
    config = make_config(preset, overrides, dataset, data or '', cond)
    if asked := overrides.get('attn_resolutions'):
        check_attention(asked, config.network)
    config = config.method.resolved(config, offline).check(world_size)
    if config.init:
        check_initial(config.init, config.network, offline)
    return config, dataset


def check_attention(asked: list[int], network: NetworkConfig) -> None:
    """Refuse to leave out attention that was asked for. (Presets' own may be left out: images have other sizes.)"""
    sides = [min(network.img_resolution) >> i for i in range(len(network.architecture.channel_mult))]
    if wrong := [side for side in asked if side not in sides]:
        near = sorted({min(sides, key=lambda side: abs(side - n)) for n in asked}, reverse=True)
        raise UserError(
            f'no level has a shorter side of {wrong[0]}; levels have {", ".join(map(str, sides))} '
            f'(try --attn-resolutions={",".join(map(str, near))})'
        )


def with_micro_batch(config: TrainConfig, folder: Path, device: torch.device, notes: list[str]) -> TrainConfig:
    """The config with a micro-batch, where none was asked for: that of a run to be resumed, else the largest that fits.

    Every rank calls it; all get that of the smallest device. What it chose is printed, and added to `notes`.
    """
    world_size = distributed.world_size()
    share, earlier = config.batch // world_size, folder / 'config.json'
    if config.micro_batch is not None:
        return config
    if earlier.exists():
        micro = read_object(earlier).get('micro_batch')
        fits = isinstance(micro, int) and micro > 0 and share % micro == 0
        return dataclasses.replace(config, micro_batch=micro) if fits else config
    sizes, available = memory(config, world_size), device_memory(device)
    if device.type == 'cpu':  # where other programs run too, and where more images at once are no faster
        fixed = sum(sizes.values()) - sizes['activations']
        available = min(available / int(os.environ.get('LOCAL_WORLD_SIZE', '1')), fixed + ACTIVATIONS_ON_CPU)
    fitting = fitting_micro_batch(config, world_size, available, sizes)
    micro = min(map(int, distributed.gather_text(str(fitting))))
    if micro == share:
        return config
    notes.append(
        f'--batch-gpu={micro}: of the {share} images of a step, as many at once as fit in {format_bytes(available)}'
    )
    distributed.print0(notes[-1])
    return dataclasses.replace(config, micro_batch=micro)


def make_measure(
    config: TrainConfig, device: torch.device, measuring: MeasureConfig, seeds: list[int], vae: str | None
) -> Measure:
    """What computes the metrics of a network in training."""
    if not measuring.refs and config.encoder != 'rgb':
        raise UserError('the training data are latents; give --ref, a reference made of the images')
    how = Generation(seeds, config.sampler, load_encoder(config.encoder, device, vae))
    batch = config.micro_batch_for(distributed.world_size())
    measuring = dataclasses.replace(measuring, refs=measuring.refs or (config.data,), batch=batch)
    evaluator = Evaluator(measuring, device)
    evaluator.prepare(how.describe(config.network))
    evaluator.read_references()
    return lambda net, nimg: evaluator.network(net, how)


def make_preview(config: TrainConfig, device: torch.device, folder: Path, vae: str | None) -> Preview | None:
    """What draws sample grids on rank 0; None, with a word about it, where latents cannot be decoded here."""
    if distributed.rank() != 0:
        return None
    try:
        encoder = load_encoder(config.encoder, device, vae)
    except UserError as error:
        click.echo(f'warning: no sample grids will be drawn: {error}', err=True)
        return None
    return lambda net, nimg: draw_samples(net, nimg, folder, encoder, config.sampler, config.class_names)


def draw_samples(
    net: Denoiser, nimg: int, folder: Path, encoder: Encoder, config: SamplerConfig, names: Sequence[str] = ()
) -> np.ndarray:
    """Write a grid of samples with a class per column, the same seeds each time, to samples-KIMG.png; return it.

    Columns have the names of their classes above them, where there are `names`.
    """
    label_dim = net.config.label_dim
    columns = min(label_dim, 10) or 10
    classes = [i * label_dim // columns for i in range(columns)] if label_dim else None
    if config.sampler.order is not None:  # a stochastic sampler needs all of its steps
        config = dataclasses.replace(config, steps=min(config.steps, PREVIEW_STEPS))
    made = generate(net, range(5 * columns), config, classes=classes, encoder=encoder)
    pixels = torch.cat([batch.images for batch in made]).permute(0, 2, 3, 1).numpy()
    grid = image_grid(pixels, columns, max(1, 64 // pixels.shape[1]))
    grid = captioned(grid, [names[i] for i in classes]) if names and classes else grid
    save_png(folder / f'samples-{nimg // KIMG:07d}.png', grid)
    return grid


if __name__ == '__main__':
    cli.run(main)
