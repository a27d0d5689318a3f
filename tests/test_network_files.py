"""Network files: rebuilt from the file alone, whole or not at all, and errors that name the file."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from dnnlib.configs import replaced
from dnnlib.errors import UserError
from dnnlib.files import atomic_path, make_folder, write_json
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, load_network, read_info, save_network
from tests.conftest import ROOT
from torch_utils.tensor_files import HEADER_KEY, TensorFile, save_tensors


@pytest.fixture
def saved(tmp_path, tiny_config):
    net = Denoiser(tiny_config, seed=5).eval()
    torch.nn.init.ones_(net.unet.out_gain)
    info = NetworkInfo(tiny_config, 4096, 0.1, 'edm2plus-digits', 'digits')
    path = tmp_path / 'net.safetensors'
    save_network(path, net.state_dict(), info)
    return net, info, path


def test_a_network_is_rebuilt_from_its_file_alone(saved):
    net, info, path = saved
    loaded, loaded_info = load_network(path)
    assert loaded_info == info == read_info(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x, sigma, labels = torch.ones(2, 1, 8, 8), torch.tensor([0.3, 3.0]), torch.eye(10)[:2]
    assert torch.equal(net(x, sigma, labels), loaded(x, sigma, labels))


def test_sixteen_bit_parameters_constants_exact(saved):
    net, info, path = saved
    save_network(path, net.state_dict(), info, dtype=torch.float16)
    loaded, _ = load_network(path)
    assert torch.equal(loaded.unet.emb_fourier.freqs, net.unet.emb_fourier.freqs)
    torch.testing.assert_close(loaded.unet.out_conv.weight, net.unet.out_conv.weight, rtol=1e-3, atol=1e-6)
    assert loaded.unet.out_conv.weight.dtype == torch.float32


def test_header_is_json_with_versions(saved):
    _, _, path = saved
    with safetensors.safe_open(path, framework='pt') as file:
        header = json.loads(file.metadata()[HEADER_KEY])
    assert (
        header['kind'] == 'network file'
        and header['config']['architecture']['block'] == 'G*'
        and header['nimg'] == 4096
    )
    assert header['versions']['torch'] == torch.__version__


def bad_files(path):
    """(what is done to a good file, part of the message)"""
    data = path.read_bytes()
    yield 'text', lambda: path.write_text('not a network'), 'is not a network file'
    yield 'empty', lambda: path.write_bytes(b''), 'is not a network file'
    yield 'cut', lambda: path.write_bytes(data[: len(data) // 2]), 'is not a network file'
    yield 'foreign', lambda: safetensors.torch.save_file({'a': torch.ones(1)}, path), 'header does not say'
    yield 'state', lambda: save_tensors(path, {'a': torch.ones(1)}, {'kind': 'training state'}), "but 'training state'"


@pytest.mark.parametrize('case', range(5))
def test_files_that_are_no_networks(saved, case):
    _, _, path = saved
    _, damage, message = list(bad_files(path))[case]
    damage()
    with pytest.raises(UserError, match=message) as error:
        load_network(path)
    assert str(path) in str(error.value)


def test_tensors_that_do_not_fit_the_config(saved):
    net, info, path = saved
    weights = net.state_dict()
    weights['extra.weight'] = torch.ones(1)
    del weights['unet.out_conv.weight']
    save_network(path, weights, info)
    with pytest.raises(UserError, match=r"'unet.out_conv.weight' is missing; .*'extra.weight' is unknown"):
        load_network(path)
    save_network(path, net.state_dict(), replaced(info, {'config.architecture.model_channels': 32}))
    with pytest.raises(UserError, match='has shape'):
        load_network(path)


def test_unknown_field_in_a_config(saved):
    net, info, path = saved
    header = info.to_header()
    architecture = header['config']['architecture']
    architecture['model_chanels'] = architecture.pop('model_channels')
    save_tensors(path, net.state_dict(), header)
    with pytest.raises(
        UserError, match=r"did you mean architecture.model_channels.*missing field 'architecture.model_channels'"
    ):
        load_network(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_network(tmp_path / 'none.safetensors')


def test_atomic_path_leaves_nothing_when_it_fails(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(RuntimeError), atomic_path(path) as beside:
        beside.write_text('half')
        raise RuntimeError
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as beside:
        beside.write_text('new')
    assert path.read_text() == 'new' and list(tmp_path.iterdir()) == [path]


def test_permissions_follow_the_umask(saved):
    _, info, path = saved
    mask = os.umask(0o027)
    try:
        save_network(path, saved[0].state_dict(), info)
        write_json(path.with_suffix('.json'), {})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(path.with_suffix('.json').stat().st_mode) == 0o640


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from dnnlib.files import atomic_path
with atomic_path({str(path)!r}) as beside:
    beside.write_text('half')
    print('ready', flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == 'ready\n'
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == 'old'


def test_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError) as error:
        make_folder(tmp_path / 'file' / 'out')
    assert error.value.filename


def test_tensor_file_reads_one_by_one(saved):
    net, _, path = saved
    with TensorFile(path) as file:
        assert file.names == sorted(net.state_dict())
        assert torch.equal(file.get('unet.out_gain'), torch.ones(()))
