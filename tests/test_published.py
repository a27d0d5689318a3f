"""Published EDM2 networks, from files of their structure that the tests write: exact, and nothing in them runs."""

import collections
import functools
import io
import json
import pickle
import re
import signal

import numpy as np
import pytest
import safetensors.torch
import torch

from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from ema.reconstruct import Plan, Wanted, find_snapshots
from networks import convert as convert_module
from networks.config import NetworkConfig
from networks.convert import convert, convert_folder
from networks.denoiser import Denoiser
from networks.edm2.magnitude import normalize
from networks.encoders import SIGMA_DATA, sample_latents
from networks.files import load_network, open_network, read_info, save_network
from networks.published.edm2 import find_encoder, rebuild_config
from networks.published.file import PublishedFile, describe_name
from networks.published.models import BASE_URL, MODELS, models_table, resolve_model
from networks.published.reader import (
    MAGIC,
    NAMES,
    PublishedObject,
    _read_storage,
    find_tensors,
    read_published,
    to_object,
)
from tests import published_files as files
from tests import test_pickles as hostile
from tests.golden_networks import golden_inputs, golden_net
from tests.helpers import edm2_network, make_archive
from tests.test_networks import close
from torch_utils.pickles import read_pickle, to_array
from training.initial import check_initial, start_from
from training.loop import train
from training.presets.table import PRESETS, make_config
from training.state import TrainState

TINY = edm2_network((8, 8), 1, 10, 16, (1, 2), 1, (4,), 16, block='A')


def tiny_net(seed: int = 0, config: NetworkConfig = TINY) -> Denoiser:
    net = Denoiser(config, seed=seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith('_gain'):
                p.fill_(0.5 + 0.1 * seed)
    return net.eval()


@pytest.fixture(scope='module')
def golden_file(tmp_path_factory):
    """The golden network of block A as a published file, in float32."""
    path = tmp_path_factory.mktemp('golden') / 'edm2-img64-s-1073741-0.075.pkl'
    return files.write_published(path, golden_net('A'), torch.float32)


# What is read


def test_golden_outputs(golden, golden_file):
    expected = golden['nets']['A']
    net, _ = load_network(golden_file)
    x, sigma, labels = golden_inputs()
    D, D_null = net(x, sigma, labels), net(x, sigma)
    close(D.flatten()[:8], expected['D_first8'])
    close(D.flatten()[-8:], expected['D_last8'])
    close([D.mean(), D.std()], [expected['D_mean'], expected['D_std']])
    close([D_null.mean(), D_null.std()], [expected['Dnull_mean'], expected['Dnull_std']])
    close(net.logvar(sigma), expected['logvar'])
    with open_network(golden_file) as file:
        assert {name: list(file.shape(name)) for name in file.names} == expected['param_shapes']


def test_the_files_of_these_tests_would_run_code(golden_file):
    with files.modules_of_the_files(), pytest.raises(RuntimeError, match='the file was unpickled'):
        pickle.loads(golden_file.read_bytes())


def test_what_a_file_says_of_itself(golden_file):
    info = read_info(golden_file)
    assert info.config == golden_net('A').config
    assert (info.nimg, info.ema_std, info.preset) == (2**30, 0.075, 'edm2-img64-s')
    assert (info.dataset, info.encoder) == ('img64', 'rgb')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_widened_and_buffers_imported(tmp_path, dtype):
    original = tiny_net(seed=3)
    net, _ = load_network(files.write_published(tmp_path / 'net.pkl', original, dtype))
    for name, tensor in original.state_dict().items():
        read = net.state_dict()[name]
        assert read.dtype == torch.float32 and torch.equal(read, tensor.to(dtype).float()), name
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net.unet.out_gain.fill_(2.0)  # memory of its own, not the file's


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_other_protocols(tmp_path, protocol):
    path = files.write(tmp_path / 'net.pkl', files.content_of(tiny_net()), protocol)
    assert load_network(path)[1].config == TINY


def test_unconditional_networks(tmp_path):
    config = edm2_network((8, 8), 1, 0, 16, (1, 2), 1, (4,), 16, block='A')
    path = files.write_published(tmp_path / 'net.pkl', tiny_net(config=config))
    assert load_network(path)[1].config == config


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('edm2-img512-s-2147483-0.130.pkl', (2**31, 0.130, 'edm2-img512-s')),
        ('edm2-img512-xxl-0939524-0.070.pkl', (896 * 2**20, 0.070, 'edm2-img512-xxl')),
        ('edm2-img512-xs-uncond-0134217-0.110.pkl', (2**27, 0.110, 'edm2-img512-xs-uncond')),
        ('raw-snapshots/edm2-img64-s/network-snapshot-0008388-0.050.pkl', (2**23, 0.050, 'edm2-img64-s')),
        ('runs/x/network-snapshot-0008389-0.100.pkl', (8192 * 1024 + 1024, 0.100, '')),
        ('runs/x/network-snapshot-0000524-0.100.pkl', (512 * 1024, 0.100, '')),  # every 512 Ki
        ('runs/x/network-snapshot-0001572-0.100.pkl', (1536 * 1024, 0.100, '')),
        ('runs/x/network-snapshot-0000042-0.100.pkl', (42000, 0.100, '')),  # no multiple of 1024 up to 42999
        ('weights.pkl', (0, None, '')),
    ],
)
def test_names_of_files(name, expected):
    assert describe_name(name) == expected


# Tensors


