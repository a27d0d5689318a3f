"""From a source of images to a dataset."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import PIL.Image
import tqdm

from dataset.files.archive import shape_text
from dataset.files.writer import DatasetWriter, encode_npy, encode_png
from dataset.making.transforms import TRANSFORMS, Size, normalize, to_uint8
from dataset.sources.source import Source
from dnnlib.errors import UserError
from torch_utils.parallel import in_order

FORMATS = ('png', 'npy')
CHUNK = 16  # images that a process makes at once
CHECKPOINT = 1000  # images after which the work could go on; a folder of the dataset
SAMPLE = 16  # images from which the size is estimated
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


def read_image(source: Source, index: int, recipe: Recipe) -> np.ndarray:
    """An image of a source as uint8 [H, W, C].

    Raises:
        UserError: naming it, where it is broken or cannot be used.
    """
    return to_uint8(_transformed(source, source.read(index), index, recipe))


def make_file(source: Source, index: int, recipe: Recipe) -> ImageFile:
    """An image of a source as a file of the dataset.

    Raises:
        UserError: naming it, where it is broken or cannot be used.
    """
    original = source.read(index)
    pixels = to_uint8(_transformed(source, original, index, recipe))
    if recipe.keep_jpeg and source.file and _same_in_jpeg(original, pixels):
        return ImageFile('.jpg', source.file(index), pixels.shape)
    data = encode_png(pixels) if recipe.format == 'png' else encode_npy(pixels.transpose(2, 0, 1))
    return ImageFile(f'.{recipe.format}', data, pixels.shape)


def _transformed(source: Source, image: PIL.Image.Image, index: int, recipe: Recipe) -> PIL.Image.Image:
    image = normalize(image, source.names[index], recipe.color)
    return image if recipe.size is None else TRANSFORMS[recipe.transform].apply(image, recipe.size, source.names[index])


def _same_in_jpeg(original: PIL.Image.Image, pixels: np.ndarray) -> bool:
    """Whether the image's own file holds these very pixels, upright, in a mode that datasets have."""
    upright = original.getexif().get(EXIF_ORIENTATION, 1) == 1
    return original.format == 'JPEG' and upright and {'L': 1, 'RGB': 3}.get(original.mode) == pixels.shape[2]


@dataclass(frozen=True)
class _MakeFiles:
    """The work of one process: lists of indices to lists of files, or of what is wrong."""

    source: Source
    recipe: Recipe

    def __call__(self, indices: Sequence[int]) -> list[ImageFile | UserError | OSError]:
        return [self.make(index) for index in indices]

    def make(self, index: int) -> ImageFile | UserError | OSError:
        try:
            return make_file(self.source, index, self.recipe)
        except (UserError, OSError) as error:
            return error


@dataclass(frozen=True)
class Estimate:
    """What a conversion is about to write.

    Attributes:
        count: Images.
        shape: (H, W, C) of the first of the sample.
        size: Bytes, from a sample.
    """

    count: int
    shape: tuple[int, int, int]
    size: int


def estimate(source: Source, indices: Sequence[int], recipe: Recipe) -> Estimate | None:
    """Estimate what `convert` will write, from a few images; None where none of these can be used."""
    places = sorted({round(place) for place in np.linspace(0, len(indices) - 1, SAMPLE)})
    made = _MakeFiles(source, recipe)([indices[place] for place in places])
    files = [file for file in made if isinstance(file, ImageFile)]
    if not files:
        return None
    around = 180  # bytes of headers and label of each image
    size = len(indices) * (around + sum(len(file.data) for file in files) / len(files))
    return Estimate(len(indices), files[0].shape, round(size))


def content_key(source: Source, indices: Sequence[int], recipe: Recipe) -> dict[str, Any]:
    """What the result of a conversion depends on, for going on with one: options, and a digest of names and labels."""
    digest = hashlib.blake2b(digest_size=8)
    for index in indices:
        label = None if source.labels is None else int(source.labels[index])
        digest.update(repr((source.names[index], label)).encode(errors='surrogateescape'))
    return {**asdict(recipe), 'source': source.name, 'images': len(indices), 'content': digest.hexdigest()}


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


