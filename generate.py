"""Generate images from a network file: `python generate.py --net=FILE --seeds=0-99 --outdir=DIR`."""

import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import locked_folder, make_folder
from dnnlib.parsing import parse_grid
from networks.denoiser import Denoiser
from networks.encoders import Encoder, load_encoder
from networks.published.models import models_table, resolve_model
from sampling.config import SamplerConfig
from sampling.networks import load_networks
from sampling.options import (
    execution_options,
    note_execution,
    parse_classes,
    sampler_config,
    sampler_options,
    take_sampler_flags,
)
from sampling.output import ImageWriter, finish, image_name, is_complete, missing_seeds, prepare
from sampling.pictures import check_trajectory, column_names, default_layout, draw_grid, draw_trajectory
from sampling.pipeline import check_fit, choose_labels, count_evaluations, sample, trajectory
from sampling.portions import Execution
from torch_utils import distributed
from torch_utils.tensor_files import library_versions

TRAJECTORY_SEEDS = 8

EPILOG = """\b
Examples:
  python generate.py --net=runs/digits/phema-0000049-0.120.safetensors --seeds=0-99 --class=0-9 --outdir=out/digits
  python generate.py --preset=edm2-img64-s-fid --seeds=0-99 --outdir=out/edm2
  torchrun --standalone --nproc_per_node=8 generate.py --net=FILE --seeds=0-49999 --outdir=out/fid --subdirs
  python generate.py --net=FILE --gnet=WEAKER --guidance=2 --guidance-interval=0.19,1.61 --seeds=0-7 --outdir=out/g
  python generate.py --net=FILE --sampler=dpm++2m --steps=18 --seeds=0-49999 --format=npz --outdir=out/npz
"""


