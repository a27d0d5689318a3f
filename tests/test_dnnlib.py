"""Parsing of lists and numbers, near names, grids."""

import os

import numpy as np
import pytest

from dnnlib.errors import UserError, choose, printable, quoted, unknown_choice
from dnnlib.files import open_regular, read_regular
from dnnlib.images import image_grid
from dnnlib.jsonl import append_record, cut_records, mend_records, read_records
from dnnlib.parsing import parse_float_list, parse_int_list, parse_nimg


def test_int_lists():
    assert parse_int_list('1,2,5-10') == [1, 2, 5, 6, 7, 8, 9, 10]
    assert parse_int_list('0-0, 7') == [0, 7]


@pytest.mark.parametrize('text', ['', 'a', '1,,2', '5-', '-3', '1.5', '5-1', '1-2-3', '99999999999999999999'])
def test_int_lists_that_cannot_be_read(text):
    with pytest.raises(UserError):
        parse_int_list(text)


def test_float_lists():
    assert parse_float_list('0.05,0.10,...,0.25') == [0.05, 0.1, 0.15, 0.2, 0.25]
    assert parse_float_list('0.3,0.2,...,0.1,5') == [0.3, 0.2, 0.1, 5]
    assert parse_float_list('1,2,...,3') == [1, 2, 3]


@pytest.mark.parametrize('text', ['', 'x', '...,1', '1,...,3', '1,2,...', '1,1,...,3', '1,2,...,0', '1,2,...,3.5'])
def test_float_lists_that_cannot_be_read(text):
    with pytest.raises(UserError):
        parse_float_list(text)


def test_numbers_of_images():
    assert [parse_nimg(t) for t in ('4096', '8Mi', '1.5Ki', '200k', '2M', '1G')] == [
        *(4096, 8 * 2**20, 1536, 200_000, 2_000_000, 10**9)
    ]
    for text in ('', '1.3', '8mi', '-4', '1e6', 'Mi'):
        with pytest.raises(UserError):
            parse_nimg(text)


def test_near_names():
    assert unknown_choice('preset', 'edm2plus-digit', ['edm2plus-digits', 'x']).endswith(
        'did you mean edm2plus-digits?'
    )
    assert unknown_choice('metric', 'zzz', ['fid', 'kid']) == "unknown metric 'zzz'; choose from fid, kid"


def test_choosing_from_a_table():
    assert choose('sampler', 'heun', {'heun': 1, 'euler': 2}) == 1
    with pytest.raises(UserError, match=r"unknown sampler 'huen'; did you mean heun\?"):
        choose('sampler', 'huen', {'heun': 1, 'euler': 2})


def test_messages_are_bounded():
    assert printable('a b.png') == 'a b.png' and printable(4) == '4'
    assert printable('x\x1b[31m\n') == r'x\x1b[31m\n' and printable('\udcff') == r'\udcff'
    assert len(printable('x' * 10**6)) == 100 and printable('a' * 99 + 'bc').endswith('abc')
    error = UserError([f'problem {i}' for i in range(63)])
    assert str(error).endswith('problem 9; and 53 more') and len(error.problems) == 63
    assert str(UserError([str(i) for i in range(10)])).endswith('8; 9')


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', '/dev/zero'):
        with pytest.raises(UserError, match=f'{path} is not a regular file'):
            open_regular(path)
    (tmp_path / 'x').write_bytes(b'12345')
    assert read_regular(tmp_path / 'x', 5) == b'12345'
    with pytest.raises(UserError, match='x has 5 bytes, more than the 4 that are read'):
        read_regular(tmp_path / 'x', 4)


# --- Records ---


def test_records_before_and_after_a_damaged_line_are_kept(tmp_path, capsys):
    path = tmp_path / 'stats.jsonl'
    for i in range(5):
        append_record(path, {'nimg': 100 * i, 'loss': 0.1 * i})
    whole = path.read_bytes().splitlines(keepends=True)
    for damage in (b'{"nimg": 2', b'\xff\xfe', b'[1]', b'[' * 10**5, b'{"nimg": ' + b'9' * 5000 + b'}', b''):
        path.write_bytes(b''.join([*whole[:2], damage + b'\n', *whole[3:]]))
        assert [record['nimg'] for record in read_records(path)] == [0, 100, 300, 400]
        assert capsys.readouterr().err == f'warning: {path}: line 3 is damaged and left out\n'
        cut_records(path, 300)
        assert path.read_bytes() == b''.join([*whole[:2], whole[3]])
        assert capsys.readouterr().err.count('line 3') == 1


def test_a_last_line_cut_short_is_dropped_in_silence(tmp_path, capsys):
    path = tmp_path / 'stats.jsonl'
    append_record(path, {'nimg': 1})
    path.write_bytes(path.read_bytes() + b'{"nimg": 2')
    mend_records(path)
    append_record(path, {'nimg': 3})
    assert read_records(path) == [{'nimg': 1}, {'nimg': 3}] and capsys.readouterr().err == ''


def test_a_record_without_its_place_is_not_kept_by_a_resumed_run(tmp_path):
    path = tmp_path / 'stats.jsonl'
    for record in ({'nimg': 1}, {}, {'nimg': 'x'}, {'nimg': 2}):
        append_record(path, record)
    cut_records(path, 2)
    assert read_records(path) == [{'nimg': 1}, {'nimg': 2}]
    assert read_records(tmp_path / 'none') == []


def test_quoted_values_fit_a_terminal():
    assert quoted('a b') == "'a b'" and quoted((1, 2.5)) == '(1, 2.5)'
    nested = ['x' * 1000]
    for _ in range(100):
        nested = [nested] * 10
    recursive = []
    recursive.append(recursive)
    for value in (
        'a\n\x1b[31m\u202e',
        'x' * 10**6,
        '\n' * 10**6,
        b'\x00' * 10**6,
        nested,
        recursive,
        10**4000,
        np.eye(2),
    ):
        assert len(quoted(value)) <= 100 and quoted(value).isprintable()
        assert len(quoted(value, limit=20)) <= 20
    assert len(unknown_choice('preset', 'x' * 10**6, ['a'])) < 150


def test_the_first_ten_of_many_problems_are_shown():
    problems = [f'problem {i}' for i in range(63)]
    error = UserError(problems, where='x.pkl')
    assert error.problems == problems
    assert str(error) == f'x.pkl: {"; ".join(problems[:10])}; and 53 more'
    assert str(UserError(problems[:10])) == '; '.join(problems[:10])


def test_image_grid():
    images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1) * 10
    grid = image_grid(images, columns=2, zoom=2, gap=1)
    assert grid.shape == (5, 5, 1)
    assert grid[:, :, 0].tolist() == [
        [0, 0, 128, 10, 10],
        [0, 0, 128, 10, 10],
        [128] * 5,
        [20, 20, 128, 128, 128],
        [20, 20, 128, 128, 128],
    ]