@pytest.mark.parametrize(
    'tensor',
    [
        *(torch.arange(6, dtype=dtype).reshape(2, 3) for dtype in (torch.float16, torch.float64)),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.zeros(0, 3),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0).reshape(3, 4)[1:, 1:3],
        torch.zeros(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.ones(3)),
    ],
    ids=lambda t: f'{t.dtype} {tuple(t.shape)} {t.stride()}',
)
def test_tensors_come_back(tensor, tmp_path):
    content = files.content_of(tiny_net())
    content['ema'].meta['state']['_parameters']['t'] = tensor
    path = files.write(tmp_path / 'net.pkl', content)
    with PublishedFile(path) as file:
        read = file.get('t')
        assert file.shape('t') == read.shape == tensor.shape and read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        read.zero_()
        assert torch.equal(file.get('t'), tensor)


@pytest.mark.parametrize('count', [0, 3, 5000])
def test_storages_are_read_as_torch_reads_them(count):
    """The bytes inside a pickled tensor: the same numbers as by PyTorch's own reader of weights only."""
    blob = blob_of(torch.linspace(-3, 3, count, dtype=torch.float16))
    expected = torch.load(io.BytesIO(blob), weights_only=True)
    theirs = torch.empty(0, dtype=expected.dtype).set_(expected._untyped_storage, 0, (count,))
    read = _read_storage(bytearray(blob))
    assert read.dtype == expected.dtype and torch.equal(read, theirs)


def test_trees_of_other_families(tmp_path):
    """A snapshot of EDM has other classes and attributes; its tensors are read by the names of its state dict."""

    def stored(class_name, module, **attributes):
        state = {name: getattr(module, name) for name in ('_parameters', '_buffers', '_modules')}
        return files.Persistent(
            class_name, {'training': False, '_non_persistent_buffers_set': set(), **state, **attributes}
        )

    net = torch.nn.Module()
    net.model = torch.nn.Module()
    with torch.random.fork_rng():
        net.model.enc = torch.nn.ModuleDict({'8x8_conv': torch.nn.Conv2d(1, 2, 3), '8x8_block0': torch.nn.Linear(2, 2)})
    net.model.register_buffer('freqs', torch.arange(4.0))
    expected = net.state_dict()
    for name, module in net.model.enc.items():
        net.model.enc._modules[name] = stored('Block', module, skip_scale=np.sqrt(np.float64(0.5)))
    net._modules['model'] = stored('SongUNet', net.model, label_dropout=0, _init_kwargs=files.EasyDict(augment_dim=9))
    content = {
        'ema': stored('EDMPrecond', net, sigma_max=float('inf'), _init_kwargs=files.EasyDict(model_type='SongUNet'))
    }
    path = files.write(tmp_path / 'edm.pkl', content)
    ema = to_object(read_published(path)['ema'])
    assert ema.class_name == 'EDMPrecond' and ema.state['sigma_max'] == float('inf')
    assert ema.state['_init_kwargs'] == {'model_type': 'SongUNet'}
    tensors = find_tensors(ema)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    block = to_object(
        to_object(to_object(ema.state['_modules']['model']).state['_modules']['enc']).state['_modules']['8x8_block0']
    )
    assert to_array(block.state['skip_scale']) == np.sqrt(0.5)
    with pytest.raises(UserError, match=r'edm\.pkl: the network lacks the argument img_resolution'):
        load_network(path)


def blob_of(tensor: torch.Tensor) -> bytes:
    return tensor._typed_storage().__reduce__()[1][0]


BLOB = blob_of(torch.arange(8.0))
BLOBS = {
    'code': b'\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.',
    'code behind the magic number': BLOB[:15] + b'\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.',
    'no storage': pickle.dumps(1, 2) * 5,
    'another magic number': BLOB.replace(b'\x6c\xfc\x9c', b'\x6d\xfc\x9c', 1),
    'big endian': BLOB.replace(b'q\x02\x88', b'q\x02\x89', 1),
    'claims more': BLOB.replace(b'K\x08N', b'K\x09N', 1),
    'claims a terabyte': BLOB.replace(b'K\x08N', b'\x8a\x06\x00\x00\x00\x00\x00\x01N', 1),
    'claims a terabyte twice': BLOB.replace(b'K\x08N', b'\x8a\x06\x00\x00\x00\x00\x00\x01N', 1)[:-40]
    + (2**40).to_bytes(8, 'little'),
    'less than claimed': BLOB[:-1],
    'more than claimed': BLOB + b'\0',
    'a name that is no storage': BLOB.replace(b'FloatStorage', b'FloatSt0rage', 1),
    'view of another storage': BLOB.replace(b'K\x08Nt', b'K\x08]t', 1),
    'zip': b'PK\x03\x04' + BLOB,
    'empty': b'',
}


BLOBS['kept busy'] = (
    pickle.dumps(MAGIC[0], 2)
    + pickle.dumps(MAGIC[1], 2)
    + (b'\x80\x02ccollections\nCounter\ncbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R\x85R.')
)
BLOBS['dtype of doubled tuples'] = BLOB.replace(b'ctorch\nFloatStorage\n', b')' + b'q\x00h\x00\x86' * 100, 1)
BLOBS['key of doubled tuples'] = BLOB.replace(b'K\x08N', b')' + b'q\x00h\x00\x86' * 100 + b'N', 1)
BLOBS['many values'] = BLOB.replace(b'\x80\x02}', b'\x80\x02(' + b'N' * 900 + b't\x80\x02}', 1)


