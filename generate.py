"""Generate images from a network file: `python generate.py --net=FILE --seeds=0-99 --outdir=DIR`."""

from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import make_folder, write_json
from dnnlib.images import image_grid, save_png
from networks.files import load_network
from networks.published_models import models_table, resolve_model
from sampling.pipeline import Batch, SamplerConfig, check_fit, generate
from torch_utils import distributed
from torch_utils.tensor_files import library_versions

EPILOG = """\b
Examples:
  python generate.py --net=runs/digits/phema-0000049-0.120.safetensors --seeds=0-99 --class=0-9 --outdir=out/digits
  python generate.py --preset=edm2-img64-s-fid --seeds=0-99 --outdir=out/edm2
  torchrun --standalone --nproc_per_node=8 generate.py --net=FILE --seeds=0-49999 --outdir=out/fid --subdirs
"""


def print_presets(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """click's hook: --list-presets needs no other option."""
    if value:
        click.echo(models_table())
        ctx.exit()


@click.command(epilog=EPILOG)
@click.option('--net', 'net_path', metavar='FILE|URL', help='Network file, or a published EDM2 pickle.')
@click.option('--gnet', 'gnet_path', metavar='FILE|URL', help='Guiding network file.')
@click.option('--guidance', type=float, help='Guidance weight; 1 is none, and the default without --preset.')
@click.option('--preset', metavar='NAME', help='Published EDM2 model: network, guiding network and guidance at once.')
@click.option(
    '--list-presets',
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_presets,
    help='Show them and stop.',
)
@click.option('--offline', is_flag=True, help='Download nothing; URLs and presets come from the cache.')
@click.option('--outdir', required=True, metavar='DIR', help='Where the images go; DIR-grid.png shows them at once.')
@click.option('--seeds', type=cli.INTS, required=True, help='One image for each, such as 0-99 or 1,2,5-10.')
@click.option('--subdirs', is_flag=True, help='A folder for every 1000 seeds.')
@click.option('--class', 'classes', type=cli.INTS, help='Class, or classes to cycle through; by default random.')
@click.option('--batch', type=click.IntRange(min=1), default=64, show_default=True, help='Images at a time.')
@click.option('--steps', type=int, default=32, show_default=True, help='Sampling steps; 2 N - 1 evaluations.')
@click.option('--sigma-min', type=float, default=0.002, show_default=True, help='Lowest noise level.')
@click.option('--sigma-max', type=float, default=80.0, show_default=True, help='Highest noise level.')
@click.option('--rho', type=float, default=7.0, show_default=True, help='Spacing of the noise levels.')
@click.option('--precision', default='fp32', show_default=True, metavar='fp32|bf16|fp16', help='Of the features.')
@click.option('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.')
def main(
    net_path, gnet_path, guidance, preset, offline, outdir, seeds, subdirs, classes, batch, precision, device, **sampler
):
    """Generate images with Heun's method; image k depends on seed k alone.

    The output folder has the layout of a dataset (dataset.json holds the classes), so that calculate_metrics.py
    and train.py can read it. generation.json tells how the images were made.
    """
    net_path, gnet_path, guidance = resolve_model(preset, net_path, gnet_path, guidance)
    config = SamplerConfig(guidance=guidance, **sampler).check()
    chosen = distributed.init(device)
    try:
        net, info = load_network(net_path, chosen, precision, offline)
        guiding_net = load_network(gnet_path, chosen, precision, offline)[0] if gnet_path else None
        check_fit(net, guiding_net, config, classes)
        names = {seed: f'{seed // 1000:06d}/{seed:06d}.png' if subdirs else f'{seed:06d}.png' for seed in seeds}
        folder = make_folder(outdir)
        prepare_folder(folder, set(names.values()))
        mine = list(names)[distributed.rank() :: distributed.world_size()]
        labels = write_images(folder, names, mine, generate(net, mine, config, guiding_net, classes, batch), chosen)
        if distributed.rank() == 0:
            record = {
                'net': {'file': net_path, **info.to_header()},
                'guiding_net': gnet_path,
                'sampler': {'name': 'heun', **config.to_json()},
                'seeds': list(names),
                'classes': classes,
                'precision': precision,
                'versions': library_versions(),
            }
            write_json(folder / 'generation.json', record)
            write_json(folder / 'dataset.json', {'labels': labels})
            draw_grid(folder, names, classes)
    finally:
        distributed.close()


def prepare_folder(folder: Path, names: set[str]) -> None:
    """Refuse a folder that holds other images, which would be taken for results of this run; forget an earlier run.

    Its records go first: should this run be stopped, no record shall stand beside images that it does not describe.
    """
    for path in folder.rglob('*.png'):
        if path.relative_to(folder).as_posix() not in names:
            raise UserError(f'{folder} holds other images, such as {path.name}; give an empty folder')
    distributed.barrier()  # all ranks have looked before any writes
    if distributed.rank() == 0:
        for record in ('generation.json', 'dataset.json'):
            (folder / record).unlink(missing_ok=True)


def write_images(
    folder: Path, names: dict[int, str], mine: list[int], batches: Iterable[Batch], device: torch.device
) -> list | None:
    """Write this rank's images; return [name, class] of all ranks' images, or None without classes."""
    position = {seed: i for i, seed in enumerate(names)}
    labels = torch.full((len(names),), -1, device=device)
    with tqdm(total=len(mine), unit='img', disable=None if distributed.rank() == 0 else True) as bar:
        for batch in batches:
            for i, seed in enumerate(batch.seeds):
                path = folder / names[seed]
                path.parent.mkdir(exist_ok=True)
                save_png(path, batch.images[i].permute(1, 2, 0).numpy())
                if batch.labels is not None:
                    labels[position[seed]] = batch.labels[i]
            bar.update(len(batch.seeds))
    labels = distributed.all_reduce_max(labels).tolist()
    return [list(pair) for pair in zip(names.values(), labels, strict=True)] if max(labels) >= 0 else None


def draw_grid(folder: Path, names: dict[int, str], classes: list[int] | None) -> None:
    """Show the first images at once in FOLDER-grid.png, with a column for each class where classes are cycled."""
    cycle = len(classes) if classes else 0
    aligned = 1 < cycle <= 20 and all(seed % cycle == i % cycle for i, seed in enumerate(names))
    columns = min(cycle if aligned else 10, len(names))
    pixels = [np.asarray(PIL.Image.open(folder / name)) for name in list(names.values())[: 10 * columns]]
    pixels = np.stack([p if p.ndim == 3 else p[:, :, None] for p in pixels])
    path = Path(f'{folder}-grid.png')
    save_png(path, image_grid(pixels, columns, zoom=max(1, 64 // pixels.shape[1])))
    click.echo(f'{len(names)} images in {folder}, shown in {path}')


if __name__ == '__main__':
    cli.run(main)
