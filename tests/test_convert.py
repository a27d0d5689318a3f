"""Conversions that stop, go on, run in parallel or pass over images (dataset/making/convert.py, dataset_writer.py)."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import dataset_tool
from dataset.files.archive import Archive
from dataset.files.writer import DatasetWriter, work_folder
from dataset.making import convert as convert_module
from dataset.making.transforms import TRANSFORMS
from dataset.reader import ImageDataset
from dnnlib.errors import UserError

ROOT = Path(__file__).parent.parent


def tool(*args):
    """Run dataset_tool.py here; returns what it prints, raises what stops it."""
    result = CliRunner().invoke(dataset_tool.main, list(map(str, args)), standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.output


def convert(source, dest, *args):
    return tool('convert', f'--source={source}', f'--dest={dest}', *args)


def photos(folder, count=12, size=(8, 6), ending='png', mode='RGB', **options):
    """Pictures of other colours in three class folders."""
    for i in range(count):
        path = folder / 'abc'[i % 3] / f'{i:05d}.{ending}'
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).convert(mode).save(path, **options)
    return folder


def pixels(path):
    dataset = ImageDataset(path)
    return np.stack([dataset[i][0].permute(1, 2, 0).numpy() for i in range(len(dataset))])


def names_in(path):
    return list(Archive(path).files.names)


# --- Notes ---


def test_the_note_of_how_it_was_made(tmp_path):
    output = convert(photos(tmp_path / 'in'), tmp_path / 'a.zip', '--resolution=4', '--transform=center-crop')
    made_with = {'source': 'in', 'transform': 'center-crop', 'filter': 'lanczos', 'resolution': [4, 4], 'color': 'keep',
                 'format': 'png'}  # fmt: skip
    assert ImageDataset(tmp_path / 'a.zip').made_with == made_with
    with zipfile.ZipFile(tmp_path / 'a.zip') as file:
        content = json.loads(file.read('dataset.json'))
    assert list(content) == ['labels', 'class_names', 'edm2plus'] and content['edm2plus'] == made_with
    assert output.startswith('writing 12 images of in as 4x4 RGB PNG, about 0.0 MB\n')
    assert 'made with: {"source": "in", "transform": "center-crop"' in tool('info', f'--source={tmp_path}/a.zip')
    convert(tmp_path / 'a.zip', tmp_path / 'b.zip', '--color=gray')
    again = ImageDataset(tmp_path / 'b.zip').made_with
    assert again['before'] == made_with and again['color'] == 'gray' and again['source'] == 'a'


def test_class_names_are_kept(tmp_path):
    convert(photos(tmp_path / 'in'), tmp_path / 'a.zip', '--workers=0')
    assert ImageDataset(tmp_path / 'a.zip').class_names == ['a', 'b', 'c']
    with zipfile.ZipFile(tmp_path / 'a.zip') as file:
        content = json.loads(file.read('dataset.json'))
    assert content['class_names'] == ['a', 'b', 'c']
    assert dict(content['labels']) == {f'00000/img{i:08d}.png': i // 4 for i in range(12)}  # all that EDM2 reads
    assert 'class 1 (b): 4 images\n' in tool('info', f'--source={tmp_path}/a.zip')
    convert(tmp_path / 'a.zip', tmp_path / 'b', '--color=gray', '--max-images=2')
    assert ImageDataset(tmp_path / 'b').class_names == ['a', 'b', 'c'] and len(ImageDataset(tmp_path / 'b')) == 2
    convert('digits', tmp_path / 'c.zip', '--max-images=10')
    assert ImageDataset(tmp_path / 'c.zip').class_names is None


def test_datasets_without_a_note(tmp_path):
    for i, content in enumerate(['{"labels": null}', '{"labels": null, "edm2plus": 3}', '{}']):
        path = photos(tmp_path / str(i), 2)
        (path / 'dataset.json').write_text(content)
        dataset = ImageDataset(path)
        assert dataset.made_with == {} and dataset.labels is None and dataset.encoder == 'rgb'


def test_digits_stay_what_they_were(tmp_path):
    """Image files byte by byte, so that other runs' fingerprints hold."""
    convert('digits', tmp_path / 'x.zip')
    assert ImageDataset(tmp_path / 'x.zip').fingerprint == '26d87e9188b68a8a'


