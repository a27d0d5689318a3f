"""Make datasets for training, and look at them."""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np

from dataset.files.archive import LATENT_CHANNELS, NPY, is_zip_name, shape_text
from dataset.files.writer import DatasetWriter, work_folder
from dataset.making.convert import FILE_FORMATS, Recipe, about_conversion, convert_images, estimate
from dataset.making.encode import DOWNSAMPLING, encode_dataset
from dataset.making.statistics import latent_statistics, pixel_statistics
from dataset.making.transforms import COLORS, TRANSFORMS
from dataset.reader import ImageDataset
from dataset.sources.source import Source
from dataset.sources.table import EMBEDDED, SOURCES, balanced_order, class_lines, open_source
from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import make_folder
from dnnlib.images import captioned, image_grid, save_png
from networks.encoders import DEFAULT_VAE, load_encoder
from torch_utils import distributed
from torch_utils.parallel import default_workers

SOURCE_HELP = (
    f'An embedded set ({", ".join(EMBEDDED)}; a folder so named: ./{next(iter(EMBEDDED))}), or the path of: '
    f'{", ".join(SOURCES)}.'
)
source_option = click.option('--source', required=True, metavar='|'.join([*EMBEDDED, 'PATH']), help=SOURCE_HELP)
dest_option = click.option(
    '--dest', required=True, metavar='OUT.zip|OUTDIR', help='A zip to write, or a new or empty folder.'
)
overwrite_option = click.option(
    '--overwrite', is_flag=True,
    help='Replace an existing zip, which stays until the new one is whole; forget a stopped run.',
)  # fmt: skip
resume_option = click.option('--resume', is_flag=True, help='Continue where the same command was stopped.')
workers_option = click.option(
    '--workers', type=click.IntRange(min=0), metavar='N',
    help='Processes beside this one; they change nothing in the result.  [default: as many as there are cores]',
)  # fmt: skip


@click.group()
def main() -> None:
    """Make datasets for training, and look at them.

    \b
    python dataset_tool.py convert --source=digits --dest=data/digits.zip
    python dataset_tool.py info --source=data/digits.zip --sheet=digits.png
    """


@main.command()
@source_option
@dest_option
@click.option('--resolution', metavar='WxH|N', help='Size to bring the images to.  [default: as they are]')
@click.option('--transform', type=click.Choice(list(TRANSFORMS)), default='none', show_default=True,
              help='How to reach --resolution: by resizing alone, or by cutting the centre out.')  # fmt: skip
@click.option('--color', type=click.Choice(list(COLORS)),
              help='Leave grayscale and RGB as they are, all of one kind, or make all that.  '
              '[default: keep; rgb of ImageNet]')  # fmt: skip
@click.option('--format', 'format_', type=click.Choice(FILE_FORMATS), default='png', show_default=True,
              help='Of the images; npy is larger and faster to read.')  # fmt: skip
@click.option('--keep-jpeg', is_flag=True, help='Keep JPEG files as they are, where nothing about them has to change.')
@click.option('--max-images', type=click.IntRange(min=1), metavar='N',
              help='Take only N images, as evenly over the classes as there are, always the same.')  # fmt: skip
@click.option('--skip-broken', is_flag=True, help='Leave out images that cannot be used, and list them.')
@resume_option
@overwrite_option
@workers_option
def convert(
    source: str, dest: str, resolution: str | None, transform: str, color: str | None, format_: str, keep_jpeg: bool,
    max_images: int | None, skip_broken: bool, resume: bool, overwrite: bool, workers: int | None,
) -> None:  # fmt: skip
    """Make a dataset: PNGs and dataset.json in an uncompressed zip or a folder.

    Labels are those of the source's dataset.json if it has one; else each class folder is a class, numbered in sorted
    order. Images are turned upright (EXIF). Grayscale and RGB stay what they are; palettes and CMYK become RGB;
    transparency is laid over white; grayscale of 16 or 32 bits is refused. All images must have one size and one mode
    after that.

    The dataset appears whole or not at all, and equal input gives equal bytes. After Ctrl-C or an error, the same
    command with --resume continues a large one.

    \b
    python dataset_tool.py convert --source=digits --dest=data/digits.zip --resolution=16
    python dataset_tool.py convert --source=pictures/ --dest=data/pictures64.zip --resolution=64 --transform=center-crop
    python dataset_tool.py convert --source=imagenet --dest=data/img64.zip --resolution=64x64 \\
        --transform=center-crop-dhariwal
    """
    size = _check_convert(dest, resolution, transform, overwrite, resume, color, format_, keep_jpeg)
    if _is_whole(dest, resume):
        return
    images = open_source(source)
    _note_namesake(source)
    recipe = Recipe(size, transform, color or images.color, format_, keep_jpeg)
    indices = range(len(images))
    if max_images is not None:
        indices = sorted(balanced_order(images)[:max_images])
    workers = default_workers(len(indices)) if workers is None else workers
    with DatasetWriter(dest, about_conversion(images, indices, recipe), resume, overwrite) as writer, _hint(writer):
        if about := estimate(images, indices, recipe):
            what = f'{len(indices)} images of {images.name} as {shape_text(*about[0])} {format_.upper()}'
            _print_estimate(dest, what, about[1])
        done = convert_images(images, indices, recipe, writer, skip_broken, workers)
    print(f'{dest}: {done.count} images of {shape_text(*done.shape)}')
    print('\n'.join(class_lines(done.labels, images.class_names)))
    for line in done.skipped_lines():
        print(line)


