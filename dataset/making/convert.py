"""From a source of images to a dataset."""

import collections
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import PIL.Image
import tqdm

from dataset.files.archive import MODE_CHANNELS, shape_text
from dataset.files.writer import DatasetWriter, encode_npy, encode_png
from dataset.making.transforms import TRANSFORMS, Size, normalize, to_uint8
from dataset.sources.source import Source
from dnnlib.errors import UserError
from torch_utils.parallel import in_order

FILE_FORMATS = ('png', 'npy')
CHUNK = 16  # images that a process takes at once
CHECKPOINT = 1000  # images after which the work can be continued; a folder of the dataset
SAMPLE = 16  # images from which the size is estimated
AROUND = 180  # bytes of headers and label of each image
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Recipe:
    """What becomes of each image.

    Attributes:
        size: (width, height) to bring it to; None keeps its own, and then `transform` must be `none`.
        transform: How, a name in TRANSFORMS.
        color: A name in COLORS.
        format: `png`, or `npy` with uint8 [C, H, W].
        keep_jpeg: Keep the files of JPEGs that come out with the pixels that they have.
    """

    size: Size | None = None
    transform: str = 'none'
    color: str = 'keep'
    format: str = 'png'
    keep_jpeg: bool = False

    def __post_init__(self):
        assert self.size is not None or self.transform == 'none', f'{self.transform} needs a size'

    @property
    def keeps_pixels(self) -> bool:
        """Whether all images come out as they are."""
        return self.size is None and self.color == 'keep'

    @property
    def filter(self) -> dict[str, str]:
        """That it resizes with, for notes and journals, which leave out bicubic."""
        name = TRANSFORMS[self.transform].filter
        return {'filter': name} if name else {}

    def problems(self) -> list[str]:
        """What is wrong with it, in words of dataset_tool.py's options."""
        found = []
        transform = TRANSFORMS[self.transform]
        if self.size and not transform.fits(*self.size):
            width, height = self.size
            found.append(f'--transform={self.transform} makes {transform.sizes}, not {width}x{height}')
        if self.keep_jpeg and (not self.keeps_pixels or self.format != 'png'):
            found.append('--keep-jpeg keeps pixels as they are; it cannot go with --resolution, --color or --format')
        return found


@dataclass(frozen=True)
class ImageFile:
    """An image, ready to be written.

    Attributes:
        ending: Of its name.
        data: Of its file.
        shape: (H, W, C).
    """

    ending: str
    data: bytes
    shape: tuple[int, int, int]


def make_file(source: Source, index: int, recipe: Recipe) -> ImageFile:
    """An image of a source as a file of the dataset."""
    original = source.read(index)
    image = normalize(original, source.names[index], recipe.color)
    if recipe.size is not None:
        image = TRANSFORMS[recipe.transform].apply(image, recipe.size, source.names[index])
    pixels = to_uint8(image)
    if recipe.keep_jpeg and source.file and _same_in_jpeg(original, pixels):
        return ImageFile('.jpg', source.file(index), pixels.shape)
    data = encode_png(pixels) if recipe.format == 'png' else encode_npy(pixels.transpose(2, 0, 1))
    return ImageFile(f'.{recipe.format}', data, pixels.shape)


def _same_in_jpeg(original: PIL.Image.Image, pixels: np.ndarray) -> bool:
    """Whether the image's own file holds these very pixels, upright, in a mode that datasets have."""
    upright = original.getexif().get(EXIF_ORIENTATION, 1) == 1
    return original.format == 'JPEG' and upright and MODE_CHANNELS.get(original.mode) == pixels.shape[2]


def estimate(source: Source, indices: Sequence[int], recipe: Recipe) -> tuple[tuple[int, int, int], int] | None:
    """Shape (H, W, C) and bytes of what `convert_images` will write, from a few images; None if none can be used."""
    places = sorted({round(place) for place in np.linspace(0, len(indices) - 1, SAMPLE)})
    make = functools.partial(make_file, source, recipe=recipe)
    made = in_order(make, [indices[place] for place in places], keep_errors=True)
    files = [file for file in made if isinstance(file, ImageFile)]
    if not files:
        return None
    return files[0].shape, round(len(indices) * (AROUND + sum(len(file.data) for file in files) / len(files)))


