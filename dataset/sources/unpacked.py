"""Files that may be packed with gzip."""

import gzip
import zlib

from dnnlib.errors import UserError
from dnnlib.files import open_regular


def read_unpacked(path: str, most: int) -> bytes:
    """The content of a file, unpacked where it is packed; more than `most` bytes are refused, and damaged ones."""
    with open_regular(path) as file:
        packed = file.peek(2).startswith(b'\x1f\x8b')
        try:
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(most + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f'{path} is cut short or damaged: {error}') from None
    if len(data) > most:
        raise UserError(f'{path} has more than the {most} bytes that are read')
    return data
