"""Loss, learning rate, random draws, configs, and a whole run in small: exact, resumable, the same on two ranks."""

import json
import math
from dataclasses import replace

import pytest
import torch

from diffusion.noise import LogNormal
from dnnlib.errors import UserError
from networks.denoiser import Denoiser
from networks.encoders import decode_pixels, encode_pixels
from tests.helpers import make_archive
from torch_utils.tensor_files import TensorFile
from training.config import TrainConfig, differences, from_preset
from training.dataset import ImageDataset
from training.learning_rate import LearningRate
from training.loop import clean_gradients, train
from training.loss import DenoisingLoss, training_draws
from training.presets import PRESETS, get_preset
from training.state import TrainState, state_files
from training.status import read_stats

CPU = torch.device('cpu')


def test_learning_rate_golden(golden):
    schedule = LearningRate(0.01, 70000, 10_000_000)
    for case in golden['lr']:
        assert schedule.at(case['cur_nimg'], case['batch']) == pytest.approx(case['lr'], rel=1e-12)


def test_loss_by_hand(tiny_config):
    net = Denoiser(tiny_config, seed=0).eval()  # D = c_skip x
    y, noise = torch.full((2, 1, 8, 8), 0.3), torch.full((2, 1, 8, 8), -1.0)
    sigma = torch.tensor([0.5, 2.0])
    losses, errors = DenoisingLoss(net)(y, sigma, noise, None)
    for i, s in enumerate((0.5, 2.0)):
        D = 0.25 / (s**2 + 0.25) * (0.3 - s)
        error = 64 * (s**2 + 0.25) / (s * 0.5) ** 2 * (D - 0.3) ** 2
        u = net.logvar(sigma)[i].item()
        assert errors[i].item() == pytest.approx(error, rel=1e-5)
        assert losses[i].item() == pytest.approx(error / math.exp(u) + 64 * u, rel=1e-5)


def test_uncertainty_is_best_at_the_log_of_the_error(tiny_config):
    net = Denoiser(tiny_config, seed=0).eval()
    y, noise, sigma = torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.7), torch.tensor([0.5])
    _, error = DenoisingLoss(net)(y, sigma, noise, None)
    best = (error / 64).log()
    net.logvar = lambda sigma: u  # a free variable in its place
    u = best.detach().clone().requires_grad_()
    DenoisingLoss(net)(y, sigma, noise, None)[0].sum().backward()
    assert abs(u.grad.item()) < 1e-3 * 64


def test_draws_depend_on_image_numbers_alone():
    levels = LogNormal(-0.8, 1.6)
    sigma, noise = training_draws(7, list(range(10)), (1, 4, 4), levels, CPU)
    for part in ([0, 1, 2], [9, 4]):
        s, n = training_draws(7, part, (1, 4, 4), levels, CPU)
        assert torch.equal(s, sigma[part]) and torch.equal(n, noise[part])
    other, _ = training_draws(8, [0], (1, 4, 4), levels, CPU)
    assert other[0] != sigma[0]


def test_draws_are_normal():
    sigma, noise = training_draws(0, list(range(4000)), (1, 4, 4), LogNormal(-0.8, 1.6), CPU)
    assert sigma.log().mean().item() == pytest.approx(-0.8, abs=0.1)
    assert sigma.log().std().item() == pytest.approx(1.6, abs=0.1)
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(torch.stack([sigma.log(), noise[:, 0, 0, 0]]))[0, 1].abs() < 0.06


def test_pixels_survive_encoding():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(decode_pixels(encode_pixels(images)), images)
    assert decode_pixels(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]


def test_non_finite_gradients_become_zero_and_are_counted(tiny_config):
    net = Denoiser(tiny_config)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    grad = net.unet.out_conv.weight.grad.view(-1)
    grad[:4] = torch.tensor([math.nan, math.inf, -math.inf, 3.0])
    count, norm = clean_gradients(net)
    assert count == 3 and norm == 3 and grad[:4].tolist() == [0, 0, 0, 3]


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp('data') / 'tiny.zip', count=30, classes=10)


@pytest.fixture
def config(archive, tiny_config) -> TrainConfig:
    dataset = ImageDataset(archive)
    return TrainConfig(
        preset='edm2plus-digits',
        data=str(archive),
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        network=replace(tiny_config, dropout=0.1),
        levels=LogNormal(-0.8, 1.6),
        learning_rate=LearningRate(0.01, 100, 2048),
        duration=4096,
        batch=512,
        snapshot=2048,
        checkpoint=2048,
        status=512,
        preview=4096,
    )


def weights(folder) -> dict[str, torch.Tensor]:
    with TensorFile(state_files(folder)[-1], 'training state') as file:
        return dict(file.items())


@pytest.fixture
def run(tmp_path):
    """Train in this process; returns the run folder."""

    def train_in(name: str, config: TrainConfig):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        with torch.random.fork_rng():  # dropout seeds the global stream
            train(config.check(), ImageDataset(config.data), folder, CPU)
        return folder

    return train_in


def test_resumed_run_is_bit_exact(config, run):
    whole = run('whole', config)
    run('halves', replace(config, duration=2048))
    halves = run('halves', config)
    a, b = weights(whole), weights(halves)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a['net/unet.out_gain'], torch.zeros(()))
    losses = [[(r['nimg'], r['loss']) for r in read_stats(folder)] for folder in (whole, halves)]
    assert losses[0] == losses[1] and [nimg for nimg, _ in losses[0]] == list(range(512, 4097, 512))


