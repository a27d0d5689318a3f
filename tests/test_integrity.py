"""Damage: of files, of weights, of folders that two processes use. Nothing of it goes unnoticed."""

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.torch
import torch

from dataset.files import index
from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from dnnlib.files import locked_folder, parse_object, read_object
from evaluation.records import find_generation
from metrics.detectors import PixelDetector
from metrics.gathering import gather
from metrics.npz import NpzImages
from metrics.reading import describe, read_batches
from metrics.reference import load_reference, save_reference
from metrics.registry import needs_of, select_metrics
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, load_network, open_network, save_network
from reporting.runs import compare_configs, read_run
from sampling.output import is_complete, write_npz
from tests.conftest import ROOT
from tests.helpers import state_tensors, write_dataset
from torch_utils.finite import nonfinite
from torch_utils.tensor_files import HEADER_KEY, VERIFY_VARIABLE, TensorFile, UnreadableFileError, digest, save_tensors
from training.config import refuse_differences
from training.initial import check_initial
from training.monitor.step_stats import PendingStats
from training.state import TrainState, state_files

PAGE = 4096


@st.composite
def damage(draw):
    """What a disk or a network does to a file: bytes -> bytes."""
    where, what = (
        draw(st.floats(0, 1, exclude_max=True)),
        draw(st.sampled_from(['bit', 'page', 'tail', 'cut', 'noise'])),
    )
    # A third of the places are in the header, which is small.
    near, bit, noise = draw(st.integers(0, 2)) == 0, draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=40))

    def apply(data: bytes) -> bytes:
        spoilt, at = bytearray(data), int(where * (min(len(data), 3000) if near else len(data)))
        if what == 'bit':
            spoilt[at] ^= 1 << bit
        elif what == 'page':
            spoilt[at : at + PAGE] = bytes(len(spoilt[at : at + PAGE]))
        elif what == 'tail':
            spoilt[at:] = bytes(len(spoilt) - at)
        elif what == 'cut':
            del spoilt[at:]
        else:
            spoilt[at : at + len(noise)] = noise[: len(spoilt) - at]
        return bytes(spoilt)

    return apply


@pytest.fixture(scope='module')
def kinds(config, trained_once, archive, tmp_path_factory):
    """Of each kind of file that we write: the file, and what loads it, to something that can be compared."""
    folder = tmp_path_factory.mktemp('kinds')
    state = TrainState(config, torch.device('cpu'))

    def load_state(path: Path):
        state.load(path)
        return state.nimg, state._tensors()

    def load_net(path: Path):
        net, info = load_network(path)
        return info, net.state_dict()

    needs, detectors = needs_of(select_metrics(['fd_pixels', 'class_agreement'])), {'pixels': PixelDetector()}
    images = ImageDataset(archive)
    batches = read_batches(images, 16, 'test')
    save_reference(folder / 'reference.safetensors', gather(describe(images), batches, needs, 'cpu', detectors))

    def load_metric_reference(path: Path):
        loaded = load_reference(path, needs, detectors)
        return loaded.about, {str(need): c.to_tensors() for need, c in loaded.collected.items()}

    save_tensors(folder / 'latents.safetensors', {'latents': torch.randn(8, 8, 8, generator=torch.Generator())}, {})
    pixels = [np.asarray(images[i][0].permute(1, 2, 0)) for i in range(len(images))]
    write_npz(folder / 'images.npz', pixels, len(pixels), torch.arange(len(pixels)))

    def load_chunk(path: Path):
        with TensorFile(path, 'latents') as file:
            return file.get('latents')

    def load_images(path: Path):
        return [(x, label) for x, label in NpzImages(path)]

    write_dataset(folder / 'labelled.zip', pixels, np.arange(len(pixels)))
    write_dataset(folder / 'unlabelled.zip', pixels, None)

    def load_dataset(path: Path):
        data = ImageDataset(path)
        return data.image_shape, data.fingerprint, data.num_classes, [data[i] for i in range(len(data))]

    with zipfile.ZipFile(folder / 'labelled.zip') as file:
        file.extractall(folder / 'unpacked')
    texts = ('config.json', 'stats.jsonl', 'log.txt')
    (folder / 'run').mkdir()
    for name in texts:
        shutil.copy(trained_once / name, folder / 'run')

    def load_text(path: Path):
        (folder / 'run' / path.name).write_bytes(path.read_bytes())
        try:
            compare_configs([read_run(folder / 'run', 'run')] * 2)
            refuse_differences(folder / 'run', read_object(folder / 'run/config.json'), config)
        finally:
            shutil.copy(trained_once / path.name, folder / 'run')

    def load_unpacked(path: Path):
        (folder / 'unpacked/dataset.json').write_bytes(path.read_bytes())
        return load_dataset(folder / 'unpacked') and None

    shutil.copy(folder / 'unpacked/dataset.json', folder)
    return {
        **{name: (trained_once / name, load_text) for name in texts},
        'dataset.json': (folder / 'dataset.json', load_unpacked),
        'labelled data set': (folder / 'labelled.zip', load_dataset),
        'unlabelled data set': (folder / 'unlabelled.zip', load_dataset),
        'training state': (state_files(trained_once)[-1], load_state),
        'snapshot': (trained_once / 'network-snapshot-0000002-0.050.safetensors', load_net),
        'reference': (folder / 'reference.safetensors', load_metric_reference),
        'latents': (folder / 'latents.safetensors', load_chunk),
        'npz': (folder / 'images.npz', load_images),
    }


