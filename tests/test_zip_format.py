"""The zip format (dataset/files/zip_format.py), held against Python's zipfile."""

import os
import zipfile

import numpy as np
import pytest

from dataset.files.file_table import list_zip
from dataset.files.zip_format import DamagedZipError, ZipWriter, read_member
from dnnlib.errors import UserError

FILES = {'a.png': b'hello', 'b/c.png': b'', 'ä/ß€.png': b'x' * 1000, 'dataset.json': b'{}'}


def contents(path):
    """All files of a zip as our reader sees them."""
    table = list_zip(path)
    columns = (table.offsets, table.packed, table.sizes, table.crcs, table.methods)
    file = os.open(path, os.O_RDONLY)
    try:
        return {
            name: read_member(file, name, *(int(column[i]) for column in columns)) for i, name in enumerate(table.names)
        }
    finally:
        os.close(file)


def write(path, files):
    writer = ZipWriter(path)
    for name, data in files.items():
        writer.add(name, data)
    writer.finish()
    writer.close()
    return path


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_zipfile_writes(tmp_path, method):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w', method) as file:
        file.mkdir('b')
        for name, data in FILES.items():
            file.writestr(name, data)
        file.comment = b'a comment'
    assert contents(tmp_path / 'x.zip') == FILES


def test_zipfile_reads_what_is_written(tmp_path):
    with zipfile.ZipFile(write(tmp_path / 'x.zip', FILES)) as file:
        assert file.testzip() is None
        assert {name: file.read(name) for name in file.namelist()} == FILES
        assert all(info.date_time == (1980, 1, 1, 0, 0, 0) for info in file.infolist())
        assert all(info.external_attr >> 16 == 0o644 and info.create_system == 3 for info in file.infolist())


def test_bytes_are_those_of_zipfile(tmp_path):
    # As datasets were written before this module existed.
    with zipfile.ZipFile(tmp_path / 'y.zip', 'w') as file:
        for name, data in FILES.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            file.writestr(info, data)
    assert write(tmp_path / 'x.zip', FILES).read_bytes() == (tmp_path / 'y.zip').read_bytes()


@pytest.mark.parametrize('count', [65535, 65536, *(pytest.param(n, marks=pytest.mark.slow) for n in (65534, 70000))])
def test_more_entries_than_16_bits_count(tmp_path, count):
    path = write(tmp_path / 'x.zip', {f'{i:06d}.png': b'%d' % i for i in range(count)})
    table = list_zip(path)
    assert len(table) == count and table.names[count - 1] == f'{count - 1:06d}.png'
    with zipfile.ZipFile(path) as file:
        assert len(file.namelist()) == count and file.read(f'{count - 1:06d}.png') == b'%d' % (count - 1)


def test_offsets_beyond_32_bits(tmp_path):
    path = tmp_path / 'x.zip'
    writer = ZipWriter(path)
    writer.add('near', b'1')
    hole = 5 << 30  # takes no room on disk
    writer._file.truncate(hole)
    writer._zip.start_dir = hole
    writer.add('far', b'2')
    writer.finish()
    writer.close()
    assert contents(path) == {'near': b'1', 'far': b'2'}
    assert sorted(list_zip(path).offsets.tolist()) == [0, hole]
    with zipfile.ZipFile(path) as file:
        assert file.read('near') == b'1' and file.read('far') == b'2'


def test_something_may_lie_before_a_zip(tmp_path):
    path = write(tmp_path / 'x.zip', FILES)
    path.write_bytes(b'PK#!/bin/sh\n' + path.read_bytes())
    assert contents(path) == FILES


def test_something_may_lie_before_a_large_one(tmp_path):
    whole = write(tmp_path / 'a.zip', {f'{i:05d}.png': b'x' for i in range(65536)}).read_bytes()
    (tmp_path / 'b.zip').write_bytes(b'PK and a program that unpacks it' + whole)
    table = list_zip(tmp_path / 'b.zip')
    assert len(table) == 65536 and table.offsets[0] == 32