def test_accumulation_changes_nothing_but_rounding(config, run):
    config = replace(config, duration=2048, network=replace(config.network, dropout=0.0))
    a, b = weights(run('one', config)), weights(run('four', replace(config, micro_batch=128)))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_files_of_a_run(config, run):
    folder = run('files', config)
    names = sorted(path.name for path in folder.iterdir())
    times = ('0000002', '0000004')
    expected = [f'network-snapshot-{t}-{std}.safetensors' for t in times for std in ('0.050', '0.100')]
    expected += [f'training-state-{t}.safetensors' for t in times]
    assert set(expected) <= set(names) and not [name for name in names if name.endswith('.tmp')]
    assert json.loads((folder / 'config.json').read_text()) == json.loads(json.dumps(config.to_json()))
    record = read_stats(folder)[-1]
    assert record['nimg'] == 4096 and record['nonfinite'] == 0 and record['grad_norm'] > 0


def test_another_config_is_refused(config, run):
    run('other', replace(config, duration=2048))
    changed = replace(config, seed=1, learning_rate=replace(config.learning_rate, ref=0.02))
    with pytest.raises(UserError) as error:
        run('other', changed)
    assert error.value.problems[1:] == ['learning_rate.ref is 0.02, was 0.01', 'seed is 1, was 0']


def test_differences_leave_out_what_may_change(config):
    old = json.loads(json.dumps(config.to_json()))
    assert differences(old, replace(config, duration=8192, workers=2, micro_batch=64).to_json()) == []


def test_loss_falls(config, run):
    config = replace(
        config, batch=64, duration=80 * 64, learning_rate=LearningRate(0.02, 100, 640), status=640, snapshot=5120,
        checkpoint=5120, preview=5120, network=replace(config.network, dropout=0.0),
    )  # fmt: skip
    records = read_stats(run('falls', config))
    assert records[-1]['mse'] < 0.75 * records[0]['mse'] and records[-1]['loss'] < 0.75 * records[0]['loss']


def test_state_round_trip(config, tmp_path):
    state = TrainState(config, CPU)
    for p in state.net.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    state.nimg = 512 * 5
    state.save(tmp_path)
    other = TrainState(replace(config, seed=0), CPU)
    other.load(state_files(tmp_path)[0])
    assert other.nimg == state.nimg
    for a, b in zip(state.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ('exp_avg', 'exp_avg_sq', 'step'):
            assert torch.equal(state.optimizer.state[a][key], other.optimizer.state[b][key])


def test_two_newest_states_are_kept(config, run):
    folder = run('kept', replace(config, checkpoint=1024))
    assert [path.name for path in state_files(folder)] == [
        'training-state-0000003.safetensors',
        'training-state-0000004.safetensors',
    ]


def test_all_problems_of_a_config_are_told_at_once(config):
    with pytest.raises(UserError) as error:
        replace(config, duration=1000, ema_stds=(0.3,), precision='fp64', seed=-1).check()
    text = '\n'.join(error.value.problems)
    assert len(error.value.problems) == 4
    assert 'duration must be a multiple of the batch (512 images), not 1000 (try 1024)' in text
    with pytest.raises(UserError, match='multiple of the number of ranks'):
        config.check(world_size=3)
    with pytest.raises(UserError, match=r'no multiple of batch-gpu 100 \(try 128 or 64\)'):
        replace(config, micro_batch=100).check()


@pytest.mark.parametrize('name', PRESETS)
def test_presets_can_be_built(name):
    preset = get_preset(name)
    shape = (preset.img_channels, preset.resolution, preset.resolution)
    config = from_preset(
        name, data='', dataset='', fingerprint='', image_shape=shape, label_dim=preset.label_dim, overrides={}
    )
    config.check()
    with torch.device('meta'):
        Denoiser(config.network)


def test_preset_sizes():
    """Parameters in millions of the papers' tables (spec/edm2.md section 3)."""
    sizes = {'edm2-img64-s': 280.21, 'edm2plus-img64-s': 153.97, 'edm2plus-img64-l': 426.40, 'edm2plus-img64-xs': 68.69}
    for name, expected in sizes.items():
        preset = get_preset(name)
        config = from_preset(
            name, data='', dataset='', fingerprint='', image_shape=(3, 64, 64), label_dim=1000, overrides={}
        )
        with torch.device('meta'):
            net = Denoiser(config.network)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(expected, abs=0.005), preset


def test_two_ranks_equal_one(archive, run_script, tmp_path):
    arguments = [
        *('--preset=edm2plus-digits', f'--data={archive}', '--channels=32', '--duration=1280', '--batch=64'),
        *('--status=64', '--snapshot=1280', '--checkpoint=1280', '--preview=1280', '--rampup=640'),
    ]
    for ranks, name in ((0, 'one'), (2, 'two')):
        process = run_script('train.py', *arguments, f'--outdir={tmp_path / name}', ranks=ranks)
        assert process.returncode == 0, process.stderr
    one, two = read_stats(tmp_path / 'one'), read_stats(tmp_path / 'two')
    assert len(one) == 20
    for a, b in zip(one, two, strict=True):
        assert b['loss'] == pytest.approx(a['loss'], rel=1e-3), a['nimg']
