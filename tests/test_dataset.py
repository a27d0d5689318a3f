"""Reading datasets (dataset/files/archive.py, dataset/reader.py) and the data order (dataset/order.py)."""

import io
import itertools
import json
import multiprocessing
import pickle
import struct
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.files.archive import Archive
from dataset.files.writer import DatasetWriter, encode_png
from dataset.order import BatchOrder, epoch_order, make_loader
from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from tests.helpers import write_dataset

COUNT, HEIGHT, WIDTH = 23, 5, 7
LABELS = np.arange(COUNT) * 2 % 9


def random_images(count=COUNT, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, channels), dtype=np.uint8)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / 'data.zip'
    write_dataset(path, random_images(), LABELS)
    return path


def encode(image, mode=None, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(image).convert(mode).save(file, **{'format': 'png', **options})
    return file.getvalue()


def write_files(path, files):
    """Write {name: bytes} as a zip or a folder, by the ending of `path`."""
    if path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as file:
            for name, data in files.items():
                file.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def label_file(labels):
    return json.dumps({'labels': labels}).encode()


PICTURE = encode(random_images(1)[0])
OTHER = encode(random_images(1, seed=1)[0])


# --- Reading ---


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('labels', [LABELS, None])
def test_zip_and_folder_give_what_was_written(tmp_path, channels, labels):
    images = random_images(channels=channels)
    datasets = []
    for name in ('data.zip', 'data'):
        write_dataset(tmp_path / name, images, labels)
        dataset = ImageDataset(tmp_path / name)
        datasets.append(dataset)
        assert dataset.name == 'data' and dataset.path == str(tmp_path / name)
        assert len(dataset) == COUNT and dataset.image_shape == (channels, HEIGHT, WIDTH)
        assert dataset.num_classes == (0 if labels is None else 9)
        for i in range(COUNT):
            image, label = dataset[i]
            assert image.dtype == torch.uint8 and image.is_contiguous()
            assert np.array_equal(image.permute(1, 2, 0).numpy(), images[i])
            assert type(label) is int and label == (-1 if labels is None else labels[i])
    assert datasets[0].fingerprint == datasets[1].fingerprint
    assert (datasets[0].labels is None) == (labels is None)
    assert labels is None or (datasets[0].labels.dtype == np.int64 and np.array_equal(datasets[0].labels, labels))


def test_order_is_that_of_the_names_not_of_the_file_system(tmp_path):
    names = ['b.png', 'a/z.png', 'a.png', 'B.PNG', 'é.png']
    contents = {name: encode(image) for name, image in zip(names, random_images(), strict=False)}
    for path in (tmp_path / 'x', tmp_path / 'y.zip'):
        dataset = ImageDataset(write_files(path, contents))
        assert dataset.names == sorted(names)
        for i, name in enumerate(sorted(names)):
            assert np.array_equal(dataset[i][0].permute(1, 2, 0).numpy(), random_images()[names.index(name)])


def test_labels_follow_names_and_not_positions(tmp_path):
    files = {'a.png': PICTURE, 'b.png': OTHER, 'dataset.json': label_file([['b.png', 4], ['a.png', 1]])}
    assert ImageDataset(write_files(tmp_path / 'data.zip', files)).labels.tolist() == [1, 4]


def test_hidden_and_other_files_do_not_count(tmp_path):
    files = {'a.png': PICTURE, '__MACOSX/._a.png': b'?', '.b.png': b'?', 'x/.y/c.png': b'?', 'readme.txt': b'?'}
    for path in (tmp_path / 'data', tmp_path / 'data.zip'):
        assert ImageDataset(write_files(path, files)).names == ['a.png']


@pytest.mark.parametrize('ending', ['jpg', 'jpeg', 'webp', 'bmp'])
def test_other_formats(tmp_path, ending):
    image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    data = encode(image, format=ending.replace('jpg', 'jpeg'))
    dataset = ImageDataset(write_files(tmp_path / 'data', {f'a.{ending.upper()}': data}))
    assert (dataset[0][0].int() - 200).abs().max() <= 2


def test_fingerprint_tells_datasets_apart(tmp_path, archive):
    prints = {ImageDataset(archive).fingerprint}
    changed = LABELS.copy()
    changed[5] += 1
    for i, labels in enumerate([changed, None, LABELS[:22]]):
        write_dataset(tmp_path / f'{i}.zip', random_images(COUNT if labels is None else len(labels)), labels)
        prints.add(ImageDataset(tmp_path / f'{i}.zip').fingerprint)
    files = {'a.png': PICTURE, 'b.png': encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8))}
    prints.add(ImageDataset(write_files(tmp_path / 'ab', files)).fingerprint)
    prints.add(ImageDataset(write_files(tmp_path / 'ac', {'a.png': PICTURE, 'c.png': files['b.png']})).fingerprint)
    prints.add(ImageDataset(write_files(tmp_path / 'ba', {'a.png': files['b.png'], 'b.png': PICTURE})).fingerprint)
    assert len(prints) == 7 and all(len(text) == 16 for text in prints)
    assert ImageDataset(archive).fingerprint in prints


