"""SiD2 in training: v-prediction, resumed runs, ranks, dropout, augmentation, finetuning at twice the resolution."""

import dataclasses
import math

import pytest
import torch

from dataset.augment.distribution import DistributionAugment
from dataset.reader import ImageDataset
from diffusion.logsnr import Cosine, logsnr_of
from diffusion.preconditioning import EDM
from diffusion.weightings import Sigmoid
from dnnlib.configs import replaced
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.dropout import seed_dropout
from networks.files import load_network
from sampling.samplers import Ancestral
from tests.helpers import make_archive, state_tensors
from tests.test_sid2 import TINY
from training.initial import check_initial
from training.methods.denoising import DenoisingConfig
from training.optimizer import Optimizer
from training.presets.table import get_preset, make_config

UVIT = dataclasses.replace(TINY, channels=(16, 32), down_blocks=(1,), up_blocks=(1,), dropout=(0.2, 0.2))
NETWORK = NetworkConfig((8, 8), 1, 10, UVIT, EDM(1.0))


@pytest.fixture
def sid2_config(config):
    """A run of four steps."""
    return dataclasses.replace(
        config,
        network=dataclasses.replace(NETWORK, augment_dim=DistributionAugment().dim),
        method=DenoisingConfig(Cosine.interpolated(8, 8, 16), Sigmoid(2.0, bias_start=0.0, bias_images=1024)),
        optimizer=Optimizer(1e-3, eps=1e-12),
        augment=DistributionAugment(),
        label_dropout=0.1,
        xflip=True,
        duration=1024 * 2,
        batch=512,
        status=512,
        snapshot=1024,
        checkpoint=1024,
    )


def noisy_net(network=NETWORK, seed=0) -> Denoiser:
    """A network whose output is no zero."""
    net = Denoiser(network, seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net


def test_denoiser_is_v_prediction():
    net, sigma = noisy_net().eval(), torch.tensor([0.01, 0.5, 3.0, 200.0])
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = x * (1 + sigma[:, None, None, None] ** 2).sqrt()
    logsnr = logsnr_of(sigma)
    alpha, s = (v.sqrt()[:, None, None, None] for v in (logsnr.sigmoid(), (-logsnr).sigmoid()))
    v = -net.unet(alpha * noisy, -logsnr / 8, None)  # z = alpha x_ve has unit variance, as x here
    torch.testing.assert_close(net(noisy, sigma), alpha * (alpha * noisy) - s * v, rtol=1e-4, atol=1e-4)


def test_resumed_run_is_bit_exact(sid2_config, run):
    whole = state_tensors(run('whole', sid2_config))
    run('halves', dataclasses.replace(sid2_config, slice=1024))
    halves = state_tensors(run('halves', sid2_config))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)
    assert whole['net/unet.patch_out.weight'].any()


@pytest.mark.slow
def test_two_ranks_and_micro_batches_equal_one(tmp_path, run_script):
    """With dropout of features and labels, and augmentation: all draws belong to images."""
    data = make_archive(tmp_path / 'data.zip', 30, 10, (3, 8, 8))
    arguments = [
        *('--preset=sid2-digits', f'--data={data}', '--batch=128', '--set=augment=distribution', '--lr=1e-3'),
        *(f'--{name}=1024' for name in ('duration', 'status', 'snapshot', 'checkpoint', 'preview')),
        *('--set=network.architecture.channels=[16,32]', '--set=network.architecture.dropout=[0.2,0.2]'),
        *('--set=network.architecture.emb_channels=32', '--rampup=1024', '--set=optimizer.eps=1e-3'),
    ]
    for name, ranks, more in (('one', 0, []), ('two', 2, ['--batch-gpu=32'])):
        done = run_script('train.py', *arguments, *more, f'--outdir={tmp_path / name}', ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (state_tensors(tmp_path / name) for name in ('one', 'two'))
    # eps keeps Adam from enlarging differences of rounding; the weights have moved by about 1e-3.
    for name in (name for name in one if name.startswith('net/')):
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_dropout_masks_belong_to_images():
    net = noisy_net().train()
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def at(numbers, rows):
        seed_dropout(net, 7, numbers)
        return net(x[rows], torch.ones(len(rows)))

    whole = at([10, 11, 12, 13], [0, 1, 2, 3])
    torch.testing.assert_close(at([12, 10], [2, 0]), whole[[2, 0]])
    assert not torch.allclose(at([12, 11], [2, 0])[1], whole[0], atol=1e-3)


def test_finetuning_at_twice_the_resolution(sid2_config, run, tmp_path, capsys):
    plain = dataclasses.replace(sid2_config, augment=None, network=NETWORK)
    first = run('first', plain) / 'network-snapshot-0000002-0.050.safetensors'
    original = load_network(first)[0].state_dict()
    large = make_archive(tmp_path / 'large.zip', 30, 10, (1, 16, 16))
    config = dataclasses.replace(
        sid2_config,
        network=dataclasses.replace(sid2_config.network, img_resolution=(16, 16)),
        data=str(large),
        fingerprint=ImageDataset(large).fingerprint,
        init=str(first),
        duration=1024,
        optimizer=Optimizer(1e-3, rampup=10**9),
    )
    check_initial(config.init, config.network)
    weights = load_network(run('second', config) / 'network-snapshot-0000001-0.050.safetensors')[0].state_dict()
    note = 'what does not fit is left out or starts from scratch: unet.emb_augment.weight'
    assert f'the weights of {first}; {note}' in capsys.readouterr().out
    for name, tensor in original.items():  # a step at almost no learning rate, rounded to FP16
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-3)
    assert weights.keys() - original.keys() == {'unet.emb_augment.weight'}
    second = tmp_path / 'second' / 'network-snapshot-0000001-0.050.safetensors'
    run('third', dataclasses.replace(plain, init=str(second), duration=1024))
    assert note in capsys.readouterr().out


