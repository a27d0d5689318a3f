"""Parsing of lists and numbers, near names, grids."""

import numpy as np
import pytest

from dnnlib.errors import UserError, quoted, unknown_choice
from dnnlib.images import image_grid
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
