"""Latents: encoding a dataset, drawing from it, and training on it (dataset/making/encode.py, training/inputs.py)."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import dataset_tool
from dataset.files.archive import Archive
from dataset.files.writer import DatasetWriter, encode_npy, work_folder
from dataset.making import encode as encode_module
from dataset.making.encode import encode_dataset
from dataset.making.statistics import LatentStatistics
from dataset.order import BatchOrder, make_loader
from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from networks.encoders import LATENT_MEAN, LATENT_STD, StabilityVAEEncoder, encode_pixels
from networks.files import read_info
from tests.helpers import write_dataset
from torch_utils.random import stream, stream_seed
from training.inputs import to_training_images, training_inputs

CPU = torch.device('cpu')
COUNT = 13


class ColorVAE:
    """Its mean is the colours and their sum over 8x8 pixels, its standard deviation half of that plus one."""

    def encode(self, x):
        small = torch.nn.functional.avg_pool2d(x, 8)
        mean = torch.cat([small, small.sum(dim=1, keepdim=True)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=mean / 2 + 1))


@pytest.fixture
def images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 24, 3), dtype=np.uint8)
    write_dataset(tmp_path / 'images.zip', pixels, np.arange(COUNT) % 3)
    return ImageDataset(tmp_path / 'images.zip')


def test_latents_have_no_mirror_images(tmp_path, images):
    """The VAE's answer to a mirror image is not its mirrored answer."""
    encode(images, tmp_path / 'x.zip')
    with pytest.raises(UserError, match=r'x\.zip holds latents, which cannot be mirrored'):
        ImageDataset(tmp_path / 'x.zip', xflip=True)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(encode_module, 'CHUNK', 4)


def encode(dataset, dest, **options):
    return encode_dataset(dataset, dest, StabilityVAEEncoder(ColorVAE()), 'colors', CPU, batch=3, **options)


def latents_of(dataset):
    """What the VAE gives for all images, in one go."""
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    return StabilityVAEEncoder(ColorVAE()).encode(images)


# --- Encoding ---


