"""What a run tells: losses by noise level, magnitudes, held-out images, times, pictures, what it will cost."""

import itertools
import json
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.order import BatchOrder
from dataset.reader import ImageDataset
from diffusion.levels import LogNormal
from dnnlib.configs import replaced
from dnnlib.errors import UserError
from dnnlib.files import write_json
from dnnlib.images import CAPTION
from dnnlib.jsonl import append_record, cut_records, read_records
from networks.complexity import saved_bytes
from networks.denoiser import Denoiser
from networks.encoders import PixelEncoder, encode_pixels
from networks.magnitudes import magnitudes, mean_and_max
from sampling.config import SamplerConfig
from tests.helpers import edm2_network, needs_compiler
from train import draw_samples, with_micro_batch
from training.cost import fitting_micro_batch, format_bytes, memory, plan
from training.heldout import held_out_loss, split
from training.inputs import training_draws
from training.loop import train
from training.methods.denoising import DenoisingConfig, DenoisingLoss
from training.monitor.log import RunLog, read_stats
from training.monitor.step_stats import BINS, LossSums, PendingStats, StepStats, noise_edges, reduced, summarize
from training.monitor.timing import Growing, PhaseTimer
from training.presets.table import make_config

CPU = torch.device('cpu')
LEVELS = LogNormal(-0.8, 1.6)


def test_noise_bins_are_half_standard_deviations():
    edges = noise_edges(LEVELS)
    assert len(edges) == BINS - 1 >= 7
    assert [(edge + 0.8) / 1.6 for edge in edges] == pytest.approx([-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2])


def test_losses_by_noise_level_by_hand():
    sums = LossSums(torch.tensor(noise_edges(LEVELS)))
    middle = math.exp(-0.8 + 0.1)  # the sixth bin
    sigma = torch.tensor([1e-6, middle, middle, 1e6])
    sums.add(sigma, torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([3.0, 5.0, 7.0, 11.0]))
    found = summarize(reduced([sums.sums, sums.sums]).sum(dim=0), LEVELS, elements=2)
    assert found['loss'] == pytest.approx(15 / 8) and found['mse'] == pytest.approx(26 / 8)
    by_noise = found['by_noise']
    assert by_noise['images'] == [2, 0, 0, 0, 0, 4, 0, 0, 0, 2]
    assert by_noise['loss'] == [0.5, None, None, None, None, 1.5, None, None, None, 4.0]
    assert by_noise['mse'] == [1.5, None, None, None, None, 3.0, None, None, None, 5.5]


def test_records_split_the_loss_by_noise_level(config, finished):
    for record in read_stats(finished('bins')):
        by_noise = record['by_noise']
        assert sum(by_noise['images']) == config.status
        for name in ('loss', 'mse'):
            parts = [v * n for v, n in zip(by_noise[name], by_noise['images'], strict=True) if n]
            assert sum(parts) / config.status == pytest.approx(record[name], rel=1e-5)
        assert set(record['seconds']) >= {'data', 'forward/backward', 'optimizer', 'ema'}
        assert 0.05 < record['memory_gib'] < 64


def step_with(*counts: int) -> StepStats:
    return StepStats(LossSums(torch.zeros(BINS - 1)), 0.0, torch.tensor(1.0), torch.tensor(counts))


def test_nonfinite_steps_in_a_row():
    stats, names = PendingStats(4), ['a', 'b', 'c', 'd']

    def line(*steps, limit=3):
        for counts in steps:
            stats.add(step_with(*counts))
        stats.collect()
        found, exceeded = stats.bad_gradients(names, limit)
        stats.clear()
        return found, exceeded

    good, bad = (0, 0, 0, 0), (0, 1, 0, 0)
    assert line(good) == ({'nonfinite': 0, 'nonfinite_in': {}}, False)
    assert line((1, 2, 3, 4), (1, 0, 0, 0)) == ({'nonfinite': 11, 'nonfinite_in': {'d': 4, 'c': 3, 'a': 2}}, False)
    assert stats.streak == 2
    assert not line(good, bad)[1] and stats.streak == 1
    assert line(bad, bad, good)[1], 'three in a row, whatever comes after'
    assert not line(*[bad] * 50, limit=0)[1]