def tree_of(tensors: dict[str, tuple]) -> bytes:
    """A pickled module with parameters: (bytes of the storage, offset, size, stride) of each."""

    def stored(blob, offset=0, size=(8,), stride=(1,)):
        storage = hostile.Reduced(torch.storage._load_from_bytes, (blob,))
        return hostile.Reduced(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {}))

    with files.modules_of_the_files():
        return pickle.dumps(
            files.Persistent('Precond', {'_parameters': {name: stored(*args) for name, args in tensors.items()}}), 4
        )


def read_tree(data: bytes) -> dict[str, torch.Tensor]:
    return find_tensors(to_object(read_pickle(data, NAMES)))


@pytest.mark.parametrize('case', BLOBS)
def test_hostile_storages(case, refuse):
    assert BLOBS[case] != BLOB
    message = refuse(tree_of({'a': (BLOBS[case],)}), read=read_tree)
    assert "'a' is no tensor that can be read" in message
    if 'code' in case:
        assert "asks for 'os.system'" in message


def test_the_hostile_storages_begin_as_an_honest_one(refuse):
    assert not refuse(tree_of({'a': (BLOB,)}), read=read_tree, may_be_read=True)
    assert read_tree(tree_of({'a': (BLOB,)}))['a'].tolist() == list(range(8))


def test_what_is_read_again_and_again(refuse):
    """Five pickles are read for each storage, and a tree has each of its parts: a small file must not use one twice."""
    assert 'shares its numbers' in refuse(tree_of({str(i): (BLOB,) for i in range(10_000)}), read=read_tree)
    empty = blob_of(torch.zeros(0))
    assert 'shares its numbers' in refuse(tree_of({str(i): (empty, 0, (0,)) for i in range(10_000)}), read=read_tree)
    part = dict.fromkeys(map(str, range(1000)))
    children = {str(i): files.Persistent('Block', {'_parameters': part}) for i in range(1000)}
    with files.modules_of_the_files():
        data = pickle.dumps(files.Persistent('Precond', {'_modules': children}), 4)
    assert 'occurs twice' in refuse(data, read=read_tree)


SHAPES = {
    'beyond the end': (1, (8,), (1,)),
    'huge': (0, (2**40,), (1,)),
    'huge by stride 0': (0, (2**40,), (0,)),
    'copies by stride 0': (0, (9,), (0,)),
    'overflow': (0, (2**40, 2**40, 0), (1, 1, 1)),
    'overflow in stride': (0, (2,), (2**63,)),
    'huge numbers': (0, (2**70,), (1,)),
    'negative size': (0, (-1,), (1,)),
    'negative stride': (7, (2,), (-1,)),
    'negative offset': (-1, (2,), (1,)),
    'strides missing': (0, (2, 2), (1,)),
    'floats': (0, (2.0,), (1,)),
    'many dimensions': (0, (1,) * 100, (1,) * 100),
}


@pytest.mark.parametrize('case', SHAPES)
def test_tensors_stay_within_their_storage(case, refuse):
    assert "'a' is no tensor" in refuse(tree_of({'a': (BLOB, *SHAPES[case])}), read=read_tree)


@pytest.mark.parametrize(
    'value',
    [1, [1], 'x', np.ones(3), hostile.Reduced(torch._utils._rebuild_parameter, ())],
    ids=lambda value: type(value).__name__,
)
def test_other_things_than_tensors(value, refuse):
    with files.modules_of_the_files():
        data = pickle.dumps(files.Persistent('Precond', {'_parameters': {'a': value}}), 4)
    assert "'a' is no tensor" in refuse(data, read=read_tree)


# What is refused, by name


refuse = hostile.refuse  # the fixture: at once, in one line, without any contact with the world


def refused(tmp_path, content, match: str) -> list[str]:
    path = files.write(tmp_path / 'bad.pkl', content)
    with pytest.raises(UserError, match=match) as error:
        load_network(path)
    assert str(error.value).startswith(str(path)) and str(error.value).count('bad.pkl') == 1
    assert len(str(error.value)) < 1500 and str(error.value).isprintable()
    return error.value.problems


def test_missing_unknown_and_misshapen_tensors_are_listed(tmp_path):
    content = files.content_of(tiny_net())
    state = content['ema'].meta['state']
    unet = state['_modules']['unet'].meta['state']
    unet['_parameters']['extra'] = torch.ones(2)
    state['_modules']['logvar_linear'].meta['state']['_parameters']['weight'] = torch.ones(3)
    del unet['_modules']['emb_fourier'].meta['state']['_buffers']['phases']
    problems = refused(tmp_path, content, 'missing')
    assert problems == [
        "tensor 'unet.emb_fourier.phases' is missing",
        "tensor 'unet.extra' is unknown",
        "tensor 'logvar_linear.weight' has shape (3,), expected (1, 128)",
    ]


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'res_balance': 0.5}, 'res_balance is 0.5; only 0.3'),
        ({'logvar_channels': 64}, 'logvar_channels is 64; only 128'),
        ({'resample_filter': [1, 3, 3, 1]}, r'resample_filter is \(1, 3, 3, 1\)'),
        ({'block': 'C'}, "unknown argument 'block'"),
        ({'a\n' * 400: 1}, r"unknown argument 'a\\na"),
        ({'img_resolution': None}, 'lacks the argument img_resolution'),
        ({'num_blocks': 10**9}, 'not built'),
        ({'channel_mult': [1] * 30}, 'not built'),
        ({'channel_mult': [1] * 1000}, "channel_mult must be a list of whole numbers, not 'a list'"),
        ({'model_channels': 10**15}, 'not built'),
        ({'model_channels': '16'}, "model_channels must be a whole number, not 'a str'"),
        ({'model_channels': 16.0}, 'model_channels must be a whole number'),
        ({'sigma_data': float('nan')}, 'sigma_data must be a number, not nan'),
        ({'sigma_data': 10**300}, 'sigma_data must be between'),
        ({'sigma_data': 1e-300}, 'sigma_data must be between'),
        ({'sigma_data': -0.5}, 'sigma_data must be between'),
        ({'label_dim': 11}, "emb_label.weight' has shape"),
        ({'num_blocks': 2}, 'is missing'),
    ],
)
def test_arguments_that_make_another_network(tmp_path, arguments, match):
    refused(tmp_path, files.content_of(tiny_net(), **arguments), match)