@pytest.mark.parametrize('ending', ['.zip', ''])
def test_latents_are_those_of_the_images(tmp_path, images, small_chunks, ending):
    dest = tmp_path / f'latents{ending}'
    encode(images, dest)
    dataset = ImageDataset(dest)
    assert dataset.image_shape == (4, 2, 3) and dataset.encoder == 'stabilityvae'
    assert dataset.labels.tolist() == images.labels.tolist()
    assert dataset.made_with['vae'] == 'colors' and dataset.made_with['resolution'] == [24, 16]
    stored = torch.stack([dataset[i][0] for i in range(COUNT)])
    assert stored.dtype == torch.float32 and torch.equal(stored, latents_of(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['images.zip', f'latents{ending}']
    array = np.load(Archive(dest).path + '/00000/img00000000.npy') if not ending else stored[0].numpy()
    assert array.dtype == np.float32 and array.shape == (8, 2, 3)


def test_going_on_encodes_only_what_is_missing(tmp_path, images, small_chunks, monkeypatch):
    encode(images, tmp_path / 'whole.zip')
    seen = []

    class Counting(ColorVAE):
        stop = 6

        def encode(self, x):
            seen.append(len(x))
            if sum(seen) == self.stop:
                raise KeyboardInterrupt
            return super().encode(x)

    def run(resume):
        return encode_dataset(
            images, tmp_path / 'x.zip', StabilityVAEEncoder(Counting()), 'colors', CPU, batch=3, resume=resume
        )

    with pytest.raises(KeyboardInterrupt):
        run(resume=False)
    assert not (tmp_path / 'x.zip').exists() and work_folder(tmp_path / 'x.zip').exists()
    with pytest.raises(UserError, match='add --resume to continue'):
        run(resume=False)
    Counting.stop = None
    # It stops once more, in putting together, after the second chunk.
    checkpoint = DatasetWriter.checkpoint

    def stopping(self, state):
        checkpoint(self, state)
        if self.count == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, 'checkpoint', stopping)
        with pytest.raises(KeyboardInterrupt):
            run(resume=True)
    assert sum(seen) == 6 + COUNT - 4, 'the first chunk was made before'
    statistics = run(resume=True)
    assert sum(seen) == 6 + COUNT - 4, 'all chunks were made before'
    assert (tmp_path / 'x.zip').read_bytes() == (tmp_path / 'whole.zip').read_bytes()
    assert statistics.sums == encode(images, tmp_path / 'again.zip').sums


def test_going_on_with_another_vae_is_refused(tmp_path, images):
    with DatasetWriter(tmp_path / 'x.zip', encode_module.about_encoding(images, 'other', None)) as writer:
        writer.checkpoint({})
    with pytest.raises(UserError, match=r'x.zip was started with other vae; --overwrite starts over'):
        encode(images, tmp_path / 'x.zip', resume=True)


def test_the_fingerprint_tells_vaes_apart(tmp_path, images):
    """Files of latents have the same names and sizes whatever is in them."""
    prints = set()
    for vae in ('colors', 'others'):
        encode_dataset(images, tmp_path / 'x.zip', StabilityVAEEncoder(ColorVAE()), vae, CPU)
        prints.add(ImageDataset(tmp_path / 'x.zip').fingerprint)
    assert len(prints) == 2


def test_what_a_vae_does_not_take(tmp_path, images):
    write_dataset(tmp_path / 'gray.zip', np.zeros((2, 16, 16, 1), np.uint8), None)
    write_dataset(tmp_path / 'odd.zip', np.zeros((2, 16, 20, 3), np.uint8), None)
    encode(images, tmp_path / 'latents.zip')
    for name, message in [('gray', 'holds grayscale'), ('odd', 'images of 20x16 .* multiples of 8'),
                          ('latents', 'holds latents already')]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            encode(ImageDataset(tmp_path / f'{name}.zip'), tmp_path / 'x.zip')
    assert not (tmp_path / 'x.zip').exists()


def test_statistics_are_those_of_the_draws():
    generator = stream(0, 'test')
    moments = torch.randn(50, 8, 6, 6, generator=generator) * 2 + 1
    moments[:, 4:] = moments[:, 4:].abs()
    statistics = LatentStatistics()
    for part in moments.split(20):
        statistics.add(part)
    count, total, squares = statistics.sums
    draws = torch.stack([to_training_images(moments, range(i * 50, i * 50 + 50), 0) for i in range(300)])
    mean = draws.double().mean(dim=(0, 1, 3, 4))
    variance = draws.double().var(dim=(0, 1, 3, 4))
    assert count == 50 * 36
    assert torch.allclose(torch.tensor(total).double() / count, mean, atol=0.01)
    assert torch.allclose(torch.tensor(squares).double() / count - mean**2, variance, rtol=0.01)


@pytest.mark.parametrize('fits', [True, False])
def test_a_warning_where_latents_are_far_off(fits):
    scale = torch.tensor(LATENT_STD)[None, :, None, None] * (1 if fits else 3)
    mean = torch.randn(50, 4, 20, 20, generator=stream(1)) * scale + torch.tensor(LATENT_MEAN)[None, :, None, None]
    statistics = LatentStatistics()
    statistics.add(torch.cat([mean, torch.zeros_like(mean)], dim=1))
    lines = statistics.lines()
    std = float(lines[0].split('std ')[1].split()[0])
    assert std == pytest.approx(0.5 if fits else 1.5, rel=0.02)
    assert '(sigma_data 0.5)' in lines[0] and (len(lines) == 1) == fits
    assert fits or 'warning: these are far from mean 0 and std 0.5' in lines[1]


def tiny_vae(folder):
    diffusers = pytest.importorskip('diffusers', reason='the extra `latents` is not installed')
    with torch.random.fork_rng(devices=[]):
        vae = diffusers.AutoencoderKL(
            down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4,
            block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4,
        )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_two_ranks_encode_the_same_as_one(tmp_path, run_script):
    vae = tiny_vae(tmp_path / 'vae')
    pixels = np.random.default_rng(0).integers(0, 256, (600, 16, 16, 3), dtype=np.uint8)  # three chunks
    write_dataset(tmp_path / 'images.zip', pixels, np.arange(600) % 3)
    for ranks, name in ((0, 'one'), (2, 'two')):
        args = (f'--source={tmp_path}/images.zip', f'--dest={tmp_path}/{name}.zip', f'--vae={vae}', '--workers=1')
        result = run_script('dataset_tool.py', 'encode', *args, ranks=ranks, env={'PYTHONWARNINGS': 'default'})
        assert result.returncode == 0, result.stderr
        assert 'normalised latents: mean' in result.stdout and 'warning: these are far' in result.stdout
    assert (tmp_path / 'one.zip').read_bytes() == (tmp_path / 'two.zip').read_bytes()


def test_the_command(tmp_path, images, monkeypatch):
    monkeypatch.setattr(dataset_tool, 'load_encoder', lambda name, device, vae: StabilityVAEEncoder(ColorVAE()))
    args = ['encode', f'--source={images.path}', f'--dest={tmp_path}/new/x.zip', '--vae=some/colors']
    result = CliRunner().invoke(dataset_tool.main, args, catch_exceptions=False)
    assert 'writing 13 images of images as latents, about 0.0 MB' in result.output
    assert 'new/x.zip: 13 images of 3x2 latents\nnormalised latents: mean' in result.output
    args = ['info', f'--source={tmp_path}/new/x.zip', f'--sheet={tmp_path}/sheet.png']
    result = CliRunner().invoke(dataset_tool.main, args, catch_exceptions=False)
    assert 'x.zip: 13 images of 3x2 latents' in result.output and 'class 0: 5 images' in result.output
    assert 'normalised latents: mean' in result.output and '"vae": "colors"' in result.output
    with PIL.Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.mode == 'RGB'
    args = ['convert', f'--source={tmp_path}/new/x.zip', f'--dest={tmp_path}/y.zip']
    result = CliRunner().invoke(dataset_tool.main, args)
    assert 'x.zip/00000/img00000000.npy holds latents; only images can be converted' in str(result.exception)


def test_an_error_leaves_the_other_ranks_where_they_are(tmp_path, images, monkeypatch):
    """Taking leave of ranks that wait for this one would hide its error behind theirs (`distributed.session`)."""
    closed = []
    monkeypatch.setattr('torch_utils.distributed.close', lambda: closed.append(1))
    monkeypatch.setattr(dataset_tool, 'load_encoder', lambda name, device, vae: StabilityVAEEncoder(ColorVAE()))
    convert = ['convert', f'--source={images.path}', f'--dest={tmp_path}/gray.zip', '--color=gray']
    assert CliRunner().invoke(dataset_tool.main, convert).exit_code == 0
    for name, count in (('gray.zip', 0), ('images.zip', 1)):
        args = ['encode', f'--source={tmp_path}/{name}', f'--dest={tmp_path}/x.zip']
        result = CliRunner().invoke(dataset_tool.main, args)
        assert len(closed) == count and (result.exit_code == 0) == bool(count)


# --- Drawing ---


def test_pixels_are_scaled():
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    assert torch.equal(to_training_images(images, [0] * 4, 0), encode_pixels(images))


def test_draws_belong_to_image_numbers():
    moments = torch.rand(4, 8, 3, 5, generator=stream(0))
    together = to_training_images(moments, [7, 8, 9, 10], seed=1)
    assert together.shape == (4, 4, 3, 5) and together.dtype == torch.float32
    for i in range(4):
        assert torch.equal(to_training_images(moments[i : i + 1], [7 + i], seed=1)[0], together[i])
    assert not torch.equal(to_training_images(moments, [8, 9, 10, 11], seed=1), together)
    assert not torch.equal(to_training_images(moments, [7, 8, 9, 10], seed=2), together)


def test_draws_are_mean_plus_std_noise():
    moments = torch.zeros(1, 8, 100, 100)
    moments[:, :4] = torch.tensor(LATENT_MEAN)[None, :, None, None] + 2
    moments[:, 4:] = 3
    x = to_training_images(moments, [5], seed=0)[0]
    for channel, scale in zip(x, LATENT_STD, strict=True):
        assert channel.mean().item() == pytest.approx(2 * 0.5 / scale, abs=0.05 / scale)
        assert channel.std().item() == pytest.approx(3 * 0.5 / scale, rel=0.03)
    correlation = torch.corrcoef(x.flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.05


# --- The same batches from everything ---


def test_folder_zip_and_latents_give_the_same_batches(tmp_path, images):
    encode(images, tmp_path / 'latents.zip')
    encode(images, tmp_path / 'latents')
    write_dataset(tmp_path / 'images', np.stack([images[i][0].permute(1, 2, 0).numpy() for i in range(COUNT)]),
                  images.labels)  # fmt: skip
    order = BatchOrder(COUNT, 3, 8, 4, start_nimg=5)
    paths = ('images.zip', 'images', 'latents.zip', 'latents')
    streams = [list(itertools.islice(make_loader(ImageDataset(tmp_path / path), order), 8)) for path in paths]
    expected = latents_of(images)
    index_of = {number: index for pairs in itertools.islice(order, 8) for number, index in pairs}
    for zipped, folder, latents, latent_folder in zip(*streams, strict=True):
        assert torch.equal(zipped.images, folder.images) and torch.equal(latents.images, latent_folder.images)
        assert all(torch.equal(batch.numbers, zipped.numbers) for batch in (folder, latents, latent_folder))
        assert all(torch.equal(batch.labels, zipped.labels) for batch in (folder, latents, latent_folder))
        assert torch.equal(latents.images, expected[[index_of[number] for number in zipped.numbers.tolist()]])
    prints = {ImageDataset(tmp_path / path).fingerprint for path in paths}
    assert len(prints) == 2


# --- Files that are no latents ---


@pytest.mark.parametrize(
    ('array', 'message'),
    [
        (np.array([[[None]]], object), r'is object \[1, 1, 1\]'),
        (np.zeros((8, 2, 3)), r'is float64 \[8, 2, 3\]; uint8 \[1 or 3, H, W\] are images'),
        (np.zeros((8, 2, 3), np.float16), r'is float16 \[8, 2, 3\]'),
        (np.zeros((4, 2, 3), np.float32), r'is float32 \[4, 2, 3\]'),
        (np.zeros((8, 6), np.float32), r'is float32 \[8, 6\]'),
        (np.zeros((2, 2, 3), np.uint8), r'is uint8 \[2, 2, 3\]'),
        (np.zeros((3, 0, 3), np.uint8), r'is uint8 \[3, 0, 3\]'),
        (np.zeros((8, 3, 2), np.float32), 'is 2x3 latents, but a.npy is 3x2 latents'),
        (np.zeros((3, 2, 3), np.uint8), 'is 3x2 RGB, but a.npy is 3x2 latents'),
    ],
)
def test_bad_npy_is_named(tmp_path, array, message):
    (tmp_path / 'a.npy').write_bytes(encode_npy(np.zeros((8, 2, 3), np.float32)))
    np.save(tmp_path / 'b.npy', array, allow_pickle=True)
    dataset = ImageDataset(tmp_path)
    with pytest.raises(UserError, match=f'{tmp_path}/b.npy {message}|b.npy cannot be decoded: {message}'):
        dataset[1]


@pytest.mark.parametrize('kept', [0, 5, 60, 128, 200])
def test_cut_npy_is_named(tmp_path, kept):
    data = encode_npy(np.zeros((8, 2, 3), np.float32))
    (tmp_path / 'a.npy').write_bytes(data)
    (tmp_path / 'b.npy').write_bytes(data[:kept])
    with pytest.raises(UserError, match=f'{tmp_path}/b.npy cannot be decoded'):
        ImageDataset(tmp_path)[1]
    (tmp_path / 'b.npy').write_bytes(data + b'more')
    with pytest.raises(UserError, match=f'{tmp_path}/b.npy'):
        ImageDataset(tmp_path)[1]


def test_fortran_order_and_other_byte_order(tmp_path):
    array = np.random.default_rng(0).standard_normal((8, 2, 3)).astype(np.float32)
    np.save(tmp_path / 'a.npy', np.asfortranarray(array))
    np.save(tmp_path / 'b.npy', array.astype('>f4'))
    dataset = ImageDataset(tmp_path)
    assert all(np.array_equal(dataset[i][0].numpy(), array) for i in range(2))


# --- Training ---


def test_latents_train(tmp_path, images, run_script):
    encode(images, tmp_path / 'latents.zip')
    wide = np.random.default_rng(0).standard_normal((40, 8, 8, 8)).astype(np.float32)
    with DatasetWriter(tmp_path / 'square.zip') as writer:
        for moments in wide:
            writer.add('.npy', encode_npy(abs(moments)))
        writer.finish(np.arange(40) % 10)
    result = run_script(
        'train.py', '--preset=edm2plus-digits', f'--data={tmp_path}/square.zip', '--outdir=run', '--channels=16',
        '--duration=1Ki', '--batch=256', '--preview=1Ki', '--workers=1', env={'PYTHONWARNINGS': 'default'},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['network']['img_channels'] == 4 and config['encoder'] == 'stabilityvae'
    info = read_info(tmp_path / 'run/network-snapshot-0000001-0.050.safetensors')
    assert info.encoder == 'stabilityvae' and info.config.img_channels == 4
    assert 'no sample grids will be drawn' in result.stderr or list((tmp_path / 'run').glob('samples-*.png'))


def test_another_seed_draws_other_latents(config):
    """Held-out images have draws of their own, which are not those of training."""
    moments, numbers = torch.ones(2, 8, 4, 4), [0, 1]
    y = training_inputs(moments, torch.tensor([0, 1]), numbers, config, torch.device('cpu')).y
    other = training_inputs(moments, torch.tensor([0, 1]), numbers, config, torch.device('cpu'), held_out=True).y
    assert torch.equal(y, to_training_images(moments, numbers, config.seed))
    assert torch.equal(
        other, to_training_images(moments, numbers, stream_seed(config.seed, 'held out'))
    ) and not torch.equal(y, other)


@pytest.mark.parametrize(
    'header', [b'{' * 3000, b'-' * 9000, b"{'shape': " + b'9' * 5000, b'\0' * 50, b"{1: 2, 'a': 3}"]
)
def test_npy_headers_that_are_none(tmp_path, header):
    (tmp_path / 'a.npy').write_bytes(b'\x93NUMPY\1\0' + len(header).to_bytes(2, 'little') + header)
    with pytest.raises(UserError, match=f'{tmp_path}/a.npy cannot be decoded'):
        ImageDataset(tmp_path)


def test_npy_claiming_much_allocates_nothing(tmp_path):
    whole = encode_npy(np.zeros((8, 9, 9), np.float32))
    (tmp_path / 'a.npy').write_bytes(whole.replace(b'(8, 9, 9), }   ', b'(8, 9999, 9), }'))
    with pytest.raises(UserError, match=r'it has 2592 bytes for float32 \[8, 9999, 9\]'):
        ImageDataset(tmp_path)


@pytest.mark.parametrize('order', ['<f4', '>f4'])
def test_npy_of_other_machines(tmp_path, order):
    array = np.random.default_rng(0).standard_normal((8, 3, 2)).astype(order)
    np.save(tmp_path / 'a.npy', np.asfortranarray(array))
    latents = ImageDataset(tmp_path)[0][0]
    assert latents.dtype == torch.float32 and latents.is_contiguous() and np.array_equal(latents.numpy(), array)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 3e38, -3e38])
def test_poisoned_latents_are_named_at_the_first_visit(tmp_path, value):
    array = np.zeros((8, 2, 3), np.float32)
    (tmp_path / 'a.npy').write_bytes(encode_npy(array))
    array[5, 1, 1] = value
    (tmp_path / 'b.npy').write_bytes(encode_npy(array))
    dataset = ImageDataset(tmp_path)
    with pytest.raises(UserError, match=f'{tmp_path}/b.npy holds latents that are not finite, or beyond 10000'):
        dataset[1]