def test_pending_statistics_are_kept():
    stats, other = PendingStats(4), PendingStats(4)
    stats.add(step_with(1, 0, 0, 2))
    stats.collect()
    stats.streak = torch.tensor(7)
    other.load(stats.tensors())
    for each in (stats, other):
        each.add(step_with(0, 0, 3, 0))
        each.collect()
    assert all(torch.equal(stats.tensors()[name], other.tensors()[name]) for name in stats.NAMES)
    assert other.nonfinite.tolist() == [[1, 0, 0, 2], [0, 0, 3, 0]] and other.streak == 7
    assert other.sums.shape == (2, BINS, 3)


def test_magnitudes_by_hand(tiny_config):
    net = Denoiser(tiny_config, seed=0).train()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    x, sigma = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 1.0])
    outputs = []
    block = net.unet.enc['8x8_block0']
    for layer in (block.emb_linear, block.dw_in, block.pw_expand, block.pw_project, block.dw_out):
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    found = magnitudes(net, x, sigma, None)
    assert net.training and all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert set(found['activations']) == set(found['weights']) == {'enc 8x8', 'dec 8x8', 'enc 4x4', 'dec 4x4'}
    expected = [h.square().flatten(2).mean(dim=2).sqrt().mean(dim=0) if h.ndim == 4 else h.abs().mean(dim=0)
                for h in outputs]  # fmt: skip
    torch.testing.assert_close(
        found['activations']['enc 8x8'].sort().values, torch.cat(expected).sort().values, rtol=1e-5, atol=1e-6
    )
    rms = block.dw_in.weight.detach().square().flatten(1).mean(dim=1).sqrt()
    assert torch.isin(rms, found['weights']['enc 8x8']).all()
    mean, largest = mean_and_max(found)['weights']['enc 8x8']
    assert mean == pytest.approx(found['weights']['enc 8x8'].mean().item()) and largest >= mean


def test_magnitudes_stay_near_one_in_training(config, run):
    (record,) = [r for r in read_stats(run('near', config)) if 'magnitudes' in r]
    assert record['nimg'] == config.duration
    for mean, largest in record['magnitudes']['weights'].values():
        assert 0.9 < mean <= largest < 1.5  # the step after the last normalization is in them
    for mean, _ in record['magnitudes']['activations'].values():
        assert 0.2 < mean < 2


def test_split_holds_out_other_images(archive):
    dataset = ImageDataset(archive)
    part, held_out = split(dataset, 0.2, seed=3)
    assert len(held_out) == 6 and len(part) == 24
    together = torch.cat([part.indices, held_out.indices])
    assert together.sort().values.tolist() == list(range(30))
    assert part.indices.tolist() == sorted(part.indices.tolist())
    assert torch.equal(part[5][0], dataset[int(part.indices[5])][0])
    assert split(dataset, 0.2, seed=4)[1].indices.tolist() != held_out.indices.tolist()
    assert split(dataset, 0.0, seed=3) == (dataset, None)
    assert len(split(dataset, 0.001, seed=3)[1]) == 1
    with pytest.raises(UserError, match='leaves none to train on'):
        split(dataset, 0.99, seed=3)