# --- Estimates ---


def test_the_estimate_is_near(tmp_path):
    source = photos(tmp_path / 'in', 40, (64, 64))
    output = convert(source, tmp_path / 'a.zip')
    estimate = float(re.search(r'about ([\d.]+) MB', output)[1]) * 1e6
    assert estimate == pytest.approx((tmp_path / 'a.zip').stat().st_size, rel=0.1, abs=5e4)


def test_a_disk_too_small_is_warned_of(tmp_path, monkeypatch):
    usage = type('Usage', (), {'free': 10})
    monkeypatch.setattr(dataset_tool.shutil, 'disk_usage', lambda path: usage)
    assert 'warning: only 0.0 MB are free at' in convert(photos(tmp_path / 'in'), tmp_path / 'a.zip')


# --- Processes ---


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # on a machine with one core
@pytest.mark.parametrize('ending', ['.zip', ''])
def test_processes_change_nothing(tmp_path, ending):
    source = photos(tmp_path / 'in', 70)
    dests = [tmp_path / f'{workers}{ending}' for workers in (0, 1, 3)]
    for workers, dest in zip((0, 1, 3), dests, strict=True):
        convert(source, dest, f'--workers={workers}')
    one, *others = ({name: Archive(dest).read(i) for i, name in enumerate(names_in(dest))} for dest in dests)
    assert all(other == one for other in others) and len(one) == 71


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_broken_images_reach_the_main_process(tmp_path):
    source = photos(tmp_path / 'in', 70)
    for i in (30, 60):
        (source / 'a' / f'{i:05d}.png').write_bytes(b'?')
    with pytest.raises(UserError) as caught:
        convert(source, tmp_path / 'a.zip', '--workers=2')
    # By name, not by who was first.
    assert str(caught.value).startswith(f'{source}/a/00030.png is damaged')


@pytest.mark.filterwarnings('ignore:This DataLoader will create')
def test_info_in_processes(tmp_path):
    source = photos(tmp_path / 'in', 50)
    outputs = [tool('info', f'--source={source}', f'--workers={n}', f'--sheet={tmp_path}/{n}.png') for n in (0, 2)]
    assert outputs[0].replace('/0.png', '') == outputs[1].replace('/2.png', '')
    assert (tmp_path / '0.png').read_bytes() == (tmp_path / '2.png').read_bytes()


# --- Broken images ---


def test_skip_broken(tmp_path):
    source = photos(tmp_path / 'in', 12)
    (source / 'a' / '00003.png').write_bytes(b'?')
    photos(tmp_path / 'other', 9, (9, 6))
    (tmp_path / 'other' / 'c' / '00008.png').rename(source / 'c' / '00008.png')
    output = convert(source, tmp_path / 'a.zip', '--skip-broken')
    dataset = ImageDataset(tmp_path / 'a.zip')
    assert len(dataset) == 10 and dataset.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3
    assert dataset.names == [f'00000/img{i:08d}.png' for i in range(10)]
    skipped = dataset.made_with['skipped']
    assert skipped[0].startswith(f'{source}/a/00003.png is damaged')
    assert skipped[1].startswith(f'{source}/c/00008.png is 9x6 RGB, but {source}/a/00000.png is 8x6 RGB')
    assert 'left out 2 images' in output and all(f'  {problem}\n' in output for problem in skipped)