def test_what_finetuning_refuses(tmp_path, tiny_config, sid2_config, run):
    first = run('first', dataclasses.replace(sid2_config, duration=1024))
    path = str(first / 'network-snapshot-0000001-0.050.safetensors')
    with pytest.raises(UserError) as error:
        check_initial(path, replaced(sid2_config.network, {'architecture.patch': 2}))
    assert error.value.problems[1:] == ['architecture.patch is 2, was 1']


def test_recipes_of_the_paper():
    """SiD2 appendix A.4."""
    for resolution, small, heavy, interval in ((128, 1, 1, 0), (256, 2, 1, -1.5), (512, 4, 2, -3)):
        for name, patch, bias, steps in (('small', small, interval, 10**6), ('fh', heavy, interval, 8 * 10**5)):
            preset = get_preset(f'sid2-img{resolution}-{name}')
            if resolution == 256:
                bias = -1
            if (resolution, name) == (128, 'fh'):
                bias = 1  # that of the 1.26 in table 1
            assert preset.method.weighting == Sigmoid(bias) and preset.network.architecture.patch == patch
            assert preset.duration == steps * 2048 and preset.network.img_resolution == (resolution, resolution)
            low, high = (logsnr_of(torch.tensor(sigma)).item() for sigma in preset.sampler.guidance_interval[::-1])
            assert (low, high) == pytest.approx((interval, 5), abs=1e-6)
            assert preset.sampler.sampler == Ancestral(variance=0.3, clip=1.0) and preset.sampler.steps == 512
            ends = preset.method.levels.logsnr(torch.tensor([0.0, 1.0])).tolist()
            shifts = [2 * math.log(512 / resolution), 2 * math.log(32 / resolution)]
            assert ends == pytest.approx([15 + shifts[0], -15 + shifts[1]])
    wider = get_preset('sid2-img512-fh').network.architecture
    assert get_preset('sid2-img128-fh').network.architecture.channels == wider.channels[1:]


def test_generation_with_the_settings_of_the_file(tmp_path, run_here, sid2_config, run):
    recipe = make_config('sid2-digits', {})
    config = dataclasses.replace(
        sid2_config, duration=1024, sampler=dataclasses.replace(recipe.sampler, steps=4), preview=1024
    )
    net = run('run', config) / 'network-snapshot-0000001-0.050.safetensors'
    common = [f'--net={net}', '--seeds=0-3', '--batch=2']
    for name, more in (
        ('file', []),
        ('heun', ['--sampler=heun', '--disc=edm', '--sigma-max=40']),
        ('guided', ['--gnet=self', '--guidance=2']),
        ('everywhere', ['--gnet=self', '--guidance=2', '--guidance-interval=0,inf']),
    ):
        done = run_here('generate.py', *common, *more, f'--outdir={tmp_path / name}')
        assert done.returncode == 0, done.stderr
    images = {name: (tmp_path / f'{name}-grid.png').read_bytes() for name in ('file', 'heun', 'guided', 'everywhere')}
    assert len(set(images.values())) == 4
    settings = (tmp_path / 'file' / 'generation.json').read_text()
    assert '"ancestral"' in settings and '"cosine"' in settings
