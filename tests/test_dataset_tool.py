"""Making datasets: dataset_tool.py, dataset/sources/table.py and dataset/making/transforms.py."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

import dataset_tool
from dataset.making.transforms import normalize
from dataset.reader import ImageDataset
from dataset.sources.table import balanced_order, open_source
from dnnlib import cli
from dnnlib.images import CAPTION

ROOT = Path(__file__).parent.parent


def tool(*args):
    """Run dataset_tool.py in this process; anything but success raises SystemExit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['dataset_tool.py', *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.run(dataset_tool.main)
    if caught.value.code != 0:
        raise caught.value


def convert(source, dest, *args):
    tool('convert', f'--source={source}', f'--dest={dest}', *args)


def refused(capsys, *args):
    """The one line on stderr with which dataset_tool.py refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        tool(*args)
    output = capsys.readouterr()
    assert caught.value.code == 2 and all(line.startswith('writing ') for line in output.out.splitlines())
    assert output.err.startswith('dataset_tool.py: error: ') and output.err.count('\n') == 1
    return output.err


def save(path, color=(250, 10, 10), size=(8, 6), mode='RGB', **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new('RGB', size, color).convert(mode).save(path, **options)
    return path


def pixels(path):
    dataset = ImageDataset(path)
    return np.stack([dataset[i][0].permute(1, 2, 0).numpy() for i in range(len(dataset))])


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures of other colours in three class folders of 6, 4 and 2."""
    for i, kind in enumerate(['cat'] * 6 + ['ant'] * 4 + ['bee'] * 2):
        save(tmp_path / 'photos' / kind / f'{i:02d}.png', (i, 100, 200))
    return tmp_path / 'photos'


# --- Digits ---


def test_digits_are_those_of_scikit_learn(tmp_path, capsys):
    convert('digits', tmp_path / 'digits.zip')
    dataset = ImageDataset(tmp_path / 'digits.zip')
    data = load_digits()
    assert dataset.image_shape == (1, 8, 8) and dataset.num_classes == 10
    assert np.array_equal(dataset.labels, data.target)
    assert np.array_equal(pixels(tmp_path / 'digits.zip')[..., 0], np.round(data.images * 255 / 16))
    assert dataset.names[1234] == '00001/img00001234.png'
    output = capsys.readouterr().out
    assert 'digits.zip: 1797 images of 8x8 grayscale\n' in output and 'class 8: 174 images\n' in output


def bicubic_matrix(small, large):
    """Interpolation from `small` to `large` samples by Keys' cubic kernel with a = -1/2, from its formula."""
    centres = (np.arange(large) + 0.5) * small / large - 0.5
    x = np.abs(centres[:, None] - np.arange(small))
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)  # at the edges, what lies outside is left out


def test_digits_are_upscaled_as_floats(tmp_path):
    convert('digits', tmp_path / 'digits', '--resolution=16', '--max-images=50')
    chosen = pixels(tmp_path / 'digits')[..., 0].astype(float)
    matrix = bicubic_matrix(8, 16)
    exact = (matrix @ (load_digits().images * 255 / 16) @ matrix.T).clip(0, 255)
    distances = [np.abs(exact - image).max(axis=(1, 2)).min() for image in chosen]
    assert max(distances) < 0.501  # rounding, once


def test_missing_scikit_learn_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    error = refused(capsys, 'convert', '--source=digits', f'--dest={tmp_path}/x.zip')
    assert 'scikit-learn' in error and '`demo`' in error


# --- Folders and zips ---


def test_equal_input_gives_equal_bytes(tmp_path, photos):
    convert(photos, tmp_path / 'a.zip')
    for path in photos.rglob('*.png'):
        os.utime(path, (10**9, 10**9))
    convert(photos, tmp_path / 'sub' / 'b.zip')
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'sub' / 'b.zip').read_bytes()


def test_a_dataset_converts_to_itself(tmp_path, photos):
    convert(photos, tmp_path / 'a.zip')
    convert(tmp_path / 'a.zip', tmp_path / 'b')
    convert(tmp_path / 'b', tmp_path / 'c.zip')
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'c.zip').read_bytes()
    with zipfile.ZipFile(tmp_path / 'a.zip') as file:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
        assert set(file.namelist()) == {str(path.relative_to(tmp_path / 'b')) for path in (tmp_path / 'b').rglob('*.*')}
        assert json.loads(file.read('dataset.json'))['labels'][5] == ['00000/img00000005.png', 1]