def test_what_would_have_kept_images_is_said(tmp_path):
    source = photos(tmp_path / 'in', 40)
    for i in range(1, 31):
        path = source / 'abc'[i % 3] / f'{i:05d}.png'
        PIL.Image.new(*(('L', (8, 6)) if i % 2 else ('RGB', (6, 8)))).save(path)
    (source / 'b' / '00031.png').write_bytes(b'?')
    output = convert(source, tmp_path / 'a.zip', '--skip-broken')
    assert output.count(f'\n  {source}/') == 20 and '  and 11 more, all of them listed in dataset.json\n' in output
    assert 'to keep 15 of them, add --color=rgb or --color=gray\n' in output
    assert 'to keep 15 of them, choose a --resolution\n' in output
    with pytest.raises(UserError, match='; --skip-broken leaves out images that cannot be used'):
        convert(source, tmp_path / 'b.zip')


def test_skip_broken_needs_one_that_is_not(tmp_path):
    source = photos(tmp_path / 'in', 2)
    for path in source.rglob('*.png'):
        path.write_bytes(b'?')
    with pytest.raises(
        UserError, match=f'none of the 2 images can be used; the first: {source}/a/00000.png is damaged'
    ):
        convert(source, tmp_path / 'a.zip', '--skip-broken')
    assert not (tmp_path / 'a.zip').exists() and not work_folder(tmp_path / 'a.zip').exists()


# --- Files as they are ---


def test_keep_jpeg(tmp_path):
    source = photos(tmp_path / 'in', 5, ending='jpg')
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    with PIL.Image.open(source / 'a' / '00000.jpg') as image:
        image.save(source / 'a' / '00000.jpg', exif=exif)
    with PIL.Image.open(source / 'a' / '00003.jpg') as image:
        image.convert('CMYK').save(source / 'a' / '00003.jpg')
    with PIL.Image.open(source / 'b' / '00001.jpg') as image:
        image.save(source / 'b' / '00001.jpg', format='png')  # not what its name says
    convert(source, tmp_path / 'plain.zip')
    convert(source, tmp_path / 'kept', '--keep-jpeg')
    numbers = [(0, 'png'), (1, 'png'), (2, 'png'), (3, 'jpg'), (4, 'jpg')]
    assert names_in(tmp_path / 'kept') == [f'00000/img{i:08d}.{ending}' for i, ending in numbers] + ['dataset.json']
    assert np.array_equal(pixels(tmp_path / 'kept'), pixels(tmp_path / 'plain.zip'))
    assert (tmp_path / 'kept/00000/img00000004.jpg').read_bytes() == (source / 'c' / '00002.jpg').read_bytes()
    assert ImageDataset(tmp_path / 'kept').labels.tolist() == [0, 0, 1, 1, 2]


def test_keep_jpeg_still_looks_at_them(tmp_path):
    source = photos(tmp_path / 'in', 3, ending='jpg')
    path = source / 'b' / '00001.jpg'
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f'{path} cannot be decoded'):
        convert(source, tmp_path / 'x.zip', '--keep-jpeg')


def test_npy(tmp_path):
    source = photos(tmp_path / 'in', 5)
    convert(source, tmp_path / 'a.zip')
    convert(source, tmp_path / 'b.zip', '--format=npy')
    one, other = ImageDataset(tmp_path / 'a.zip'), ImageDataset(tmp_path / 'b.zip')
    assert other.names[0] == '00000/img00000000.npy' and other.image_shape == one.image_shape == (3, 6, 8)
    assert np.array_equal(pixels(tmp_path / 'a.zip'), pixels(tmp_path / 'b.zip'))
    convert(tmp_path / 'b.zip', tmp_path / 'c.zip')
    assert np.array_equal(pixels(tmp_path / 'a.zip'), pixels(tmp_path / 'c.zip'))


