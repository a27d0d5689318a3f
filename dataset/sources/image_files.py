"""Image files in whichever format."""

import functools
import io

import PIL.Image

from dataset.files.archive import image_errors
from dnnlib.errors import UserError

# Never opened: those that run other programs, and those that Pillow knows by name only.
NOT_IMAGES = frozenset({'EPS', 'PDF', 'WMF', 'MPEG', 'BUFR', 'GRIB', 'HDF5'})


@functools.cache
def source_formats() -> dict[str, str]:
    """Endings of image files and the formats they stand for: all that Pillow reads."""
    PIL.Image.init()
    return {
        ending: name for ending, name in PIL.Image.registered_extensions().items()
        if name in PIL.Image.OPEN and name not in NOT_IMAGES
    }  # fmt: skip


def load_image(data: bytes, where: str) -> PIL.Image.Image:
    """Decode an image file whole; of several pictures in it, the first. Floats, of unknown scale, are refused."""
    formats = sorted(set(source_formats().values()))
    with image_errors(where, formats):
        image = PIL.Image.open(io.BytesIO(data), formats=formats)
        image.load()
    if image.mode == 'F':
        raise UserError(f'{where} has pixels of mode F; convert it to 8-bit grayscale or RGB first')
    return image
