"""EDM in training: augmentation belongs to images, runs resume to the bit, ranks do not matter; and its presets."""

import re
from dataclasses import replace

import pytest
import torch

from dataset.augment.edm import TRANSFORMS, EDMAugment
from dataset.reader import ImageDataset
from diffusion import levels, preconditioning, weightings
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.edm.song import SongConfig
from networks.files import load_network
from tests.helpers import state_tensors
from tests.test_training import assert_same_gradients, train_on_one_and_two_ranks
from training.config import Averages
from training.methods.denoising import DenoisingConfig, DenoisingLoss
from training.monitor.log import read_stats
from training.optimizer import Optimizer
from training.presets.table import get_preset

AUGMENT = EDMAugment(0.5, **{name: 1.0 for name in TRANSFORMS if name != 'xflip'})  # every transform there is


@pytest.fixture
def edm_config(config):
    """The run of the fixture `config` as EDM trains."""
    architecture = SongConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1)
    return replace(
        config,
        preset='edm-digits',
        network=NetworkConfig((8, 8), 1, 10, architecture, augment_dim=AUGMENT.dim),
        optimizer=Optimizer(0.01, rampup=2048, beta2=0.999, nonfinite='clamp'),
        method=DenoisingConfig(levels.LogNormal(-1.2, 1.2)),
        ema=Averages((0.1,), halflife=512),
        augment=AUGMENT,
        xflip=True,
    )


@pytest.mark.parametrize('micro_batch', [pytest.param(None, marks=pytest.mark.slow), 64])
def test_resumed_run_is_bit_exact(edm_config, run, micro_batch):
    config = replace(edm_config, micro_batch=micro_batch)
    whole = run('whole', config)
    run('halves', replace(config, slice=1024))
    halves = run('halves', config)
    a, b = state_tensors(whole), state_tensors(halves)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith('ema/') and 'unet.map_augment' in name for name in a)
    # Both averages are there, and the network in their files is complete.
    for path in (*halves.glob('network-snapshot-*-0.100.safetensors'), *halves.glob('network-ema-*.safetensors')):
        net, info = load_network(path)
        assert net.config == config.network and info.config.augment_dim == AUGMENT.dim


def test_micro_batches_see_the_same_images(edm_config, run):
    """One step of 1024 at once and in four rounds: equal gradients but for the order of sums."""
    config = replace(edm_config, batch=1024, duration=1024, status=1024, preview=1024, ema=Averages((0.1,)))
    a, b = (state_tensors(run(name, replace(config, micro_batch=n))) for name, n in (('one', None), ('four', 256)))
    assert_same_gradients(a, b)


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one(archive, run_script, tmp_path):
    arguments = [
        *('--preset=edm-digits', f'--data={archive}', '--channels=16', '--duration=1024', '--batch=1024', '--xflip'),
        *('--status=1024', '--snapshot=1024', '--checkpoint=1024', '--preview=1024', '--batch-gpu=256'),
        *('--dropout=0.1', '--set', 'augment.p=0.5', '--set', 'augment.translate_int=1'),
    ]
    train_on_one_and_two_ranks(arguments, run_script, tmp_path)
    assert_same_gradients(state_tensors(tmp_path / 'one'), state_tensors(tmp_path / 'two'))


@pytest.mark.parametrize('name', ['iddpm', *(pytest.param(name, marks=pytest.mark.slow) for name in ('vp', 've'))])
def test_other_formulations_learn(edm_config, run, name):
    """VP, VE and iDDPM around the same network; iDDPM's second half of F gets no gradient from the loss."""
    network = replace(edm_config.network, preconditioning=preconditioning.PRECONDITIONINGS[name]())
    drawn = {'vp': levels.VP(), 've': levels.LogUniform(), 'iddpm': levels.VP(epsilon_t=1e-3)}[name]
    method = DenoisingConfig(drawn, weightings.EpsilonMSE())
    records = read_stats(run(name, replace(edm_config, network=network, method=method)))
    assert records[-1]['loss'] < 0.8 * records[0]['loss']


