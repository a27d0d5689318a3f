"""Pictures of generated images: a grid of the first ones, and how they came about step by step."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib.errors import UserError
from dnnlib.files import atomic_path
from dnnlib.images import captioned, image_grid, save_png, to_pil
from sampling.output import read_images

DEFAULT_ROWS = 10
FRAME_MS, LAST_FRAME_MS = 120, 1500
STRIP_COLUMNS = 16  # of steps, evenly chosen
MOVING, STRIP = '.gif', '.png'


def default_layout(seeds: list[int], classes: list[int] | None) -> tuple[int, int]:
    """(rows, columns) that show the first images: a column for each class where classes are cycled in order."""
    columns = min(len(classes) if classes and _cycled(seeds, classes) else 10, len(seeds))
    return min(DEFAULT_ROWS, -(-len(seeds) // columns)), columns


def column_names(
    seeds: list[int], classes: list[int] | None, class_names: Sequence[str], columns: int
) -> list[str] | None:
    """The names of the classes that the columns of a grid show, where each shows one."""
    if not class_names or not classes or len(classes) != columns or not _cycled(seeds, classes):
        return None
    return [class_names[classes[seed % columns]] for seed in seeds[:columns]]


def _cycled(seeds: list[int], classes: list[int]) -> bool:
    cycle = len(classes)
    return 1 < cycle <= 20 and all(seed % cycle == i % cycle for i, seed in enumerate(seeds))


def draw_grid(
    path: Path, folder: Path, names: list[str], layout: tuple[int, int], captions: list[str] | None = None
) -> None:
    """Show the first rows x columns of the named images in one PNG, row by row; captions are those of the columns."""
    rows, columns = layout
    pixels = np.stack(list(read_images(folder, names[: rows * columns])))
    grid = image_grid(pixels, columns, _zoom(pixels.shape[1]))
    save_png(path, captioned(grid, captions) if captions else grid)


def check_trajectory(path: Path) -> None:
    """Refuse a name of another kind of picture than there is."""
    if path.suffix not in (MOVING, STRIP):
        raise UserError(f'--trajectory={path} must end in {MOVING} (moving) or {STRIP} (a strip for each image)')


def draw_trajectory(path: Path, frames: torch.Tensor) -> None:
    """Show how images came about: a moving GIF, all images beside each other, or a PNG with a row for each image.

    Args:
        path: Ends in .gif or .png.
        frames: uint8 [T, N, C, H, W] of `sampling.pipeline.trajectory`.
    """
    check_trajectory(path)
    pixels = frames.permute(0, 1, 3, 4, 2).numpy()  # [T, N, H, W, C]
    count, zoom = pixels.shape[1], _zoom(pixels.shape[2])
    if path.suffix == STRIP:
        chosen = np.linspace(0, len(pixels) - 1, min(len(pixels), STRIP_COLUMNS)).round().astype(int)
        rows = pixels[chosen].swapaxes(0, 1)  # [N, T', H, W, C]
        save_png(path, image_grid(rows.reshape(-1, *rows.shape[2:]), len(chosen), zoom))
        return
    columns = min(count, 8)
    pictures = [to_pil(image_grid(frame, columns, zoom)) for frame in pixels]
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    with atomic_path(path) as beside:
        pictures[0].save(
            beside, format='gif', save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
        )


def _zoom(height: int) -> int:
    """Small images are magnified to 64 pixels or so."""
    return max(1, 64 // height)
