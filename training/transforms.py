"""How a source image becomes one of the dataset: upright, 8-bit, of the asked size."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageOps

from dnnlib.errors import UserError
from training.archive import image_errors

AS_THEY_ARE = ('L', 'RGB', 'F')
GRAYSCALE = ('1', 'L', 'LA')
CONVERTIBLE = ('1', 'P', 'PA', 'LA', 'RGBA', 'CMYK')


def normalize(image: PIL.Image.Image, where: str) -> PIL.Image.Image:
    """Turn an image upright (EXIF) and make it L or RGB; F, floats on the scale 0-255, stays F.

    Black and white become L, palettes and CMYK become RGB, transparency is laid over white.

    Raises:
        UserError: naming the file as `where`, for other modes, such as 16 bits a channel, and for damaged EXIF data.
    """
    with image_errors(where):
        image = PIL.ImageOps.exif_transpose(image)
        mode = 'L' if image.mode in GRAYSCALE else 'RGB'
        if image.has_transparency_data and image.mode in (*AS_THEY_ARE, *CONVERTIBLE):
            white = PIL.Image.new('RGBA', image.size, 'white')
            return PIL.Image.alpha_composite(white, image.convert('RGBA')).convert(mode)
    if image.mode in AS_THEY_ARE:
        return image
    if image.mode in CONVERTIBLE:
        return image.convert(mode)
    raise UserError(f'{where} has pixels of mode {image.mode}; convert it to 8-bit grayscale or RGB first')


def to_uint8(image: PIL.Image.Image) -> np.ndarray:
    """Pixels of an L, RGB or F image as uint8 [H, W, C]; floats are rounded and clipped."""
    pixels = np.asarray(image)
    if image.mode == 'F':
        pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
    return pixels.reshape(image.height, image.width, -1)


def resize(image: PIL.Image.Image, size: tuple[int, int], where: str) -> PIL.Image.Image:
    """Resize bicubically to (width, height), with antialiasing where that is smaller.

    Raises:
        UserError: naming the file as `where`, where the aspect ratio would change.
    """
    if image.width * size[1] != image.height * size[0]:
        have, want = f'{image.width}x{image.height}', f'{size[0]}x{size[1]}'
        raise UserError(f'{where} is {have}, which {want} would distort; add --transform=center-crop')
    return image.resize(size, PIL.Image.Resampling.BICUBIC)


def center_crop(image: PIL.Image.Image, size: tuple[int, int], where: str) -> PIL.Image.Image:
    """Cut out the largest centred part with the aspect ratio of (width, height), then resize bicubically to it."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)).resize(size, PIL.Image.Resampling.BICUBIC)


# What to do to reach --resolution; a new transform is one entry.
TRANSFORMS: dict[str, Callable[[PIL.Image.Image, tuple[int, int], str], PIL.Image.Image]] = {
    'none': resize,
    'center-crop': center_crop,
}
