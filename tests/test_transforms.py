"""Transforms against numbers worked out without Pillow (dataset/making/transforms.py)."""

import numpy as np
import PIL.Image
import pytest

from dataset.making.transforms import TRANSFORMS, normalize, to_uint8
from dnnlib.errors import UserError


def filter_matrix(source, target, kernel, support):
    """Resampling of `source` samples to `target`: weights of a kernel that is stretched where it goes down."""
    scale = source / target
    stretch = max(scale, 1)
    centres = (np.arange(target) + 0.5) * scale
    first = np.floor(centres - support * stretch + 0.5).clip(0)
    last = np.floor(centres + support * stretch + 0.5).clip(max=source)
    places = np.arange(source)
    weights = kernel((places + 0.5 - centres[:, None]) / stretch)
    weights = np.where((places >= first[:, None]) & (places < last[:, None]), weights, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def keys_cubic(x):
    """Keys' cubic convolution with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def lanczos(x):
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


def box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def dhariwal(pixels, target):
    """ADM's crop of float pixels [H, W], from its description."""
    while min(pixels.shape) >= 2 * target:
        height, width = (side // 2 for side in pixels.shape)
        pixels = filter_matrix(pixels.shape[0], height, box, 0.5) @ pixels
        pixels = pixels @ filter_matrix(pixels.shape[1], width, box, 0.5).T
    scale = target / min(pixels.shape)
    height, width = (round(side * scale) for side in pixels.shape)
    pixels = filter_matrix(pixels.shape[0], height, keys_cubic, 2) @ pixels
    pixels = pixels @ filter_matrix(pixels.shape[1], width, keys_cubic, 2).T
    top, left = (height - target) // 2, (width - target) // 2
    return pixels[top : top + target, left : left + target]


def apply(name, image, size):
    return TRANSFORMS[name].apply(image, size, 'x')


@pytest.mark.parametrize('shape', [(64, 64), (63, 100), (100, 63), (33, 32), (129, 257), (8, 9), (375, 500)])
@pytest.mark.parametrize('target', [16, 32])
def test_dhariwal_crop(shape, target):
    pixels = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    result = np.asarray(apply('center-crop-dhariwal', PIL.Image.fromarray(pixels), (target, target)))
    assert result.shape == (target, target)
    assert np.abs(result - dhariwal(pixels.astype(float), target)).max() < 2e-3


@pytest.mark.parametrize('name', ['center-crop', 'center-crop-bicubic'])
@pytest.mark.parametrize('shape', [(64, 64), (63, 100), (100, 64), (20, 31)])
def test_center_crop(name, shape):
    """EDM2: the square of the shorter side, by Lanczos."""
    pixels = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    result = np.asarray(apply(name, PIL.Image.fromarray(pixels), (32, 32)))
    side = min(shape)
    top, left = ((extent - side) // 2 for extent in shape)
    crop = pixels[top : top + side, left : left + side].astype(float)
    matrix = filter_matrix(side, 32, *((lanczos, 3) if name == 'center-crop' else (keys_cubic, 2)))
    assert np.abs(result - matrix @ crop @ matrix.T).max() < 2e-3


def test_dhariwal_crop_by_hand():
    # 8x4 -> shorter side 4 = 2x2: halved once to 4x2, then already the target, middle columns 1 and 2.
    pixels = np.arange(32, dtype=np.uint8).reshape(4, 8) * 4
    image = apply('center-crop-dhariwal', PIL.Image.fromarray(pixels), (2, 2))
    # mean of {2, 3, 10, 11}, {4, 5, 12, 13}, {18, 19, 26, 27}, {20, 21, 28, 29}, times 4
    assert np.asarray(image).tolist() == [[26, 34], [90, 98]]


def test_dhariwal_crop_is_not_the_plain_one():
    # What halving first is for: bicubic from far above would look at more pixels.
    pixels = np.random.default_rng(0).integers(0, 256, (70, 70), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    one, other = (np.asarray(apply(f'center-crop-{name}', image, (16, 16))) for name in ('dhariwal', 'bicubic'))
    assert np.abs(one.astype(int) - other).max() > 3


def test_wide_crop_lies_on_a_black_square():
    image = PIL.Image.new('RGB', (40, 40), (200, 100, 50))
    result = to_uint8(apply('center-crop-wide', image, (16, 8)))
    assert result.shape == (16, 16, 3)
    assert (result[4:12] == [200, 100, 50]).all() and not result[:4].any() and not result[12:].any()


@pytest.mark.parametrize(('name', 'size'), [('center-crop-dhariwal', (8, 4)), ('center-crop-wide', (8, 8))])
def test_impossible_sizes(name, size):
    assert not TRANSFORMS[name].fits(*size)


@pytest.mark.parametrize(
    ('mode', 'color', 'expected'),
    [('L', 'rgb', 'RGB'), ('CMYK', 'gray', 'L'), ('RGB', 'gray', 'L'), ('RGBA', 'gray', 'L'), ('P', 'keep', 'RGB'),
     ('F', 'rgb', 'RGB'), ('F', 'gray', 'F'), ('YCbCr', 'keep', 'RGB'), ('1', 'rgb', 'RGB')],
)  # fmt: skip
def test_colors(mode, color, expected):
    image = normalize(PIL.Image.new('L', (3, 2), 77).convert(mode), 'x', color)
    assert image.mode == expected and np.asarray(image).shape[:2] == (2, 3)
    if mode not in ('1', 'CMYK'):
        assert np.abs(np.asarray(image).astype(float) - 77).max() <= 1


def test_gray_is_luminance():
    assert normalize(PIL.Image.new('RGB', (1, 1), (255, 0, 0)), 'x', 'gray').getpixel((0, 0)) == 76  # 0.299 of 255


@pytest.mark.parametrize('mode', ['I;16', 'I', 'LAB', 'HSV'])
def test_other_modes_are_refused(mode):
    with pytest.raises(UserError, match=f'x.png has pixels of mode {mode}'):
        normalize(PIL.Image.new(mode, (2, 2)), 'x.png')