def test_names_of_the_first_pcs(tmp_path):
    path = tmp_path / 'x.zip'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('xx.png', b'1')
    path.write_bytes(path.read_bytes().replace(b'xx.png', b'\x84\xe1.png'))
    assert list(list_zip(path).names) == ['äß.png']


def test_going_on_gives_the_same_bytes(tmp_path):
    whole = write(tmp_path / 'whole.zip', FILES).read_bytes()
    items = list(FILES.items())
    for stop in range(len(items) + 1):
        path = tmp_path / f'{stop}.zip'
        writer = ZipWriter(path)
        for name, data in items[:stop]:
            writer.add(name, data)
        size = writer.size
        writer.add('lost', b'to be cut off' * 1000)
        writer.close()
        writer = ZipWriter(path, size)
        assert writer.names() == [name for name, _ in items[:stop]]
        for name, data in items[stop:]:
            writer.add(name, data)
        writer.finish()
        writer.close()
        assert path.read_bytes() == whole


def test_going_on_needs_whole_entries(tmp_path):
    path = tmp_path / 'x.zip'
    writer = ZipWriter(path)
    writer.add('a', b'12345')
    size = writer.size
    writer.close()
    for wrong in (size - 1, size + 1):
        with pytest.raises(DamagedZipError):
            ZipWriter(path, wrong)


def test_an_unfinished_one_is_no_zip(tmp_path):
    path = tmp_path / 'x.zip'
    writer = ZipWriter(path)
    writer.add('a.png', b'12345')
    writer.close()
    assert not zipfile.is_zipfile(path)
    with pytest.raises(UserError, match=r'x.zip is cut short or damaged: File is not a zip file'):
        list_zip(path)


@pytest.mark.parametrize('cut', [1, 10, 22, 40, 60, 120])
def test_cut_anywhere(tmp_path, cut):
    path = write(tmp_path / 'x.zip', FILES)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r'x.zip is cut short or damaged'):
        list_zip(path)


def test_cut_out_of_the_middle(tmp_path):
    path = write(tmp_path / 'x.zip', FILES)
    data = path.read_bytes()
    path.write_bytes(data[:50] + data[100:])
    with pytest.raises(UserError, match='cut short or damaged'):
        list_zip(path)


def test_damaged_directory_never_crashes(tmp_path):
    path = write(tmp_path / 'x.zip', FILES)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[int(rng.integers(len(whole) - 250, len(whole)))] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            contents(path)
        except (UserError, DamagedZipError):
            refused += 1
    assert refused > 100


@pytest.mark.parametrize('method', [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packings_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w', method) as file:
        file.writestr('a', b'1' * 1000)
    with pytest.raises(DamagedZipError, match=f'packed by method {method}; pack the zip again'):
        contents(tmp_path / 'x.zip')


def test_encrypted_is_refused(tmp_path):
    path = write(tmp_path / 'x.zip', {'a': b'1'})
    data = bytearray(path.read_bytes())
    data[data.index(b'PK\1\2') + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(DamagedZipError, match='it is encrypted'):
        contents(path)


def test_unpacking_stops_at_the_promised_size(tmp_path):
    path = tmp_path / 'x.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('a', bytes(10**6))
    data = bytearray(path.read_bytes())
    place = data.index(b'PK\1\2') + 24
    data[place : place + 4] = (100).to_bytes(4, 'little')
    path.write_bytes(data)
    with pytest.raises(DamagedZipError, match='it has 101 bytes instead of 100'):
        contents(path)


@pytest.mark.parametrize('name', ['../a.png', 'x/../../a.png', '/etc/a.png', '..\\a.png'])
def test_names_that_lead_out_are_refused(tmp_path, name):
    path = write(tmp_path / 'x.zip', {'ok.png': b'', name: b''})
    with pytest.raises(UserError) as caught:
        list_zip(path)
    assert f'{path} is cut short or damaged: 1 of its names lead out of it, for instance {name}' in str(caught.value)


def test_two_dots_in_a_name_lead_nowhere(tmp_path):
    names = ['a..b.png', '..c.png', 'd../e.png']
    assert list(list_zip(write(tmp_path / 'x.zip', dict.fromkeys(names, b''))).names) == ['a..b.png', 'd../e.png']