def same(a, b) -> bool:
    """Whether nested values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


DIGESTS = ['training state', 'snapshot', 'reference', 'latents', 'npz', 'labelled data set', 'unlabelled data set']
TEXTS = ['config.json', 'stats.jsonl', 'log.txt', 'dataset.json']  # with no digest: refused, or read as they are


@pytest.mark.parametrize('kind', [*DIGESTS, *TEXTS])
@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(apply=damage())
def test_damage_is_refused_or_harmless(kinds, tmp_path_factory, kind, apply):
    path, load = kinds[kind]
    whole = path.read_bytes()
    spoilt = tmp_path_factory.mktemp('spoilt') / path.name
    spoilt.write_bytes(apply(whole))
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        loaded = load(spoilt)
    except UserError as error:
        assert len(str(error)) < 1000
    else:
        assert same(loaded, load(path))
    assert time.monotonic() - start < 20
    kib = 1024 if sys.platform == 'darwin' else 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**20 * kib  # 1 GiB
    spoilt.unlink()


def test_a_flipped_pixel_of_an_npz_is_refused(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)  # more than zipfile reads ahead
    np.savez(tmp_path / 'x.npz', images)
    data = bytearray((tmp_path / 'x.npz').read_bytes())
    data[data.index(images.tobytes()) + 40_000] ^= 1
    (tmp_path / 'x.npz').write_bytes(data)
    with pytest.raises(UserError, match='CRC-32'):
        NpzImages(tmp_path / 'x.npz')


def test_a_damaged_index_is_made_again(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(index, 'KEEP_FROM', 1)
    path = tmp_path / 'tiny.zip'
    path.write_bytes(archive.read_bytes())
    made = index.open_index(path)
    chance, whole = random.Random(0), index.index_path(path).read_bytes()
    for _ in range(50):
        spoilt = bytearray(whole)
        spoilt[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        index.index_path(path).unlink()  # what is open is mapped from it
        index.index_path(path).write_bytes(spoilt)
        found = index.open_index(path)
        assert found.fingerprint == made.fingerprint and list(found.files.names) == list(made.files.names)
        assert np.array_equal(found.labels.classes, made.labels.classes)
        assert all(np.array_equal(getattr(found.files, name), getattr(made.files, name)) for name in index.COLUMNS)


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('dataset.json', 'dataset.jsoo', 'its own header names it dataset.json'),  # else without labels
        ('00000/img00000002.png', '00000/img00100002.png', 'its own header names it 00000/img00000002.png'),  # last
        ('00000/img00000002.png', '00000/img00000002.pog', 'its own header names it 00000/img00000002.png'),  # no image
        ('00000/img00000002.png', '00000/img00000002.pn/', 'are folders with content'),
    ],
)
def test_a_damaged_name_in_the_directory_of_a_zip(kinds, tmp_path, old, new, message):
    data = bytearray(kinds['labelled data set' if old == 'dataset.json' else 'unlabelled data set'][0].read_bytes())
    place = data.rindex(old.encode())
    data[place : place + len(old)] = new.encode()
    (tmp_path / 'x.zip').write_bytes(data)
    with pytest.raises(UserError, match=message):
        dataset = ImageDataset(tmp_path / 'x.zip')
        [dataset[i] for i in range(len(dataset))]


def test_a_damaged_generation_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as file:
        file.writestr('generation.json', '{"seeds": [1]}')
    data = (tmp_path / 'x.zip').read_bytes()
    (tmp_path / 'x.zip').write_bytes(data.replace(b'[1]', b'[2]'))
    with pytest.raises(UserError, match=r'generation\.json of .* cannot be read: Bad CRC-32'):
        find_generation(str(tmp_path / 'x.zip'))


@pytest.mark.parametrize('what', ['bit', 'page', 'tail'])
def test_a_damaged_newest_state_falls_back(config, run, finished, capsys, what):
    """The reviewers' experiments, of which each damaged state was once loaded silently."""
    whole, folder = finished('whole'), finished('run')
    newest = state_files(folder)[-1]
    data = bytearray(newest.read_bytes())
    middle = len(data) - 40_000
    if what == 'bit':
        data[middle] ^= 1
    elif what == 'page':
        data[middle : middle + PAGE] = bytes(PAGE)
    else:
        data[middle:] = bytes(len(data) - middle)
    newest.write_bytes(data)
    run('run', config)
    text = capsys.readouterr().out
    assert f'warning: {newest} is damaged: tensor' in text and 'at 1024 images' in text
    assert newest.with_suffix('.unreadable').exists()
    assert same(state_tensors(folder), state_tensors(whole))


