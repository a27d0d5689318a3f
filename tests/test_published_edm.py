"""Published EDM networks, from files of their structure: each network in each preconditioner, exact, nothing runs."""

import json
import math

import pytest
import torch

from diffusion import preconditioning
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.convert import convert
from networks.denoiser import Denoiser
from networks.edm.adm import ADMConfig
from networks.edm.song import SongConfig
from networks.files import load_network, open_network, read_info
from networks.published.edm import rebuild_config
from networks.published.file import describe_name
from networks.published.models import EDM_URL, MODELS
from networks.published.reader import PublishedObject
from sampling.config import SamplerConfig
from sampling.samplers import Heun
from tests import published_files as files
from tests.conftest import ROOT
from tests.test_edm_networks import CONFIGS, golden_inputs, golden_net
from training.initial import check_initial
from training.presets.table import PRESETS

SMALL = {'channel_mult': (1, 2), 'num_blocks': 1, 'attn_resolutions': (4,), 'dropout': 0.13}
NETWORKS = {
    'ddpmpp': SongConfig(model_channels=16, **SMALL),
    'ncsnpp': SongConfig(
        model_channels=16, embedding='fourier', channel_mult_noise=2, encoder='residual', taps=(1, 3, 3, 1), **SMALL
    ),
    'adm': ADMConfig(model_channels=64, **SMALL),
}