def test_color_mends_mixtures(tmp_path):
    source = photos(tmp_path / 'in', 3)
    PIL.Image.new('L', (8, 6), 7).save(source / 'a' / '00001.png')
    with pytest.raises(UserError, match='add --color=rgb or --color=gray'):
        convert(source, tmp_path / 'a.zip')
    for color, channels in (('rgb', 3), ('gray', 1)):
        convert(source, tmp_path / f'{color}.zip', f'--color={color}')
        assert ImageDataset(tmp_path / f'{color}.zip').image_shape == (channels, 6, 8)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--resolution=8x4', '--transform=center-crop-dhariwal'], 'center-crop-dhariwal makes a square, not 8x4'),
        (['--resolution=8', '--transform=center-crop-wide'], 'makes a width above the height, not 8x8'),
        (['--keep-jpeg', '--resolution=8'], '--keep-jpeg keeps pixels as they are'),
        (['--keep-jpeg', '--format=npy'], '--keep-jpeg keeps pixels as they are'),
        (['--resume', '--overwrite'], 'choose one'),
    ],
)
def test_options_that_do_not_go_together(tmp_path, args, message):
    with pytest.raises(UserError, match=re.escape(message)):
        convert('digits', tmp_path / 'x.zip', *args)


@pytest.mark.parametrize('transform', TRANSFORMS)
def test_every_transform_makes_a_dataset(tmp_path, transform):
    size = '8x4' if 'wide' in transform else '4'
    source = photos(tmp_path / 'in', 3, (12, 12))
    convert(source, tmp_path / 'x.zip', f'--resolution={size}', f'--transform={transform}')
    dataset = ImageDataset(tmp_path / 'x.zip')
    assert dataset.image_shape == ((3, 8, 8) if 'wide' in transform else (3, 4, 4))
    assert dataset.made_with['transform'] == transform


# --- Going on ---


def stop_after(count, monkeypatch, error=KeyboardInterrupt):
    """Make the writer fail at its image number `count`."""
    add = DatasetWriter.add

    def failing(self, ending, data):
        if self.count == count:
            raise error
        add(self, ending, data)

    monkeypatch.setattr(DatasetWriter, 'add', failing)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """More than a checkpoint of images, the 700th broken."""
    folder = photos(tmp_path_factory.mktemp('many') / 'in', 1100, (2, 2))
    (folder / 'b' / '00700.png').write_bytes(b'?')
    convert(folder, folder.parent / 'whole.zip', '--skip-broken', '--workers=0')
    return folder


@pytest.mark.parametrize('ending', ['.zip', ''])
def test_going_on_gives_the_same(tmp_path, many, monkeypatch, ending):
    dest = tmp_path / f'x{ending}'
    with monkeypatch.context() as patch:
        stop_after(1042, patch)
        with pytest.raises((KeyboardInterrupt, dataset_tool.click.Abort)):
            convert(many, dest, '--skip-broken', '--workers=0')
    assert not dest.exists() and [path.name for path in tmp_path.iterdir()] == [f'.x{ending}.tmp']
    with pytest.raises(UserError, match=f'{dest} was stopped after 1000 images; add --resume to continue, or'):
        convert(many, dest, '--skip-broken')
    read = []
    make_file = convert_module.make_file
    monkeypatch.setattr(
        convert_module, 'make_file', lambda source, i, recipe: read.append(i) or make_file(source, i, recipe)
    )
    output = convert(many, dest, '--skip-broken', '--resume', '--workers=0')
    assert min(read[16:]) >= 1000, 'images before the checkpoint were made again'  # 16 for the estimate
    whole = many.parent / 'whole.zip'
    assert names_in(dest) == names_in(whole) and 'left out 1 images' in output
    one, other = Archive(dest), Archive(whole)
    assert all(one.read(i) == other.read(i) for i in range(1100))
    assert ending == '' or dest.read_bytes() == whole.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [f'x{ending}']
    assert 'is complete' in convert(many, dest, '--resume')


def test_going_on_with_other_options_is_refused(tmp_path, many, monkeypatch):
    dest = tmp_path / 'x.zip'
    with monkeypatch.context() as patch:
        stop_after(1042, patch, OSError(28, 'No space left on device'))
        with pytest.raises(OSError, match='No space left') as caught:
            convert(many, dest, '--skip-broken', '--workers=0')
        assert caught.value.filename == str(dest)
    with pytest.raises(UserError, match='started with other color; --overwrite starts over'):
        convert(many, dest, '--skip-broken', '--resume', '--color=gray')
    (many / 'a' / 'new.png').write_bytes(b'')
    try:
        with pytest.raises(UserError, match='started with other content and images'):
            convert(many, dest, '--skip-broken', '--resume')
    finally:
        (many / 'a' / 'new.png').unlink()
    assert work_folder(dest).exists()
    convert('digits', dest, '--overwrite', '--max-images=10')
    assert len(ImageDataset(dest)) == 10 and not work_folder(dest).exists()


