"""The index that large datasets keep beside them (dataset/files/index.py, dataset/files/file_table.py)."""

import multiprocessing
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from dataset.files import index as dataset_index
from dataset.files.file_table import Names
from dataset.files.index import index_path, open_index
from dataset.files.writer import DatasetWriter, encode_npy
from dataset.reader import ImageDataset
from tests.helpers import write_dataset

COUNT = 12


@pytest.fixture(params=['data.zip', 'data'])
def path(request, tmp_path, monkeypatch):
    """A dataset that counts as large."""
    monkeypatch.setattr(dataset_index, 'KEEP_FROM', COUNT)
    return make(tmp_path / request.param)


def make(path, seed=0, count=COUNT, classes=4):
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    write_dataset(path, images, np.arange(count) % classes)
    return path


def same(one, other):
    return (
        list(one.names) == list(other.names)
        and np.array_equal(one.labels, other.labels)
        and (one.fingerprint, one.made_with) == (other.fingerprint, other.made_with)
        and all(torch.equal(one[i][0], other[i][0]) for i in range(len(one)))
    )


@pytest.fixture
def scans(monkeypatch):
    """How often a dataset was looked through."""
    made = []
    make = dataset_index._make
    monkeypatch.setattr(dataset_index, '_make', lambda archive: made.append(archive.path) or make(archive))
    return made


def test_the_index_gives_what_looking_through_gives(path, scans, monkeypatch):
    first = ImageDataset(path)
    assert index_path(path).name == f'.{path.name}.index.safetensors' and index_path(path).exists()
    again = ImageDataset(path)
    assert len(scans) == 1 and same(first, again)
    monkeypatch.setattr(dataset_index, '_load', lambda path: None)
    assert same(ImageDataset(path), again) and len(scans) == 2


def test_class_names_are_in_it(tmp_path, scans, monkeypatch):
    monkeypatch.setattr(dataset_index, 'KEEP_FROM', 1)
    with DatasetWriter(tmp_path / 'data.zip') as writer:
        writer.add('.npy', encode_npy(np.zeros((1, 2, 2), np.uint8)))
        writer.finish([1], class_names=['ant', 'bee'])
    assert [ImageDataset(tmp_path / 'data.zip').class_names for _ in range(2)] == [['ant', 'bee']] * 2
    assert len(scans) == 1


def test_small_datasets_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_index, 'KEEP_FROM', COUNT + 1)
    ImageDataset(make(tmp_path / 'data.zip'))
    assert [path.name for path in tmp_path.iterdir()] == ['data.zip']


def test_another_zip_has_another_index(tmp_path, scans, monkeypatch):
    monkeypatch.setattr(dataset_index, 'KEEP_FROM', 1)
    path = make(tmp_path / 'data.zip')
    about = path.stat()
    before = ImageDataset(path).fingerprint
    make(path, seed=1, classes=3)  # another time, the same size
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    dataset = ImageDataset(path)
    assert len(scans) == 2 and dataset.fingerprint != before
    assert all(dataset[i] for i in range(COUNT))
    make(path, seed=1, count=COUNT + 1)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1))  # another size alone
    assert len(ImageDataset(path)) == COUNT + 1 and len(scans) == 3


@pytest.mark.parametrize('how', ['new file', 'new folder', 'file gone', 'labels'])
def test_a_changed_folder_is_looked_through_again(tmp_path, scans, monkeypatch, how):
    monkeypatch.setattr(dataset_index, 'KEEP_FROM', 1)
    path = make(tmp_path / 'data')
    for folder in (path, path / '00000'):
        os.utime(folder, (1, 1))
    before = ImageDataset(path)
    image = (path / '00000' / 'img00000003.png').read_bytes()
    text = (path / 'dataset.json').read_text()
    if how == 'new file':
        (path / '00000' / 'zzz.png').write_bytes(image)
        (path / 'dataset.json').write_text(text.replace(']]', '], ["00000/zzz.png", 1]]'))
    elif how == 'new folder':
        (path / '00001').mkdir()
    elif how == 'file gone':
        (path / '00000' / 'img00000011.png').unlink()
        (path / 'dataset.json').write_text('{"labels": null}')
    else:
        (path / 'dataset.json').write_text(text.replace('img00000003.png", 3', 'img00000003.png", 2'))
    after = ImageDataset(path)
    assert len(scans) == 2
    assert (after.fingerprint == before.fingerprint) == (how == 'new folder')


