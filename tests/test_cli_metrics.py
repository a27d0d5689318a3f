"""calculate_metrics.py from its command line, in one process and in two."""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import calculate_metrics
import dataset_tool
import evaluation.measure
import evaluation.selftest
import metrics.inception
import sweep
import train
from dnnlib import cli
from dnnlib.errors import UserError
from evaluation.measure import MeasureConfig
from metrics.detectors import PixelDetector
from metrics.registry import select_metrics
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, load_network, save_network
from sampling.config import SamplerConfig
from sampling.pipeline import generate
from sampling.samplers import Euler
from tests.helpers import edm2_network, make_latents, random_inception
from torch_utils.tensor_files import TensorFile, save_tensors
from training.presets.table import get_preset

ROOT = Path(__file__).parents[1]


def write_images(folder: Path, images: np.ndarray, labels: list[int] | None = None) -> Path:
    folder.mkdir(parents=True)
    names = [f'{i:06d}.png' for i in range(len(images))]
    for name, image in zip(names, images, strict=True):
        PIL.Image.fromarray(image).save(folder / name)
    if labels is not None:
        pairs = [list(pair) for pair in zip(names, labels, strict=True)]
        (folder / 'dataset.json').write_text(json.dumps({'labels': pairs}))
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Folders `real` and `made` of digits with labels, `colour` and `bare` without, `single` of one image."""
    import sklearn.datasets

    digits = sklearn.datasets.load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target.tolist()
    folder = tmp_path_factory.mktemp('data')
    write_images(folder / 'real', images[:300], labels[:300])
    write_images(folder / 'made', images[300:400], labels[300:400])
    write_images(folder / 'bare', images[400:410])
    write_images(folder / 'single', images[:1], labels[:1])
    write_images(folder / 'colour', np.zeros((5, 8, 8, 3), np.uint8))
    make_latents(folder / 'latents.zip', 5)
    (folder / 'empty').mkdir()
    write_images(folder / 'broken', images[:6])
    (folder / 'broken/000003.png').write_bytes(b'no picture')
    write_images(folder / 'mixed', images[:6])
    PIL.Image.fromarray(np.zeros((8, 9), np.uint8)).save(folder / 'mixed/000002.png')
    with zipfile.ZipFile(folder / 'real.zip', 'w') as archive:
        for path in (folder / 'real').iterdir():
            archive.write(path, path.name)
    return folder


@pytest.fixture
def run(data, monkeypatch, capsys):
    """Run the script in the folder of the data: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(data)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', ['calculate_metrics.py', *arguments])
        with pytest.raises(SystemExit) as ending:
            cli.run(calculate_metrics.main)
        captured = capsys.readouterr()
        return ending.value.code, captured.out, captured.err

    return run


def test_all_metrics_of_an_archive(run, tmp_path):
    path = tmp_path / 'new folder' / 'metrics.json'
    both = '--metrics=class_agreement,fd_pixels'
    code, out, err = run('calc', '--images=made', '--ref=real.zip', both, f'--json={path}')
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith('class_agreement ') and second.startswith('fd_pixels ')
    assert all('N=100, reference N=300' in line for line in (first, second))
    assert err.count('\n') == 1 and '100 images of made and 300 images of real' in err
    written = json.loads(path.read_text())
    assert set(written) == {'metrics', 'detectors', 'warnings', 'images', 'reference', 'run'}
    assert f'{written["metrics"]["fd_pixels"]["value"]:.5f}' in second
    assert written['metrics']['class_agreement']['value'] > 0.8
    assert written['images']['count'] == 100 and written['images']['path'] == 'made'
    assert written['run']['versions']['pillow'] == PIL.__version__ and 'transformers' in written['run']['versions']
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    assert git.returncode != 0 or written['run']['commit'].removesuffix('-dirty') == git.stdout.strip()
    assert 'commit' in written['run']
    assert (
        written['reference']['name'] == 'real'
        and written['reference']['versions'].items() <= written['run']['versions'].items()
    )
    assert written['reference']['image_shape'] == [1, 8, 8]
    assert len(written['warnings']) == 1


def test_reference_file_and_archive_give_the_same(run, tmp_path):
    reference = tmp_path / 'ref.safetensors'
    code, out, err = run('ref', '--data=real', f'--dest={reference}')
    assert (code, err) == (0, '') and '300 images of real' in out
    header = TensorFile(reference).header
    assert header['images']['count'] == 300 and header['detectors'] == {'pixels': PixelDetector.identity}
    numbers = []
    for ref in (reference, 'real', 'real.zip'):
        assert run('calc', '--images=made', f'--ref={ref}', f'--json={tmp_path / "out.json"}')[0] == 0
        numbers.append(json.loads((tmp_path / 'out.json').read_text())['metrics'])
    assert numbers[0] == numbers[1] == numbers[2]


