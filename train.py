"""Train a diffusion model from a preset: `torchrun train.py --preset=... --data=... --outdir=...`."""

import json
import os

import click
import torch

from dnnlib import cli
from dnnlib.files import make_folder
from dnnlib.images import image_grid, save_png
from networks.denoiser import Denoiser
from sampling.pipeline import SamplerConfig, generate
from torch_utils import distributed
from training.config import KIMG, from_preset
from training.initial import check_initial
from training.loop import open_dataset, train
from training.presets import PRESETS, get_preset

EPILOG = """\b
Examples:
  python train.py --preset=edm2plus-digits --data=data/digits.zip --outdir=runs/digits
  torchrun --standalone --nproc_per_node=8 train.py --preset=edm2plus-img64-s \\
      --data=imagenet64.zip --outdir=runs/img64-s --batch-gpu=64 --precision=fp16
"""


@click.command(epilog=EPILOG)
@click.option('--preset', required=True, metavar='NAME', help=f'Recipe: {", ".join(PRESETS)}.')
@click.option('--data', required=True, metavar='ZIP|DIR', help='Dataset archive made by dataset_tool.py.')
@click.option('--outdir', required=True, metavar='DIR', help='Run folder; a run found in it is continued.')
@click.option('--init', metavar='FILE|URL', help='Network file to start from, ours or a published EDM2 pickle.')
@click.option('--offline', is_flag=True, help='Download nothing; a URL comes from the cache.')
@click.option('--cond', type=bool, default=True, show_default=True, help='Train class-conditionally.')
@click.option('--duration', type=cli.NIMG, help='Length of the run, such as 8Mi.')
@click.option('--batch', type=cli.NIMG, help='Images in a step, over all ranks.')
@click.option('--batch-gpu', 'micro_batch', type=cli.NIMG, help='Images that one rank processes at once.')
@click.option('--channels', type=int, metavar='INT', help='Width of the first level of the network.')
@click.option('--dropout', type=float, metavar='FLOAT', help='Share of features dropped.')
@click.option('--P_mean', 'P_mean', type=float, metavar='FLOAT', help='Mean of ln(sigma).')
@click.option('--P_std', 'P_std', type=float, metavar='FLOAT', help='Standard deviation of ln(sigma).')
@click.option('--lr', type=float, metavar='FLOAT', help='Highest learning rate, alpha_ref.')
@click.option('--decay', type=float, metavar='STEPS', help='Steps after which the learning rate falls, t_ref.')
@click.option('--rampup', type=cli.NIMG, help='Images over which the learning rate rises.')
@click.option('--ema', 'ema_stds', type=cli.FLOATS, help='EMA lengths to track, such as 0.05,0.10.')
@click.option('--precision', type=str, metavar='fp32|bf16|fp16', help='Of the features.')
@click.option('--status', type=cli.NIMG, help='Interval of status lines.')
@click.option('--preview', type=cli.NIMG, help='Interval of sample grids.')
@click.option('--snapshot', type=cli.NIMG, help='Interval of EMA snapshots.')
@click.option('--checkpoint', type=cli.NIMG, help='Interval of full states to continue from.')
@click.option('--seed', type=int, metavar='INT', help='Of weights, data order and noise.')
@click.option('--workers', type=int, metavar='INT', help='Data loading processes beside each rank.')
@click.option('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.')
@click.option('-n', '--dry-run', is_flag=True, help='Print the config and stop.')
def main(preset, data, outdir, offline, cond, device, dry_run, **flags):
    """Train a diffusion model, or continue the run found in --outdir.

    Numbers of images may be written as 4096, 200k or 8Mi. What is not given comes from the preset.
    """
    dataset, label_dim = open_dataset(data, cond)
    overrides = {name: tuple(v) if isinstance(v, list) else v for name, v in flags.items() if v is not None}
    config = from_preset(
        preset,
        data=data,
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        image_shape=dataset.image_shape,
        label_dim=label_dim,
        overrides=overrides,
    ).check(int(os.environ.get('WORLD_SIZE', '1')))
    expected = get_preset(preset)
    made_for = (expected.img_channels, expected.resolution, expected.resolution)
    if dataset.image_shape != made_for:
        click.echo(
            f'warning: {preset} is made for images of shape {made_for}, these are {dataset.image_shape}', err=True
        )
    if config.init:
        check_initial(config.init, config.network, offline)
    if dry_run:
        click.echo(json.dumps(config.to_json(), indent=2))
        return
    chosen = distributed.init(device)
    try:
        folder = make_folder(outdir)
        train(config, dataset, folder, chosen, preview=lambda net, nimg: draw_samples(net, nimg, folder))
    finally:
        distributed.close()


def draw_samples(net: Denoiser, nimg: int, folder) -> None:
    """Write a grid of samples with a class per column, the same seeds each time, to samples-KIMG.png."""
    label_dim = net.config.label_dim
    columns = min(label_dim, 10) or 10
    classes = [i * label_dim // columns for i in range(columns)] if label_dim else None
    seeds = range(5 * columns)
    images = [batch.images for batch in generate(net, seeds, SamplerConfig(steps=18), classes=classes)]
    pixels = torch.cat(images).permute(0, 2, 3, 1).numpy()
    zoom = max(1, 64 // net.config.img_resolution[0])
    save_png(folder / f'samples-{nimg // KIMG:07d}.png', image_grid(pixels, columns, zoom))


if __name__ == '__main__':
    cli.run(main)