def print_presets(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """click's hook: --list-presets needs no other option."""
    if value:
        click.echo(models_table())
        ctx.exit()


@click.command(epilog=EPILOG)
@click.option('--net', 'net_path', metavar='FILE|DIR|URL', help='Network file, a run folder for its newest, or a '
              'published EDM or EDM2 pickle.')  # fmt: skip
@click.option('--gnet', 'gnet_path', metavar='FILE|URL|self',
              help='Guiding network: unconditional, or weaker; "self" is the main one with its labels dropped, '
                   'for networks that were trained with some of them dropped.')  # fmt: skip
@click.option('--guidance', type=float, help='Guidance weight; 1 is none, and the default without --preset.')
@click.option(
    '--preset', metavar='NAME', help='Published EDM or EDM2 model: network, guiding network and guidance at once.'
)
@click.option('--list-presets', is_flag=True, is_eager=True, expose_value=False, callback=print_presets,
              help='Show them and stop.')  # fmt: skip
@click.option('--outdir', required=True, metavar='DIR', help='Where the images go; DIR-grid.png shows them at once.')
@click.option('--seeds', type=cli.INTS, required=True, help='One image for each, such as 0-99 or 1,2,5-10.')
@click.option('--subdirs', is_flag=True, help='A folder for every 1000 seeds.')
@click.option('--class', 'classes', metavar='LIST', help='Numbers or names of classes to cycle through, such as 0-9 or '
              'cat,dog; by default random.')  # fmt: skip
@click.option('--batch', type=click.IntRange(min=1), default=64, show_default=True, help='Images at a time.')
@sampler_options
@click.option('--skip-existing', is_flag=True, help='Continue: keep the images that are there.')
@click.option('--overwrite', is_flag=True, help='Replace images that were made with other settings.')
@click.option('--format', 'form', type=click.Choice(['png', 'npz']), default='png', show_default=True,
              help='npz packs all into DIR/images.npz: arr_0 uint8 NHWC, arr_1 classes.')  # fmt: skip
@click.option('--grid', 'layout', type=cli.Parsed('grid', parse_grid), metavar='ROWSxCOLS',
              help='Layout of DIR-grid.png; by default up to 10 rows, a class per column where they fit.')  # fmt: skip
@click.option('--trajectory', 'film', type=click.Path(path_type=Path, dir_okay=False), metavar='FILE.gif|.png',
              help=f'Show the denoised estimate of the first {TRAJECTORY_SEEDS} seeds over the steps.')  # fmt: skip
@click.option('--vae', metavar='DIR', help='Folder of the VAE, for latents on machines without a network.')
@click.option('--precision', default='fp32', show_default=True, metavar='fp32|bf16|fp16', help='Of the features.')
@execution_options
@click.option('--offline', is_flag=True, help='Download nothing; URLs and presets come from the cache.')
@click.option('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.')
def main(preset, outdir, skip_existing, overwrite, layout, film, **flags):
    """Generate images; image k depends on seed k alone.

    The output folder has the layout of a dataset (dataset.json holds the classes), so that calculate_metrics.py
    and train.py can read it. generation.json tells how the images were made. A run that was interrupted is resumed
    by the same command with --skip-existing. docs/sampling.md compares the samplers.
    """
    model = resolve_model(preset, flags['net_path'], flags['gnet_path'], flags['guidance'])
    check_guidance(flags, model[2])
    flags['net_path'], flags['gnet_path'], weight = model
    del flags['guidance']
    flags |= {'sampler_flags': take_sampler_flags(flags), 'weight': weight}
    flags['seeds'] = seeds = list(dict.fromkeys(flags['seeds']))
    if film is not None:
        check_trajectory(film)
        check_film(film, Path(outdir))
    with distributed.session(flags.pop('device')) as device, contextlib.ExitStack() as lock:
        job = load(device, **flags)
        folder = make_folder(outdir)
        if film is not None:
            make_folder(film.parent)
        prepare_together(lock, folder, job.record, skip_existing, overwrite)
        if is_complete(folder):
            distributed.print0(f'{folder} is complete')
            return
        missing = missing_seeds(folder, seeds, job.record['subdirs']) if skip_existing else seeds
        distributed.barrier()  # all ranks have looked before any writes
        note_execution(job.execution, len(missing), job.record['precision'], device)
        write_images(folder, missing, job)
        distributed.barrier()
        if distributed.rank() == 0:
            names = [image_name(seed, job.record['subdirs']) for seed in seeds]
            rows, columns = layout or default_layout(seeds, job.classes)
            captions = column_names(seeds, job.classes, job.class_names, columns)
            draw_grid(Path(f'{folder}-grid.png'), folder, names, (rows, columns), captions)
            if film is not None:
                draw_trajectory(
                    film, trajectory(job.net, seeds[:TRAJECTORY_SEEDS], *job.how, job.encoder, job.execution)
                )
            labels = choose_labels(job.net.config, seeds, None, job.classes, job.how[0].noise_device)
            finish(folder, job.record, labels, job.class_names)
            click.echo(summary(folder, job.record, len(seeds) - len(missing)))


def check_guidance(flags: dict[str, Any], weight: float) -> None:
    """Refuse what asks for guidance and would get none; `--gnet=FILE --guidance=1` says that it wants none."""
    if weight == 1 and flags['guidance'] is None and flags['gnet_path'] is not None:
        raise UserError('--gnet guides nothing without its weight: give --guidance=W too')
    if weight == 1 and flags['guidance'] is None and flags['guidance_interval'] is not None:
        raise UserError('--guidance-interval means nothing without guidance: give --gnet=FILE --guidance=W too')


def check_film(film: Path, folder: Path) -> None:
    """Keep the trajectory out of the folder of images, whose readers would take a strip for one of them."""
    if folder.resolve() in film.resolve().parents:
        raise UserError(f'--trajectory={film} must lie outside of {folder}, which holds nothing but images')


def prepare_together(
    lock: contextlib.ExitStack, folder: Path, record: dict[str, Any], skip_existing: bool, overwrite: bool
) -> None:
    """Lock the folder and `prepare` it on rank 0; a refusal is raised on all ranks, so that none waits forever."""
    refusal = ''
    if distributed.rank() == 0:
        try:
            lock.enter_context(locked_folder(folder))
            prepare(folder, record, skip_existing, overwrite)
        except UserError as error:
            refusal = str(error)
    if refusal := distributed.gather_text(refusal)[0]:
        raise UserError(refusal)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be done.

    Args:
        net: The main network.
        how: SamplerConfig, guiding network or None, classes or None: arguments of `sample`.
        encoder: Makes images of samples.
        batch: Images at a time.
        execution: How networks are evaluated.
        record: What generation.json says.
        class_names: Of all classes, where the network file has them.
    """

    net: Denoiser
    how: tuple[SamplerConfig, Denoiser | None, list[int] | None]
    encoder: Encoder
    batch: int
    execution: Execution
    record: dict[str, Any]
    class_names: tuple[str, ...]

    @property
    def classes(self) -> list[int] | None:
        """Classes to cycle through."""
        return self.how[2]


def load(
    device,
    sampler_flags,
    weight,
    net_path,
    gnet_path,
    seeds,
    classes,
    batch,
    subdirs,
    form,
    vae,
    precision,
    execution,
    offline,
) -> Job:
    """Load the networks, check that all fits together, and describe it."""
    net, info, guiding_net, nets = load_networks(net_path, gnet_path, device, precision, offline)
    config = sampler_config(sampler_flags, weight, info.sampler)
    classes = parse_classes(classes, info.class_names)
    check_fit(net, guiding_net, config, classes)
    encoder = load_encoder(info.encoder, device, vae)
    record = {
        **nets,
        'sampler': config.to_json(),
        'evaluations_per_image': dict(zip(('net', 'guiding_net'), count_evaluations(config), strict=True)),
        'seeds': seeds,
        'classes': classes,
        'subdirs': subdirs,
        'format': form,
        'encoder': info.encoder,
        'vae': vae,
        'precision': f'{precision} with TF32' if execution.tf32 and device.type == 'cuda' else precision,
        'execution': dataclasses.asdict(execution),
        'threads': torch.get_num_threads(),
        'device': device.type,
        'batch': batch,
        'world_size': distributed.world_size(),
        'versions': library_versions(),
        'command': f'python {shlex.join(sys.argv)}',
    }
    return Job(net, (config, guiding_net, classes), encoder, batch, execution, record, info.class_names)


def write_images(folder: Path, missing: list[int], job: Job) -> None:
    """Sample and write this rank's share of the missing images, with a progress bar for all ranks together."""
    rank, ranks = distributed.rank(), distributed.world_size()
    bar = tqdm(total=len(missing), unit='img', disable=True if rank else None)
    with bar, ImageWriter(folder, job.record['subdirs'], job.encoder) as writer:
        for samples in sample(job.net, missing[rank::ranks], *job.how, job.batch, job.execution):
            writer.put(samples)
            bar.update(min(ranks * len(samples.seeds), len(missing) - bar.n))


def summary(folder: Path, record: dict[str, Any], existing: int) -> str:
    """The line that ends a run."""
    evaluations = record['evaluations_per_image']
    there = f' ({existing} of them were there)' if existing else ''
    guide = f', {evaluations["guiding_net"]} of the guiding network' if evaluations['guiding_net'] else ''
    return (
        f'{len(record["seeds"])} images{there} in {folder}, shown in {folder}-grid.png; '
        f'evaluations for each: {evaluations["net"]}{guide}'
    )


if __name__ == '__main__':
    cli.run(main)