def test_held_out_images_are_not_trained_on(config, run):
    dataset = ImageDataset(config.data)
    config = replace(
        config,
        held_out=0.5,
        duration=1024,
        preview=1024,
        network=replaced(config.network, {'architecture.dropout': 0.0}),
    )
    seen = []

    class Spy(ImageDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    from training import loop

    batches = loop.make_loader(
        split(Spy(config.data), 0.5, config.seed)[0], BatchOrder(15, config.seed, 256, 256), workers=0
    )
    for _ in range(2):
        next(batches)
    assert set(seen) == set(split(dataset, 0.5, config.seed)[0].indices.tolist())
    records = read_records(run('heldout', config) / 'metrics.jsonl')
    assert [(r['nimg'], r['ema_std']) for r in records] == [(1024, 0.05), (1024, 0.1)]
    assert sum(records[0]['held_out']['by_noise']['images']) == 15


def test_held_out_loss_by_hand(config):
    dataset = ImageDataset(config.data)
    _, held_out = split(dataset, 0.2, config.seed)
    net = Denoiser(config.network, seed=1).eval()
    found = held_out_loss(net, held_out, config, batch_size=4)
    assert found == held_out_loss(net, held_out, config, batch_size=4)
    assert found['mse'] == pytest.approx(held_out_loss(net, held_out, config, batch_size=5)['mse'], rel=1e-6)
    normal = torch.distributions.Normal(0, 1)
    sigma = (config.method.levels.P_mean + config.method.levels.P_std * normal.icdf((torch.arange(6) + 0.5) / 6)).exp()
    y = encode_pixels(torch.stack([held_out[i][0] for i in range(6)]))
    from torch_utils.random import stream_seed

    _, noise = training_draws(
        stream_seed(config.seed, 'held out'), list(range(6)), (1, 8, 8), config.method.levels, CPU
    )
    labels = torch.eye(10)[[held_out[i][1] for i in range(6)]]
    _, losses, errors = DenoisingLoss(net, DenoisingConfig())(y, sigma, noise, labels)
    assert found['mse'] == pytest.approx(errors.sum().item() / (6 * 64), rel=1e-5)
    assert found['loss'] == pytest.approx(losses.sum().item() / (6 * 64), rel=1e-5)


def test_timer_adds_up():
    timer = PhaseTimer(CPU)
    for _ in range(3):
        with timer.phase('data'):
            time.sleep(0.01)
    with timer.phase('ema'):
        pass
    seconds = timer.take()
    assert seconds['data'] >= 0.03 and 0 <= seconds['ema'] < seconds['data']
    assert timer.take() == {}


def test_records_are_cut_where_a_run_goes_on(tmp_path):
    path = tmp_path / 'stats.jsonl'
    cut_records(path, 5)
    assert not path.exists()
    for nimg in (1, 2, 3):
        append_record(path, {'nimg': nimg})
    with open(path, 'a') as file:
        file.write('{"nimg": 4, "lo')
    cut_records(path, 2)
    assert read_records(path) == [{'nimg': 1}, {'nimg': 2}] and path.read_text().count('\n') == 2


def test_log(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.say('one\ntwo')
    log.say('three', show=False)
    assert capsys.readouterr().out == 'one\ntwo\n'
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert [line[20:] for line in lines] == ['one', 'two', 'three'] and lines[0][4] == '-'
    RunLog(None).say('nothing')
    assert not capsys.readouterr().out


def test_picture_of_the_loss(config, tmp_path):
    pytest.importorskip('matplotlib')
    import PIL.Image

    train(replace(config, held_out=0.2), ImageDataset(config.data), tmp_path, CPU)
    with PIL.Image.open(tmp_path / 'loss.png') as image:
        assert np.asarray(image.convert('L')).std() > 10


def test_tensorboard(config, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.loop import train

    picture = np.zeros((4, 6, 1), np.uint8)
    config = replace(config, duration=1024, preview=1024, held_out=0.1)
    train(
        config, ImageDataset(config.data), tmp_path, CPU, preview=lambda net, nimg: picture, tensorboard=True,
        measure=lambda net, nimg: {'m': {'value': 2.5}},
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / 'tensorboard'))
    events.Reload()
    assert {'training/loss', 'training/by_noise/mse/4', 'EMA 0.1/held_out/mse'} <= set(events.Tags()['scalars'])
    assert events.Scalars('EMA 0.05/metrics/m/value')[0].value == 2.5
    assert 'activations/enc 8x8' in events.Tags()['histograms'] and 'samples' in events.Tags()['images']


def test_tensorboard_missing(monkeypatch):
    from training.monitor import board

    monkeypatch.setattr(board.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='pip install tensorboard'):
        board.require_tensorboard()


def test_plan_of_a_published_run():
    rows = dict(plan(make_config('edm2plus-img64-xl', {'micro_batch': 32, 'precision': 'fp16'}).check(32), 32))
    assert rows['parameters'] == '613.55 M' and rows['one forward pass'].startswith('198.88 GFLOPs')
    assert rows['steps'] == '327680 of 2048 images'
    assert rows['ranks'] == '32: 64 images each per step'
    assert 'with --batch-gpu=32' in rows['memory of one GPU']
    assert rows['snapshots'] == '80 times 2, 1.1 GiB each, 182.9 GiB together'
    assert rows['states'] == '5, of which 2 stay, 11.4 GiB each, 22.9 GiB together'


def test_planned_files_are_what_a_run_writes(config, finished):
    folder = finished('sizes')
    rows = dict(plan(config, 1))
    for kind, pattern, count in (('snapshots', 'network-snapshot-*', 4), ('states', 'training-state-*', 2)):
        files = list(folder.glob(pattern))
        assert len(files) == count
        planned = float(rows[kind].split(', ')[-2].removesuffix(' MiB each')) * 2**20
        assert files[0].stat().st_size == pytest.approx(planned, rel=0.15, abs=0.07 * 2**20)  # and a header


def test_planned_memory_is_what_autograd_keeps(tiny_config):
    """The estimate against a real training pass: parameters x copies, weights once, activations per image."""
    config = make_config('edm2plus-digits', {'ema_stds': (0.05, 0.1, 0.2)})
    parts = memory(config, 1)
    numbers = sum(p.numel() for p in Denoiser(config.network).parameters())
    assert parts['parameters, gradients, optimizer, EMAs'] == 4 * numbers * 7
    assert memory(config, 2)['parameters, gradients, optimizer, EMAs'] == 4 * numbers * 8
    assert parts['activations'] == saved_bytes(config.network)
    # One process gathers gradients: float32 weights and their gradients, in place of the parameters', beside the cast.
    bf16 = [memory(replace(config, precision='bf16'), ranks)['normalized weights'] for ranks in (1, 2)]
    assert bf16[0] == bf16[1] + 4 / 2 * bf16[1]
    net = Denoiser(config.network).train()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(torch.zeros(64, 1, 8, 8), torch.ones(64), torch.zeros(64, 10))
    given = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers()]}
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in given)
    assert 64 * parts['activations'] + parts['normalized weights'] == pytest.approx(
        total, rel=0.05
    )  # attention differs
    assert output.requires_grad


