"""What datasets need of zips beside the standard library's zipfile.

Members are read by their place, without a position in the file that processes would share or an object for each of a
million members; and a zip that was interrupted, which has no directory yet, can be continued. PKWARE's APPNOTE 6.3:

    local header, content; local header, content; ...; directory (an entry for each); end
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from dnnlib.errors import printable

LOCAL = struct.Struct('<4s5H3L2H')  # signature, version, flags, method, time, date, crc, packed, size, lengths of 2
ENCRYPTED = 99  # in the place of a method
EXTRA_GUESS = 64  # bytes of extra fields to read along with a local header, which mostly has fewer


class DamagedZipError(Exception):
    """What is wrong with a zip or a member, for the caller to say of which file."""


def read_member(file: int, name: str, offset: int, packed: int, size: int, crc: int, method: int) -> bytes:
    """Read a member by its place, see `file_table.FileTable`; the position of the descriptor `file` does not matter.

    Raises:
        DamagedZipError: where it is damaged, has another name in its own header, is encrypted, or packed in a way that
            is not known here.
    """
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        how = 'encrypted' if method == ENCRYPTED else f'packed by method {method}'
        raise DamagedZipError(f'it is {how}; pack the zip again, best without compression (zip -0)')
    data = os.pread(file, LOCAL.size + EXTRA_GUESS + packed, offset)
    if len(data) < LOCAL.size or not data.startswith(b'PK\3\4'):
        raise DamagedZipError('it is not where the directory says')
    *_, name_length, extra_length = LOCAL.unpack_from(data)
    start = LOCAL.size + name_length + extra_length
    if start > LOCAL.size + EXTRA_GUESS:
        data = os.pread(file, start + packed, offset)
    _check_name(data, name)
    data = data[start : start + packed]
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, size + 1)  # no more, whatever it would unpack to
        except zlib.error as error:
            raise DamagedZipError(str(error)) from None
    if len(data) != size:
        raise DamagedZipError(f'it has {len(data)} bytes instead of {size}')
    if zlib.crc32(data) != crc:
        raise DamagedZipError('Bad CRC-32')
    return data


def check_name(file: int, name: str, offset: int) -> None:
    """Make sure that a member that is not read has the name that the directory gives it, too."""
    data = os.pread(file, LOCAL.size + 4 * len(name) + EXTRA_GUESS, offset)
    if len(data) >= LOCAL.size:
        _check_name(data, name)


def _check_name(data: bytes, name: str) -> None:
    length = LOCAL.unpack_from(data)[-2]
    local = data[LOCAL.size : LOCAL.size + length].split(b'\0')[0].decode('ascii', 'replace')  # as zipfile ends names
    # Outside ASCII, programs write the two in several encodings.
    if local != name and (local.isascii() or name.isascii()):
        raise DamagedZipError(f'its own header names it {printable(local)}')


class ZipWriter:
    """Writes an uncompressed zip, or continues one that was interrupted.

    Equal names and contents in equal order give equal bytes.

    Args:
        path: File to write.
        size: Bytes of an interrupted zip at `path` to keep; what follows them is cut off.

    Raises:
        DamagedZipError: where those bytes are not whole members of a zip that this class has written.
    """

    def __init__(self, path: str | os.PathLike, size: int = 0):
        Path(path).touch()
        self._file = open(path, 'r+b')  # noqa: SIM115 (closed by `close`)
        try:
            kept = list(self._members(size))
            self._file.seek(size)
            self._file.truncate()
            self._zip = zipfile.ZipFile(self._file, 'w')  # begins where the file is
            self._zip.filelist.extend(kept)
        except BaseException:
            self._file.close()
            raise

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def names(self) -> list[str]:
        """Names of the files so far."""
        return self._zip.namelist()

    def add(self, name: str, data: bytes) -> None:
        """Append a file."""
        self._zip.writestr(_described(name), data)

    def sync(self) -> None:
        """Flush what was written so far to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the directory, which makes it a zip, and flush it to disk."""
        self._zip.close()
        self.sync()

    def close(self) -> None:
        """Close the file; without `finish`, it is no zip."""
        self._zip.fp = None  # else its end would write a directory
        self._file.close()

    def _members(self, size: int) -> Iterator[zipfile.ZipInfo]:
        """The members in the first `size` bytes."""
        place = 0
        while place < size:
            self._file.seek(place)
            header = self._file.read(LOCAL.size)
            if len(header) < LOCAL.size or not header.startswith(b'PK\3\4'):
                raise DamagedZipError(f'there is no member at {place} bytes')
            *_, crc, _, length, name_length, _ = LOCAL.unpack(header)
            info = _described(self._file.read(name_length).decode())
            info.header_offset, info.CRC, info.compress_size, info.file_size = place, crc, length, length
            yield info
            place += LOCAL.size + name_length + length
        if place != size:
            raise DamagedZipError(f'a member extends beyond {size} bytes')


def _described(name: str) -> zipfile.ZipInfo:
    """Of 1980, so that equal content gives equal bytes; made on Unix, readable by all."""
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o644 << 16
    return info