def test_other_transform_is_warned_about(run, data, tmp_path):
    """Two archives of dataset_tool.py, one of them through a reference file."""
    for name in ('center-crop', 'center-crop-dhariwal'):
        with pytest.raises(SystemExit) as ending:
            arguments = ['convert', '--source=real', f'--dest={tmp_path / name}.zip', '--resolution=4']
            dataset_tool.main([*arguments, f'--transform={name}'])
        assert ending.value.code == 0
    reference = tmp_path / 'ref.safetensors'
    assert run('ref', f'--data={tmp_path}/center-crop.zip', f'--dest={reference}')[0] == 0
    assert TensorFile(reference).header['images']['made_with']['transform'] == 'center-crop'
    log = f'--record={tmp_path / "log"}'
    code, _, err = run('calc', f'--images={tmp_path}/center-crop-dhariwal.zip', f'--ref={reference}', log)
    assert code == 0 and 'transform center-crop-dhariwal, the reference center-crop with center-crop' in err
    code, _, err = run('calc', f'--images={tmp_path}/center-crop.zip', f'--ref={reference}', log)
    assert code == 0 and 'transform' not in err


def test_copies_in_a_reference_are_told_of_when_it_is_made_and_used(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    folder = write_images(tmp_path / 'twice', images[[*range(9), 0, 1]])
    reference = tmp_path / 'ref.safetensors'
    code, _, err = run('ref', f'--data={folder}', f'--dest={reference}')
    assert code == 0 and err == 'warning: twice: 2 of 11 images are copies of others in it\n'
    code, _, err = run('calc', '--images=made', f'--ref={reference}', f'--record={tmp_path / "log"}')
    assert code == 0 and 'twice: 2 of 11 images are copies' in err


def test_reference_is_not_read_before_it_is_known_that_results_can_be_written(run, monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(evaluation.measure, 'gather', None)
    code, _, err = run('calc', '--images=made', '--ref=real', f'--json={tmp_path}/file/out.json')
    assert code == 2 and f'{tmp_path}/file' in err
    log = tmp_path / 'log'
    log.touch()
    for denied, problem in (
        (log, f'{log} cannot be written; choose another --record'),
        (tmp_path, 'out.json cannot be'),
    ):
        monkeypatch.setattr('os.access', lambda path, mode, denied=denied: path != denied)  # root may write anywhere
        code, _, err = run('calc', '--images=made', '--ref=real', f'--json={tmp_path}/out.json', f'--record={log}')
        assert code == 2 and problem in err


def test_batch_size_does_not_matter(run, tmp_path):
    values = []
    for batch in (1000, 7):
        assert run('calc', '--images=made', '--ref=real', f'--batch={batch}', f'--json={tmp_path / "out.json"}')[0] == 0
        values.append(json.loads((tmp_path / 'out.json').read_text())['metrics']['fd_pixels']['value'])
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        ('calc --images=absent --ref=real', 'absent'),
        ('calc --images=made --ref=absent', 'absent'),
        ('calc --images=made --ref=absent.safetensors', 'absent.safetensors'),
        ('calc --images=made --ref=real --metrics=fd_pixel', 'did you mean fd_pixels or'),
        ('calc --images=made --ref=real --metrics=', "unknown metric ''; choose from"),
        ('calc --images=made --ref=real --batch=0', '--batch'),
        ('calc --images=made --ref=colour', 'made are 1x8x8'),
        ('calc --images=single --ref=real', 'single has 1 image'),
        ('calc --images=made --ref=single', 'single has 1 image'),
        ('calc --images=bare --ref=real --metrics=class_agreement', 'class_agreement needs labels, and bare has none'),
        ('calc --images=made --ref=bare --metrics=class_agreement', 'class_agreement needs labels, and bare has none'),
        ('calc --images=made --ref=REF --metrics=class_agreement', 'no pixels/sample, only pixels/halves: make it'),
        ('calc --images=colour --ref=REF', 'colour are 3x8x8'),
        ('calc --images=made --ref=NET', 'is not a metric reference'),
        ('calc --images=made --ref=TEXT', 'is not a metric reference'),
        ('calc --images=made --ref=REF --json=.', 'is a directory'),
        ('calc --images=made --ref=REF --json=TEXT/out.json', 'text.safetensors'),
        ('calc --images=made --ref=REF --record=TEXT/out.jsonl', 'text.safetensors'),
        ('calc --images=made', 'fid needs a reference: --ref=FILE|DATASET'),
        ('calc --images=made --ref=REF --repeats=3', 'made has 100 images, which 3 repeats do not divide evenly'),
        ('calc --images=empty --ref=REF', 'empty holds no images'),
        ('calc --images=mixed --ref=REF', '000002.png is 9x8 grayscale, but 000000.png is 8x8 grayscale'),
        ('calc --images=broken --ref=REF', '000003.png is damaged'),
        ('calc --images=TEXT.npz --ref=REF', 'text.safetensors.npz'),
        ('calc --images=latents.zip --ref=real', 'latents holds latents (encoder stabilityvae), and metrics measure'),
        ('calc --images=made --ref=latents.zip', 'latents holds latents'),
        ('calc --images=latents.zip --ref=REF --repeats=5', 'latents 0-0 holds latents'),
        ('compare latents.zip latents.zip', 'latents holds latents'),
        ('ref --data=latents.zip --dest=DIR/new.safetensors', 'latents holds latents'),
        ('compare real made --metrics=is', 'is needs no reference: use calc or gen without --ref'),
        ('compare made single', 'single has 1 image'),
        ('compare made', "Missing argument 'B'"),
        ('calc --images=made --ref=REF --device=tpu9', "unknown device 'tpu9'"),
        ('ref --data=real --dest=DIR/new.safetensors --metrics=is', 'is needs no reference'),
        ('ref --data=real --dest=DIR/ref.npz', 'must end in .safetensors'),
        ('ref --data=single --dest=DIR/new.safetensors', 'at least 4 are needed'),
        ('ref --data=absent --dest=DIR/new.safetensors', 'absent'),
        ('mesaure', 'mesaure'),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(run, tmp_path, arguments, problem):
    reference, network, text = (tmp_path / f'{name}.safetensors' for name in ('ref', 'net', 'text'))
    assert run('ref', '--data=real', f'--dest={reference}')[0] == 0
    save_tensors(network, {'weight': torch.zeros(2)}, {'format': 'network'})
    text.write_text('not tensors')
    before = sorted(tmp_path.iterdir())
    places = {'REF': reference, 'NET': network, 'TEXT': text, 'DIR': tmp_path}
    for word, place in places.items():
        arguments = arguments.replace(word, str(place))
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, '')
    assert problem in err and err.count('\n') == 1 and err.startswith('calculate_metrics.py: error: ')
    assert sorted(tmp_path.iterdir()) == before


def test_unreadable_image_in_the_middle_leaves_nothing(run, data, tmp_path):
    code, out, err = run('ref', '--data=broken', f'--dest={tmp_path / "ref.safetensors"}')
    assert (code, out, err.count('\n')) == (2, '', 1) and '000003.png' in err
    assert not list(tmp_path.iterdir())


def test_help_has_an_example(run):
    for command in ([], ['calc'], ['ref']):
        code, out, _ = run(*command, '--help')
        assert code == 0 and 'python calculate_metrics.py' in out


# ---- two processes ----

WORKER = """
import json, sys, torch
from dnnlib.errors import UserError
from metrics.detectors import load_detectors
from metrics.gathering import Need, gather
from metrics.image_sets import ImageBatch, ImageSet
from metrics.statistics import FeatureStatistics
from torch_utils import distributed

distributed.init('cpu')
rank = distributed.rank()
vectors = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
found = {}
for name, cut in {'shared': 11, 'idle': 40}.items():
    share = (vectors[:cut], vectors[cut:])
    statistics = FeatureStatistics(3)
    statistics.update(share[rank])
    statistics.all_reduce()
    found[name] = [statistics.count, statistics.mean.tolist(), statistics.scatter.tolist()]
nothing = FeatureStatistics(3)
nothing.all_reduce()
found['nothing'] = nothing.count

images = torch.randint(0, 256, (9, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
labels = torch.arange(9)
split, kept = Need('pixels', 'halves'), Need('pixels', 'sample')
pixels = load_detectors(['pixels'])

def stream(places):
    for i in torch.tensor(places).split(2) if places else ():
        yield ImageBatch(images[i], labels[i], i)

def broken_stream():
    yield from stream([0, 1])
    if rank == 1:
        raise UserError('the disk of rank 1 is gone')

for name, places in {'gathered': ([0, 1, 4, 5, 8], [2, 3, 6, 7]), 'gathered alone': (list(range(9)), [])}.items():
    collected = gather(ImageSet('some', 9, (1, 2, 2), 9), stream(places[rank]), [split, kept], 'cpu', pixels).collected
    assert sorted(collected[kept].labels.tolist()) == labels.tolist()
    assert torch.equal(collected[kept].features, (images.flatten(1).float() / 255)[collected[kept].labels])
    half = collected[split].groups[0]
    found[name] = [half.count, half.mean.tolist(), half.scatter.tolist()]
try:
    gather(ImageSet('some', 9, (1, 2, 2), 9), broken_stream(), [split], 'cpu', pixels)
except UserError as error:
    found['error'] = str(error)
distributed.close()
json.dump(found, open(sys.argv[1] + str(rank), 'w'))
"""


def run_two_processes(*arguments: str) -> list[tuple[int, str, str]]:
    """Run python twice as torchrun would: (exit code, stdout, stderr) of both ranks."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    common = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1'}
    common['PYTHONPATH'] = str(ROOT)
    processes = [
        subprocess.Popen(
            [sys.executable, '-W', 'error', *arguments],
            env={**os.environ, **common, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'CUDA_VISIBLE_DEVICES': ''},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def test_two_ranks_agree_with_one_and_idle_ranks_do_not_hang(tmp_path):
    endings = run_two_processes('-c', WORKER, str(tmp_path / 'rank'))
    assert [code for code, _, _ in endings] == [0, 0], endings
    found = [json.loads((tmp_path / f'rank{rank}').read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    vectors = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    for name in ('shared', 'idle'):
        count, mean, scatter = found[0][name]
        assert count == 40
        np.testing.assert_allclose(mean, vectors.mean(dim=0), rtol=1e-14)
        np.testing.assert_allclose(scatter, 39 * np.cov(vectors.T), atol=1e-11)  # terms of about 40
    assert found[0]['nothing'] == 0
    assert found[0]['gathered'][0] == 5
    for part in (1, 2):
        np.testing.assert_allclose(found[0]['gathered'][part], found[0]['gathered alone'][part], atol=1e-14)
    assert found[0]['error'] == 'the disk of rank 1 is gone'


def test_two_ranks_print_once_what_one_rank_prints(run, data, tmp_path):
    # One batch holds all images to be measured, so that rank 1 has none of them.
    measure = ['calc', f'--images={data / "made"}', f'--ref={data / "real"}', '--metrics=fd_pixels,class_agreement']
    one = run(*measure, '--batch=150', f'--json={tmp_path / "one.json"}')
    script = str(ROOT / 'calculate_metrics.py')
    two, silent = run_two_processes(script, *measure, '--batch=150', f'--json={tmp_path / "two.json"}')
    assert [ending[0] for ending in (one, two, silent)] == [0, 0, 0], (two, silent)
    assert one[1] in two[1] and one[2] in two[2]  # some versions of gloo print lines of their own
    assert 'fd_pixels' not in silent[1] + silent[2]
    written = [json.loads((tmp_path / name).read_text()) for name in ('one.json', 'two.json')]
    values = [results['metrics']['fd_pixels'].pop('value') for results in written]
    halves = [results['metrics']['fd_pixels'].pop('real_halves') for results in written]
    assert values[0] == pytest.approx(values[1], rel=1e-9) and halves[0] == pytest.approx(halves[1], rel=1e-9)
    for results in written:
        assert results.pop('run')['device'] == 'cpu'
    assert written[0] == written[1]


RANKS = """
import json, multiprocessing, sys, torch
from metrics.gathering import gather
from metrics.image_sets import ImageBatch, ImageSet
from metrics.inception_score import class_features
from metrics.reading import batch_range
from metrics.registry import needs_of, select_metrics
from metrics.results import evaluate
from torch_utils import distributed

torch.set_num_threads(1)
images = torch.randint(0, 256, (2, 31, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
images[1, 5] = images[1, 12]

class Detector:
    identity, standard = 'exponentials', True
    def num_features(self, shape):
        return {'inception': 4, 'spatial': 4, 'classes': 5}
    def __call__(self, images):
        x = (images.flatten(1).float() / 255).exp()
        return {'inception': x + 1e4, 'spatial': x, 'classes': class_features(x)}

def work(rank, size, folder):
    if size > 1:
        torch.distributed.init_process_group('gloo', f'file://{folder}/store{size}', rank=rank, world_size=size)
    chosen = select_metrics(['fid', 'kid', 'is', 'prdc', 'sfid', 'fid_infinity'])
    needs = {*needs_of(chosen), *needs_of(chosen, reference=True)}
    def read(which):
        for k in batch_range(31, 2):
            i = torch.arange(2 * k, min(2 * k + 2, 31))
            yield ImageBatch(images[which][i], None, i)
    sets = [gather(ImageSet('x', 31, (1, 2, 2), 0), read(k), sorted(needs), 'cpu', {'inception': Detector()})
            for k in (0, 1)]
    if rank == 0:
        found = {**evaluate(chosen, *sets), 'duplicates': sets[1].duplicates}
        json.dump(found, open(f'{folder}/{size}.json', 'w'))
    distributed.close()

fork = multiprocessing.get_context('fork')
for size in (1, 2, 8):
    processes = [fork.Process(target=work, args=(rank, size, sys.argv[1])) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
"""


def test_1_2_and_8_ranks_agree(tmp_path):
    """31 images in 16 batches."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, '-c', RANKS, str(tmp_path)], env=environment, check=True, timeout=100)
    one, two, eight = (json.loads((tmp_path / f'{size}.json').read_text()) for size in (1, 2, 8))
    assert one['duplicates'] == two['duplicates'] == eight['duplicates'] == 1
    for name, numbers in one['metrics'].items():
        for figure, value in numbers.items():
            for other in (two, eight):
                found = other['metrics'][name][figure]
                assert found == (value if value is None else pytest.approx(value, rel=1e-9)), (name, figure)
    assert one['metrics']['fid']['value'] > 1e-3 and one['metrics']['is']['value'] > 1


# ---- with a weights file ----


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    return random_inception(tmp_path_factory.mktemp('weights') / 'random.pth')


@pytest.fixture
def inception(weights, monkeypatch):
    """Random weights stand for the published ones."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(metrics.inception, 'PUBLISHED', digest[:8])
    monkeypatch.setenv('EDM2PLUS_INCEPTION', str(weights))
    return digest


ALL = '--metrics=fid,kid,is,precision_recall,sfid'


@pytest.mark.slow
def test_all_inception_metrics_in_one_pass(run, data, tmp_path, inception, monkeypatch):
    passes = []
    call = metrics.inception.InceptionDetector.__call__

    def counted(self, images):
        passes.append(len(images))
        return call(self, images)

    monkeypatch.setattr(metrics.inception.InceptionDetector, '__call__', counted)
    for name, first in (('A', 'made'), ('B', 'real')):
        pixels = np.stack([np.asarray(PIL.Image.open(data / first / f'{i:06d}.png')) for i in range(8)])
        write_images(tmp_path / name, pixels)
    np.savez(tmp_path / 'B.npz', pixels[..., None])
    log, ref = tmp_path / 'log.jsonl', tmp_path / 'ref.safetensors'
    (tmp_path / 'A/generation.json').write_text(json.dumps({'seeds': [0, 1, 2], 'sampler': {'steps': 5}}))

    assert run('ref', f'--data={tmp_path / "B"}', f'--dest={ref}', ALL)[0] == 0
    assert TensorFile(ref).header['detectors']['inception'].endswith(inception)
    code, out, err = run('calc', f'--images={tmp_path / "A"}', f'--ref={ref}', ALL, f'--record={log}')
    assert code == 0 and sum(passes) == 16, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ['fid', 'kid', 'is', 'precision_recall', 'sfid']
    assert all('N=8' in line for line in lines) and 'reference' not in lines[2] and 'N=8, reference N=8' in lines[0]
    # the same images as an array
    assert run('compare', str(tmp_path / 'B.npz'), str(tmp_path / 'A'), '--metrics=fid,kid', f'--record={log}')[0] == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    values = [{name: numbers['value'] for name, numbers in record['metrics'].items()} for record in records]
    assert values[1].items() <= values[0].items() and values[1]['fid'] > 1e-3
    assert records[0]['images']['generation'] == {'seeds': '0-2', 'sampler': {'steps': 5}}
    assert records[0]['detectors']['inception'].endswith(inception)
    assert records[0]['run']['command'].startswith('python calculate_metrics.py calc --images=')
    assert records[0]['reference']['sha256'] == hashlib.sha256(ref.read_bytes()).hexdigest()
    assert not any('weights' in warning for warning in records[0]['warnings'])


def test_reference_of_other_weights_is_refused(run, data, tmp_path, inception, monkeypatch):
    small = write_images(tmp_path / 'small', np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8))
    ref, other = tmp_path / 'ref.safetensors', random_inception(tmp_path / 'other.pth', seed=1)
    assert run('ref', f'--data={small}', f'--dest={ref}', '--metrics=fid')[0] == 0
    measure = ('calc', f'--images={small}', f'--ref={ref}', '--metrics=fid', f'--inception={other}')
    code, out, err = run(*measure)
    assert (code, out, err.count('\n')) == (2, '', 1) and '--any-weights' in err
    code, out, err = run(*measure, '--any-weights')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'was made with another detector' in err and inception in err
    np.savez(tmp_path / 'ref.npz', mu=np.zeros(2048), sigma=np.eye(2048))
    code, out, err = run('calc', f'--images={small}', f'--ref={tmp_path / "ref.npz"}', *measure[3:], '--any-weights')
    assert (code, out, err.count('\n')) == (2, '', 1) and 'made with the published weights of inception' in err


# ---- repeats, networks ----


def test_repeats_of_stored_images(run, tmp_path):
    path = tmp_path / 'out.json'
    code, out, _ = run(
        'calc', '--images=made', '--ref=real', '--repeats=2', f'--json={path}', f'--record={tmp_path / "l"}'
    )
    record = json.loads(path.read_text())
    values = [numbers['fd_pixels']['value'] for numbers in record['runs']]
    summary = record['summary']['fd_pixels']['value']
    assert code == 0 and len(out.splitlines()) == 3 and 'N=50 x 2' in out and values[0] != values[1]
    assert (summary['min'], summary['max']) == (min(values), max(values))
    assert summary['mean'] == pytest.approx(sum(values) / 2) and 'metrics' not in record


@pytest.fixture(scope='module')
def network(tmp_path_factory, data):
    path = tmp_path_factory.mktemp('net') / 'net.safetensors'
    config = edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Denoiser(config)
    own, names = {'steps': 3}, ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
    save_network(path, net.state_dict(), NetworkInfo(config, 0, None, 'none', sampler=own, class_names=names))
    return path


def test_a_network_brings_its_sampler_and_names_of_classes(run, network, tmp_path):
    """A run folder stands for its network too."""
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/network-0000001-0.05.safetensors').write_bytes(network.read_bytes())
    path = tmp_path / 'out.json'
    files = f'--json={path}', f'--record={tmp_path / "r"}'
    code, _, err = run('gen', f'--net={tmp_path / "run"}', '--seeds=0-3', '--class=three,1', '--ref=real', *files)
    assert code == 0, err
    images = json.loads(path.read_text())['images']
    assert (images['sampler']['steps'], images['classes']) == (3, [3, 1])
    assert images['net']['sha256'] == hashlib.sha256(network.read_bytes()).hexdigest()


def test_generated_images_are_those_of_generate(run, network, tmp_path):
    """Two repeats, against generate.py's images of the same seeds."""
    how = [f'--net={network}', '--steps=2', '--sampler=euler', '--class=0-9', '--device=cpu']
    path = tmp_path / 'out.json'
    seeds = ['--seeds=0-19', '--repeats=2', '--batch=8']
    code, out, err = run('gen', *how, *seeds, '--ref=real', f'--json={path}', f'--record={tmp_path / "log"}')
    assert code == 0, err
    record = json.loads(path.read_text())
    assert record['images']['seeds'] == ['0-19', '20-39'] and 'N=20 x 2' in out
    assert record['images']['net']['sha256'] == hashlib.sha256(network.read_bytes()).hexdigest()
    assert record['images']['sampler']['sampler']['name'] == 'euler' and record['images']['classes'] == list(range(10))
    config = SamplerConfig(2, Euler())
    net = load_network(network)[0]
    for numbers, seeds in zip(record['runs'], (range(20), range(20, 40)), strict=True):
        images = torch.cat([batch.images for batch in generate(net, seeds, config, classes=range(10), batch_size=20)])
        folder = write_images(tmp_path / f'{seeds[0]}', images[:, 0].numpy())
        assert run('calc', f'--images={folder}', '--ref=real', f'--json={path}', f'--record={tmp_path / "log"}')[0] == 0
        stored = json.loads(path.read_text())['metrics']['fd_pixels']['value']
        assert numbers['fd_pixels']['value'] == pytest.approx(stored, rel=1e-9)


def test_offline_downloads_neither_weights_nor_references(run, network, tmp_path, monkeypatch):
    monkeypatch.setenv('EDM2PLUS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.delenv('EDM2PLUS_INCEPTION', raising=False)
    for arguments, file in (
        (['--ref=real', '--metrics=fid'], metrics.inception.FILE),
        (['--ref=https://localhost/img64.pkl'], 'img64.pkl'),
    ):
        code, out, err = run('gen', f'--net={network}', '--seeds=0-9', '--offline', *arguments)
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert f'{file} is not in the download cache' in err and '--offline forbids' in err


def test_mistakes_about_networks(run, network, tmp_path):
    for arguments, problem in (
        (['--class=10'], 'classes must be between 0 and 9'),
        (['--guidance=2'], 'guiding network'),
        (['--sampler=hean'], 'heun'),
        (['--ref=colour'], 'net.safetensors are 1x8x8'),
        (['--seeds=0'], 'net.safetensors has 1 image(s)'),
        (['--device=cuda:99'], 'cuda:99'),
    ):
        code, out, err = run('gen', f'--net={network}', '--ref=real', *arguments)
        assert (code, out, err.count('\n')) == (2, '', 1) and problem in err


def test_scripts_that_measure_networks_have_the_same_options():
    for command in (calculate_metrics.gen, train.main, sweep.main):
        options = {name for parameter in command.params for name in parameter.opts}
        assert {'--metrics', '--ref', '--inception', '--dinov2', '--any-weights'} <= options


def test_training_is_measured_against_its_data_or_what_is_given(data):
    """References are opened, and what cannot be held to them refused, before the first step."""
    config = dataclasses.replace(get_preset('edm2plus-digits'), data=str(data / 'real.zip'), encoder='rgb')
    measuring = MeasureConfig(select_metrics(['fd_pixels']))
    train.make_measure(config, torch.device('cpu'), measuring, list(range(10)), None)
    other = dataclasses.replace(measuring, refs=(str(data / 'colour'),))
    with pytest.raises(UserError, match='those of the reference colour 3x8x8'):
        train.make_measure(config, torch.device('cpu'), other, list(range(10)), None)
    latents = dataclasses.replace(config, encoder='stabilityvae')
    with pytest.raises(UserError, match='give --ref'):
        train.make_measure(latents, torch.device('cpu'), measuring, list(range(10)), None)


def test_several_references_in_one_pass(run, data, tmp_path, monkeypatch):
    """Each reference gets the numbers that it gets alone, a line of the screen and of the record, one pass in all."""
    passes, call = [], PixelDetector.__call__
    monkeypatch.setattr(
        PixelDetector, '__call__', lambda self, images: passes.append(len(images)) or call(self, images)
    )
    write_images(tmp_path / 'eval', np.random.default_rng(0).integers(0, 240, (50, 8, 8), np.uint8))
    record, path = tmp_path / 'record.jsonl', tmp_path / 'out.json'
    refs = ['real', str(tmp_path / 'eval')]
    both = [f'--ref={ref}' for ref in refs]
    code, out, _ = run('calc', '--images=made', *both, f'--record={record}', f'--json={path}')
    assert code == 0 and sum(passes) == 100 + 300 + 50
    assert [line.split()[0] for line in out.splitlines()] == ['real:', 'fd_pixels', 'eval:', 'fd_pixels']
    records = [json.loads(line) for line in record.read_text().splitlines()]
    assert records == json.loads(path.read_text()) and [r['reference']['name'] for r in records] == ['real', 'eval']
    for ref, found in zip(refs, records, strict=True):
        assert run('calc', '--images=made', f'--ref={ref}', f'--record={record}', f'--json={path}')[0] == 0
        assert json.loads(path.read_text())['metrics'] == found['metrics']


def test_random_subset_of_stored_images(run, tmp_path):
    """As long as the seed is the same so is the subset; its images are some of the set's, each once."""
    found = {}
    for arguments in (
        ('--subset=40',),
        ('--subset=40', '--seed=0'),
        ('--subset=40', '--seed=1'),
        ('--subset=100',),
        (),
    ):
        files = (f'--json={tmp_path / "out.json"}', f'--record={tmp_path / "record"}')
        assert run('calc', '--images=made', '--ref=real', *arguments, *files)[0] == 0
        record = json.loads((tmp_path / 'out.json').read_text())
        found[arguments] = record['metrics']['fd_pixels']['value'], record['images']['name'], record['images']['count']
    default, again, other, whole, without = found.values()
    assert default == again and default[0] != other[0] and whole[0] == pytest.approx(without[0], rel=1e-9)
    assert default[1:] == ('made 40 of seed 0', 40)
    code, _, err = run('calc', '--images=made', '--ref=real', '--subset=101')
    assert code == 2 and 'made has 100 images, fewer than --subset=101' in err
    code, out, _ = run(
        'calc', '--images=made', '--ref=real', '--subset=40', '--repeats=2', f'--record={tmp_path / "r"}'
    )
    assert code == 0 and 'N=20 x 2' in out


def test_selftest(run, monkeypatch):
    """Closed forms agree, halves of digits too; what is not available is said."""
    code, out, err = run('selftest', '--data=real', '--ref=real')
    assert (code, err) == (0, '')
    lines = out.splitlines()
    assert sum(line.endswith(' ok') for line in lines) == 8 + 3 and not any('WRONG' in line for line in lines)
    assert any('fd_pixels of real and real' in line for line in lines)
    missing = [line for line in lines if line.startswith('not checked: ')]
    assert 'fd_pixels: 256 images in each half are needed, there are 150' in missing[0]
    assert any('inception' in line and 'offline forbids' in line for line in missing) and len(missing) == 3
    assert 'not checked: detectors and published references: give --data' in run('selftest')[1]
    code, out, err = run('selftest', '--data=real', '--ref=real', '--metrics=kid_pixels,fd_pixels')
    assert (code, err) == (0, '') and 'not checked: real against real: kid_pixels: it has no known value' in out
    assert 'fd_pixels of real and real' in out
    code, _, err = run('selftest', '--data=real', '--ref=real', '--ref=nothing')
    assert code == 2 and 'nothing is no file or folder' in err
    code, _, err = run('calc', '--images=real', '--ref=edm2-img46')  # measures what the reference makes the default
    assert code == 2 and 'did you mean edm2-img64' in err
    with monkeypatch.context() as without:
        without.setattr('metrics.dino.importlib.util.find_spec', lambda name: None)
        out = run('selftest', '--data=real', '--ref=real', '--metrics=fd_dinov2')[1]
    assert 'not checked: real against real: fd_dinov2: DINOv2 needs' in out
    uncovered = math.prod((150 - 1 - i) / (300 - 1 - i) for i in range(5))  # no image is among the 5 nearest of 299
    assert any(line.split()[:3] == ['prdc_pixels:', 'coverage', f'{1 - uncovered:.6g}'] for line in lines)
    monkeypatch.setattr(evaluation.selftest, 'kernel_distance', lambda real, images: {'value': 79.001})
    code, out, _ = run('selftest')
    assert code == 1 and [line.endswith('WRONG') for line in out.splitlines()].count(True) == 1


def test_options_are_no_abbreviations_of_torchrun_s():
    """Before Python 3.12 its parser looks at the script's options too, and refuses what could be several of its own."""
    from torch.distributed.run import get_args_parser

    theirs = {name for action in get_args_parser()._actions for name in action.option_strings}
    scripts = [path.stem for path in ROOT.glob('*.py')]
    assert len(scripts) >= 7
    for script in scripts:
        command = importlib.import_module(script).main
        for each in getattr(command, 'commands', {'': command}).values():
            for option in [o for parameter in each.params for o in (*parameter.opts, *parameter.secondary_opts)]:
                same = [name for name in theirs if option.startswith('--') and name.startswith(option)]
                assert not same, f'{script}.py {each.name} {option}: torchrun has {same}'


def test_torchrun_takes_all_options_of_results(data, run_script, tmp_path):
    where = f'--record={tmp_path / "record"}'
    measure = (
        'calculate_metrics.py',
        'calc',
        '--subset=90',
        '--seed=3',
        f'--images={data / "made"}',
        f'--ref={data / "real"}',
        where,
    )
    process = run_script(*measure, f'--json={tmp_path / "out.json"}', ranks=2)
    assert process.returncode == 0, process.stderr
    assert len((tmp_path / 'record').read_text().splitlines()) == 1 and process.stdout.count('fd_pixels') == 1
    assert json.loads((tmp_path / 'record').read_text())['run']['ranks'] == 2


def test_one_failing_rank_is_one_line(data, tmp_path):
    """The image that rank 1 cannot read stops both, and one of them says so."""
    arguments = [str(ROOT / 'calculate_metrics.py'), 'calc', f'--images={data / "broken"}', f'--ref={data / "real"}']
    endings = run_two_processes(*arguments, '--batch=3', f'--record={tmp_path / "record"}')
    assert [code for code, _, _ in endings] == [2, 2]
    lines = [line for _, _, err in endings for line in err.splitlines() if 'calculate_metrics' in line]
    assert len(lines) == 1 and '000003.png is damaged' in lines[0]