def test_micro_batch_is_what_fits(config):
    sizes = {'weights': 1000, 'activations': 10}
    cases = {10**6: 256, 4450: 256, 4449: 128, 2530: 64, 1000: 1}  # 0.8 of it, less 1000, in portions of 10
    for available, expected in cases.items():
        assert fitting_micro_batch(config, 1, available, sizes) == expected
    assert fitting_micro_batch(replace(config, batch=96), 1, 1750, sizes) == 32
    assert fitting_micro_batch(config, 4, 10**6, sizes) == 64


def test_plan_proposes_a_micro_batch():
    rows = dict(plan(make_config('edm2plus-img64-xs', {'batch': 256}).check(), 1))
    proposed = [int(rows[f'memory of one GPU, {size} GiB'].split('--batch-gpu=')[1].split()[0]) for size in (24, 80)]
    assert proposed == [16, 64], 'of 0.57 GiB for each image'


def test_micro_batch_of_a_run_that_was_begun_stays(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('train.device_memory', lambda device: 2**24)
    chosen = with_micro_batch(config, tmp_path, torch.device('cpu'), [])
    assert 1 <= chosen.micro_batch < 256 and f'--batch-gpu={chosen.micro_batch}: ' in capsys.readouterr().out
    write_json(tmp_path / 'config.json', chosen.to_json())
    monkeypatch.setattr('train.device_memory', lambda device: 2**40)
    assert with_micro_batch(config, tmp_path, torch.device('cpu'), []) == chosen
    monkeypatch.setattr('train.memory', lambda config, world_size: {'weights': 2**20, 'activations': 2**25})
    assert with_micro_batch(config, tmp_path / 'other', torch.device('cpu'), []).micro_batch == 64, 'of 0.8 * 4 GiB'
    monkeypatch.setattr('train.device_memory', lambda device: 2**31)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert with_micro_batch(config, tmp_path / 'other', torch.device('cpu'), []).micro_batch == 16, 'a rank has half'
    monkeypatch.setattr('train.device_memory', lambda device: 2**40)
    monkeypatch.setattr('train.memory', memory)
    asked = replace(config, micro_batch=128)
    assert with_micro_batch(asked, tmp_path, torch.device('cpu'), []) == asked
    assert with_micro_batch(config, tmp_path / 'other', torch.device('cpu'), []).micro_batch is None
    for content, problem in (('[1]', 'not an object'), ('zz', 'cannot be read')):
        (tmp_path / 'config.json').write_text(content)
        with pytest.raises(UserError, match=rf'config\.json .*{problem}'):
            with_micro_batch(config, tmp_path, torch.device('cpu'), [])
    write_json(tmp_path / 'config.json', {'micro_batch': 'many'})  # refused later, with all differences
    assert with_micro_batch(config, tmp_path, torch.device('cpu'), []) == config


def test_pictures_come_early_and_at_every_stop(config, tmp_path, monkeypatch):
    minutes = itertools.count()
    monkeypatch.setattr('training.monitor.timing.time', SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
    growing, seen = Growing(), []
    assert [minute for minute in range(1, 20) if growing.due()] == [1, 2, 4, 8, 16]
    monkeypatch.undo()
    config = replace(config, slice=768, checkpoint=2048, snapshot=2048, preview=2048)
    for _ in range(3):
        train(
            config,
            ImageDataset(config.data),
            tmp_path,
            torch.device('cpu'),
            preview=lambda net, nimg: seen.append(nimg),
        )
        assert (tmp_path / 'loss.png').exists()
    assert seen == [768, 1536, 2048]


def test_bytes_for_people():
    assert format_bytes(3 * 2**30) == '3.0 GiB' and format_bytes(5 * 2**20) == '5.0 MiB'


def test_dry_run_needs_no_data(run_here, tmp_path):
    process = run_here('train.py', '--preset=edm2plus-img64-s', '--dry-run', '--ranks=8', '--batch-gpu=64')
    assert process.returncode == 0, process.stderr
    config, end = json.JSONDecoder().raw_decode(process.stdout)
    assert (
        config['network']['architecture']['model_channels'] == 192
        and config['micro_batch'] == 64
        and config['workers'] == 0
    )
    text = process.stdout[end:]
    for part in (
        '153.97 M',
        '50.41 GFLOPs',
        '8: 256 images each per step',
        'FID 1.58',
        'memory of one GPU',
        'with --batch-gpu=64',
    ):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_help_is_grouped(run_here):
    text = run_here('train.py', '--help').stdout
    places = [text.index(title) for title in ('Main options:', 'Recipe:', 'Execution:', 'Output and intervals:')]
    assert places == sorted(places) and text.index('--lr') > places[1] > text.index('--data')


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@needs_compiler
def test_compiled_training_is_the_same_mathematics(config, run):
    small = replace(
        config, batch=64, duration=1024, status=64, preview=1024, micro_batch=32,
        network=edm2_network((8, 8), 1, 10, 16, (1,), 1, (4,), 16),
    )  # fmt: skip
    eager, compiled = read_stats(run('eager', small)), read_stats(run('compiled', replace(small, compile=True)))
    for a, b in zip(eager, compiled, strict=True):
        assert b['loss'] == pytest.approx(a['loss'], rel=1e-3)
    names = [sorted(path.name for path in run(name, replace(small, compile=name == 'compiled')).glob('*.safetensors'))
             for name in ('eager', 'compiled')]  # fmt: skip
    assert names[0] == names[1]


def test_metrics_along_the_way(archive, run_script, run_here, tmp_path):
    arguments = [
        *('--preset=edm2plus-digits', f'--data={archive}', '--channels=16', '--duration=1Ki', '--batch=128'),
        *('--status=512', '--snapshot=1Ki', '--checkpoint=1Ki', '--preview=1Ki', '--set=sampler.steps=2'),
        '--metrics=fd_pixels',
    ]
    process = run_script('train.py', *arguments, '--metric-seeds=0-9', f'--outdir={tmp_path / "run"}', ranks=2)
    assert process.returncode == 0, process.stderr
    records = read_records(tmp_path / 'run/metrics.jsonl')
    assert [(r['nimg'], r['ema_std']) for r in records] == [(1024, 0.05), (1024, 0.1)]
    assert all(r['metrics']['fd_pixels']['num_images'] == 10 for r in records)
    process = run_here('train.py', *arguments[:-1], '--metrics=fib', f'--outdir={tmp_path / "other"}')
    assert process.returncode == 2 and "unknown metric 'fib'" in process.stderr
    assert not (tmp_path / 'other').exists()


def test_sample_grids_name_their_classes(tmp_path, tiny_config):
    net, names = Denoiser(tiny_config).eval(), [f'class {i}' for i in range(tiny_config.label_dim)]
    how = (tmp_path, PixelEncoder(), SamplerConfig(steps=2))
    plain, named = draw_samples(net, 1000, *how), draw_samples(net, 2000, *how, names)
    assert np.array_equal(named[CAPTION:], plain) and len(named) == len(plain) + CAPTION
    assert (named[:CAPTION] < 128).sum() > 20 * len(names)  # every column has its text