def test_class_folders_become_labels_in_sorted_order(tmp_path, photos, capsys):
    convert(photos, tmp_path / 'a.zip')
    assert ImageDataset(tmp_path / 'a.zip').labels.tolist() == [0] * 4 + [1] * 2 + [2] * 6
    assert pixels(tmp_path / 'a.zip')[:, 0, 0, 0].tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]
    output = capsys.readouterr().out
    assert output.endswith('class 0 (ant): 4 images\nclass 1 (bee): 2 images\nclass 2 (cat): 6 images\n')


def test_folders_that_all_images_share_are_no_class(tmp_path, photos):
    photos.rename(tmp_path / 'all')
    (tmp_path / 'top' / 'photos').mkdir(parents=True)
    (tmp_path / 'all').rename(tmp_path / 'top' / 'photos' / 'all')
    assert open_source(str(tmp_path / 'top')).class_names == ['ant', 'bee', 'cat']
    assert open_source(str(tmp_path / 'top' / 'photos' / 'all' / 'ant')).labels is None


def test_dataset_json_overrules_folders(tmp_path, photos, capsys):
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob('*.png'))
    (photos / 'dataset.json').write_text(json.dumps({'labels': [[name, i % 5] for i, name in enumerate(names)]}))
    convert(photos, tmp_path / 'a.zip')
    assert ImageDataset(tmp_path / 'a.zip').labels.tolist() == [i % 5 for i in range(12)]
    (photos / 'dataset.json').write_text('{"labels": null}')
    convert(photos, tmp_path / 'b.zip')
    assert ImageDataset(tmp_path / 'b.zip').labels is None
    assert capsys.readouterr().out.endswith('no labels\n')


def test_image_outside_the_class_folders_is_named(tmp_path, photos, capsys):
    save(photos / 'loose.png')
    error = refused(capsys, 'convert', f'--source={photos}', f'--dest={tmp_path}/x.zip')
    assert f'{photos}/ant/06.png is in a class folder, but {photos}/loose.png is in none' in error


@pytest.mark.parametrize(('count', 'expected'), [(3, [1, 1, 1]), (7, [3, 2, 2]), (9, [4, 2, 3]), (100, [4, 2, 6])])
def test_max_images_balances_the_classes(tmp_path, photos, count, expected):
    convert(photos, tmp_path / 'a.zip', f'--max-images={count}')
    assert np.bincount(ImageDataset(tmp_path / 'a.zip').labels).tolist() == expected
    colors = pixels(tmp_path / 'a.zip')[:, 0, 0, 0].tolist()
    assert len(set(colors)) == len(colors) == min(count, 12)


def test_max_images_does_not_take_the_first(tmp_path):
    convert('digits', tmp_path / 'a.zip', '--max-images=100')
    zeros = [i for i, label in enumerate(load_digits().target) if label == 0]
    taken = pixels(tmp_path / 'a.zip')[ImageDataset(tmp_path / 'a.zip').labels == 0]
    first = np.round(load_digits().images[zeros[:10]] * 255 / 16)
    assert len(taken) == 10 and not np.array_equal(taken[..., 0], first)


def test_max_images_takes_the_same_in_every_process():
    first = [1470, 1648, 501, 1566, 1788, 938, 420, 1761, 1195, 459, 130, 1040]
    assert balanced_order(open_source('digits'))[:12] == first


@pytest.mark.parametrize('count', [1, 5])
def test_unlabeled_max_images(tmp_path, photos, count):
    convert(photos / 'cat', tmp_path / 'a.zip', f'--max-images={count}')
    assert len(ImageDataset(tmp_path / 'a.zip')) == count


# --- Pixels ---