def test_a_folder_that_changes_while_it_is_looked_through(tmp_path, scans, monkeypatch):
    monkeypatch.setattr(dataset_index, 'KEEP_FROM', 1)
    path = make(tmp_path / 'data')
    (path / 'dataset.json').unlink()
    os.utime(path / '00000', (1, 1))
    make_index = dataset_index._make

    def copy_meanwhile(archive):
        (path / '00000' / 'zzz.png').write_bytes((path / '00000' / 'img00000003.png').read_bytes())
        return make_index(archive)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_index, '_make', copy_meanwhile)
        assert len(ImageDataset(path)) == COUNT
    assert len(ImageDataset(path)) == COUNT + 1


@pytest.mark.parametrize('damage', ['cut', 'empty', 'other', 'old'])
def test_a_damaged_index_is_made_anew(path, scans, damage):
    whole = ImageDataset(path)
    kept = index_path(path)
    data = kept.read_bytes()
    if damage == 'old':
        data = data.replace(b'\\"version\\": 1', b'\\"version\\": 0')
    kept.unlink()  # the old one is still mapped
    kept.write_bytes({'cut': data[:-7], 'empty': b'', 'other': b'x' * 99}.get(damage, data))
    assert same(ImageDataset(path), whole) and len(scans) == 2
    assert same(ImageDataset(path), whole) and len(scans) == 2


def test_a_folder_that_cannot_be_written(path, scans, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(dataset_index, 'save_tensors', refuse)
    assert same(ImageDataset(path), ImageDataset(path)) and len(scans) == 2
    assert not index_path(path).exists()


def open_and_answer(path, barrier, answers):
    barrier.wait()
    answers.put(open_index(path).fingerprint)


def test_processes_that_open_it_at_once(path):
    context = multiprocessing.get_context('fork')
    barrier, answers = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=open_and_answer, args=(path, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    prints = {answers.get() for _ in processes}
    for process in processes:
        process.join()
    assert prints == {ImageDataset(path).fingerprint}
    assert {file.name for file in path.parent.iterdir()} == {path.name, index_path(path).name}


def test_a_mapped_index_goes_to_other_processes(path):
    ImageDataset(path)
    dataset = ImageDataset(path)
    assert same(pickle.loads(pickle.dumps(dataset)), dataset)


def test_a_replaced_zip_is_noticed(tmp_path):
    """Its index in memory is of the old one; reading by place must not give the bytes of another image."""
    path = make(tmp_path / 'data.zip')
    dataset = ImageDataset(path)
    os.remove(path)  # noqa: PTH107
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('00000/img00000000.png', b'?' * 10_000)
    with pytest.raises(Exception, match=r'data.zip/00000/img00000007.png'):
        dataset = pickle.loads(pickle.dumps(dataset))  # as in a spawned worker, which opens the file anew
        dataset[7]


def test_the_order_of_a_mapped_index_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_index, 'KEEP_FROM', 1)
    with DatasetWriter(tmp_path / 'data.zip') as writer:
        image = np.zeros((1, 2, 2), np.uint8)
        for i in range(1100):
            writer.add('.npy', encode_npy(image + i % 256))
        writer.finish(None)
    for _ in range(2):
        dataset = ImageDataset(tmp_path / 'data.zip')
        assert [int(dataset[i][0][0, 0, 0]) for i in (0, 999, 1000, 1099)] == [0, 999 % 256, 1000 % 256, 1099 % 256]


# --- Names ---


def test_names_are_a_list():
    words = ['a', 'äö', '', 'x/y.png', '猫', '\udcff']
    names = Names.of([word.encode('utf-8', 'surrogateescape') for word in words])
    assert names == words and list(names) == words and len(names) == 6
    assert [names[i] for i in range(6)] == words and names[-1] == words[-1] and names[1:3] == words[1:3]
    assert names != words[:5] and names != [*words[:5], 'x']
    for i in (6, -7):
        with pytest.raises(IndexError):
            names[i]
    assert Names.of([]) == []