def test_opening_decodes_one_image_only(tmp_path):
    files = {f'{i}.png': PICTURE if i == 0 else b'not an image' for i in range(5)}
    dataset = ImageDataset(write_files(tmp_path / 'data.zip', files))
    assert len(dataset) == 5
    with pytest.raises(UserError, match=r'data.zip/3.png is damaged or of another format'):
        dataset[3]


def test_pickled_dataset_reads_without_its_handle(archive):
    dataset = ImageDataset(archive)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[i][0], dataset[i][0]) for i in range(COUNT))


def test_a_zip_is_opened_once(archive, monkeypatch):
    dataset = ImageDataset(archive)
    monkeypatch.delattr(zipfile, 'ZipFile')
    assert dataset[1][0].shape == dataset[2][0].shape


def read_often(dataset, rounds, answers):
    try:
        answers.put(all(dataset[i % COUNT][0].numel() for i in range(rounds)))
    except UserError:
        answers.put(False)


def test_forked_processes_do_not_share_a_file_position(archive):
    dataset = ImageDataset(archive)  # its handle is open now
    context = multiprocessing.get_context('fork')
    answers = context.SimpleQueue()
    processes = [context.Process(target=read_often, args=(dataset, 1000, answers)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [answers.get() for _ in processes] == [True, True]
    for process in processes:
        process.join()


@pytest.mark.parametrize('labels', [LABELS, None])
def test_mirror_images_follow_the_images(tmp_path, labels):
    write_dataset(tmp_path / 'data.zip', random_images(), labels)
    plain, dataset = ImageDataset(tmp_path / 'data.zip'), ImageDataset(tmp_path / 'data.zip', xflip=True)
    assert len(dataset) == 2 * COUNT and dataset.fingerprint != plain.fingerprint and len(dataset.fingerprint) == 16
    assert dataset.names == plain.names and dataset.image_shape == plain.image_shape
    for i in range(COUNT):
        image, label = plain[i]
        assert torch.equal(dataset[i][0], image) and torch.equal(dataset[COUNT + i][0], image.flip(2))
        assert dataset[COUNT + i][0].is_contiguous() and dataset[i][1] == dataset[COUNT + i][1] == label
    assert torch.equal(dataset[-1][0], plain[-1][0].flip(2))
    with pytest.raises(IndexError):
        dataset[2 * COUNT]
    batch = next(make_loader(dataset, BatchOrder(2 * COUNT, 0, 2 * COUNT, 2 * COUNT)))  # an epoch
    assert sorted(image.numpy().tobytes() for image in batch.images) == sorted(
        image.numpy().tobytes() for image, _ in dataset
    )


# --- Bad input ---


def png_claiming(width, height):
    """A PNG whose header promises that many pixels."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


BAD_IMAGES = {
    'truncated': (PICTURE[: len(PICTURE) // 2], 'cannot be decoded'),
    'no image': (b'hello', 'is damaged or of another format than BMP, JPEG, PNG, WEBP'),
    'GIF by another name': (encode(random_images(1)[0], 'P', format='gif'), 'is damaged or of another format'),
    'empty': (b'', 'is damaged or of another format'),
    'other size': (encode(np.zeros((WIDTH, HEIGHT, 3), np.uint8)), 'is 5x7 RGB, but a.png is 7x5 RGB'),
    'other mode': (encode(np.zeros((HEIGHT, WIDTH), np.uint8)), 'is 7x5 grayscale, but a.png is 7x5 RGB'),
    'RGBA': (encode(np.zeros((HEIGHT, WIDTH, 4), np.uint8)), 'is of mode RGBA'),
    '16 bits': (encode(np.zeros((HEIGHT, WIDTH), np.uint16)), 'is of mode I;16'),
    '100 megapixels': (png_claiming(10000, 10000), 'has too many pixels'),
    'gigapixels': (png_claiming(40000, 40000), 'has too many pixels'),
}


@pytest.mark.parametrize('kind', BAD_IMAGES)
@pytest.mark.parametrize('ending', ['', '.zip'])
def test_bad_image_is_named(tmp_path, kind, ending):
    data, message = BAD_IMAGES[kind]
    path = write_files(tmp_path / f'data{ending}', {'a.png': PICTURE, 'x/b.png': data})
    dataset = ImageDataset(path)
    with pytest.raises(UserError, match=f'{path}/x/b.png {message}'):
        dataset[1]


BAD_LABEL_FILES = {
    'not JSON': (b'{"labels": [', 'is not JSON'),
    'not text': (b'\xff\xfe\xff', 'is not JSON'),
    'too deep': (b'[' * 100_000, 'is not JSON'),
    'no object': (b'[]', r'should read like \{"labels": \[\["00000/img00000000.png", 6\], ...\]\}'),
    'a mapping': (b'{"labels": {"a.png": 1, "b.png": 2}}', 'should read like'),
    'no pairs': (label_file([['a.png', 1, 2], ['b.png', 2]]), 'should read like'),
    'no names': (label_file([[1, 1], ['b.png', 2]]), 'should read like'),
    'missing': (label_file([['a.png', 1]]), 'has no label for 1 of 2 images, for instance b.png'),
    'twice': (label_file([['a.png', 1], ['b.png', 1], ['b.png', 2]]), 'more than one label .* for instance b.png'),
    'float': (label_file([['a.png', 1.5], ['b.png', 1]]), 'not whole numbers from 0 up, for instance 1.5 of a.png'),
    'negative': (label_file([['a.png', 1], ['b.png', -1]]), 'not whole numbers from 0 up, for instance -1 of b.png'),
    'bool': (label_file([['a.png', True], ['b.png', 1]]), 'for instance True of a.png'),
    'text': (label_file([['a.png', '1'], ['b.png', 1]]), "for instance '1' of a.png"),
    'extra': (
        b'{"labels": [["a.png", 1], ["b.png", 1], ["c.png", 1], ["d.png", 1]], "edm2plus": {"source": "x"}}',
        'has labels for 2 images that are not there, for instance c.png',
    ),
    'partly vectors': (label_file([['a.png', [0, 0]], ['b.png', 1]]), r'for instance \[0, 0\] of a.png'),
    'long': (label_file([['a.png', 'x' * 10**6], ['b.png', 1]]), "xxx' of a.png"),
    'enormous': (label_file([['a.png', 2**70], ['b.png', 1]]), 'of a.png'),
}


@pytest.mark.parametrize('kind', BAD_LABEL_FILES)
def test_bad_label_file_is_named(tmp_path, kind):
    data, message = BAD_LABEL_FILES[kind]
    path = write_files(tmp_path / 'data.zip', {'a.png': PICTURE, 'b.png': PICTURE, 'dataset.json': data})
    with pytest.raises(UserError, match=f'{path}/dataset.json .*{message}'):
        ImageDataset(path)


def test_problems_of_labels_are_reported_together(tmp_path):
    labels = label_file([['a.png', -1], ['c.png', 1], ['c.png', 2]])
    path = write_files(tmp_path / 'data', {'a.png': PICTURE, 'b.png': PICTURE, 'dataset.json': labels})
    with pytest.raises(UserError) as caught:
        ImageDataset(path)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ('labels', 'expected', 'message'),
    [
        ([['a.png', 4.0], ['b.png', 1]], [4, 1], 'has 1 labels such as 4.0'),
        ([['a.png', [0, 0, 1]], ['b.png', [1.0, 0, 0]]], [2, 0], 'has 2 labels such as 4.0, or one-hot vectors'),
        ([['a.png', [0.5, 0.5]], ['b.png', [0, 1]]], None, 'vectors as labels that are not one-hot, of a.png'),
        ([['d.png', 1], ['a.png', 2], ['c.png', 1], ['b.png', 1]], [2, 1], 'for 2 images that are not there, for'),
    ],
)  # fmt: skip
def test_labels_that_other_readers_take_open_with_a_warning(tmp_path, capsys, labels, expected, message):
    path = write_files(tmp_path / 'x.zip', {'a.png': PICTURE, 'b.png': PICTURE, 'dataset.json': label_file(labels)})
    found = ImageDataset(path).labels
    assert (found is None and expected is None) or found.tolist() == expected
    errors = capsys.readouterr().err
    assert errors.startswith(f'warning: {path}/dataset.json ') and message in errors and errors.count('\n') == 1


@pytest.mark.parametrize(
    ('names', 'expected'),
    [(['ant', 'bee'], ['ant', 'bee']), (['ant', 'bee', 'cat'], ['ant', 'bee', 'cat']), (None, None), (['ant'], None),
     ([1, 2], None), ({'0': 'ant'}, None)],
)  # fmt: skip
def test_class_names(tmp_path, capsys, names, expected):
    content = {'labels': [['a.png', 1], ['b.png', 0]], 'class_names': names}
    files = {'a.png': PICTURE, 'b.png': PICTURE, 'dataset.json': json.dumps(content).encode()}
    assert ImageDataset(write_files(tmp_path / 'x.zip', files)).class_names == expected
    assert ('are not a name for each' in capsys.readouterr().err) == (names is not None and expected is None)


def test_missing_path_says_how_to_make_one(tmp_path):
    path = tmp_path / 'none.zip'
    command = f'python dataset_tool.py convert --source=digits --dest={path}'
    with pytest.raises(UserError, match=f'{path} does not exist; .*{command}'):
        ImageDataset(path)


def test_not_a_zip(tmp_path):
    path = tmp_path / 'data.zip'
    path.write_bytes(b'hello')
    with pytest.raises(UserError, match=f'{path} is neither a folder nor a zip'):
        ImageDataset(path)


@pytest.mark.parametrize('kept', [0.3, 0.999])
def test_cut_zip(archive, kept):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=f'{archive} is cut short or damaged'):
        ImageDataset(archive)


def test_damage_inside_a_zip_is_noticed(archive):
    dataset = ImageDataset(archive)
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        data[file.getinfo(dataset.names[7]).header_offset + 100] ^= 1
    archive.write_bytes(data)
    dataset = ImageDataset(archive)
    with pytest.raises(UserError, match=f'{archive}/{dataset.names[7]} cannot be read from its zip: Bad CRC'):
        dataset[7]


@pytest.mark.parametrize('ending', ['', '.zip'])
def test_nothing_in_it(tmp_path, ending):
    path = write_files(tmp_path / f'data{ending}', {'readme.txt': b'hello'})
    with pytest.raises(UserError, match=f'{path} holds no images .*png'):
        ImageDataset(path)


def test_file_gone_after_opening(tmp_path):
    path = write_files(tmp_path / 'data', {'a.png': PICTURE, 'b.png': PICTURE})
    dataset = ImageDataset(path)
    (path / 'b.png').unlink()
    with pytest.raises(FileNotFoundError) as caught:
        dataset[1]
    assert caught.value.filename == f'{path}/b.png'


def test_repeated_name_in_a_zip(tmp_path):
    path = tmp_path / 'data.zip'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('a.png', PICTURE)
        with pytest.warns(UserWarning, match='Duplicate name'):
            file.writestr('a.png', OTHER)
    with pytest.raises(
        UserError, match=f'{path} is cut short or damaged: 1 of its names are there more than once, .* a.png'
    ):
        ImageDataset(path)


def test_links(tmp_path):
    write_files(tmp_path / 'elsewhere', {'b.png': PICTURE})
    path = write_files(tmp_path / 'data', {'a.png': PICTURE})
    (path / 'linked').symlink_to(tmp_path / 'elsewhere')
    assert list(Archive(path).files.names) == ['a.png', 'linked/b.png']
    (tmp_path / 'elsewhere' / 'back').symlink_to(path)
    with pytest.raises(UserError, match=f'{path}/linked/back is a link to a folder that it is in'):
        Archive(path)


def test_an_endless_device_is_not_read(tmp_path):
    path = write_files(tmp_path / 'data', {'a.png': PICTURE})
    (path / 'b.png').symlink_to('/dev/zero')
    with pytest.raises(UserError, match=f'{path}/b.png is not a regular file'):
        ImageDataset(path)[1]


@pytest.mark.parametrize('ending', ['', '.zip'])
def test_files_of_enormous_content(tmp_path, monkeypatch, ending):
    """A megabyte of a zip may unpack to a gigabyte."""
    monkeypatch.setattr(Archive.read, '__defaults__', (10**5,))
    path = tmp_path / f'data{ending}'
    write_files(path, {'a.png': PICTURE, 'b.png': bytes(10**5 + 1)})
    dataset = ImageDataset(path)
    assert dataset[0][0].shape == (3, HEIGHT, WIDTH)
    with pytest.raises(UserError, match=f'{path}/b.png .*100001 bytes, more than the 100000 that are read'):
        dataset[1]


def test_a_label_file_is_as_large_as_its_images_need(tmp_path):
    path = tmp_path / 'data.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('a.png', PICTURE)
        file.writestr('dataset.json', b'[' + b'[],' * 10**6 + b'0]')
    with pytest.raises(UserError, match=r'dataset.json .*unpacks to 3000003 bytes, more than the 1064960'):
        ImageDataset(path)


def test_names_from_a_zip_do_not_reach_the_terminal(tmp_path):
    name = '\x1b[31m' + 'x' * 1000 + '.png'
    path = write_files(tmp_path / 'data.zip', {'a.png': PICTURE, f'b/{name}': b'?'})
    with pytest.raises(UserError) as caught:
        ImageDataset(path)[1]
    assert '\x1b' not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), length=st.sampled_from([1, 1, 20]), value=st.integers(0, 255))
def test_damage_is_noticed_or_harmless(tmp_path, place, length, value):
    """Any byte, or twenty: what opens has the images and labels that were written, or, less a name, no labels."""
    with DatasetWriter(tmp_path / 'whole.zip') as writer:
        for image in random_images(5):
            writer.add('.png', encode_png(image))
        writer.finish(LABELS[:5], {'source': 'x'})
    data = bytearray((tmp_path / 'whole.zip').read_bytes())
    start = int(place * len(data))
    data[start : start + length] = bytes([value]) * len(data[start : start + length])
    (tmp_path / 'x.zip').write_bytes(data)
    try:
        dataset = ImageDataset(tmp_path / 'x.zip')
        items = [(image.permute(1, 2, 0).numpy(), label) for image, label in dataset]
    except UserError:
        return
    assert dataset.labels is None or [label for _, label in items] == LABELS[:5].tolist()
    assert all(np.array_equal(image, expected) for (image, _), expected in zip(items, random_images(5), strict=True))


# --- Order ---

SIZE, SEED, BATCH = 10, 3, 48


def sequence(world_size, micro_batch, steps=3, start=0):
    """Dataset indices by image number, put together from all ranks; every number must come exactly once."""
    visited = {}
    for rank in range(world_size):
        order = BatchOrder(SIZE, SEED, BATCH, micro_batch, rank, world_size, start)
        micro_batches = list(itertools.islice(order, steps * BATCH // (world_size * micro_batch)))
        assert all(len(pairs) == micro_batch for pairs in micro_batches)
        for number, index in itertools.chain(*micro_batches):
            assert number not in visited
            visited[number] = index
    assert sorted(visited) == list(range(start, start + steps * BATCH))
    return [visited[number] for number in sorted(visited)]


@pytest.mark.parametrize(('world_size', 'micro_batch'), [(1, 48), (1, 1), (2, 8), (2, 24), (3, 16), (3, 2), (8, 2)])
def test_ranks_together_visit_one_sequence(world_size, micro_batch):
    assert sequence(world_size, micro_batch) == sequence(1, 16)


def test_every_epoch_is_another_permutation():
    indices = sequence(1, 16, steps=10)
    epochs = [tuple(indices[i : i + SIZE]) for i in range(0, len(indices) // SIZE * SIZE, SIZE)]
    assert len(set(epochs)) == len(epochs) == 48
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)


@pytest.mark.parametrize('start', [1, 7, 10, 48, 96, 131])
def test_starting_anywhere_is_going_on(start):
    whole = sequence(1, 16, steps=8)
    for world_size, micro_batch in [(1, 16), (2, 8), (3, 4), (8, 6)]:
        assert sequence(world_size, micro_batch, steps=4, start=start) == whole[start : start + 4 * BATCH]


def test_a_late_start_costs_no_replay():
    order = BatchOrder(1000, SEED, 64, 32, 1, 2, start_nimg=2 * 10**9)
    numbers = [number for number, _ in next(iter(order))]
    assert numbers == list(range(2 * 10**9 + 32, 2 * 10**9 + 64))


def test_accumulation_rounds():
    order = BatchOrder(SIZE, SEED, BATCH, micro_batch=4, rank=1, world_size=3, start_nimg=96)
    firsts = [pairs[0][0] for pairs in itertools.islice(order, 8)]
    assert firsts == [96 + (a * 3 + 1) * 4 for a in range(4)] + [144 + (a * 3 + 1) * 4 for a in range(4)]


def test_order_depends_on_the_seed_and_stays_what_it_was():
    assert epoch_order(8, seed=0, epoch=0).tolist() == GOLDEN[0]
    assert epoch_order(8, seed=0, epoch=1).tolist() == GOLDEN[1]
    assert epoch_order(8, seed=1, epoch=0).tolist() == GOLDEN[2]
    assert next(iter(BatchOrder(8, 0, 16, 16))) == list(enumerate(GOLDEN[0] + GOLDEN[1]))


# A library that changed these would make a resumed run see other images.
GOLDEN = ([5, 0, 4, 2, 1, 6, 7, 3], [0, 6, 2, 7, 5, 4, 3, 1], [1, 0, 5, 4, 3, 7, 6, 2])


def test_impossible_split_is_refused():
    for wrong in ({'micro_batch': 5}, {'micro_batch': 16, 'world_size': 2}, {'rank': 1}, {'dataset_size': 0}):
        with pytest.raises(AssertionError):
            BatchOrder(**{'dataset_size': SIZE, 'seed': 0, 'batch': BATCH, 'micro_batch': 16, **wrong})


# --- Loader ---


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def test_batches_hold_the_images_of_the_order(archive):
    dataset = ImageDataset(archive)
    order = BatchOrder(COUNT, SEED, 16, 4, 1, 2, start_nimg=100)
    for batch, pairs in zip(take(make_loader(dataset, order), 9), order, strict=False):
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, HEIGHT, WIDTH)
        assert batch.labels.dtype == batch.numbers.dtype == torch.int64
        assert batch.numbers.tolist() == [number for number, _ in pairs]
        assert batch.labels.tolist() == [LABELS[index] for _, index in pairs]
        for image, (_, index) in zip(batch.images, pairs, strict=True):
            assert torch.equal(image, dataset[index][0])


def test_without_labels_they_are_minus_one(tmp_path):
    write_dataset(tmp_path / 'data', random_images(), None)
    (batch,) = take(make_loader(ImageDataset(tmp_path / 'data'), BatchOrder(COUNT, 0, 4, 4)), 1)
    assert batch.labels.tolist() == [-1] * 4


@pytest.mark.filterwarnings('ignore:This DataLoader will create')  # on a machine with one core
def test_workers_change_nothing(archive):
    dataset = ImageDataset(archive)
    order = BatchOrder(COUNT, SEED, 8, 4)
    state = torch.get_rng_state()
    alone, helped = (take(make_loader(dataset, order, workers), 12) for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels) and torch.equal(one.numbers, other.numbers)
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('how', ['damaged', 'gone'])
def test_bad_image_reaches_the_main_process_as_one_line(tmp_path, workers, how):
    path = write_files(tmp_path / 'data', {'a.png': PICTURE, 'b.png': PICTURE})
    dataset = ImageDataset(path)
    if how == 'damaged':
        (path / 'b.png').write_bytes(PICTURE[:50])
    else:
        (path / 'b.png').unlink()
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        take(make_loader(dataset, BatchOrder(2, 0, 2, 2), workers), 1)
    assert f'{path}/b.png' in str(caught.value) and '\n' not in str(caught.value)
    assert how == 'damaged' or caught.value.filename == f'{path}/b.png'