def test_defaults_and_constants_of_the_constructor():
    given = {'img_resolution': 64, 'img_channels': 4, 'label_dim': 1000, 'model_channels': 128, 'use_fp16': True}
    expected = edm2_network((64, 64), 4, 1000, 128, block='A')
    constants = {'clip_act': 256, 'channel_mult': None, 'attn_balance': 0.3, 'resample_filter': [1, 1]}

    def rebuild(args, arguments):
        return rebuild_config(PublishedObject('Precond', {'_init_args': args, '_init_kwargs': arguments}))

    assert rebuild((), given) == rebuild(None, {**given, **constants}) == expected
    with pytest.raises(UserError, match=r'lacks the argument img_channels'):
        rebuild((), {'img_resolution': 64, 'label_dim': 0})
    for args, arguments in [((1,), given), ((), None), ((), [])]:
        with pytest.raises(UserError, match='arguments of the network are missing'):
            rebuild(args, arguments)


@pytest.mark.parametrize('args', [np.ones(3), np.ones(0), [], 0, ''], ids=repr)
def test_positional_arguments_of_any_kind_are_refused(tmp_path, args):
    content = files.content_of(tiny_net())
    content['ema'].meta['state']['_init_args'] = args
    refused(tmp_path, content, 'arguments of the network are missing')


def structures() -> dict[str, tuple]:
    """Trees that no module makes."""
    loop, twice, shared = files.content_of(tiny_net()), files.content_of(tiny_net()), files.content_of(tiny_net())
    loop['ema'].meta['state']['_modules']['again'] = loop['ema']
    container = torch.nn.ModuleDict()
    twice['ema'].meta['state']['_modules'] |= {'a': container, 'b': container}
    storage, rebuild = torch.ones(4)._typed_storage(), torch._utils._rebuild_tensor_v2
    shared['ema'].meta['state']['_parameters'] = {
        name: hostile.Reduced(rebuild, (storage, 0, (4,), (1,), False, collections.OrderedDict())) for name in 'ab'
    }
    bytes_shared = files.content_of(tiny_net())
    blob = blob_of(torch.ones(4096))
    bytes_shared['ema'].meta['state']['_parameters'] = {
        name: hostile.Reduced(
            rebuild, (hostile.Reduced(torch.storage._load_from_bytes, (blob,)), 0, (4096,), (1,), False, {})
        )
        for name in 'ab'
    }
    named = files.content_of(tiny_net())
    named['ema'].meta['state']['_parameters'] = {'a\nb': torch.ones(1)}
    odd = files.content_of(tiny_net())
    odd['ema'].meta['state']['_parameters'] = {'a': [1]}
    child = files.content_of(tiny_net())
    child['ema'].meta['state']['_modules']['a'] = 3
    whole = files.content_of(tiny_net())
    whole['ema'].meta['state']['_parameters'] = {'a': torch.ones(2, dtype=torch.int64)}
    listed = files.content_of(tiny_net())
    listed['ema'].meta['state']['_modules'] = [1]
    edm = files.content_of(tiny_net())
    edm['ema'].meta['class_name'] = 'EDM3Precond'
    return {
        'list': ([1, 2], "no 'ema'"),
        'empty': ({}, "no 'ema'"),
        'ema is a dict': ({'ema': {}}, "no 'ema'"),
        'loop': (loop, 'opcode 48'),
        'twice': (twice, 'occurs twice'),
        'shared numbers': (shared, 'shares its numbers'),
        'bytes read twice': (bytes_shared, 'shares its numbers'),
        'name of two lines': (named, r"name 'a\\nb'"),
        'no tensor': (odd, "'a' is no tensor"),
        'whole numbers': (whole, "'a' is no tensor.*asks for 'torch.LongStorage'"),
        'no module': (child, "'a' is no module"),
        'list of modules': (listed, "'_modules' is no dictionary"),
        'another class': (edm, "class 'EDM3Precond'; only Precond"),
        'object of another kind': ({'ema': files.Persistent('Precond', [])}, "no 'ema'"),
        'object without a class': ({'ema': files.Persistent(None, {})}, "no 'ema'"),
        'deep': (deep(), '_modules has the name'),
    }


def deep() -> dict:
    content = files.content_of(tiny_net())
    module = content['ema']
    for _ in range(3):
        module.meta['state']['_modules'] = {'a' * 90: files.Persistent('Block', {'_modules': {}})}
        module = module.meta['state']['_modules']['a' * 90]
    return content


@pytest.mark.parametrize('case', structures())
def test_trees_that_no_module_makes(tmp_path, case):
    refused(tmp_path, *structures()[case])


