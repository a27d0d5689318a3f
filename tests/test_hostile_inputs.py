"""Files and values that nobody means well by: each ends in one line and exit code 2, whichever script meets it."""

import io
import json
import pickle
import sys
import tarfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import calculate_metrics
import dataset_tool
import reconstruct_phema
import report
import train
from dataset.reader import ImageDataset
from metrics.detectors import PixelDetector
from metrics.gathering import gather
from metrics.image_sets import ImageSet
from metrics.reading import describe, read_batches
from metrics.reference import KIND, save_reference
from metrics.registry import needs_of, select_metrics
from networks.denoiser import Denoiser
from networks.files import NetworkInfo
from tests.test_integrity import header_file
from torch_utils.tensor_files import TensorFile, save_tensors
from training.monitor.plots import plot_loss
from training.state import state_files


@pytest.fixture
def refused(run_here):
    """Run a script in this process, which must refuse what it gets; returns what it says."""

    def run(script, *arguments) -> str:
        name = f'{script.__name__}.py'
        ended = run_here(name, *arguments)
        text = ended.stderr
        assert ended.returncode == 2 and text.startswith(f'{name}: error: '), text
        assert text.count('\n') == 1 and len(text) < 1000, text
        return text

    return run


def npy(header: str, data: bytes = b'') -> bytes:
    """A NumPy file with this text as its header."""
    return b'\x93NUMPY\x02\x00' + len(header).to_bytes(4, 'little') + header.encode() + data


HEADERS = {
    'braces': '{' * 3000,
    'brackets': '[' * 3000,
    'nested': "{'descr': " * 3000,
    'minus': '-' * 3000 + '1',
    'digits': "{'descr': '|u1', 'fortran_order': False, 'shape': (" + '9' * 5000 + ', 8, 8, 3)}',
    'huge': "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 8, 8, 3)}",
    'negative': "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3)}",
    'objects': "{'descr': '|O', 'fortran_order': False, 'shape': (2, 8, 8, 3)}",
    'no dictionary': '3',
    'empty': '',
    'long': ' ' * 20_000,
}


@pytest.mark.parametrize('header', HEADERS.values(), ids=list(HEADERS))
def test_npy_headers(refused, tmp_path, archive, header):
    with zipfile.ZipFile(tmp_path / 'images.npz', 'w') as file:
        file.writestr('arr_0.npy', npy(header, bytes(2 * 8 * 8 * 3)))
    assert 'images.npz' in refused(calculate_metrics, 'calc', '--images=images.npz', f'--ref={archive}')
    with zipfile.ZipFile(tmp_path / 'latents.zip', 'w') as file:
        file.writestr('00000/img00000000.npy', npy(header, bytes(8 * 8 * 8 * 4)))
    assert 'latents.zip' in refused(train, '--preset=edm2plus-digits', '--data=latents.zip', '--outdir=run')
    assert not (tmp_path / 'run').exists()


def reference(path: Path, archive: Path, header: dict | None = None, **tensors: torch.Tensor) -> Path:
    """A reference of an archive for `fd_pixels`, with changes."""
    needs, images = needs_of(select_metrics(['fd_pixels']), reference=True), ImageDataset(archive)
    batches = read_batches(images, 16, 'test')
    save_reference(path, gather(describe(images), batches, needs, 'cpu', {'pixels': PixelDetector()}))
    with TensorFile(path, KIND) as file:
        changed = {name: tensors.get(name.rpartition('/')[2], tensor) for name, tensor in file.items()}
        about = file.header | (header or {})
    save_tensors(path, {name: t.clone() for name, t in changed.items()}, about)
    return path