@hypothesis.given(st.integers(0, 2**20), st.integers(0, 63), st.integers(1, 5))
@hypothesis.settings(max_examples=50)
def test_every_changed_bit_changes_the_digest(place, bit, count):
    data = torch.arange(600_000, dtype=torch.int64)
    before = digest(data, data.shape)
    for i in range(count):
        data[(place + 17 * i) % len(data)] ^= torch.tensor(1 << bit if bit < 63 else -(2**63))
        assert digest(data, data.shape) != before
    for i in range(count):
        data[(place + 17 * i) % len(data)] ^= torch.tensor(1 << bit if bit < 63 else -(2**63))
    assert digest(data, data.shape) == before != digest(data, (2, 300_000))
    data[[3, 5000]] = data[[5000, 3]]
    assert digest(data, data.shape) != before


def test_verifying_and_turning_it_off(tmp_path, monkeypatch, run_script, tiny_config):
    path = tmp_path / 'net.safetensors'
    weights = Denoiser(tiny_config, seed=0).state_dict()
    save_network(path, weights, NetworkInfo(tiny_config, 0, None, 'preset'))
    name = 'unet.out_conv.weight'
    spoilt = bytearray(path.read_bytes())
    spoilt[spoilt.index(weights[name].numpy().tobytes())] ^= 1
    (tmp_path / 'spoilt.safetensors').write_bytes(spoilt)
    with pytest.raises(UnreadableFileError, match=rf"spoilt\.safetensors is damaged: tensor '{re.escape(name)}'"):
        load_network(tmp_path / 'spoilt.safetensors')
    monkeypatch.setenv(VERIFY_VARIABLE, '0')
    load_network(tmp_path / 'spoilt.safetensors')
    monkeypatch.delenv(VERIFY_VARIABLE)
    with TensorFile(path) as file:
        header = {k: v for k, v in file.header.items() if k != 'digests'}
    safetensors.torch.save_file(weights, tmp_path / 'old.safetensors', {HEADER_KEY: json.dumps(header)})
    load_network(tmp_path / 'old.safetensors')
    process = subprocess.run(
        [sys.executable, '-m', 'torch_utils.tensor_files', 'verify', *map(str, sorted(tmp_path.glob('*.safetensors')))],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr.endswith('error: 1 of 3 files are damaged\n'), process.stderr
    first, old, bad = process.stdout.splitlines()
    assert first.startswith(f'{path}: whole, ') and 'too old to have digests' in old and 'spoilt' in bad


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        (b'preset-a', b'preset-b', 'its digest does not fit'),
        (
            b'"unet.out_conv.weight":{',
            b'"unet.out_conv.weighs":{',
            'it does not hold the tensors that its header names',
        ),
    ],
)
def test_a_changed_header_is_refused(tmp_path, tiny_config, old, new, message):
    path = tmp_path / 'net.safetensors'
    save_network(path, Denoiser(tiny_config, seed=0).state_dict(), NetworkInfo(tiny_config, 0, None, 'preset-a'))
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    with pytest.raises(UnreadableFileError, match=message):
        load_network(path)


