"""The zip format, as far as datasets need it: a million entries in seconds and little memory, each read by its place.

Python's zipfile makes an object of every entry, which for ImageNet is a gigabyte and many seconds in every process,
and cannot go on with a zip that was not finished. What is here follows PKWARE's APPNOTE 6.3; a file is

    local header, content; local header, content; ...; directory (an entry for each); [zip64 end, locator]; end
"""

import array
import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dnnlib.errors import UserError

LOCAL = struct.Struct('<4s5H3L2H')  # signature, version, flags, method, time, date, crc, packed, size, lengths of 2
CENTRAL = struct.Struct('<4s6H3L5H2L')  # ..., lengths of name, extra, comment; disk, attributes of 2, offset
END = struct.Struct('<4s4H2LH')  # signature, disks, entries on this disk, entries, size, offset, length of comment
END64 = struct.Struct('<4sQ2H2L4Q')
LOCATOR64 = struct.Struct('<4sLQL')

STORED, DEFLATED, ENCRYPTED = 0, 8, 99
UTF8_NAME = 0x800
LARGE16, LARGE32 = 0xFFFF, 0xFFFFFFFF  # stand for numbers that are in a zip64 field
NEW_YEAR_1980 = (0, 1 << 5 | 1)  # time and date, the same for all, so that equal content gives equal bytes
EXTRA_GUESS = 64  # bytes of extra fields to read along with a local header, which mostly has fewer


class DamagedZipError(Exception):
    """What is wrong with a zip or an entry, for the caller to say of which file."""


@dataclass(frozen=True)
class ZipEntries:
    """The files in a zip, in the order of its directory; folders left out.

    Attributes:
        names: UTF-8.
        offsets: Of the local headers in the file, int64 [N].
        packed: Bytes in the zip, int64 [N].
        sizes: Bytes when unpacked, int64 [N].
        crcs: Of the unpacked content, uint32 [N].
        methods: STORED, DEFLATED or another number, uint8 [N].
    """

    names: list[bytes]
    offsets: np.ndarray
    packed: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray
    methods: np.ndarray


def read_directory(path: str | os.PathLike) -> ZipEntries:
    """Read which files are in a zip.

    Raises:
        UserError: where it is not a zip, cut short or damaged.
        OSError: where it cannot be read.
    """
    with open(path, 'rb') as file:
        if file.read(2) != b'PK':
            raise UserError(f'{path} is neither a folder nor a zip')
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse_directory(data)
            except DamagedZipError as error:
                raise UserError(f'{path} is cut short or damaged: {error}') from None
            except struct.error:
                raise UserError(f'{path} is cut short or damaged: its directory ends early') from None


def _find_directory(data: mmap.mmap) -> tuple[int, int, int]:
    """Where the directory begins, how many entries it has, and by how much all offsets are to be moved."""
    end = len(data) - END.size + 1
    while True:
        end = data.rfind(b'PK\5\6', max(0, len(data) - END.size - LARGE16), end + 3)
        if end < 0:
            raise DamagedZipError('it has no directory')
        *_, count, size, offset, comment_length = END.unpack_from(data, end)
        if end + END.size + comment_length <= len(data):  # else these four bytes are within a comment, or it is cut
            break
    after = end  # what follows the directory
    if end >= LOCATOR64.size and data[end - LOCATOR64.size :][:4] == b'PK\6\7':
        _, _, end64, _ = LOCATOR64.unpack_from(data, end - LOCATOR64.size)
        if data[end64 : end64 + 4] != b'PK\6\6':  # moved by what lies before the zip
            end64 = max(0, end - LOCATOR64.size - END64.size)
        if data[end64 : end64 + 4] != b'PK\6\6':
            raise DamagedZipError('it has no zip64 directory where it says')
        *_, count, size, offset = END64.unpack_from(data, end64)
        after = end64
    shift = after - size - offset  # another file may have been put before the zip
    if shift < 0:
        raise DamagedZipError('it is shorter than its directory says')
    return offset + shift, count, shift


def _parse_directory(data: mmap.mmap) -> ZipEntries:
    place, count, shift = _find_directory(data)
    names = []
    offsets, packed, sizes = (array.array('q') for _ in range(3))
    crcs, methods = array.array('I'), array.array('B')
    unpack, length = CENTRAL.unpack_from, CENTRAL.size
    for _ in range(count):
        (signature, _, _, flags, method, _, _, crc, packed_size, size, name_length, extra_length, comment_length,
         _, _, _, offset) = unpack(data, place)  # fmt: skip
        if signature != b'PK\1\2':
            raise DamagedZipError('its directory is not one')
        name = data[place + length : place + length + name_length]
        extra = place + length + name_length
        if LARGE32 in (packed_size, size, offset):
            size, packed_size, offset = _zip64_numbers(data[extra : extra + extra_length], size, packed_size, offset)
        place = extra + extra_length + comment_length
        if name.endswith(b'/'):
            continue
        if offset + shift + LOCAL.size + packed_size > len(data):
            raise DamagedZipError(f'{name!r} lies beyond its end')
        # Names without the UTF-8 flag are in the character set of the first PCs.
        names.append(name if flags & UTF8_NAME or name.isascii() else name.decode('cp437').encode())
        offsets.append(offset + shift)
        packed.append(packed_size)
        sizes.append(size)
        crcs.append(crc)
        methods.append(ENCRYPTED if flags & 1 else min(method, 255))
    longs = [np.array(values, np.int64) for values in (offsets, packed, sizes)]
    return ZipEntries(names, *longs, np.array(crcs, np.uint32), np.array(methods, np.uint8))