@pytest.mark.parametrize(
    ('encoder', 'expected'),
    [
        (files.encoder_of('StandardRGBEncoder'), 'rgb'),
        (files.encoder_of('StabilityVAEEncoder'), 'stabilityvae'),
        (files.encoder_of('StabilityVAEEncoder', scale=files.SCALE.tolist()), 'stabilityvae'),
        (files.encoder_of('StabilityVAEEncoder', bias=files.BIAS.reshape(1, -1, 1, 1)), 'stabilityvae'),
        (files.encoder_of('StabilityVAEEncoder', scale=files.SCALE * np.float32(1.001)), 'has the scale'),
        (files.encoder_of('StabilityVAEEncoder', bias=-files.BIAS), 'has the bias'),
        (files.encoder_of('StabilityVAEEncoder', bias=files.BIAS[:3]), 'no bias of 4 channels'),
        (files.encoder_of('StabilityVAEEncoder', scale=np.ones(1000)), 'no scale of 4 channels'),
        (files.encoder_of('StabilityVAEEncoder', scale='x'), 'no scale of 4 channels'),
        (files.encoder_of('StabilityVAEEncoder', scale=b'x' * 5000), 'no scale of 4 channels'),
        (files.encoder_of('StabilityVAEEncoder', vae_name='other/vae'), 'another VAE'),
        (files.encoder_of('OtherEncoder'), r"encoder \('OtherEncoder'\) is none of"),
        (None, r'encoder \(missing\) is none of'),
    ],
)
def test_encoders(tmp_path, encoder, expected):
    config = edm2_network((8, 8), 4, 10, 16, (1, 2), 1, (4,), 16, block='A')
    content = files.content_of(tiny_net(config=config), encoder=encoder)
    if expected in ('rgb', 'stabilityvae'):
        assert read_info(files.write(tmp_path / 'net.pkl', content)).encoder == expected
    else:
        refused(tmp_path, content, expected)


def test_the_encoder_of_the_files_has_the_numbers_of_ours():
    z = torch.linspace(-20, 20, 4 * 9).reshape(1, 4, 3, 3)
    theirs = z * torch.tensor(files.SCALE)[:, None, None] + torch.tensor(files.BIAS)[:, None, None]
    ours = sample_latents(torch.cat([z, torch.zeros_like(z)], dim=1), torch.zeros_like(z))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert SIGMA_DATA == 0.5
    assert find_encoder(None, TINY) == 'rgb'


# Conversion


def test_conversion_keeps_every_number(tmp_path):
    original = tiny_net(seed=1)
    source = files.write_published(tmp_path / 'edm2-img64-s-1073741-0.075.pkl', original)
    info = convert(source, tmp_path / 'out' / 'net.safetensors')
    net, read = load_network(tmp_path / 'out' / 'net.safetensors')
    assert read == info == read_info(source)
    for name, tensor in load_network(source)[0].state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    with open_network(tmp_path / 'out' / 'net.safetensors') as file:
        dtypes = {name: file.get(name).dtype for name in file.names}
    assert dtypes['unet.out_conv.weight'] == torch.float16 and dtypes['unet.emb_fourier.freqs'] == torch.float32
    assert b'dummy source' in source.read_bytes()
    assert b'dummy source' not in (tmp_path / 'out' / 'net.safetensors').read_bytes()
    convert(tmp_path / 'out' / 'net.safetensors', tmp_path / 'wide.safetensors', dtype='fp32')
    with open_network(tmp_path / 'wide.safetensors') as file:
        assert {file.get(name).dtype for name in file.names} == {torch.float32}


@pytest.mark.parametrize('published', [True, False])
def test_plain_state_dict(tmp_path, published):
    original, source = tiny_net(seed=1), tmp_path / 'net.pkl'
    if published:
        files.write_published(source, original)
    else:
        source = source.with_suffix('.safetensors')
        save_network(source, original.state_dict(), read_info(files.write_published(tmp_path / 'net.pkl', original)))
    convert(source, tmp_path / 'plain.safetensors', dtype='fp16', plain=True)
    plain = safetensors.torch.load_file(tmp_path / 'plain.safetensors')
    expected = original.half().state_dict()
    assert plain.keys() == expected.keys() and all(torch.equal(plain[n].half(), expected[n]) for n in expected)
    with pytest.raises(UserError, match='does not say what it is'):
        load_network(tmp_path / 'plain.safetensors')


def test_folders(tmp_path, capsys):
    for i, std in enumerate(('0.050', '0.100')):
        files.write_published(tmp_path / 'edm2-img64-s' / f'network-snapshot-0008388-{std}.pkl', tiny_net(seed=i))
    convert_folder(tmp_path / 'edm2-img64-s', tmp_path / 'out')
    assert '2 files converted, 0 were there' in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert names == [f'network-snapshot-0008388-{std}.safetensors' for std in ('0.050', '0.100')]
    assert read_info(tmp_path / 'out' / names[1]).preset == 'edm2-img64-s'
    (tmp_path / 'out' / names[0]).write_bytes(b'kept')
    (tmp_path / 'out' / names[1]).unlink()
    convert_folder(tmp_path / 'edm2-img64-s', tmp_path / 'out')
    assert '1 files converted, 1 were there' in capsys.readouterr().out
    assert (tmp_path / 'out' / names[0]).read_bytes() == b'kept'
    with pytest.raises(UserError, match='holds no'):
        convert_folder(tmp_path, tmp_path / 'out')