def tiny(network: str = 'ddpmpp', name: str = 'edm', label_dim: int = 10, augment_dim: int = 9) -> Denoiser:
    known = preconditioning.PRECONDITIONINGS[name]()
    config = NetworkConfig((8, 8), 1, label_dim, NETWORKS[network], known, augment_dim=augment_dim)
    return Denoiser(config, seed=1).eval().requires_grad_(False)


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize('name', preconditioning.PRECONDITIONINGS)
def test_every_network_in_every_preconditioner(tmp_path, network, name):
    original = tiny(network, name)
    path = files.write(tmp_path / 'network-snapshot-200000.pkl', files.edm_content(original))
    net, info = load_network(path)
    assert info.config == original.config and not info.config.uncertainty
    assert (info.nimg, info.ema_std, info.dataset, info.encoder) == (200_000_000, None, 'cifar10-32x32', 'rgb')
    assert [*net.state_dict()] == [*original.state_dict()]
    assert all(torch.equal(tensor, original.state_dict()[key]) for key, tensor in net.state_dict().items())
    converted = tmp_path / 'net.safetensors'
    assert convert(path, converted) == info
    x, sigma = torch.ones(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    labels, augment = torch.eye(10)[:2], 0.1 * torch.ones(2, 9)
    expected = original(x, sigma, labels, augment)
    for read in (net, load_network(converted)[0]):
        assert torch.equal(read(x, sigma, labels, augment), expected)


@pytest.mark.parametrize('name', CONFIGS)
def test_golden_denoisers(tmp_path, name):
    """The golden networks through a file: D of both images, and without labels."""
    expected_of = json.loads((ROOT / 'tests/golden/edm.json').read_text())['networks'][name]
    original = Denoiser(NetworkConfig((16, 16), 3, 4, CONFIGS[name], augment_dim=9))
    original.unet.load_state_dict(golden_net(name).state_dict())
    net, _ = load_network(files.write(tmp_path / 'net.pkl', files.edm_content(original)))
    x, labels, augment = golden_inputs()
    sigma = torch.tensor([0.5, 3.0])
    for case, D in (('D', net(x, sigma, labels, augment)), ('Dn', net(x, sigma))):
        want = expected_of[case]
        numbers = [D.mean(), D.std(), *D[0, 0, 0, :4], *(D[1, 2, 15, 12:] if 'last4' in want else [])]
        expected = [want['mean'], want['std'], *want['first4'], *want.get('last4', [])]
        torch.testing.assert_close(torch.stack(numbers), torch.tensor(expected), rtol=0, atol=1e-5)


def rebuild(class_name: str, **arguments) -> NetworkConfig:
    arguments = {'img_resolution': 64, 'img_channels': 3, **arguments}
    return rebuild_config(PublishedObject(class_name, {'_init_args': (), '_init_kwargs': arguments}))


def test_defaults_of_the_constructors():
    """A file names those arguments alone that its training script gave."""
    cifar10 = {'img_resolution': 32, 'label_dim': 10, 'augment_dim': 9, 'model_type': 'SongUNet', 'dropout': 0.13}
    assert rebuild('EDMPrecond', **cifar10, channel_mult=[2, 2, 2]) == PRESETS['edm-cifar10-cond-vp'].network
    ncsnpp = {'embedding_type': 'fourier', 'encoder_type': 'residual', 'resample_filter': [1, 3, 3, 1]}
    ncsnpp |= {'channel_mult_noise': 2, 'channel_mult': [2, 2, 2], 'decoder_type': 'standard'}
    assert rebuild('EDMPrecond', **cifar10, **ncsnpp) == PRESETS['edm-cifar10-cond-ve'].network
    assert rebuild('EDMPrecond', label_dim=1000) == PRESETS['edm-imagenet64-adm'].network
    for class_name, name, family in (
        *(('VPPrecond', 'vp', SongConfig), ('VEPrecond', 've', SongConfig), ('iDDPMPrecond', 'iddpm', ADMConfig)),
    ):
        config = rebuild(class_name)
        assert config.preconditioning == preconditioning.PRECONDITIONINGS[name]() and config.architecture == family()


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'model_type': 'EvilUNet'}, "class 'EvilUNet'; only SongUNet or DhariwalUNet"),
        ({'model_type': [1]}, 'U-Net is of the class'),
        ({'surprise': 1}, "unknown argument 'surprise'"),
        ({'img_channels': None}, 'lacks the argument img_channels'),
        ({'num_blocks': 10**9}, 'not built'),
        ({'model_channels': 10**12}, 'not built'),
        ({'model_channels': b'x' * 9}, 'model_channels must be a whole number'),
        ({'channel_mult': [1] * 1000}, 'channel_mult must be'),
        ({'embedding_type': 'positionel'}, 'did you mean positional'),
        ({'sigma_max': 10}, 'knows noise levels from 0 to 10'),
        ({'sigma_min': 'x'}, 'knows noise levels'),
        ({'sigma_data': math.nan}, 'sigma_data'),
        ({'label_dim': 11}, "map_label.weight' has shape"),
        ({'augment_dim': 0}, "map_augment.weight' is unknown"),
    ],
)
def test_arguments_that_make_another_network(tmp_path, arguments, match):
    path = files.write(tmp_path / 'bad.pkl', files.edm_content(tiny(), **arguments))
    with pytest.raises(UserError, match=match) as error:
        load_network(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 1500


def test_levels_of_another_iddpm_are_refused(tmp_path):
    content = files.edm_content(tiny('adm', 'iddpm'))
    content['ema'].meta['state']['_buffers']['u'] = torch.zeros(1001)
    with pytest.raises(UserError, match='table of noise levels'):
        load_network(files.write(tmp_path / 'bad.pkl', content))


def test_hostile_augmentations_are_not_called(tmp_path):
    """What stands beside the network is read by the same rules."""

    class Evil:
        def __reduce__(self):
            return print, ('called',)

    path = files.write(tmp_path / 'bad.pkl', {**files.edm_content(tiny()), 'augment_pipe': Evil()})
    with pytest.raises(UserError, match=r"asks for 'builtins\.print'"):
        load_network(path)


def test_published_models_are_sampled_as_the_paper_does():
    steps = {'cifar10-32x32': 18, 'ffhq-64x64': 40, 'afhqv2-64x64': 40, 'imagenet-64x64': 256}
    for name, model in MODELS.items():
        if name.startswith('edm-'):
            config = SamplerConfig.from_json(model.sampler)
            data = name.removeprefix('edm-').rsplit('-', 2)[0]
            churn = (40, 0.05, 50, 1.003) if 'imagenet' in name else ()
            expected = Heun(*churn, noise_always=True)
            assert config == SamplerConfig(steps=steps[data], sampler=expected), name
            trained = name.removeprefix('edm-').replace('-32x32', '').replace('-64x64', '64').replace('64-uncond', '64')
            trained = trained.replace('afhqv264', 'afhqv2-64').replace('imagenet64-cond', 'imagenet64')
            preset = PRESETS[f'edm-{trained}']
            assert preset.result == f'FID {model.result}' and preset.sampler == config
            assert model.net_url == f'{EDM_URL}{name}.pkl' and model.gnet is None
    baseline = SamplerConfig.from_json(MODELS['baseline-imagenet-64x64-cond-adm'].sampler)
    assert baseline.sampler == Heun(80, 0.05, 50, 1.003, noise_always=True)
    assert MODELS['baseline-cifar10-32x32-uncond-vp'].net_url.startswith(f'{EDM_URL}baseline/')


def test_names_of_files():
    assert describe_name('runs/00000/network-snapshot-200000.pkl') == (200_000_000, None, '')
    assert describe_name('edm-cifar10-32x32-cond-vp.pkl') == (0, None, '')


def test_generate_by_preset_from_the_cache(tmp_path, run_script):
    name, cache = 'edm-cifar10-32x32-cond-vp', tmp_path / 'cache'
    folder = cache / 'downloads' / EDM_URL.removeprefix('https://')
    path = files.write(folder / f'{name}.pkl', files.edm_content(tiny()))
    assert read_info(path).sampler['steps'] == 18
    options = (f'--preset={name}', '--seeds=0-1', '--outdir=out', '--offline')
    done = run_script('generate.py', *options, env={'EDM2PLUS_CACHE': str(cache)})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'out' / 'generation.json').read_text())
    assert record['evaluations_per_image']['net'] == 35
    # What stands on the command line comes first; the converted file says the same.
    with open_network(path) as file:
        assert file.names
    convert(path, tmp_path / 'net.safetensors')
    assert read_info(tmp_path / 'net.safetensors').sampler == read_info(path).sampler


def test_runs_can_start_from_published_weights(tmp_path):
    """--init: other classes and no augmentation start from scratch, another network is refused."""
    path = str(files.write(tmp_path / 'net.pkl', files.edm_content(tiny())))
    for config in (tiny().config, tiny(label_dim=3).config, tiny(augment_dim=0).config):
        check_initial(path, config)
    with pytest.raises(UserError, match='holds another network'):
        check_initial(path, tiny('ncsnpp').config)