def header_file(path: Path, header: str) -> Path:
    """A file with a tensor and this text as our header."""
    safetensors.torch.save_file({'a': torch.zeros(2)}, path, {HEADER_KEY: header})
    return path


HOSTILE = {
    'a list': '[]',
    'a number': '3',
    'nested': '[' * 10_000 + ']' * 10_000,
    'nested objects': '{"a":' * 10_000 + '1' + '}' * 10_000,
    'many digits': '{"nimg": ' + '9' * 5000 + '}',
    'infinite': '{"nimg": 1e999}',
    'not a number': '{"nimg": NaN}',
    'empty': '',
}


@pytest.mark.parametrize('text', HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_headers(tmp_path, text):
    path = header_file(tmp_path / 'network-snapshot-0000001-0.050.safetensors', text)
    with pytest.raises(UserError, match='its header is damaged'):
        open_network(path)
    with pytest.raises(ValueError):
        parse_object(text)


@pytest.mark.parametrize(
    ('field', 'value'),
    [('nimg', 'many'), ('nimg', None), ('nimg', 1.5), ('ema_std', []), ('ema_std', True), ('ema_lengths', 3),
     ('ema_lengths', [['a']]), ('preset', 3), ('encoder', None), ('sampler', []), ('config', []), ('config', None),
     ('ema_halflife', {})],
)  # fmt: skip
def test_types_of_header_fields(tmp_path, tiny_config, field, value):
    header = json.loads(json.dumps(NetworkInfo(tiny_config, 0, None, 'preset').to_header())) | {field: value}
    with pytest.raises(UserError, match=r'x\.safetensors: ') as error:
        open_network(header_file(tmp_path / 'x.safetensors', json.dumps(header)))
    assert field in str(error.value) or field == 'config'


def test_hostile_states(config, finished, tmp_path):
    state = TrainState(config, torch.device('cpu'))
    path = state_files(finished('run'))[-1]
    with TensorFile(path, 'training state') as file:
        header, tensors = file.header, dict(file.items())
    first = next(name for name in tensors if name.startswith('net/'))
    for change, match in [
        (({'nimg': 5000}, {}), 'its name does not say'),
        (({'nimg': -1}, {}), 'its name does not say'),
        (({'nimg': '2048'}, {}), 'nimg must be a whole number'),
        (({'config': []}, {}), 'config'),
        (({}, {'optimizer/net/nothing/step': torch.zeros(())}), 'which this run does not have'),
        (({}, {first: torch.zeros_like(tensors[first], dtype=torch.int32)}), 'another shape or type'),
        (({}, {first: torch.full_like(tensors[first], float('nan'))}), 'not finite'),
        (({}, {'stats/sums': torch.zeros(3)}), 'another shape or type'),
    ]:
        save_tensors(path, tensors | change[1], header | change[0])
        with pytest.raises(UnreadableFileError, match=match):
            state.load(path)


@pytest.fixture
def poisoned(monkeypatch):
    """Set one weight to NaN after so many images."""

    def after(images: int) -> None:
        def spoil(self):
            if self.nimg >= images:
                with torch.no_grad():
                    self.net.state_dict()['unet.out_conv.weight'].view(-1)[0] = float('nan')
            update(self)

        update = TrainState.update_averages
        monkeypatch.setattr(TrainState, 'update_averages', spoil)

    return after


def test_poison_stops_the_run_before_it_is_saved(config, run, tmp_path, poisoned):
    config = replace(config, duration=4096, batch=128, status=256, keep=2)
    poisoned(2100)
    with pytest.raises(UserError, match=r'at 3072 images; this was not saved; the last good .*-0000002\.safetensors: '):
        run('run', config)
    folder = tmp_path / 'run'
    assert len(state_files(folder)) == 2 and not nonfinite(state_tensors(folder))
    assert len(list(folder.glob('network-snapshot-*'))) == 2 * len(config.ema.stds)


def test_poison_at_the_end_is_no_success(config, run, tmp_path, poisoned):
    poisoned(2048)
    with pytest.raises(UserError, match=r'the last good state is .*training-state-0000001\.safetensors: the same'):
        run('run', config)
    assert [path.name for path in state_files(tmp_path / 'run')] == ['training-state-0000001.safetensors']
    assert not list((tmp_path / 'run').glob('network-snapshot-0000002*'))


POISON_ON_TWO_RANKS = """
import json, sys
from pathlib import Path
import click, torch
from dataset.reader import ImageDataset
from dnnlib import cli
from dnnlib.configs import from_json
from torch_utils import distributed
from training.config import TrainConfig
from training.loop import train
from training.state import TrainState

def spoil(self):
    if self.nimg >= 1100:
        with torch.no_grad():
            self.net.state_dict()['unet.out_conv.weight'].view(-1)[0] = float('nan')
    update(self)

update, TrainState.update_averages = TrainState.update_averages, spoil

@click.command()
def main():
    config = from_json(TrainConfig, json.loads('''CONFIG'''))
    with distributed.session('cpu') as device:
        train(config, ImageDataset(config.data), Path(sys.argv[0]).parent, device)

cli.run(main)
"""


def test_poison_on_two_ranks(config, tmp_path):
    (tmp_path / 'poison.py').write_text(POISON_ON_TWO_RANKS.replace('CONFIG', json.dumps(config.to_json())))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    process = subprocess.run(
        [*command, str(tmp_path / 'poison.py')],
        capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert process.returncode != 0
    assert 'not finite at 2048 images; this was not saved; the last good state is' in process.stderr, process.stderr
    assert [path.name for path in state_files(tmp_path)] == ['training-state-0000001.safetensors']
    assert not nonfinite(state_tensors(tmp_path))


def test_no_state_is_dropped_while_gradients_are_bad(config, tmp_path):
    state = TrainState(replace(config, keep=1), torch.device('cpu'))
    for kimg, streak, left in ((1, 0, [1]), (2, 3, [1, 2]), (3, 5, [1, 2, 3]), (4, 0, [4])):
        state.nimg, state.stats.streak = 1024 * kimg, torch.tensor(streak)
        state.saving(tmp_path)()
        assert [path.name for path in state_files(tmp_path)] == [f'training-state-{n:07d}.safetensors' for n in left]


def test_a_snapshot_that_overflows_is_not_written(config, tmp_path):
    state = TrainState(replace(config, snapshot_precision='fp16'), torch.device('cpu'))
    state.ema.averages[max(config.ema.stds)]['unet.out_conv.weight'].fill_(1e6)
    assert not state.nonfinite()
    with pytest.raises(UserError, match=r'would hold values that are not finite, in unet\.out_conv\.weight'):
        state.saving_snapshots(tmp_path)
    assert not list(tmp_path.iterdir())


def test_length_of_a_streak():
    stats = PendingStats(2)
    stats.streak = torch.tensor(5)
    assert stats.current_streak() == 5
    stats.nonfinite = torch.tensor([[0, 1], [2, 0]])
    assert stats.current_streak() == 7
    stats.nonfinite = torch.tensor([[0, 1], [0, 0], [3, 0], [0, 3]])
    assert stats.current_streak() == 2
    stats.nonfinite = torch.tensor([[0, 1], [0, 0]])
    assert stats.current_streak() == 0


def test_a_poisoned_network_is_no_beginning(tmp_path, config, archive, run_script, tiny_config):
    weights = Denoiser(tiny_config, seed=0).state_dict()
    for t in weights.values():
        t.fill_(float('nan'))
    save_network(tmp_path / 'nan.safetensors', weights, NetworkInfo(tiny_config, 0, None, 'preset'))
    with pytest.raises(UserError, match=r'nan\.safetensors holds values that are not finite, in .* more'):
        check_initial(str(tmp_path / 'nan.safetensors'), tiny_config)


def test_vanishing_gradients_are_warned_about(config, run, capsys):
    run('run', replace(config, slice=256, loss_scaling=1e-30, precision='bf16'))
    assert re.search(r'warning: gradients were 0 in 1 of 1 steps', capsys.readouterr().out)


def test_a_folder_of_images_takes_one_process(tmp_path, tiny_config, run_script, run_here):
    save_network(
        tmp_path / 'net.safetensors', Denoiser(tiny_config, seed=0).state_dict(), NetworkInfo(tiny_config, 0, None, 'p')
    )
    (tmp_path / 'out').mkdir()
    arguments = ('--net=net.safetensors', '--seeds=0-3', '--steps=2', '--outdir=out', '--device=cpu')
    with locked_folder(tmp_path / 'out'):
        process = run_script('generate.py', *arguments)
        assert process.returncode == 2, process.stderr
        assert process.stderr == 'generate.py: error: another process is at work in out\n'
        assert [path.name for path in (tmp_path / 'out').iterdir()] == ['.lock']
    assert run_here('generate.py', *arguments).returncode == 0 and is_complete(tmp_path / 'out')