def test_mistakes_of_conversion(tmp_path):
    source = files.write_published(tmp_path / 'net.pkl', tiny_net())
    with pytest.raises(UserError, match=r'must end in \.safetensors'):
        convert(source, tmp_path / 'out.pkl')
    with pytest.raises(UserError, match='did you mean fp16'):
        convert(source, tmp_path / 'out.safetensors', dtype='f16')
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(UserError, match='cut short'):
        convert(source, tmp_path / 'out.safetensors')
    assert [path.name for path in tmp_path.iterdir()] == ['net.pkl']


def hostile_files():
    """What the tests of the reader refuse, each beginning as a published file does."""
    yield from (data for module, name in hostile.NAMES for data in hostile.forms(module, name).values())
    yield from (*hostile.ABUSE.values(), *hostile.SIZES.values(), *hostile.SHARING.values(), *hostile.BOMBS.values())
    whole = pickle.dumps({'ema': np.arange(3)}, 4)
    yield from (whole[:end] for end in range(2, len(whole), 7))


def test_hostile_files_at_the_command_line(tmp_path):
    """Hundreds of files through `python -m networks.convert`: each ends in one line for the user."""
    source, dest, count = tmp_path / 'evil.pkl', tmp_path / 'out.safetensors', 0
    for data in hostile_files():
        source.write_bytes(data if data[:1] == b'\x80' else b'\x80\x04' + data)
        signal.setitimer(signal.ITIMER_REAL, 30)
        try:
            with pytest.raises(UserError) as error:
                convert_module.main.main([str(source), str(dest)], standalone_mode=False)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert str(error.value).startswith(str(source)) and '\n' not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ['evil.pkl']
        count += 1
    assert count > 400


def test_flipped_bits(tmp_path, refuse):
    """A published file with any bit wrong is refused, or read as a network of the same shape."""
    path = files.write_published(tmp_path / 'net.pkl', tiny_net(), torch.float16)
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    for place in rng.integers(0, len(data), 60):
        broken = bytearray(data)
        broken[place] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            assert load_network(path)[1].config.img_channels == 1
        except UserError as error:
            assert '\n' not in str(error)


def test_no_code_runs_and_no_file_is_touched(golden_file, refuse):
    """Watched by Python's audit hook: a whole published file, read as the scripts read it."""
    read = functools.partial(read_pickle, names=NAMES)
    assert not refuse(
        golden_file.read_bytes(), read=lambda data: find_tensors(to_object(read(data)['ema'])), may_be_read=True
    )


# Presets


def test_presets_are_those_that_users_know():
    sizes, metrics = ('xs', 's', 'm', 'l', 'xl', 'xxl'), ('fid', 'dino')
    expected = {f'edm2-img512-{size}{kind}-{m}' for size in sizes for kind in ('', '-guid') for m in metrics}
    expected |= {f'edm2-img64-{size}-fid' for size in ('s', 'm', 'l', 'xl')}
    expected |= {f'edm2-{name}-autog-{m}' for name in AUTOGUIDED for m in metrics}
    expected |= {f'edm-{name}' for name in EDM_NAMES} | {f'baseline-{name}' for name in EDM_BASELINES}
    assert set(MODELS) == expected
    assert all(name in models_table() for name in expected)


EDM_NAMES = [
    *(f'cifar10-32x32-{kind}-{net}' for kind in ('cond', 'uncond') for net in ('vp', 've')),
    *(f'{data}-64x64-uncond-{net}' for data in ('ffhq', 'afhqv2') for net in ('vp', 've')),
    'imagenet-64x64-cond-adm',
]
EDM_BASELINES = ['cifar10-32x32-uncond-vp', 'cifar10-32x32-uncond-ve', 'imagenet-64x64-cond-adm']
AUTOGUIDED = ('img512-s', 'img512-xxl', 'img512-s-uncond', 'img64-s')


def test_presets_agree_with_their_names_and_the_recipes():
    for name, model in MODELS.items():
        if not name.startswith('edm2'):
            continue
        size = re.match(r'edm2-img\d+-[a-z]+', name)[0]
        nimg, std, trained = describe_name(f'{model.net}.pkl')
        assert trained.startswith(size) and nimg == PRESETS[size].duration
        assert (model.metric == 'FID') == name.endswith('fid')
        assert (model.guidance == 1) == (model.gnet is None) == ('guid' not in name and 'autog' not in name)
        if model.gnet is None and model.metric == 'FID':
            assert PRESETS[size].result == f'FID {model.result} at EMA {std:.3f}'
        if 'guid-' in name:
            assert describe_name(f'{model.gnet}.pkl') == (2**31, std, 'edm2-img512-xs-uncond')
        if 'autog' in name:
            assert ('uncond' in model.gnet) == ('uncond' in name)
            assert describe_name(f'{model.gnet}.pkl')[0] == (2**28 if 'xxl' in name else 2**27)