def _zip64_numbers(extra: bytes, *numbers: int) -> list[int]:
    """Put the 64-bit numbers of an extra field in the place of those that are marked."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from('<2H', extra, place)
        if kind == 1:
            large = iter(struct.unpack_from(f'<{length // 8}Q', extra, place + 4))
            return [next(large, number) if number == LARGE32 else number for number in numbers]
        place += 4 + length
    return list(numbers)


def read_member(file: int, offset: int, packed: int, size: int, crc: int, method: int) -> bytes:
    """Read the content of an entry by its place, as `ZipEntries` has it; the position of `file` does not matter.

    Args:
        file: Descriptor of the zip.
        offset, packed, size, crc, method: Of the entry.

    Raises:
        DamagedZipError: where it is damaged, encrypted, or packed in a way that is not known here.
    """
    if method not in (STORED, DEFLATED):
        how = 'encrypted' if method == ENCRYPTED else f'packed by method {method}'
        raise DamagedZipError(f'it is {how}; pack the zip again, best without compression (zip -0)')
    data = os.pread(file, LOCAL.size + EXTRA_GUESS + packed, offset)
    if len(data) < LOCAL.size or not data.startswith(b'PK\3\4'):
        raise DamagedZipError('it is not where the directory says')
    *_, name_length, extra_length = LOCAL.unpack_from(data)
    start = LOCAL.size + name_length + extra_length
    if start + packed > LOCAL.size + EXTRA_GUESS + packed:
        data, start = os.pread(file, packed, offset + start), 0
    data = data[start : start + packed]
    if method == DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, size + 1)  # no more, whatever it would unpack to
        except zlib.error as error:
            raise DamagedZipError(str(error)) from None
    if len(data) != size:
        raise DamagedZipError(f'it has {len(data)} bytes instead of {size}')
    if zlib.crc32(data) != crc:
        raise DamagedZipError('Bad CRC-32')
    return data


class ZipWriter:
    """Writes an uncompressed zip, and can go on with one that was not finished.

    Equal names and contents in equal order give equal bytes.

    Args:
        path: File to write.
        size: Bytes of an unfinished zip at `path` to keep and go on after; what lies behind them is cut off.

    Raises:
        DamagedZipError: where those bytes are not whole entries of a zip that this class has written.
        OSError: where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, size: int = 0):
        self._names: list[bytes] = []
        self._numbers = array.array('Q')  # offset, size and CRC of each entry
        self.size = 0
        Path(path).touch()
        self._file = open(path, 'r+b')  # noqa: SIM115 (closed by `close`)
        try:
            while self.size < size:
                self._recover_entry()
            if self.size != size:
                raise DamagedZipError(f'an entry goes beyond {size} bytes')
            self._file.seek(size)
            self._file.truncate()
        except BaseException:
            self._file.close()
            raise

    def add(self, name: str, data: bytes) -> None:
        """Append a file."""
        assert len(data) < LARGE32, f'{name} is too large'
        raw, crc = name.encode(), zlib.crc32(data)
        flags = 0 if raw.isascii() else UTF8_NAME
        header = LOCAL.pack(b'PK\3\4', 20, flags, STORED, *NEW_YEAR_1980, crc, len(data), len(data), len(raw), 0)
        self._file.write(header + raw)
        self._file.write(data)
        self._remember(raw, len(data), crc)

    def names(self) -> list[str]:
        """Names of the files so far."""
        return [raw.decode() for raw in self._names]

    def sync(self) -> None:
        """Flush all entries so far to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Write the directory, which makes it a zip, and flush it to disk."""
        for i, raw in enumerate(self._names):
            offset, size, crc = self._numbers[3 * i : 3 * i + 3]
            far = offset >= LARGE32
            extra = struct.pack('<2HQ', 1, 8, offset) if far else b''
            version, flags = 45 if far else 20, 0 if raw.isascii() else UTF8_NAME
            self._file.write(CENTRAL.pack(
                b'PK\1\2', 3 << 8 | version, version, flags, STORED, *NEW_YEAR_1980, crc, size, size, len(raw),
                len(extra), 0, 0, 0, 0o644 << 16, LARGE32 if far else offset
            ))  # fmt: skip  # made on Unix, readable by all
            self._file.write(raw + extra)
        end, count = self._file.tell(), len(self._names)
        length = end - self.size
        if count >= LARGE16 or end >= LARGE32:
            self._file.write(END64.pack(b'PK\6\6', END64.size - 12, 45, 45, 0, 0, count, count, length, self.size))
            self._file.write(LOCATOR64.pack(b'PK\6\7', 0, end, 1))
        small = min(count, LARGE16)
        self._file.write(END.pack(b'PK\5\6', 0, 0, small, small, min(length, LARGE32), min(self.size, LARGE32), 0))
        self.sync()

    def close(self) -> None:
        """Close the file; without `finish`, it is no zip."""
        self._file.close()

    def _remember(self, raw: bytes, size: int, crc: int) -> None:
        self._names.append(raw)
        self._numbers.extend((self.size, size, crc))
        self.size += LOCAL.size + len(raw) + size

    def _recover_entry(self) -> None:
        """Remember the entry that is there at `self.size`."""
        self._file.seek(self.size)
        header = self._file.read(LOCAL.size)
        if len(header) < LOCAL.size or not header.startswith(b'PK\3\4'):
            raise DamagedZipError(f'there is no entry at {self.size} bytes')
        *_, crc, _, size, name_length, _ = LOCAL.unpack(header)
        self._remember(self._file.read(name_length), size, crc)