def test_a_damaged_beginning_is_not_gone_on_with(tmp_path, many, monkeypatch):
    dest = tmp_path / 'x.zip'
    with monkeypatch.context() as patch:
        stop_after(1042, patch)
        with pytest.raises((KeyboardInterrupt, dataset_tool.click.Abort)):
            convert(many, dest, '--skip-broken', '--workers=0')
    data = work_folder(dest) / 'data'
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(UserError, match='cannot be continued'):
        convert(many, dest, '--skip-broken', '--resume')
    (work_folder(dest) / 'journal.json').write_text('{"about"')
    with pytest.raises(UserError, match='was stopped after some images'):
        convert(many, dest, '--skip-broken', '--resume')


def test_two_processes_at_one_dataset(tmp_path):
    with DatasetWriter(tmp_path / 'x.zip'):
        with (
            pytest.raises(UserError, match=r'another process is at work in .*x.zip.tmp'),
            DatasetWriter(tmp_path / 'x.zip'),
        ):
            pass
        assert work_folder(tmp_path / 'x.zip').exists()


def test_a_file_system_that_locks_no_folders(tmp_path, monkeypatch):
    """NFS refuses an exclusive lock of what is not open for writing, as folders never are."""

    def refuse(*_):
        raise OSError(errno.EBADF, 'Bad file descriptor')

    monkeypatch.setattr(fcntl, 'flock', refuse)
    convert('digits', tmp_path / 'x.zip', '--max-images=10')
    assert len(ImageDataset(tmp_path / 'x.zip')) == 10 and [path.name for path in tmp_path.iterdir()] == ['x.zip']


SLOW = """
import time
import dataset_tool
from dataset.files.writer import DatasetWriter
add = DatasetWriter.add
DatasetWriter.add = lambda self, *file: (self.count == 1042 and time.sleep(60), add(self, *file))
dataset_tool.cli.run(dataset_tool.main)
"""


def test_ctrl_c_and_going_on_as_a_user_does(tmp_path, many):
    dest = tmp_path / 'x.zip'
    command = [sys.executable, '-c', SLOW, 'convert', f'--source={many}', f'--dest={dest}', '--skip-broken']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (work_folder(dest) / 'journal.json').exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b'Traceback' not in errors
    assert b'stopped after 10' in errors and b'--resume continues' in errors
    assert not dest.exists()
    assert 'left out 1 images' in convert(many, dest, '--skip-broken', '--resume')
    assert dest.read_bytes() == (many.parent / 'whole.zip').read_bytes()


# --- What the system refuses ---


def test_no_permission(tmp_path, monkeypatch):
    """As root nothing is refused, so the system's answer is made up."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(self))

    monkeypatch.setattr(Path, 'mkdir', refuse)
    with pytest.raises(PermissionError) as caught, DatasetWriter(tmp_path / 'x.zip'):
        pass
    assert caught.value.filename.startswith(str(tmp_path))


@pytest.mark.xfail(os.geteuid() == 0, reason='root may write anywhere', strict=True)
def test_no_permission_for_real(tmp_path):
    (tmp_path / 'in').mkdir(mode=0o500)
    with pytest.raises(PermissionError) as caught:
        convert('digits', tmp_path / 'in' / 'x.zip')
    assert caught.value.filename == str(tmp_path / 'in')


def test_the_lock_ends_with_the_writer(tmp_path):
    with DatasetWriter(tmp_path / 'x.zip') as writer:
        writer.add('.png', b'1')
        writer.finish(None)
    with DatasetWriter(tmp_path / 'x.zip', overwrite=True):
        pass
