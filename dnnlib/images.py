"""Pictures as NumPy arrays: grids and PNG files."""

import os
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from dnnlib.files import atomic_path

CAPTION = 14  # pixels, height of a line of text


def image_grid(images: np.ndarray, columns: int, zoom: int = 1, gap: int = 2) -> np.ndarray:
    """Lay images out row by row: uint8 [N, H, W, C] -> uint8 [rows*H', columns*W', C] with a grey gap between.

    Args:
        images: uint8 [N, H, W, C], filled row by row; missing ones at the end stay grey.
        columns: Images in a row.
        zoom: Whole factor of magnification; every pixel becomes a square, nothing is smoothed.
        gap: Width of the lines between images, in output pixels.
    """
    assert images.ndim == 4 and images.dtype == np.uint8, (
        f'uint8 [N, H, W, C] expected, got {images.dtype} {images.shape}'
    )
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        grid[y : y + height, x : x + width] = image
    return grid


def captioned(grid: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """The same grid, uint8 [H, W, C], below a line of text for each of its columns, cut to their width."""
    width = grid.shape[1] / len(captions)
    strip = PIL.Image.new('L', (grid.shape[1], CAPTION), 255)
    for i, caption in enumerate(captions):
        cell = PIL.Image.new('L', (int(width) - 2, CAPTION), 255)
        PIL.ImageDraw.Draw(cell).text((1, 1), caption, fill=0, font=PIL.ImageFont.load_default())
        strip.paste(cell, (round(i * width), 0))
    return np.concatenate([np.asarray(strip)[:, :, None].repeat(grid.shape[2], axis=2), grid])


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write uint8 [H, W, C] with one, three or four channels as a PNG, whole or not at all."""
    with atomic_path(path) as beside:
        to_pil(image).save(beside, format='png')


def to_pil(image: np.ndarray) -> PIL.Image.Image:
    """Make a Pillow image of uint8 [H, W, C] with one (grayscale), three (RGB) or four (RGBA) channels."""
    assert image.ndim == 3 and image.shape[2] in (1, 3, 4), f'no picture of shape {image.shape}'
    return PIL.Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