def about_conversion(source: Source, indices: Sequence[int], recipe: Recipe) -> dict[str, Any]:
    """What the result of a conversion depends on: options, and a digest of names and labels."""
    digest = hashlib.blake2b(digest_size=8)
    for index in indices:
        label = None if source.labels is None else int(source.labels[index])
        digest.update(repr((source.names[index], label)).encode(errors='surrogateescape'))
    about = {**asdict(recipe), **recipe.filter, 'source': source.name, 'images': len(indices)}
    return {**about, 'content': digest.hexdigest()}


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        count: Images.
        shape: (H, W, C).
        labels: Class indices, int64 [count], or None.
        skipped: What was wrong with each image that was left out.
    """

    count: int
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    skipped: list[str]

    def skipped_lines(self, most: int = 20) -> list[str]:
        """What was left out, for people to read, and which options would have kept how much of it."""
        if not self.skipped:
            return []
        lines = [f'  {problem}' for problem in self.skipped[:most]]
        if len(self.skipped) > most:
            lines.append(f'  and {len(self.skipped) - most} more, all of them listed in dataset.json')
        advice = collections.Counter(problem.rpartition('; ')[2] for problem in self.skipped if '; ' in problem)
        kept = [f'to keep {count} of them, {mend}' for mend, count in advice.most_common() if '--' in mend]
        return [f'left out {len(self.skipped)} images that cannot be used:', *lines, *kept]


def convert_images(
    source: Source, indices: Sequence[int], recipe: Recipe, writer: DatasetWriter, skip_broken: bool = False,
    workers: int = 0,
) -> Converted:  # fmt: skip
    """Write images of a source to a dataset, continuing where the writer's journal says.

    Args:
        source: Where they come from.
        indices: Which, in this order; at least one.
        recipe: What becomes of each.
        writer: Of the dataset.
        skip_broken: Leave out images that cannot be used, instead of stopping at the first.
        workers: Processes beside this one; they change nothing in the result.
    """
    done, first = writer.state.get('done', 0), writer.state.get('first')  # the latter: name and shape of the first
    skipped = [(place, problem) for place, problem in writer.state.get('skipped', [])]  # and places in `indices`
    make = functools.partial(make_file, source, recipe=recipe)
    results = in_order(make, indices[done:], workers, CHUNK, keep_errors=True)
    bar = tqdm.tqdm(results, 'convert', initial=done, total=len(indices), unit='img', disable=None)
    for place, result in enumerate(bar, done):
        name = source.names[indices[place]]
        if isinstance(result, ImageFile) and first and list(result.shape) != first[1]:
            result = other_shape(name, result.shape, *first)
        if isinstance(result, UserError) and skip_broken:
            skipped.append((place, str(result)))
            continue
        if isinstance(result, UserError):
            raise UserError(f'{result}; --skip-broken leaves out images that cannot be used')
        if isinstance(result, OSError):
            raise result
        first = first or (name, list(result.shape))
        writer.add(result.ending, result.data)
        if writer.count % CHECKPOINT == 0:
            writer.checkpoint({'done': place + 1, 'first': first, 'skipped': skipped})
    problems = [problem for _, problem in skipped]
    if first is None:
        raise UserError(f'none of the {len(indices)} images can be used; the first: {problems[0]}')
    left_out = {place for place, _ in skipped}
    kept = [index for place, index in enumerate(indices) if place not in left_out]
    labels = None if source.labels is None else source.labels[kept]
    note = {**_note(source, recipe, first[1]), **({'skipped': problems} if problems else {})}
    writer.finish(labels, note, source.class_names)
    return Converted(len(kept), tuple(first[1]), labels, problems)


def _note(source: Source, recipe: Recipe, shape: Sequence[int]) -> dict[str, Any]:
    """How the dataset was made; a mere copy of a dataset keeps the note that this one has."""
    before = dict(source.made_with)
    if before and recipe.keeps_pixels and before.get('format', 'png') == recipe.format:
        return before
    return {
        'source': source.name,
        'transform': recipe.transform,
        **recipe.filter,
        'resolution': [shape[1], shape[0]],
        'color': recipe.color,
        'format': recipe.format,
        **({'before': before} if before else {}),
    }


def other_shape(name: str, shape: Sequence[int], first_name: str, first_shape: Sequence[int]) -> UserError:
    """The error for an image that is not like the first."""
    same_size = tuple(shape[:2]) == tuple(first_shape[:2])
    mend = 'add --color=rgb or --color=gray' if same_size else 'choose a --resolution'
    return UserError(f'{name} is {shape_text(*shape)}, but {first_name} is {shape_text(*first_shape)}; {mend}')