@main.command()
@click.option('--source', required=True, metavar='ZIP|DIR', help='Dataset of RGB images made by convert.')
@dest_option
@click.option('--vae', metavar='DIR', help=f'Folder of a VAE in the format of diffusers.  [default: {DEFAULT_VAE}]')
@click.option('--batch', type=click.IntRange(min=1), default=16, show_default=True, help='Images to encode at once.')
@click.option('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.')
@resume_option
@overwrite_option
@workers_option
def encode(
    source: str, dest: str, vae: str | None, batch: int, device: str | None, resume: bool, overwrite: bool,
    workers: int | None,
) -> None:  # fmt: skip
    """Make a dataset of latents: what the Stable Diffusion VAE makes of each image, its mean and standard deviation.

    Files are float32 [8, H/8, W/8] in NumPy's format. Training draws from them at every visit. Runs on any number
    of GPUs with torchrun, all of which must see the folder of --dest.

    \b
    python dataset_tool.py encode --source=data/img512.zip --dest=data/img512-latents.zip
    torchrun --standalone --nproc_per_node=8 dataset_tool.py encode --source=data/img512.zip \\
        --dest=data/img512-latents.zip --vae=downloads/sd-vae-ft-mse
    """
    problems = _dest_problems(dest, overwrite, resume)
    if problems:
        raise UserError(problems)
    with distributed.session(device) as chosen:
        if _is_whole(dest, resume):
            return
        make_folder(Path(dest).parent)
        dataset = ImageDataset(source)
        encoder = load_encoder('stabilityvae', chosen, vae)
        name = Path(vae).resolve().name if vae else DEFAULT_VAE
        workers = min(default_workers(len(dataset)), 4) if workers is None else workers
        channels, height, width = dataset.image_shape
        height, width = height // DOWNSAMPLING, width // DOWNSAMPLING
        size = len(dataset) * (4 * LATENT_CHANNELS * height * width + 300)
        if distributed.rank() == 0 and channels == 3:
            _print_estimate(dest, f'{len(dataset)} images of {dataset.name} as latents', size)
        statistics = encode_dataset(dataset, dest, encoder, name, chosen, batch, resume, overwrite, workers)
        if statistics:
            print(f'{dest}: {len(dataset)} images of {shape_text(height, width, LATENT_CHANNELS)}')
            print('\n'.join(statistics.lines()))