# Columns of the papers' tables, for the sizes in order.
COLUMNS = {
    'img512-{}-fid': ('.135 .130 .100 .085 .085 .070', '3.53 2.56 2.25 2.06 1.96 1.91', None),
    'img512-{}-dino': ('.200 .190 .155 .155 .155 .150', '103.39 68.64 58.44 52.25 45.96 42.84', None),
    'img512-{}-guid-fid': ('.045 .025 .030 .015 .020 .015', '2.91 2.23 2.01 1.88 1.85 1.81', '1.4 1.4 1.2 1.2 1.2 1.2'),
    'img512-{}-guid-dino': (
        '.150 .085 .015 .035 .030 .015',
        '79.94 52.32 41.98 38.20 35.67 33.09',
        '1.7 1.9 2.0 1.7 1.7 1.7',
    ),
}
AUTOGUIDANCE = {  # EMA lengths of both networks, weight, result
    'img512-s-autog-fid': (0.070, 0.125, 2.10, '1.34'),
    'img512-s-autog-dino': (0.120, 0.165, 2.45, '36.67'),
    'img512-xxl-autog-fid': (0.075, 0.155, 2.05, '1.25'),
    'img512-xxl-autog-dino': (0.130, 0.205, 2.30, '24.18'),
    'img512-s-uncond-autog-fid': (0.070, 0.110, 2.85, '3.86'),
    'img512-s-uncond-autog-dino': (0.090, 0.125, 2.90, '90.39'),
    'img64-s-autog-fid': (0.045, 0.110, 1.70, '1.01'),
    'img64-s-autog-dino': (0.105, 0.175, 2.20, '31.85'),
}


def test_presets_have_the_numbers_of_the_papers():
    for name, (stds, results, weights) in COLUMNS.items():
        rows = zip(stds.split(), results.split(), (weights or '1 1 1 1 1 1').split(), strict=True)
        for size, (std, result, weight) in zip(('xs', 's', 'm', 'l', 'xl', 'xxl'), rows, strict=True):
            model = MODELS[f'edm2-{name.format(size)}']
            assert (model.ema_std, model.result, model.guidance) == (f'0{std}', result, float(weight)), name
    for name, (std, guide_std, weight, result) in AUTOGUIDANCE.items():
        model = MODELS[f'edm2-{name}']
        lengths = describe_name(f'{model.net}.pkl')[1], describe_name(f'{model.gnet}.pkl')[1]
        assert (*lengths, model.guidance, model.result) == (std, guide_std, weight, result), name
        guide = 'm' if 'xxl' in name else 'xs'
        assert re.match(r'edm2-img\d+-([a-z]+)', model.gnet)[1] == guide


def test_resolving_presets():
    url = f'{BASE_URL}edm2-img64-s-1073741-0.045.pkl'
    assert resolve_model('edm2-img64-s-autog-fid', None, None, None) == (
        url,
        f'{BASE_URL}edm2-img64-xs-0134217-0.110.pkl',
        1.7,
    )
    assert resolve_model('edm2-img64-s-autog-fid', 'my', 'own', 3.0) == ('my', 'own', 3.0)
    assert resolve_model(None, 'net', None, None) == ('net', None, 1.0)
    with pytest.raises(UserError, match='did you mean edm2-img512-s-fid'):
        resolve_model('edm2-img512-s-fi', None, None, None)
    with pytest.raises(UserError, match='--net'):
        resolve_model(None, None, 'gnet', 2.0)


# Through the scripts


def test_generate_by_preset_from_the_cache(tmp_path, run_script, run_here, monkeypatch):
    cache = tmp_path / 'cache'
    folder = cache / 'downloads' / BASE_URL.removeprefix('https://')
    for name, seed in (('edm2-img64-s-1073741-0.045', 1), ('edm2-img64-xs-0134217-0.110', 2)):
        files.write_published(folder / f'{name}.pkl', tiny_net(seed=seed))
    options = ('--preset=edm2-img64-s-autog-fid', '--seeds=0-3', '--steps=3', '--outdir=out', '--offline')
    done = run_script('generate.py', *options, env={'EDM2PLUS_CACHE': str(cache)})
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'out' / 'generation.json').read_text())
    assert record['net']['file'] == f'{BASE_URL}edm2-img64-s-1073741-0.045.pkl'
    assert record['guiding_net']['file'] == f'{BASE_URL}edm2-img64-xs-0134217-0.110.pkl'
    assert record['sampler']['guidance'] == 1.7 and record['net']['nimg'] == 2**30
    for name in ('000000.png', '000003.png'):
        assert (tmp_path / 'out' / name).exists()
    monkeypatch.setenv('EDM2PLUS_CACHE', 'empty')
    done = run_here('generate.py', *options[:-2], '--outdir=none', '--offline')
    assert done.returncode == 2 and 'not in the download cache' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.slow
def test_other_scripts_take_published_files(tmp_path, run_script):
    path = files.write_published(tmp_path / 'net.pkl', tiny_net())
    done = run_script('count_flops.py', f'--net={path}', '--json')
    assert json.loads(done.stdout)['parameters'] == sum(p.numel() for p in tiny_net().parameters()), done.stderr
    data = make_archive(tmp_path / 'data.zip', 20, 10)
    options = (f'--ref={data}', '--seeds=0-7', '--steps=2', '--json=m.json')
    done = run_script('calculate_metrics.py', 'gen', f'--net={path}', *options)
    assert done.returncode == 0 and 'fd_pixels' in done.stdout, done.stderr


@pytest.fixture(scope='module')
def raw_snapshots(tmp_path_factory):
    """Six raw snapshots as they are published."""
    folder = tmp_path_factory.mktemp('raw') / 'edm2-img64-s'
    for i, kimg in enumerate(('0008388', '0016777', '0025165')):
        for j, std in enumerate(('0.050', '0.100')):
            files.write_published(folder / f'network-snapshot-{kimg}-{std}.pkl', tiny_net(seed=2 * i + j))
    return folder


