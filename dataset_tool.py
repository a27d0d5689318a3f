"""Make datasets for training, and look at them."""

import math
import re
from pathlib import Path

import click
import numpy as np
import tqdm

from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import make_folder
from dnnlib.images import image_grid, save_png
from training.archive import is_zip_name, shape_text, write_dataset
from training.sources import SOURCES, Source, balanced_order, class_lines, open_source, read_images
from training.transforms import TRANSFORMS

SOURCE_HELP = f'A folder or zip of images, or an embedded set: {", ".join(SOURCES)} (a folder so named: ./digits).'


@click.group()
def main() -> None:
    """Make datasets for training, and look at them.

    \b
    python dataset_tool.py convert --source=digits --dest=data/digits.zip
    python dataset_tool.py info --source=data/digits.zip --sheet=digits.png
    """


@main.command()
@click.option('--source', required=True, metavar='digits|FOLDER|ZIP', help=SOURCE_HELP)
@click.option('--dest', required=True, metavar='OUT.zip|OUTDIR', help='A zip to write, or a new or empty folder.')
@click.option('--resolution', metavar='WxH|N', help='Size to bring the images to, bicubically.  [default: as they are]')
@click.option('--transform', type=click.Choice(list(TRANSFORMS)), default='none', show_default=True,
              help='How to reach --resolution: by resizing alone, or by cutting the centre out first.')  # fmt: skip
@click.option('--max-images', type=click.IntRange(min=1), metavar='N',
              help='Take only N images, as evenly over the classes as there are, always the same.')  # fmt: skip
@click.option('--overwrite', is_flag=True, help='Replace an existing zip; it stays until the new one is whole.')
def convert(
    source: str, dest: str, resolution: str | None, transform: str, max_images: int | None, overwrite: bool
) -> None:
    """Make a dataset: PNGs and dataset.json in an uncompressed zip or a folder.

    Labels are those of the source's dataset.json if it has one; else each class folder is a class, numbered in sorted
    order. Images are turned upright (EXIF). Grayscale and RGB stay what they are; palettes and CMYK become RGB;
    transparency is laid over white; 16-bit grayscale is refused. All images must have one size and one mode after that.

    The dataset appears whole or not at all, and equal input gives equal bytes.

    \b
    python dataset_tool.py convert --source=digits --dest=data/digits.zip --resolution=16
    python dataset_tool.py convert --source=photos/ --dest=data/photos-64x64.zip --resolution=64 --transform=center-crop
    """
    size = _check_convert(dest, resolution, transform, overwrite)
    images = open_source(source)
    indices = range(len(images.names))
    if max_images is not None:
        indices = sorted(balanced_order(images)[:max_images])
    labels = None if images.labels is None else images.labels[indices]
    progress = tqdm.tqdm(indices, 'convert', unit='img', disable=None)  # None: only on a terminal
    shape = write_dataset(dest, read_images(images, progress, size, transform), labels)
    print(f'{dest}: {shape[0]} images of {shape_text(*shape[1:])}')
    print('\n'.join(class_lines(labels, images.class_names)))


@main.command()
@click.option('--source', required=True, metavar='digits|FOLDER|ZIP', help=SOURCE_HELP)
@click.option('--sheet', metavar='OUT.png', help='Write a picture of some images, with few classes as columns.')
def info(source: str, sheet: str | None) -> None:
    """Read a dataset whole and print its size, classes and pixel statistics."""
    if sheet:
        make_folder(Path(sheet).parent)
    images = open_source(source)
    columns, on_sheet = _sheet_layout(images) if sheet else (0, [])
    kept = {}
    total = squares = 0
    progress = tqdm.trange(len(images.names), desc='info', unit='img', disable=None)  # None: only on a terminal
    for i, image in enumerate(read_images(images, progress)):
        total += int(image.sum(dtype=np.int64))
        squares += int((image.astype(np.int64) ** 2).sum())
        if i in on_sheet:
            kept[i] = image
    shape = (len(images.names), *image.shape)
    mean = total / math.prod(shape)
    std = (squares / math.prod(shape) - mean**2) ** 0.5
    print(f'{source}: {shape[0]} images of {shape_text(*shape[1:])}, {images.bytes_on_disk / 1e6:.1f} MB')
    scaled = f'mean {mean / 127.5 - 1:.3f}, std {std / 127.5:.3f}'
    print(f'pixels: mean {mean:.2f}, std {std:.2f} of 255; scaled to -1..1: {scaled}')
    print('\n'.join(class_lines(images.labels, images.class_names)))
    if sheet:
        pictures = np.stack([kept[i] for i in on_sheet])
        save_png(sheet, image_grid(pictures, columns, zoom=max(1, 64 // pictures.shape[2])))
        print(f'{sheet}: {len(pictures)} of the images')


def _check_convert(dest: str, resolution: str | None, transform: str, overwrite: bool) -> tuple[int, int] | None:
    """Check the options of convert that need no source, and parse the resolution to (width, height)."""
    problems = []
    path = Path(dest)
    match = resolution and re.fullmatch(r'([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?', resolution)
    if resolution is not None and not match:
        problems.append(f'cannot read --resolution={resolution}; write for instance 64 or 64x48 (width x height)')
    if transform != 'none' and resolution is None:
        problems.append(f'--transform={transform} needs --resolution')
    if is_zip_name(dest) and path.is_file() and not overwrite:
        problems.append(f'{dest} exists; add --overwrite to replace it')
    if is_zip_name(dest) and path.is_dir():
        problems.append(f'{dest} is a folder; a name ending in .zip is for a zip')
    if not is_zip_name(dest) and path.is_file():
        problems.append(f'{dest} is a file; name a folder, or a zip with the ending .zip')
    if not is_zip_name(dest) and path.is_dir() and any(path.iterdir()):
        problems.append(f'{dest} is a folder with something in it; name another, or delete it first')
    if problems:
        raise UserError(problems)
    return (int(match[1]), int(match[2] or match[1])) if match else None


def _sheet_layout(source: Source, rows: int = 10) -> tuple[int, list[int]]:
    """Columns of the contact sheet and the images on it, row by row: a column per class where the classes are few."""
    classes = 1 if source.labels is None else len(np.unique(source.labels))
    columns = classes if 2 <= classes <= 20 else 10
    return columns, balanced_order(source)[: columns * rows]


if __name__ == '__main__':
    cli.run(main)