def test_exif_orientation_is_applied(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to be upright
    image = PIL.Image.new('L', (8, 6))
    image.paste(255, (0, 0, 4, 6))  # left half white, so the upper half when upright
    (tmp_path / 'photos').mkdir()
    image.save(tmp_path / 'photos' / 'a.png', exif=exif)
    convert(tmp_path / 'photos', tmp_path / 'a.zip')
    result = pixels(tmp_path / 'a.zip')[0, :, :, 0]
    assert result.shape == (8, 6) and (result[:4] == 255).all() and (result[4:] == 0).all()


@pytest.mark.parametrize(('mode', 'channels'), [('L', 1), ('1', 1), ('P', 3), ('RGB', 3), ('RGBA', 3), ('LA', 1)])
def test_modes(tmp_path, mode, channels):
    save(tmp_path / 'photos' / 'a.png', (255, 255, 255), mode=mode)
    convert(tmp_path / 'photos', tmp_path / 'a.zip')
    result = pixels(tmp_path / 'a.zip')
    assert result.shape[3] == channels and (result == 255).all()


def test_cmyk_becomes_rgb(tmp_path):
    save(tmp_path / 'photos' / 'a.jpg', (250, 10, 10), mode='CMYK', quality=95)
    convert(tmp_path / 'photos', tmp_path / 'a.zip')
    assert np.abs(pixels(tmp_path / 'a.zip').astype(int) - [250, 10, 10]).max() <= 5


def test_transparency_is_laid_over_white():
    for mode, color, expected in [('RGBA', (200, 100, 0, 51), (244, 224, 204)), ('LA', (100, 51), 224)]:
        image = normalize(PIL.Image.new(mode, (2, 2), color), 'x')
        assert image.mode == ('RGB' if mode == 'RGBA' else 'L')
        assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= 1
    palette = PIL.Image.new('P', (2, 2), 1)
    palette.putpalette([9, 9, 9, 50, 60, 70])
    assert normalize(palette, 'x').getpixel((0, 0)) == (50, 60, 70)
    palette.info['transparency'] = 1
    assert normalize(palette, 'x').getpixel((0, 0)) == (255, 255, 255)


def test_center_crop_takes_the_middle(tmp_path):
    ramp = np.broadcast_to(np.arange(20, dtype=np.uint8) * 10, (8, 20))
    (tmp_path / 'photos').mkdir()
    PIL.Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / 'photos' / 'a.png')
    convert(tmp_path / 'photos', tmp_path / 'wide.zip', '--resolution=12x8', '--transform=center-crop')
    assert np.array_equal(pixels(tmp_path / 'wide.zip')[0, :, :, 0], ramp[:, 4:16])
    convert(tmp_path / 'photos', tmp_path / 'small.zip', '--resolution=4', '--transform=center-crop')
    small = pixels(tmp_path / 'small.zip')[0, :, :, 0]
    assert small.shape == (4, 4) and np.abs(small[:, 1:3] - [85.0, 105.0]).max() <= 1  # a ramp stays a ramp
    convert(tmp_path / 'photos', tmp_path / 'high.zip', '--resolution=5x8', '--transform=center-crop')
    assert np.array_equal(pixels(tmp_path / 'high.zip')[0, :, :, 0], ramp[:, 7:12])


def test_resolution_is_width_by_height(tmp_path):
    save(tmp_path / 'photos' / 'a.png', size=(16, 8))
    convert(tmp_path / 'photos', tmp_path / 'a.zip', '--resolution=8x4')
    assert ImageDataset(tmp_path / 'a.zip').image_shape == (3, 4, 8)


def test_resizing_does_not_distort(tmp_path, capsys):
    path = save(tmp_path / 'photos' / 'a.png', size=(16, 8))
    error = refused(capsys, 'convert', f'--source={path.parent}', f'--dest={tmp_path}/x.zip', '--resolution=8')
    assert f'{path} is 16x8, which 8x8 would distort; add --transform=center-crop' in error


# --- What is in the way ---


def bad_photo(kind, path):
    """Put a picture that cannot be used at `path`; return what the error must say about it."""
    if kind == 'truncated':
        whole = save(path, size=(64, 64), color=(1, 2, 3)).read_bytes()
        path.write_bytes(whole[:60])
        return 'cannot be decoded'
    if kind == 'other size':
        save(path, size=(8, 7))
        return 'is 8x7 RGB, but {first} is 8x6 RGB; choose a --resolution'
    if kind == 'other mode':
        save(path, mode='L')
        return 'is 8x6 grayscale, but {first} is 8x6 RGB; add --color=rgb or --color=gray'
    PIL.Image.fromarray(np.zeros((6, 8), np.uint16)).save(path)
    return 'has pixels of mode I;16'


