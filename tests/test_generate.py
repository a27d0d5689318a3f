"""generate.py: what lands on disk, runs that are killed, folders that hold something else."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import generate as script
from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from dnnlib.images import CAPTION
from dnnlib.parsing import parse_grid
from networks.denoiser import Denoiser
from networks.encoders import PixelEncoder
from networks.files import NetworkInfo, load_network, network_path, save_network
from sampling import output, pipeline
from sampling.config import SamplerConfig
from sampling.options import parse_classes
from sampling.pipeline import sample
from tests.conftest import ROOT
from tests.helpers import edm2_network, needs_compiler

LABELLED = edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16)


NAMES = ('zero', 'one', 'two', 'three', 'four', 'five, or so', 'six', 'seven', 'eight', 'nine')


def make_network(path, config=LABELLED, seed=0, encoder='rgb'):
    """Write a network whose every part has a say, and return its path."""
    net = Denoiser(config, seed=seed).eval()
    torch.nn.init.ones_(net.unet.out_gain)
    for name, p in net.named_parameters():
        if name.endswith('emb_gain'):
            torch.nn.init.ones_(p)
    save_network(path, net.state_dict(), NetworkInfo(config, 1000, 0.1, 'edm2plus-digits', 'digits', encoder,
                                                 class_names=NAMES[: config.label_dim]))  # fmt: skip
    return path


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    """A labelled network, an unconditional one, one in colour, one of latents."""
    folder = tmp_path_factory.mktemp('nets')
    make_network(folder / 'net.safetensors')
    make_network(folder / 'guide.safetensors', edm2_network((8, 8), 1, 0, 16, (1, 2), 1, (4,), 16), seed=1)
    colour = edm2_network((8, 12), 3, 0, 16, (1, 2), 1, (4,), 16)
    make_network(folder / 'colour.safetensors', colour)
    latents = edm2_network((4, 4), 4, 0, 16, (1, 2), 1, (2,), 16)
    make_network(folder / 'latents.safetensors', latents, encoder='stabilityvae')
    make_network(folder / 'nameless.safetensors', latents)
    return folder


@pytest.fixture
def generate(nets, tmp_path):
    """Run generate.py in this process; returns what it printed, or raises its error."""

    def run(*args, net='net', seeds='0-9', steps=2, out='out'):
        words = [f'--net={nets}/{net}.safetensors', f'--seeds={seeds}', f'--steps={steps}', '--device=cpu']
        words += [f'--outdir={tmp_path / out}', *map(str, args)]
        result = CliRunner().invoke(script.main, words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return run


def pixels(path, frame=None):
    """A picture as an array; of a moving one, a frame in grayscale."""
    with PIL.Image.open(path) as image:
        if frame is not None:
            image.seek(frame)
            image = image.convert('L')
        return np.asarray(image)


def pngs(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*.png')}


def test_record(generate, nets, tmp_path):
    said = generate(
        f'--gnet={nets}/guide.safetensors', '--guidance=2', '--guidance-interval=0.1,3', '--sampler=dpm++2m',
        '--class=7', '--subdirs', '--rho=7', '--exact', steps=9, seeds='3,999-1001',
    )  # fmt: skip
    record = json.loads((tmp_path / 'out/generation.json').read_text())
    assert record['execution'] == {'exact': True, 'compiled': False, 'tf32': False}
    assert record['threads'] == torch.get_num_threads()
    assert record['complete'] is True and record['seeds'] == [3, 999, 1000, 1001] and record['classes'] == [7]
    for which, file in (('net', 'net'), ('guiding_net', 'guide')):
        content = (nets / f'{file}.safetensors').read_bytes()
        assert record[which]['sha256'] == hashlib.sha256(content).hexdigest() and record[which]['nimg'] == 1000
    assert record['sampler'] == {
        'steps': 9, 'sampler': {'name': 'dpm++2m'}, 'guidance': 2, 'guidance_interval': [0.1, 3], 'noise_device': 'cpu',
        'distilled': False,
        'disc': {'name': 'edm', 'sigma_min': 0.002, 'sigma_max': 80, 'rho': 7},
    }  # fmt: skip
    # Of the levels 80, 39, 17.5, 7.1, 2.52, 0.74, 0.17, 0.026 and 0.002 three are in (0.1, 3].
    assert record['evaluations_per_image'] == {'net': 9, 'guiding_net': 3}
    assert 'evaluations for each: 9, 3 of the guiding network' in said and '4 images in' in said
    assert record['precision'] == 'fp32' and record['versions']['torch'] == torch.__version__
    assert sorted(pngs(tmp_path / 'out')) == [f'{k // 1000:06d}/{k:06d}.png' for k in (3, 999, 1000, 1001)]


def test_grayscale_and_colour(generate, tmp_path):
    generate(seeds='0')
    assert pixels(tmp_path / 'out/000000.png').shape == (8, 8)
    generate(net='colour', seeds='0', out='colour')
    assert pixels(tmp_path / 'colour/000000.png').shape == (8, 12, 3)
    assert json.loads((tmp_path / 'colour/dataset.json').read_text()) == {'labels': None}


def test_evaluators_file_with_two_ranks(generate, run_script, nets, tmp_path):
    generate('--subdirs')
    process = run_script(
        'generate.py', f'--net={nets}/net.safetensors', '--seeds=9,0-4,8,7,5,6', '--steps=2', '--batch=3', '--subdirs',
        '--format=npz', f'--outdir={tmp_path}/packed', ranks=2,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    with np.load(tmp_path / 'packed/images.npz') as file:
        images, labels = file['arr_0'], file['arr_1']
        assert sorted(file.files) == ['arr_0', 'arr_1']
    assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8 and labels.dtype == np.int64
    classes = dict(json.loads((tmp_path / 'out/dataset.json').read_text())['labels'])
    for seed, image, label in zip([9, 0, 1, 2, 3, 4, 8, 7, 5, 6], images, labels, strict=True):
        name = f'000000/{seed:06d}.png'
        assert (pixels(tmp_path / 'out' / name) == image[:, :, 0]).all() and classes[name] == label
    assert sorted(p.name for p in (tmp_path / 'packed').iterdir()) == ['.lock', 'generation.json', 'images.npz']
    assert 'is complete' in generate(
        '--subdirs', '--format=npz', '--skip-existing', seeds='9,0-4,8,7,5,6', out='packed'
    )
    generate('--format=npz', net='colour', seeds='0-2', out='colour')
    with np.load(tmp_path / 'colour/images.npz') as file:
        assert file.files == ['arr_0'] and file['arr_0'].shape == (3, 8, 12, 3)


def test_packing_leaves_files_of_others(generate, monkeypatch, tmp_path):
    def with_notes(*args):
        (tmp_path / 'out/000000/notes.txt').write_text('dear to someone')
        draw_grid(*args)

    draw_grid = script.draw_grid
    monkeypatch.setattr(script, 'draw_grid', with_notes)
    said = generate('--subdirs', '--format=npz', seeds='0,1000')
    assert '2 images' in said and not (tmp_path / 'out/001000').exists()
    assert [path.name for path in (tmp_path / 'out/000000').iterdir()] == ['notes.txt']


def test_writing_leaves_no_setting_of_threads(tmp_path):
    threads, seen = torch.get_num_threads(), []
    config = SamplerConfig(steps=1)
    try:
        torch.set_num_threads(3)
        with output.ImageWriter(tmp_path, False, PixelEncoder()) as writer:
            for samples in sample(Denoiser(LABELLED).eval(), range(4), config, batch_size=2):
                writer.put(samples)
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [torch.get_num_threads(), *seen] == [3, 3]
    finally:
        torch.set_num_threads(threads)


def test_killed_and_continued(generate, nets, tmp_path):
    options = {'seeds': '0-79', 'steps': 8}
    out = tmp_path / 'out'
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'generate.py'), f'--net={nets}/net.safetensors', '--seeds=0-79', '--steps=8',
         '--batch=4', '--device=cpu', f'--outdir={out}'],
        stderr=subprocess.DEVNULL, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )  # fmt: skip
    give_up = time.monotonic() + 60
    while len(list(out.glob('*.png'))) < 10:
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = pngs(out)
    assert 10 <= len(before) < 80 and not (out / 'dataset.json').exists()
    assert json.loads((out / 'generation.json').read_text())['complete'] is False
    (out / '.000099.png.abc.tmp').write_bytes(b'half an image')
    kept = {name: (out / name).stat().st_mtime_ns for name in before}
    said = generate('--skip-existing', '--batch=7', **options)
    assert f'80 images ({len(before)} of them were there)' in said
    assert {name: (out / name).stat().st_mtime_ns for name in before} == kept
    generate(out='whole', **options)
    assert pngs(out) == pngs(tmp_path / 'whole') and len(pngs(out)) == 80
    assert (out / 'dataset.json').read_text() == (tmp_path / 'whole/dataset.json').read_text()
    assert json.loads((out / 'generation.json').read_text())['complete'] is True
    assert not list(out.glob('.*.tmp'))


def test_more_seeds_of_the_same_settings(generate, tmp_path):
    generate(seeds='0-3')
    assert '(4 of them were there)' in generate('--skip-existing', seeds='0-9')
    generate(out='whole')
    assert pngs(tmp_path / 'out') == pngs(tmp_path / 'whole')


def test_other_settings_are_refused(generate, nets, tmp_path):
    generate(seeds='0-3')
    before = pngs(tmp_path / 'out')
    record = (tmp_path / 'out/generation.json').read_bytes()
    guiding = f'--gnet={nets}/guide.safetensors'
    for change, options, message in (
        ([], {'steps': 3}, r'other settings \(sampler.steps 2, now 3\)'),
        (['--sampler=euler'], {}, 'sampler.sampler.name heun, now euler'),
        (['--class=3'], {}, r'classes None, now \[3\]'),
        (['--precision=bf16'], {}, 'precision fp32, now bf16'),
        (['--S_churn=2'], {}, 'sampler.sampler.S_churn 0.0, now 2.0'),
        ([guiding, '--guidance=2'], {}, 'guiding_net None, now file [0-9a-f]{16}'),
        (['--subdirs'], {}, 'other images, such as 000000.png'),
        ([], {'seeds': '0-2'}, 'other images, such as 000003.png'),
        (['--skip-existing', '--overwrite'], {}, 'give one of them'),
    ):
        for skip in ([], ['--skip-existing']):
            with pytest.raises(UserError, match=message):
                generate(*change, *skip, **{'seeds': '0-3', **options})
    make_network(nets / 'moved.safetensors', seed=9)
    with pytest.raises(UserError, match=r'\(net file .*, now file .*\)'):
        generate(net='moved', seeds='0-3')
    assert pngs(tmp_path / 'out') == before and (tmp_path / 'out/generation.json').read_bytes() == record
    generate('--overwrite', '--subdirs', seeds='0-1', steps=3)
    assert sorted(pngs(tmp_path / 'out')) == ['000000/000000.png', '000000/000001.png']
    assert pngs(tmp_path / 'out')['000000/000000.png'] != before['000000.png']


def test_two_ranks_are_refused_in_words(run_script, nets, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/holiday.png').write_bytes(b'')
    words = [f'--net={nets}/net.safetensors', '--seeds=0', '--steps=1', f'--outdir={tmp_path}/out']
    process = run_script('generate.py', *words, ranks=2)
    said = [line for line in process.stderr.splitlines() if 'generate.py: error' in line]
    assert process.returncode and said and all('holds other images, such as holiday.png' in line for line in said)
    assert '[rank ' not in process.stderr  # a rank that waits for one that is gone has a traceback to tell


@pytest.mark.parametrize('content', [None, 'not json', '{}', '[]', '{"seeds": 3}'])
def test_images_of_unknown_settings_are_refused(generate, tmp_path, content):
    generate(seeds='0-1')
    path = tmp_path / 'out/generation.json'
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r'images without a readable generation\.json'):
        generate('--skip-existing', seeds='0-1')
    generate('--overwrite', seeds='0-1')
    assert json.loads(path.read_text())['complete']


def test_foreign_images_are_never_removed(generate, tmp_path):
    generate(seeds='0-1')
    (tmp_path / 'out/holiday.png').write_bytes(b'dear to someone')
    with pytest.raises(UserError, match=r'other images, such as holiday.png'):
        generate('--overwrite', seeds='0-1')
    assert (tmp_path / 'out/holiday.png').exists()


def test_full_disk_is_reported_with_the_file(generate, monkeypatch, tmp_path):
    def full(path, pixels):
        if path.name == '000005.png':
            raise OSError(errno.ENOSPC, 'No space left on device')
        save_png(path, pixels)

    save_png = output.save_png
    monkeypatch.setattr(output, 'save_png', full)
    with pytest.raises(OSError, match='No space left') as caught:
        generate('--batch=2', seeds='0-19')
    assert caught.value.filename == str(tmp_path / 'out/000005.png')
    assert len(pngs(tmp_path / 'out')) == 5
    monkeypatch.undo()
    generate('--skip-existing', seeds='0-19')
    assert len(pngs(tmp_path / 'out')) == 20


def test_pictures(generate, tmp_path):
    generate('--grid=2x3', f'--trajectory={tmp_path}/films/t.gif', steps=4)
    assert pixels(tmp_path / 'out-grid.png').shape == (2 * 66 - 2, 3 * 66 - 2)
    with PIL.Image.open(tmp_path / 'films/t.gif') as film:
        assert film.size == (8 * 66 - 2, 64) and film.n_frames == 4
    last = pixels(tmp_path / 'films/t.gif', frame=3)[::8, :64:8]
    assert (last == pixels(tmp_path / 'out/000000.png')).all()
    generate(f'--trajectory={tmp_path}/t.png', '--class=0-9', steps=40, seeds='0-2', out='strip')
    strip = pixels(tmp_path / 't.png')
    assert strip.shape == (3 * 66 - 2, 16 * 66 - 2)
    assert (strip[-64::8, -64::8] == pixels(tmp_path / 'strip/000002.png')).all()
    with pytest.raises(UserError, match=r'must end in \.gif .* or \.png'):
        generate('--trajectory=t.mp4', out='none')
    with pytest.raises(UserError, match='must lie outside of'):  # it would be one of the images
        generate(f'--trajectory={tmp_path}/none/films/t.png', out='none')
    assert not (tmp_path / 'none').exists()


def test_latents(generate, monkeypatch, tmp_path):
    class Enlarging:
        def decode(self, x):
            return (x[:, :3] * 50 + 128).clip(0, 255).to(torch.uint8).repeat_interleave(8, 2).repeat_interleave(8, 3)

    asked = []
    monkeypatch.setattr(script, 'load_encoder', lambda *args: asked.append(args) or Enlarging())
    generate('--vae=somewhere', net='latents', seeds='0-1')
    assert asked == [('stabilityvae', torch.device('cpu'), 'somewhere')]
    assert pixels(tmp_path / 'out/000001.png').shape == (32, 32, 3)
    assert json.loads((tmp_path / 'out/generation.json').read_text())['encoder'] == 'stabilityvae'
    with pytest.raises(UserError, match='4 channels make no picture'):
        generate(net='nameless', out='none')
    with pytest.raises(UserError, match='guiding network has the encoder stabilityvae'):
        nets = f'--gnet={tmp_path}/latents.safetensors'
        make_network(tmp_path / 'latents.safetensors', LABELLED, encoder='stabilityvae')
        generate(nets, '--guidance=2', out='none')


def test_self_guidance(generate, tmp_path):
    said = generate('--gnet=self', '--guidance=2', seeds='0-1', steps=3)
    assert 'evaluations for each: 5, 5 of the guiding network' in said
    generate(seeds='0-1', steps=3, out='plain')
    assert pngs(tmp_path / 'out') != pngs(tmp_path / 'plain')
    generate('--gnet=self', '--guidance=1', seeds='0-1', steps=3, out='none asked for')
    assert pngs(tmp_path / 'none asked for') == pngs(tmp_path / 'plain')
    with pytest.raises(UserError, match='no labels to drop'):
        generate('--gnet=self', '--guidance=2', net='colour', out='none')


def test_bad_words(generate, tmp_path):
    for args, message in (
        (['--sampler=heum'], "unknown sampler 'heum'; did you mean heun"),
        (
            ['--sampler=dpm++2m', '--S_churn=1'],
            'dpm..2m has no option S_churn, which is one of heun, euler, ablation',
        ),
        (['--guidance-interval=2,1', '--gnet=self', '--guidance=2'], 'LO < HI'),
        (['--guidance-interval=1,2'], '--guidance-interval means nothing without guidance'),
        (['--gnet=self'], '--gnet guides nothing without its weight'),
        (['--sigma-min=3', '--sigma-max=2'], 'sigma_min < sigma_max'),
        (['--class=10'], 'classes must be between 0 and 9, not 10'),
    ):
        with pytest.raises(UserError, match=message):
            generate(*args)
    with pytest.raises(AssertionError, match="cannot read '0x3' as ROWSxCOLS"):  # click's own usage error
        generate('--grid=0x3')
    assert not (tmp_path / 'out').exists()
    assert parse_grid('4x10') == (4, 10)
    for text in ('4', '4x', 'x4', '-1x2', '1x2x3', ''):
        with pytest.raises(UserError, match='ROWSxCOLS'):
            parse_grid(text)


def test_classes_drawn_on_a_gpu_are_those_that_are_kept(generate, tmp_path, monkeypatch):
    class OfGPU(pipeline.Streams):
        """A GPU's generator, another than the CPU's, is one of other seeds here."""

        def __init__(self, seeds, config, device='cpu'):
            super().__init__([seed + 1000 * (device == 'cuda') for seed in seeds], config)

    monkeypatch.setattr(pipeline, 'Streams', OfGPU)
    for module in (pipeline, script):
        monkeypatch.setattr(module, 'check_fit', lambda *_: None)  # which would miss the GPU
    generate('--noise-device=cuda', seeds='0-5')
    generate(seeds='1000-1005', out='same')
    labels = [json.loads((tmp_path / name / 'dataset.json').read_text())['labels'] for name in ('out', 'same')]
    assert [label for _, label in labels[0]] == [label for _, label in labels[1]]
    assert np.array_equal(pixels(tmp_path / 'out/000003.png'), pixels(tmp_path / 'same/001003.png'))


def test_classes_by_name(generate, tmp_path):
    generate('--class=two,5-6', seeds='0-5')
    saved = json.loads((tmp_path / 'out/dataset.json').read_text())
    assert [label for _, label in saved['labels']] == [2, 5, 6, 2, 5, 6] and saved['class_names'] == list(NAMES)
    assert ImageDataset(tmp_path / 'out').class_names == list(NAMES)
    grid = pixels(tmp_path / 'out-grid.png')
    assert grid.shape[0] == 2 * 66 - 2 + CAPTION and 0 < (grid[:CAPTION, :66] < 128).sum() < 200
    assert parse_classes('five, or so', NAMES) == [5] and parse_classes('1,nine', NAMES) == [1, 9]
    with pytest.raises(UserError, match=r"unknown class 'sevn'; did you mean seven"):
        generate('--class=sevn', out='other')
    with pytest.raises(UserError, match=r'names no classes; give --class as numbers'):
        parse_classes('cat', ())


def test_newest_network_of_a_run_folder(tmp_path):
    with pytest.raises(UserError, match='no network file in the folder'):
        network_path(tmp_path)
    names = ['network-snapshot-0000048-0.050', 'phema-0000049-0.120', 'network-snapshot-0000049-0.100',
             'training-state-0000050', 'phema-0000012-0.300']  # fmt: skip
    for i, name in enumerate(names):
        (tmp_path / f'{name}.safetensors').touch()
        os.utime(tmp_path / f'{name}.safetensors', (0, 100 - i))
    assert network_path(tmp_path).stem == 'phema-0000049-0.120'
    make_network(network_path(tmp_path))
    assert load_network(tmp_path)[1].nimg == 1000


@needs_compiler
@pytest.mark.slow
def test_compiled(run_script, generate, nets, tmp_path):
    words = [f'--net={nets}/net.safetensors', '--seeds=0-20', '--steps=3', '--compile', f'--outdir={tmp_path}/fast']
    cache = {'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache'), 'PYTHONWARNINGS': '', 'OMP_NUM_THREADS': '2'}
    process = run_script('generate.py', *words, timeout=400, env=cache)
    assert process.returncode == 0, process.stderr
    assert '--compile takes minutes' in process.stderr
    generate(seeds='0-20', steps=3)
    for seed in range(21):
        fast, plain = (pixels(tmp_path / f / f'{seed:06d}.png') for f in ('fast', 'out'))
        assert np.abs(fast.astype(int) - plain).max() <= 1