@main.command()
@source_option
@click.option('--sheet', metavar='OUT.png', help='Write a picture of some images, with few classes as columns.')
@workers_option
def info(source: str, sheet: str | None, workers: int | None) -> None:
    """Read a dataset whole and print its size, classes and pixel statistics, and what it was made with.

    Of latents, the statistics are those of the normalised latents that networks are trained on, and the sheet shows
    three of their channels as colours.
    """
    if sheet:
        make_folder(Path(sheet).parent)
    images = open_source(source)
    _note_namesake(source)
    columns, on_sheet = _sheet_layout(images) if sheet else (0, [])
    dataset = ImageDataset(source) if images.names[0].lower().endswith(NPY) else None
    if dataset and dataset.encoder != 'rgb':
        statistics, kept = latent_statistics(dataset, set(on_sheet) - {None})
        _, height, width = dataset.image_shape
        shape, lines = shape_text(height, width, LATENT_CHANNELS), statistics.lines()
    else:
        workers = default_workers(len(images)) if workers is None else workers
        pixels = pixel_statistics(images, set(on_sheet) - {None}, workers)
        scaled = f'mean {pixels.mean / 127.5 - 1:.3f}, std {pixels.std / 127.5:.3f}'
        lines = [f'pixels: mean {pixels.mean:.2f}, std {pixels.std:.2f} of 255; scaled to -1..1: {scaled}']
        shape, kept = shape_text(*pixels.shape), pixels.kept
    print(f'{source}: {len(images)} images of {shape}, {images.bytes_on_disk / 1e6:.1f} MB')
    print('\n'.join(lines))
    if images.made_with:
        print(f'made with: {json.dumps(images.made_with)}')
    print('\n'.join(class_lines(images.labels, images.class_names)))
    if sheet:
        blank = np.full_like(next(iter(kept.values())), 128)  # as the gaps are
        pictures = np.stack([blank if i is None else kept[i] for i in on_sheet])
        grid = image_grid(pictures, columns, zoom=max(1, 64 // pictures.shape[2]))
        few = images.class_names is not None and len(np.unique(images.labels)) == columns
        save_png(sheet, captioned(grid, [images.class_names[i] for i in np.unique(images.labels)]) if few else grid)
        print(f'{sheet}: {len(kept)} of the images')


def _check_convert(
    dest: str, resolution: str | None, transform: str, overwrite: bool, resume: bool, color: str | None, format_: str,
    keep_jpeg: bool,
) -> tuple[int, int] | None:  # fmt: skip
    """Check the options of convert that need no source, and parse the resolution to (width, height)."""
    problems = _dest_problems(dest, overwrite, resume)
    match = resolution and re.fullmatch(r'([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?', resolution)
    if resolution is not None and not match:
        problems.append(f'cannot read --resolution={resolution}; write for instance 64 or 64x48 (width x height)')
    if transform != 'none' and resolution is None:
        problems.append(f'--transform={transform} needs --resolution')
    size = (int(match[1]), int(match[2] or match[1])) if match else None
    if size or transform == 'none':
        problems += Recipe(size, transform, color or 'keep', format_, keep_jpeg).problems()
    if problems:
        raise UserError(problems)
    return size


def _note_namesake(source: str) -> None:
    """Where the name of an embedded set is that of a folder, too, say which one was taken."""
    if source in EMBEDDED and Path(source).exists():
        what = f'--source={source} is the embedded set; for {source} in this folder write ./{source}'
        click.echo(f'note: {what}', err=True)


def _dest_problems(dest: str, overwrite: bool, resume: bool) -> list[str]:
    """What keeps `dest` from being written."""
    path, problems = Path(dest), []
    if path.name in ('', '..'):  # there would be no place for work beside it
        problems.append(f'--dest={dest} has no name of its own; name a new folder, or a zip')
    if resume and overwrite:
        problems.append('--resume continues, --overwrite starts over; choose one')
    if is_zip_name(dest) and path.is_file() and not (overwrite or resume):
        problems.append(f'{dest} exists; add --overwrite to replace it')
    if is_zip_name(dest) and path.is_dir():
        problems.append(f'{dest} is a folder; a name ending in .zip is for a zip')
    if not is_zip_name(dest) and path.is_file():
        problems.append(f'{dest} is a file; name a folder, or a zip with the ending .zip')
    if not is_zip_name(dest) and path.is_dir() and any(path.iterdir()) and not resume:
        problems.append(f'{dest} is a folder with something in it; name another, or delete it first')
    return problems


def _is_whole(dest: str, resume: bool) -> bool:
    """Whether there is nothing to continue, because the dataset is complete; say so."""
    path = Path(dest)
    whole = resume and (path.is_file() or (path.is_dir() and any(path.iterdir())))
    if whole and work_folder(dest).exists():
        raise UserError(f'{dest} exists, and {work_folder(dest)} of a stopped run too; remove one of them')
    if whole and distributed.rank() == 0:
        print(f'{dest} is complete, there is nothing to continue')
    return whole


def _print_estimate(dest: str, what: str, size: int) -> None:
    """Say what will be written, and warn where the disk is too full for it."""
    print(f'writing {what}, about {_megabytes(size)}', flush=True)
    free = shutil.disk_usage(Path(dest).parent).free
    if size > free:
        click.echo(f'warning: only {_megabytes(free)} are free at {dest}', err=True)


def _megabytes(size: int) -> str:
    return f'{size / 1e6:.1f} MB' if size < 1e9 else f'{size / 1e9:.1f} GB'


@contextmanager
def _hint(writer: DatasetWriter) -> Iterator[None]:
    """Where the work was stopped, but can be continued, say so."""
    try:
        yield
    except (UserError, OSError, KeyboardInterrupt):
        if writer.state:
            click.echo(f'stopped after {writer.count} images; the same command with --resume continues', err=True)
        raise


def _sheet_layout(source: Source, rows: int = 10) -> tuple[int, list[int | None]]:
    """Columns of the contact sheet and the images on it, row by row: a column per class where the classes are few.

    A class of fewer images than the others leaves places empty, None.
    """
    order = balanced_order(source)
    classes = [] if source.labels is None else np.unique(source.labels).tolist()
    if not 2 <= len(classes) <= 20:
        return 10, order[: 10 * rows]
    columns = [list(itertools.islice((i for i in order if source.labels[i] == label), rows)) for label in classes]
    return len(columns), list(itertools.chain.from_iterable(itertools.zip_longest(*columns)))


if __name__ == '__main__':
    cli.run(main)