@pytest.mark.parametrize('kind', ['truncated', 'other size', 'other mode', '16 bits'])
@pytest.mark.parametrize('dest', ['out.zip', 'out'])
def test_bad_photo_is_named_and_leaves_nothing(tmp_path, photos, capsys, kind, dest):
    message = bad_photo(kind, photos / 'bee' / 'x.png').format(first=f'{photos}/ant/06.png')
    error = refused(capsys, 'convert', f'--source={photos}', f'--dest={tmp_path / dest}')
    assert f'{photos}/bee/x.png {message}' in error
    assert list(tmp_path.iterdir()) == [photos]


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--source=digts'], "unknown source 'digts'; did you mean digits?"),
        (['--source=nowhere/photos.zip'], '--source=nowhere/photos.zip is neither a file nor a folder'),
        (['--source={here}/text.zip'], '{here}/text.zip is neither a folder nor a zip'),
        (['--source={here}/empty'], '{here}/empty holds no images'),
        (['--source=digits', '--resolution=0x8'], 'cannot read --resolution=0x8'),
        (['--source=digits', '--resolution='], 'cannot read --resolution='),
        (['--source=digits', '--transform=center-crop'], '--transform=center-crop needs --resolution'),
        (['--source=digits', '--transform=crop'], "'crop' is not one of 'none', 'center-crop'"),
        (['--source=digits', '--max-images=0'], "Invalid value for '--max-images'"),
        (['--source=digits', '--dest={here}/full'], '{here}/full is a folder with something in it'),
        (['--source=digits', '--dest={here}/text'], '{here}/text is a file'),
        (['--source=digits', '--dest={here}/text.zip'], '{here}/text.zip exists; add --overwrite'),
        (['--source=digits', '--dest={here}/folder.zip'], '{here}/folder.zip is a folder'),
        (['--source=digits', '--dest=.'], '--dest=. has no name of its own'),
        (['--source=digits', '--dest='], '--dest= has no name of its own'),
        (['--source='], '--source= is neither a file nor a folder'),
        (['--source=digits', '--dest={here}/text/x.zip'], '{here}/text is a file; a folder is needed'),
        ([], "Missing option '--source'"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path, capsys, args, message):
    for name in ('empty', 'full', 'folder.zip'):
        (tmp_path / name).mkdir()
    for name in ('text', 'text.zip', 'full/text'):
        (tmp_path / name).write_text('hello')
    before = sorted(tmp_path.rglob('*'))
    args = [f'--dest={tmp_path}/x.zip'] * ('dest' not in str(args)) + [arg.format(here=tmp_path) for arg in args]
    assert message.format(here=tmp_path) in refused(capsys, 'convert', *args)
    assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'text.zip').read_text() == 'hello'


def test_problems_of_options_are_reported_together(tmp_path, capsys):
    (tmp_path / 'x.zip').touch()
    args = ['--source=digits', f'--dest={tmp_path}/x.zip', '--resolution=big']
    error = refused(capsys, 'convert', *args)
    assert '--resolution=big' in error and '--overwrite' in error


def test_overwrite_replaces_a_zip_only_by_a_whole_one(tmp_path, photos, capsys):
    dest = tmp_path / 'x.zip'
    convert(photos, dest)
    convert('digits', dest, '--max-images=10', '--overwrite')
    assert len(ImageDataset(dest)) == 10
    save(photos / 'cat' / 'x.png', mode='L')
    refused(capsys, 'convert', f'--source={photos}', f'--dest={dest}', '--overwrite')
    assert len(ImageDataset(dest)) == 10


def test_an_empty_folder_is_filled(tmp_path, photos):
    (tmp_path / 'out').mkdir()
    convert(photos, tmp_path / 'out')
    assert len(ImageDataset(tmp_path / 'out')) == 12


@pytest.mark.parametrize(('stop', 'status'), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize('dest', ['out.zip', 'out'])
def test_stopped_convert_leaves_no_dataset(tmp_path, photos, stop, status, dest):
    slow = 'import time, dataset_tool; from dataset.files.archive import Archive; '
    slow += 'Archive.read = lambda *_: time.sleep(60); dataset_tool.cli.run(dataset_tool.main)'
    command = [sys.executable, '-c', slow, 'convert', f'--source={photos}', f'--dest={tmp_path / dest}']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('.out*')) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # to reach the first image
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and b'Traceback' not in errors
    left = {path.name for path in tmp_path.iterdir()} - {'photos'}
    assert all(name.startswith('.') and name.endswith('.tmp') for name in left)
    assert stop == signal.SIGKILL or not left
    assert not (tmp_path / dest).exists()