REFERENCES = {
    'features': ({}, {'mean': torch.zeros(63).double(), 'scatter': torch.eye(63).double()}),
    'more features': ({}, {'mean': torch.zeros(4096).double(), 'scatter': torch.eye(4096).double()}),
    'no features': ({}, {'mean': torch.zeros(0).double(), 'scatter': torch.eye(0).double()}),
    'shapes': ({}, {'mean': torch.zeros(64).double(), 'scatter': torch.eye(63).double()}),
    'no detectors': ({'detectors': {}}, {}),
    'detectors of a list': ({'detectors': []}, {}),
    'detectors of numbers': ({'detectors': {'pixels': 3}}, {}),
    'count': ({}, {'count': torch.tensor(-5)}),
    'count 0': ({}, {'count': torch.tensor(0)}),
    'count of nan': ({}, {'count': torch.tensor(float('nan'))}),
    'integers': ({}, {'mean': torch.zeros(64, dtype=torch.int32)}),
    'bools': ({}, {'scatter': torch.zeros(64, 64, dtype=torch.bool)}),
    'complex': ({}, {'scatter': torch.zeros(64, 64, dtype=torch.complex64)}),
    'size of images': ({'images': asdict(ImageSet('x', 30, None, 10))}, {}),
    'infinite': ({}, {'mean': torch.full((64,), float('inf')).double()}),
    'images': ({'images': []}, {}),
    'shape of images': ({'images': asdict(ImageSet('x', 30, (3, -1, 10**400), 10))}, {}),
    'count of images': ({'images': asdict(ImageSet('x', 'many', (1, 8, 8), 10))}, {}),
}


@pytest.mark.parametrize(('header', 'tensors'), REFERENCES.values(), ids=list(REFERENCES))
def test_references(refused, tmp_path, archive, header, tensors):
    reference(tmp_path / 'ref.safetensors', archive, header, **tensors)
    assert 'ref.safetensors' in refused(
        calculate_metrics, 'calc', f'--images={archive}', '--ref=ref.safetensors', '--metrics=fd_pixels'
    )


def test_a_reference_with_infinite_numbers_in_its_header(refused, tmp_path, archive):
    header_file(tmp_path / 'ref.safetensors', json.dumps({'kind': KIND})[:-1] + ', "duplicates": 1e999}')
    text = refused(calculate_metrics, 'calc', f'--images={archive}', '--ref=ref.safetensors', '--metrics=fd_pixels')
    assert 'its header is damaged' in text


LENGTHS = {
    'nested': '[' * 100_000,
    'objects': '{"*":' * 100_000,
    'deep value': '{"*": ' + '[' * 500 + ']' * 500 + '}',
    'digits': '{"*": ' + '9' * 400 + '}',
    'many digits': '{"*": ' + '9' * 5000 + '}',
    'infinite': '{"*": 1e999}',
    'nan': '{"*": NaN}',
    'small': '{"*": 1e-400}',
    'a list': '[0.1]',
    'true': '{"*": true}',
    'latin': '{"*": "\xff"}',
}


@pytest.mark.parametrize('text', LENGTHS.values(), ids=list(LENGTHS))
def test_lengths(refused, tmp_path, trained_once, text):
    (tmp_path / 'lengths.json').write_text(text, encoding='latin-1')
    refused(reconstruct_phema, f'--indir={trained_once}', '--outdir=out', '--outstd=lengths.json')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('text', ['1e400', '9' * 400, 'nan', '0.1,0.2,...,1e308', '0,1e-300,...,1', '1' * 5000])
def test_lists_of_lengths(refused, tmp_path, trained_once, text):
    refused(reconstruct_phema, f'--indir={trained_once}', '--outdir=out', f'--outstd={text}')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('what', ['all', 'last', 'none'])
def test_snapshots_of_integers(refused, tmp_path, tiny_config, what):
    weights = Denoiser(tiny_config, seed=0).state_dict()
    parameters = [name for name, _ in Denoiser(tiny_config, seed=0).named_parameters()]
    chosen = {'all': parameters, 'last': parameters[-1:], 'none': []}[what]
    bad = {name: t.to(torch.int64) if name in chosen else t for name, t in weights.items()}
    for kimg, tensors in ((1, weights), (2, bad)):
        info = NetworkInfo(tiny_config, 1000 * kimg, 0.05, 'preset')
        path = tmp_path / f'network-snapshot-{kimg:07d}-0.050.safetensors'
        save_tensors(path, tensors, info.to_header())
    if what != 'none':
        text = refused(reconstruct_phema, '--indir=.', '--outdir=out', '--outstd=0.1')
        assert '0000002' in text
        assert not list(tmp_path.glob('out/*'))


def cifar(path: Path, batch, meta) -> None:
    """An archive of one batch in CIFAR-10's layout."""
    with tarfile.open(path, 'w:gz') as archive:
        for name, value in (('data_batch_1', batch), ('batches.meta', meta)):
            data = pickle.dumps(value, protocol=3)
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


META = {b'label_names': [b'a', b'b']}
BATCH = {b'data': np.zeros((2, 3072), np.uint8), b'labels': [0, 1]}


