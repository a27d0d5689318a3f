"""How a source image becomes one of the dataset: upright, 8-bit, of the asked size and colours."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageOps

from dataset.files.archive import image_errors
from dnnlib.errors import UserError

AS_THEY_ARE = ('L', 'RGB', 'F')
GRAYSCALE = ('1', 'L', 'LA')
CONVERTIBLE = ('1', 'P', 'PA', 'LA', 'La', 'RGBA', 'RGBa', 'RGBX', 'CMYK', 'YCbCr')
COLORS = {'keep': None, 'gray': 'L', 'rgb': 'RGB'}  # what --color makes of images that are L or RGB

Size = tuple[int, int]  # width, height

BICUBIC, BOX, LANCZOS = PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.BOX, PIL.Image.Resampling.LANCZOS


def normalize(image: PIL.Image.Image, where: str, color: str = 'keep') -> PIL.Image.Image:
    """Turn an image upright (EXIF) and make it L or RGB; F, floats on the scale 0-255, stays F.

    Black and white become L, palettes and CMYK become RGB, transparency is laid over white.

    Args:
        image: In any mode.
        where: The file's name for messages.
        color: A name in COLORS. `keep` leaves grayscale and RGB what they are; `rgb` and `gray` make all images that.
    """
    with image_errors(where):
        image = PIL.ImageOps.exif_transpose(image)
        mode = 'L' if image.mode in GRAYSCALE else 'RGB'
        if image.has_transparency_data and image.mode in (*AS_THEY_ARE, *CONVERTIBLE):
            white = PIL.Image.new('RGBA', image.size, 'white')
            image = PIL.Image.alpha_composite(white, image.convert('RGBA')).convert(mode)
        elif image.mode in CONVERTIBLE:
            image = image.convert(mode)
    if image.mode not in AS_THEY_ARE:
        raise UserError(f'{where} has pixels of mode {image.mode}; convert it to 8-bit grayscale or RGB first')
    wanted = COLORS[color]
    if wanted is None or image.mode == wanted or (image.mode, wanted) == ('F', 'L'):
        return image
    return PIL.Image.fromarray(to_uint8(image)[:, :, 0]).convert(wanted) if image.mode == 'F' else image.convert(wanted)


def to_uint8(image: PIL.Image.Image) -> np.ndarray:
    """Pixels of an L, RGB or F image as uint8 [H, W, C]; floats are rounded and clipped."""
    pixels = np.asarray(image)
    if image.mode == 'F':
        pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
    return pixels.reshape(image.height, image.width, -1)


def resize(image: PIL.Image.Image, size: Size, where: str) -> PIL.Image.Image:
    """Resize bicubically to (width, height), with antialiasing where that is smaller; the aspect ratio must be kept."""
    if image.width * size[1] != image.height * size[0]:
        have, want = f'{image.width}x{image.height}', f'{size[0]}x{size[1]}'
        raise UserError(f'{where} is {have}, which {want} would distort; add --transform=center-crop')
    return image.resize(size, BICUBIC)


def center_crop(image: PIL.Image.Image, size: Size, where: str, resample: int = LANCZOS) -> PIL.Image.Image:
    """Cut out the largest centred part with the aspect ratio of (width, height), then resize it to that.

    With Lanczos and a square, this is what EDM and EDM2 do.
    """
    scale = min(image.width / size[0], image.height / size[1])
    width, height = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)).resize(size, resample)


def center_crop_wide(image: PIL.Image.Image, size: Size, where: str, resample: int = LANCZOS) -> PIL.Image.Image:
    """As `center_crop`, then lay the result on the middle of a black square of its width; size [width, width]."""
    width, height = size
    square = PIL.Image.new(image.mode, (width, width), 0)
    square.paste(center_crop(image, size, where, resample), (0, (width - height) // 2))
    return square


def center_crop_dhariwal(image: PIL.Image.Image, size: Size, where: str) -> PIL.Image.Image:
    """The preprocessing of ADM (Dhariwal and Nichol 2021), in which ImageNet results are compared.

    Halve by averaging (sides rounded down) while the shorter side is at least twice the target; resize bicubically so
    that the shorter side is the target; cut out the centre, towards the upper left by half a pixel where it must be.
    """
    target = size[0]
    while min(image.size) >= 2 * target:
        image = image.resize((image.width // 2, image.height // 2), BOX)
    scale = target / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), BICUBIC)
    left, top = (image.width - target) // 2, (image.height - target) // 2
    return image.crop((left, top, left + target, top + target))


@dataclass(frozen=True)
class Transform:
    """A way to reach a resolution.

    Attributes:
        apply: (image, (width, height), name of the file for messages) -> image.
        fits: Which sizes it can make; all by default.
        sizes: Those sizes in words.
        filter: That it resizes with, for notes; '' stands for bicubic, as in notes from before there was another.
    """

    apply: Callable[[PIL.Image.Image, Size, str], PIL.Image.Image]
    fits: Callable[[int, int], bool] = lambda width, height: True
    sizes: str = 'any size'
    filter: str = ''


WIDE = (lambda width, height: width > height, 'a width above the height')
SQUARE = (lambda width, height: width == height, 'a square')

# What to do to reach --resolution; a new transform is one entry.
TRANSFORMS: dict[str, Transform] = {
    'none': Transform(resize),
    'center-crop': Transform(center_crop, filter='lanczos'),
    'center-crop-bicubic': Transform(functools.partial(center_crop, resample=BICUBIC)),
    'center-crop-wide': Transform(center_crop_wide, *WIDE, filter='lanczos'),
    'center-crop-wide-bicubic': Transform(functools.partial(center_crop_wide, resample=BICUBIC), *WIDE),
    'center-crop-dhariwal': Transform(center_crop_dhariwal, *SQUARE),
}