@pytest.mark.parametrize('dest', ['out.zip', 'out'])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, archive, dest):
    # No file may grow above 100 bytes, which is less than one PNG and the zip's index.
    code = 'import resource, dataset_tool; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); '
    code += 'dataset_tool.cli.run(dataset_tool.main)'
    command = [sys.executable, '-c', code, 'convert', f'--source={archive}', f'--dest={tmp_path / dest}']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout.count('\n') <= 1  # the estimate
    assert result.stderr == f'-c: error: {tmp_path / dest}: File too large\n'
    assert not any(tmp_path.iterdir())


def test_name_too_long(tmp_path, capsys):
    dest = tmp_path / f'{"x" * 250}.zip'
    assert f'{dest}: File name too long' in refused(capsys, 'convert', '--source=digits', f'--dest={dest}')


@pytest.mark.parametrize('dest', ['out.zip', 'out'])
def test_errors_of_reading_are_not_blamed_on_the_output(tmp_path, photos, capsys, monkeypatch, dest):
    def fail(path, most):
        raise OSError(errno.EIO, 'Input/output error')  # as read() does, without the file's name

    monkeypatch.setattr('dataset.files.archive.read_regular', fail)
    error = refused(capsys, 'convert', f'--source={photos}', f'--dest={tmp_path / dest}')
    assert f'{photos}/ant/06.png: Input/output error' in error


# --- Info ---


def test_info(tmp_path, photos, capsys):
    convert(photos, tmp_path / 'a.zip')
    capsys.readouterr()
    tool('info', f'--source={tmp_path}/a.zip', f'--sheet={tmp_path}/sheets/sheet.png')
    output = capsys.readouterr().out
    values = pixels(tmp_path / 'a.zip').astype(float)
    assert f'{tmp_path}/a.zip: 12 images of 8x6 RGB, 0.0 MB\n' in output
    assert f'mean {values.mean():.2f}, std {values.std():.2f} of 255' in output
    scaled = values / 127.5 - 1
    assert f'mean {scaled.mean():.3f}, std {scaled.std():.3f}\n' in output
    assert 'class 0 (ant): 4 images\nclass 1 (bee): 2 images\nclass 2 (cat): 6 images\n' in output
    sheet = np.asarray(PIL.Image.open(tmp_path / 'sheets' / 'sheet.png'))
    assert sheet.shape == (CAPTION + 6 * (48 + 2) - 2, 3 * (64 + 2) - 2, 3)
    classes = [{6, 7, 8, 9}, {10, 11}, {0, 1, 2, 3, 4, 5}]  # by their red, in columns
    rows = [[sheet[CAPTION + 50 * row, 66 * k, 0] for k in range(3)] for row in range(6)]
    for k, column in enumerate(zip(*rows, strict=True)):
        assert set(column) - {128} == classes[k] and set(column[: len(classes[k])]) == classes[k]  # 128 is empty
    assert f'{tmp_path}/sheets/sheet.png: 12 of the images' in output


def test_info_reads_sources_too(photos, capsys):
    tool('info', f'--source={photos}')
    assert 'class 1 (bee): 2 images' in capsys.readouterr().out
    tool('info', '--source=digits')
    assert '1797 images of 8x8 grayscale, 0.0 MB' in capsys.readouterr().out


def test_a_folder_named_as_an_embedded_set(tmp_path, capsys, monkeypatch):
    save(tmp_path / 'digits' / 'a.png')
    monkeypatch.chdir(tmp_path)
    tool('info', '--source=digits')
    streams = capsys.readouterr()
    assert '1797 images' in streams.out and 'note: --source=digits is the embedded set; for digits in' in streams.err
    for source in ('./digits', 'digits/'):
        tool('info', f'--source={source}')
        streams = capsys.readouterr()
        assert ': 1 images' in streams.out and streams.err == ''


def test_many_classes_are_cut_short(tmp_path, capsys):
    for i in range(25):
        save(tmp_path / 'photos' / f'{i:02d}' / 'a.png')
    tool('info', f'--source={tmp_path}/photos')
    output = capsys.readouterr().out
    assert 'class 19 (19): 1 images\n... 25 classes in all, with 1 to 1 images each\n' in output


def test_the_script_itself(tmp_path, run_script, run_here):
    for run, status, out in ((run_script, 0, '1797 images'), (run_here, 2, '')):  # then, the zip is in the way
        result = run('dataset_tool.py', 'convert', '--source=digits', f'--dest={tmp_path}/a.zip')
        assert result.returncode == status and out in result.stdout
    assert result.stderr == f'dataset_tool.py: error: {tmp_path}/a.zip exists; add --overwrite to replace it\n'