def test_loss_of_an_untrained_network(edm_config):
    """F = 0 costs 1 an element at every noise level, of data of sigma_data (EDM section 5)."""
    net = Denoiser(edm_config.network)
    sigma = torch.tensor([0.002, 0.1, 1.0, 10.0]).repeat_interleave(64)
    generator = torch.Generator().manual_seed(0)
    y, noise = (torch.randn(256, 1, 8, 8, generator=generator) for _ in range(2))
    net.eval()
    _, losses, _ = DenoisingLoss(net, edm_config.method)(0.5 * y, sigma, noise, None)
    by_level = losses.reshape(4, -1).mean(dim=1) / 64
    torch.testing.assert_close(by_level, torch.ones(4), rtol=0.1, atol=0)


# EDM appendix F.1: resolution, classes, model_channels, channel_mult, dropout, p, lr, batch, steps of the sampler.
TABLE = {
    'edm-cifar10-cond-vp': (32, 10, 128, (2, 2, 2), 0.13, 0.12, 1e-3, 512, 18),
    'edm-cifar10-cond-ve': (32, 10, 128, (2, 2, 2), 0.13, 0.12, 1e-3, 512, 18),
    'edm-cifar10-uncond-vp': (32, 0, 128, (2, 2, 2), 0.13, 0.12, 1e-3, 512, 18),
    'edm-cifar10-uncond-ve': (32, 0, 128, (2, 2, 2), 0.13, 0.12, 1e-3, 512, 18),
    'edm-ffhq64-vp': (64, 0, 128, (1, 2, 2, 2), 0.05, 0.15, 2e-4, 256, 40),
    'edm-ffhq64-ve': (64, 0, 128, (1, 2, 2, 2), 0.05, 0.15, 2e-4, 256, 40),
    'edm-afhqv2-64-vp': (64, 0, 128, (1, 2, 2, 2), 0.25, 0.15, 2e-4, 256, 40),
    'edm-afhqv2-64-ve': (64, 0, 128, (1, 2, 2, 2), 0.25, 0.15, 2e-4, 256, 40),
    'edm-imagenet64-adm': (64, 1000, 192, (1, 2, 3, 4), 0.10, None, 1e-4, 4096, 256),
}


@pytest.mark.parametrize('name', TABLE)
def test_presets_are_the_table_of_the_paper(name):
    preset = get_preset(name)
    network, net, optimizer = preset.network, preset.network.architecture, preset.optimizer
    row = (network.img_resolution[0], network.label_dim, net.model_channels, net.channel_mult, net.dropout)
    row += (preset.augment and preset.augment.p, optimizer.lr, preset.batch, preset.sampler.steps)
    assert row == TABLE[name] and preset.result.startswith('FID')
    assert preset.duration // 10**6 == (2500 if 'imagenet' in name else 200)
    assert preset.ema.halflife == (50_000_000 if 'imagenet' in name else 500_000)
    assert (optimizer.rampup, optimizer.decay, optimizer.beta2, optimizer.eps) == (10**7, 0, 0.999, 1e-8)
    assert network.preconditioning == preconditioning.EDM(0.5)
    assert preset.method.levels == levels.LogNormal(-1.2, 1.2) and not network.uncertainty
    if not name.endswith('adm'):
        assert net.encoder == ('residual' if name.endswith('ve') else 'standard')


@pytest.mark.slow
def test_mirrored_images_are_trained_on(archive, run_script, tmp_path):
    """--xflip doubles the data set, for any family; a run without it has other data."""
    common = (f'--data={archive}', '--preset=edm2plus-digits', '--dry-run')
    plain, flipped = (run_script('train.py', *common, *flags).stdout for flags in ((), ('--xflip',)))
    prints = [re.search(r'"fingerprint": "(\w+)"', text)[1] for text in (plain, flipped)]
    assert prints == [ImageDataset(archive, xflip).fingerprint for xflip in (False, True)] and prints[0] != prints[1]