class Conversion:
    """Writes images of a source to a dataset.

    Args:
        source: Where they come from.
        indices: Which, in this order; at least one.
        recipe: What becomes of each.
        skip_broken: Leave out images that cannot be used, instead of stopping at the first.
        workers: Processes beside this one; they change nothing in the result.
    """

    def __init__(
        self, source: Source, indices: Sequence[int], recipe: Recipe, skip_broken: bool = False, workers: int = 0
    ):
        self.source = source
        self.indices = indices
        self.recipe = recipe
        self.skip_broken = skip_broken
        self.workers = workers
        self._done = 0  # of the indices
        self._first: tuple[str, list[int]] | None = None  # name and shape of the first image
        self._skipped: list[tuple[int, str]] = []  # place in the indices, and what is wrong

    def write(self, writer: DatasetWriter) -> Converted:
        """Write all images, going on where the writer's journal says.

        Raises:
            UserError: naming the image that is broken, of a mode that cannot be used, or of another shape than the
                first; where no image can be used.
            OSError: where files cannot be read or written.
        """
        self._restore(writer.state)
        rest = self.indices[self._done :]
        chunks = [rest[i : i + CHUNK] for i in range(0, len(rest), CHUNK)]
        results = in_order(_MakeFiles(self.source, self.recipe), chunks, self.workers)
        with tqdm.tqdm(desc='convert', total=len(self.indices), initial=self._done, unit='img', disable=None) as bar:
            for result in itertools.chain.from_iterable(results):
                self._take(result, writer)
                bar.update()
        if self._first is None:
            raise UserError(f'none of the {len(self.indices)} images can be used; the first: {self._skipped[0][1]}')
        left_out = {place for place, _ in self._skipped}
        kept = [index for place, index in enumerate(self.indices) if place not in left_out]
        labels = None if self.source.labels is None else self.source.labels[kept]
        writer.finish(labels, self._made_with())
        return Converted(len(kept), tuple(self._first[1]), labels, [problem for _, problem in self._skipped])

    def _restore(self, state: dict[str, Any]) -> None:
        if state:
            self._done, self._first = state['done'], state['first']
            self._skipped = [(place, problem) for place, problem in state['skipped']]

    def _take(self, result: ImageFile | UserError | OSError, writer: DatasetWriter) -> None:
        """Write the next image, or pass over it."""
        name = self.source.names[self.indices[self._done]]
        if isinstance(result, ImageFile) and self._first and list(result.shape) != self._first[1]:
            result = other_shape(name, result.shape, *self._first)
        if isinstance(result, OSError) or (isinstance(result, UserError) and not self.skip_broken):
            raise result
        if isinstance(result, UserError):
            self._skipped.append((self._done, str(result)))
        else:
            self._first = self._first or (name, list(result.shape))
            writer.add(result.ending, result.data)
        self._done += 1
        if isinstance(result, ImageFile) and writer.count % CHECKPOINT == 0:
            writer.checkpoint({'done': self._done, 'first': self._first, 'skipped': self._skipped})

    def _made_with(self) -> dict[str, Any]:
        """The note in the dataset; a mere copy of a dataset keeps the note that this one has."""
        height, width, _ = self._first[1]
        recipe, before = self.recipe, dict(self.source.made_with)
        if before and recipe.keeps_pixels and before.get('format', 'png') == recipe.format:
            made_with = before
        else:
            made_with = {
                'source': self.source.name,
                'transform': recipe.transform,
                'resolution': [width, height],
                'color': recipe.color,
                'format': recipe.format,
                **({'before': before} if before else {}),
            }
        if self._skipped:
            made_with['skipped'] = [problem for _, problem in self._skipped]
        return made_with


def other_shape(name: str, shape: Sequence[int], first_name: str, first_shape: Sequence[int]) -> UserError:
    """What to say of an image that is not like the first."""
    same_size = tuple(shape[:2]) == tuple(first_shape[:2])
    mend = 'add --color=rgb or --color=gray' if same_size else 'choose a --resolution'
    return UserError(f'{name} is {shape_text(*shape)}, but {first_name} is {shape_text(*first_shape)}; {mend}')


def recipe_problems(recipe: Recipe) -> list[str]:
    """What is wrong with a recipe, in words of dataset_tool.py's options."""
    problems = []
    transform = TRANSFORMS[recipe.transform]
    if recipe.size and not transform.fits(*recipe.size):
        width, height = recipe.size
        problems.append(f'--transform={recipe.transform} makes {transform.sizes}, not {width}x{height}')
    if recipe.keep_jpeg and (not recipe.keeps_pixels or recipe.format != 'png'):
        problems.append('--keep-jpeg keeps pixels as they are; it cannot go with --resolution, --color or --format')
    return problems
