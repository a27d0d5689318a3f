"""Wrong use of the scripts: one clear line on stderr, exit code 2, nothing half-written."""

import json

import pytest
import torch

from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, save_network
from tests.conftest import ROOT
from tests.helpers import edm2_network, make_archive


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a dataset, a network file and things that are neither."""
    folder = tmp_path_factory.mktemp('place')
    make_archive(folder / 'data.zip', count=40, classes=10)
    make_archive(folder / 'unlabelled.zip', count=4, classes=0)
    config = edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16)
    net = Denoiser(config).eval()
    save_network(folder / 'net.safetensors', net.state_dict(), NetworkInfo(config, 1000, 0.1, 'edm2plus-digits'))
    (folder / 'text.safetensors').write_text('not a network')
    (folder / 'file').write_text('')
    (folder / 'empty').mkdir()
    (folder / 'full').mkdir()
    make_archive(folder / 'full' / 'x.png', count=1, classes=0)
    return folder


TRAIN = 'train.py --preset=edm2plus-digits --data={place}/data.zip --outdir={out}'
GENERATE = 'generate.py --net={place}/net.safetensors --seeds=0-3 --steps=2 --outdir={out}'
CASES = {
    'missing dataset': ('train.py --preset=edm2plus-digits --data=none.zip --outdir={out}', 'none.zip does not exist'),
    'dataset that is none': (TRAIN.replace('data.zip', 'file'), 'file'),
    'unknown preset': (
        TRAIN.replace('-digits', '-digit'),
        "unknown preset 'edm2plus-digit'; did you mean edm2plus-digits",
    ),
    'missing flag': ('train.py --preset=edm2plus-digits', "Missing option '--data'"),
    'interval': (TRAIN + ' --slice=100', 'slice must be a multiple of the batch (64 images), not 100 (try 64 or 128)'),
    'all held out': (TRAIN + ' --held-out=1', 'the share of held-out images must be'),
    'flag of EDM2': (TRAIN + ' --fp16=True', '--fp16 is --precision=fp16 here'),
    'unit of EDM2': (
        'reconstruct_phema.py --indir={place} --outstd=0.1 --outkimg=8389',
        '--outkimg is --outnimg here, in images',
    ),
    'bounds of EDM2': (GENERATE + ' --sigma_min=0.01', '--sigma_min is --sigma-min here'),
    'unknown flag': (TRAIN + ' --learning-rate=1', '--learning-rate'),
    'unwritable folder': (TRAIN.replace('{out}', '{place}/file/out'), 'file/out: Not a directory'),
    'folder that is a file': (GENERATE.replace('{out}', '{place}/file'), 'file is a file; a folder is needed'),
    'number of images': (TRAIN + ' --duration=8mi', "cannot read '8mi' as a number of images"),
    'two problems': (TRAIN + ' --duration=1000 --dropout=2', 'dropout must be in [0, 1), not 2.0; duration must be'),
    'attention at no level': (
        TRAIN + ' --attn-resolutions=5,4',
        'no level has a shorter side of 5; levels have 8, 4 (try --attn-resolutions=4)',
    ),
    'batch of nothing': (TRAIN + ' --batch=0', 'the batch must be at least 1'),
    'no such GPU': (TRAIN + ' --device=cuda', 'device cuda:0 is not there'),
    'no such device': (TRAIN + ' --device=foo', "unknown device 'foo'"),
    'huge seed': (TRAIN + ' --seed=99999999999999999999', 'seed must be between'),
    'not a number': (TRAIN + ' --lr=nan', 'optimizer.lr must be a number, not nan'),
    'empty folder name': (TRAIN.replace('{out}', ''), 'the name of the output folder is empty'),
    'no labels': (TRAIN.replace('data.zip', 'unlabelled.zip'), 'has no labels'),
    'unknown precision': (TRAIN + ' --precision=fp8', "unknown precision 'fp8'"),
    'no network': (GENERATE.replace('net.saf', 'text.saf'), 'text.safetensors is not a network file'),
    'missing network': (GENERATE.replace('net.saf', 'none.saf'), 'none.safetensors: No such file'),
    'seeds': (GENERATE.replace('0-3', '5-1'), "the range '5-1' in '5-1' goes down"),
    'seeds that are none': (GENERATE.replace('0-3', 'a'), "cannot read 'a'"),
    'class': (GENERATE + ' --class=10', 'classes must be between 0 and 9, not 10'),
    'steps': (GENERATE + ' --steps=0', 'steps must be at least 1'),
    'guidance': (GENERATE + ' --guidance=2', '--gnet'),
    'other images': (GENERATE.replace('{out}', '{place}/full'), 'holds other images, such as x.png'),
    'unwritable images': (GENERATE.replace('{out}', '{place}/file/out'), 'file/out: Not a directory'),
    'no snapshots': ('reconstruct_phema.py --indir={place}/empty --outstd=0.1', 'holds no network-snapshot'),
    'no folder': ('reconstruct_phema.py --indir=none --outstd=0.1', 'none: No such file'),
    'list of lengths': ('reconstruct_phema.py --indir={place} --outstd=0.1,...', "'...'"),
    'nothing to count': ('count_flops.py', 'give one of --preset=NAME, --net=FILE and --tables'),
    'two things to count': ('count_flops.py --tables --preset=edm2-img64-s', 'give one of'),
    'no preset to count': (
        'count_flops.py --preset=edm2-img64-z',
        "unknown preset 'edm2-img64-z'; did you mean edm2-img64-",
    ),
    'no network to count': ('count_flops.py --net={place}/text.safetensors', 'is not a network file'),
    'gen without network': (
        'calculate_metrics.py gen --net={place}/text.safetensors --ref={place}/data.zip --json={out}',
        'is not a network file',
    ),
}


def _files(place):
    return sorted(path for path in place.rglob('*') if path.name != '.lock')  # which a folder of images keeps


@pytest.mark.parametrize('case', CASES)
def test_wrong_use(case, place, run_here, tmp_path):
    command, message = CASES[case]
    before = _files(place)
    words = command.format(place=place, out=tmp_path / 'out').split()
    process = run_here(*words)
    assert process.returncode == 2, process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f'{words[0]}: error: ') and message in lines[0], process.stderr
    assert _files(place) == before and not (tmp_path / 'out').exists()


def test_wrong_use_in_a_process_of_its_own(place, run_script):
    process = run_script('train.py', '--preset=edm2plus-digit', f'--data={place}/data.zip', '--outdir=out')
    assert process.returncode == 2 and process.stderr.count('\n') == 1, process.stderr
    assert process.stderr.startswith("train.py: error: unknown preset 'edm2plus-digit'")


@pytest.mark.parametrize('script', sorted(path.name for path in ROOT.glob('*.py')))
def test_help(script, run_here):
    process = run_here(script, '--help')
    assert process.returncode == 0 and not process.stderr and f'python {script}' in process.stdout


def test_dry_run_writes_nothing(place, run_here, tmp_path):
    process = run_here(*TRAIN.format(place=place, out=tmp_path / 'out').split(), '--dry-run', '--batch=256')
    assert process.returncode == 0, process.stderr
    config, _ = json.JSONDecoder().raw_decode(process.stdout)
    assert config['batch'] == 256 and config['network']['label_dim'] == 10 and config['network']['img_channels'] == 1
    assert not (tmp_path / 'out').exists()


def test_generated_folder(place, run_script, run_here, tmp_path):
    out = tmp_path / 'out'
    words = GENERATE.format(place=place, out=out).split()
    process = run_here(*words, '--class=3-5', '--subdirs')
    assert process.returncode == 0, process.stderr
    assert json.loads((out / 'dataset.json').read_text())['labels'] == [
        ['000000/000000.png', 3],
        ['000000/000001.png', 4],
        ['000000/000002.png', 5],
        ['000000/000003.png', 3],
    ]
    record = json.loads((out / 'generation.json').read_text())
    assert record['net']['nimg'] == 1000 and record['sampler']['steps'] == 2 and record['seeds'] == [0, 1, 2, 3]
    assert (tmp_path / 'out-grid.png').exists()
    first = {path.name: path.read_bytes() for path in out.rglob('*.png')}
    process = run_script(*words, '--class=3-5', '--subdirs', ranks=2)
    assert process.returncode == 0, process.stderr
    assert {path.name: path.read_bytes() for path in out.rglob('*.png')} == first
    assert json.loads((out / 'generation.json').read_text())['versions']['torch'] == torch.__version__


def test_count_flops(place, run_here):
    process = run_here('count_flops.py', f'--net={place}/net.safetensors', '--json')
    assert process.returncode == 0, process.stderr
    cost = json.loads(process.stdout)
    config = NetworkConfig.from_json(cost['config'])
    assert cost['parameters'] == sum(p.numel() for p in Denoiser(config).parameters())
    assert cost['operations'] > cost['macs'] > 0 and cost['saved_bytes'] > cost['peak_bytes'] > 0
    process = run_here('count_flops.py', '--preset=edm2plus-img64-xs')
    assert '68.69 M' in process.stdout and '22.71 GFLOPs' in process.stdout