def test_reconstruction_from_raw_snapshots(tmp_path, raw_snapshots):
    convert_folder(raw_snapshots, tmp_path / 'ours')
    results = []
    for folder in (raw_snapshots, tmp_path / 'ours'):
        snapshots = find_snapshots(folder)
        assert [s.info.nimg for s in snapshots] == [n * 2**23 for n in (1, 1, 2, 2, 3, 3)]
        ((_, info, weights),) = Plan.make(snapshots, [Wanted.of_length(0.075)]).reconstruct()
        results.append((info, weights))
    (info, weights), (other_info, other) = results
    assert info == other_info and info.preset == 'edm2-img64-s' and info.nimg == 3 * 2**23
    assert weights.keys() == other.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, other[name]), name


def test_thousands_mean_the_snapshot_that_they_name(raw_snapshots):
    """EDM2's --outkimg=16777 is --outnimg=16777k, of which 16 Mi are no multiple."""
    snapshots = find_snapshots(raw_snapshots)
    for nimg, meant in ((16777000, 2**24), (2**24 - 1, 2**24 - 1), (16778000, 16778000)):
        assert Plan.make(snapshots, [Wanted.of_length(0.075)], nimg).nimg == meant


def test_converted_snapshots_beside_their_originals_count_once(tmp_path, raw_snapshots):
    for path in raw_snapshots.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    convert_folder(raw_snapshots, tmp_path)
    assert len(find_snapshots(tmp_path)) == 6


@pytest.mark.slow
def test_reconstruction_at_the_command_line(tmp_path, raw_snapshots, run_script):
    done = run_script('reconstruct_phema.py', f'--indir={raw_snapshots}', '--outdir=out', '--outstd=0.06')
    assert done.returncode == 0 and 'profile error' in done.stdout, done.stderr
    evil = tmp_path / 'evil' / 'network-snapshot-0008388-0.050.pkl'
    evil.parent.mkdir()
    evil.write_bytes(hostile.forms('os', 'system')['STACK_GLOBAL REDUCE'])
    done = run_script('reconstruct_phema.py', f'--indir={evil.parent}', '--outstd=0.06')
    assert done.returncode == 2 and "asks for 'os.system'" in done.stderr and 'Traceback' not in done.stderr


# Fine-tuning


def fine_tuning(tmp_path, init, classes: int = 10, **overrides):
    """A run of one step of the digits' recipe in small, at the learning rate 0 with which every run begins."""
    dataset = ImageDataset(str(make_archive(tmp_path / f'data{classes}.zip', 40, classes)))
    sizes = {'channels': 16, 'channel_mult': (1, 2), 'attn_resolutions': (4,), 'channels_per_head': 16}
    small = {**sizes, 'num_blocks': 1, 'batch': 1000, 'micro_batch': 1000, 'block': 'A', 'dropout': 0.0}
    times = dict.fromkeys(('duration', 'snapshot', 'checkpoint', 'status', 'preview'), 1000)
    overrides = {**small, **times, 'init': str(init), **overrides}
    config = make_config(
        'edm2plus-digits', overrides, dataset, str(tmp_path / f'data{classes}.zip'), classes > 0
    ).check()
    check_initial(config.init, config.network)
    folder = tmp_path / f'run{classes}'
    folder.mkdir()
    train(config, dataset, folder, torch.device('cpu'))
    return load_network(folder / 'network-snapshot-0000001-0.050.safetensors')[0].state_dict(), config


def test_fine_tuning_begins_with_the_weights_of_the_file(tmp_path, capsys):
    original = tiny_net(seed=5)
    path = files.write_published(tmp_path / 'net.pkl', original, torch.float32)
    weights, config = fine_tuning(tmp_path, path)
    state = TrainState(config, torch.device('cpu'))
    start_from(state, config.init)
    for average in state.ema.averages.values():
        assert all(torch.equal(average[name], tensor) for name, tensor in original.state_dict().items())
    assert f'starting from the weights of {path}' in capsys.readouterr().out
    for name, tensor in original.state_dict().items():
        # Training normalizes weights; the snapshot rounds them to FP16.
        expected = normalize(tensor) if name.endswith('.weight') else tensor
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(weights['unet.emb_fourier.freqs'], original.unet.emb_fourier.freqs)


def test_fine_tuning_for_other_classes(tmp_path, capsys):
    original = tiny_net(seed=5)
    path = files.write_published(tmp_path / 'net.pkl', original, torch.float32)
    weights, config = fine_tuning(tmp_path, path, classes=4)
    assert 'what does not fit is left out or starts from scratch: unet.emb_label.weight' in capsys.readouterr().out
    drawn = Denoiser(config.network, seed=config.seed).unet.emb_label.weight.detach()
    torch.testing.assert_close(weights['unet.emb_label.weight'], normalize(drawn), rtol=1e-3, atol=1e-3)
    expected = normalize(original.unet.out_conv.weight.detach())
    torch.testing.assert_close(weights['unet.out_conv.weight'], expected, rtol=1e-3, atol=1e-3)


def test_fine_tuning_of_another_network_is_refused(tmp_path, run_script):
    path = files.write_published(tmp_path / 'net.pkl', tiny_net())
    data = make_archive(tmp_path / 'data.zip', 20, 10)
    done = run_script('train.py', '--preset=edm2plus-digits', f'--data={data}', '--outdir=run', f'--init={path}')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'architecture.model_channels is' in done.stderr and 'architecture.block is G*, was A' in done.stderr
    assert not (tmp_path / 'run').exists()


def test_a_run_continues_only_with_the_same_beginning(tmp_path):
    path = files.write_published(tmp_path / 'net.pkl', tiny_net(), torch.float32)
    _, config = fine_tuning(tmp_path, path)
    assert config.to_json()['init'] == str(path)