@pytest.mark.parametrize(
    ('batch', 'meta'),
    [
        (np.zeros((2, 3072), np.uint8), META),
        (BATCH, np.zeros(3)),
        ([], META),
        (3, META),
        (None, None),
        (b'data', b'names'),
        ({**BATCH, b'labels': np.array([0, 1])}, META),
        ({**BATCH, b'data': [0] * 6144}, META),
        ({**BATCH, b'data': np.zeros((2, 3071), np.uint8)}, META),
        ({**BATCH, b'data': np.zeros((2, 3072), np.float64)}, META),
        ({**BATCH, b'data': np.zeros(3, dtype=object)}, META),
        (BATCH, {b'label_names': [b'\xff', b'b']}),
        (BATCH, {b'label_names': np.array([b'a', b'b'])}),
    ],
)
def test_batches_of_cifar(refused, tmp_path, batch, meta):
    cifar(tmp_path / 'cifar-10-python.tar.gz', batch, meta)
    refused(dataset_tool, 'convert', '--source=cifar-10-python.tar.gz', '--dest=out.zip')
    assert [path.name for path in tmp_path.iterdir()] == ['cifar-10-python.tar.gz']


def test_whole_inputs_are_taken(tmp_path, archive, monkeypatch, capsys):
    """What the tests above change is good before: nothing is refused for another reason."""
    cifar(tmp_path / 'cifar-10-python.tar.gz', BATCH, META)
    dataset_tool.main.main(
        ['convert', f'--source={tmp_path}/cifar-10-python.tar.gz', f'--dest={tmp_path}/out.zip'], standalone_mode=False
    )
    assert len(ImageDataset(tmp_path / 'out.zip')) == 2
    reference(tmp_path / 'ref.safetensors', archive)
    arguments = ['calc', f'--images={archive}', f'--ref={tmp_path}/ref.safetensors', f'--record={tmp_path}/m.jsonl']
    calculate_metrics.main.main([*arguments, '--metrics=fd_pixels'], standalone_mode=False)


@pytest.mark.parametrize(
    'flag',
    ['--lr=1e39', '--lr=1e400', '--lr=nan', '--ls=1e39', '--P-mean=1e39',
     '--duration=1e30', '--duration=' + '9' * 5000, '--batch=' + '9' * 400, '--dropout=nan', '--seed=' + '9' * 400],
)  # fmt: skip
def test_numbers_for_training(refused, tmp_path, archive, flag):
    refused(train, '--preset=edm2plus-digits', f'--data={archive}', '--outdir=run', flag)
    assert not (tmp_path / 'run').exists()


JSONS = {'a list': '[]', 'a number': '3', 'nested': '[' * 100_000, 'empty': '', 'empty object': '{}'}


@pytest.mark.parametrize('text', JSONS.values(), ids=list(JSONS))
def test_config_of_a_run(refused, tmp_path, finished, archive, text):
    folder = finished('run')
    (folder / 'config.json').write_text(text)
    refused(train, '--preset=edm2plus-digits', f'--data={archive}', f'--outdir={folder}')
    refused(report, folder, '--dest=report.html')


LINES = [
    '{}',
    '[]',
    '3',
    '{"nimg": "many"}',
    '{"nimg": 1e999, "loss": 1}',
    '[' * 100_000,
    '{"nimg": ' + '9' * 5000 + '}',
]


@pytest.mark.parametrize('line', LINES, ids=range(len(LINES)))
def test_lines_of_stats(config, run, tmp_path, finished, line, monkeypatch):
    """A run resumes, with what can be read."""
    folder = finished('run')
    state_files(folder)[-1].unlink()
    lines = (folder / 'stats.jsonl').read_text().splitlines()
    (folder / 'stats.jsonl').write_text('\n'.join([*lines[:2], line, *lines[2:], '']))
    (folder / 'metrics.jsonl').write_text(line + '\n')
    monkeypatch.setattr(sys, 'argv', ['report.py'])
    report.main.main([str(folder), f'--dest={tmp_path}/before.html'], standalone_mode=False)
    run('run', replace(config, slice=256))
    plot_loss(folder)
    assert (folder / 'stats.jsonl').read_text().splitlines()[:4] == lines[:4]
    report.main.main([str(folder), f'--dest={tmp_path}/after.html'], standalone_mode=False)
