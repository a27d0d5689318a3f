"""Encoders: pixels and latents, there and back; a network file names its encoder."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from dnnlib.errors import UserError
from networks import encoders
from networks.denoiser import Denoiser
from networks.encoders import (
    LATENT_MEAN,
    LATENT_STD,
    PixelEncoder,
    StabilityVAEEncoder,
    denormalise_latents,
    load_encoder,
    sample_latents,
)
from networks.files import NetworkInfo, read_info, save_network
from torch_utils.tensor_files import HEADER_KEY, TensorFile


class LinearVAE:
    """A VAE whose mean is red, green, blue and their sum over 8x8 pixels, and whose inverse is exact for flat colours.

    Its standard deviation is channel k + 1. It refuses anything but [0, 1], and remembers its batch sizes.
    """

    def __init__(self):
        self.batches = []

    def encode(self, x):
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        self.batches.append(len(x))
        small = torch.nn.functional.avg_pool2d(x, 8)
        mean = torch.cat([small, small.sum(dim=1, keepdim=True)], dim=1)
        std = torch.arange(1.0, 5)[None, :, None, None].expand_as(mean)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std))

    def decode(self, z):
        self.batches.append(len(z))
        return SimpleNamespace(sample=torch.nn.functional.interpolate(z[:, :3], scale_factor=8, mode='nearest'))


def flat_images():
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [10, 100, 200]], dtype=torch.uint8)
    return colours[:, :, None, None].expand(3, 3, 16, 24)


def test_latents_there_and_back():
    vae = LinearVAE()
    encoder, images = StabilityVAEEncoder(vae), flat_images()
    stored = encoder.encode(images)
    assert stored.shape == (3, 8, 2, 3) and stored.dtype == torch.float32
    assert stored[2, :4, 0, 0].tolist() == pytest.approx([10 / 255, 100 / 255, 200 / 255, 310 / 255])
    x = sample_latents(stored, torch.zeros(3, 4, 2, 3))
    decoded = encoder.decode(x)
    assert decoded.dtype == torch.uint8 and decoded.shape == images.shape
    assert encoder.image_shape(x.shape[1:]) == images.shape[1:]
    assert (decoded.int() - images.int()).abs().max() <= 1  # uint8 is cut, not rounded
    assert set(vae.batches) == {1}, 'on a CPU images do not share a batch'


def test_latents_are_clipped_not_wrapped():
    x = torch.tensor([-100.0, 100.0])[:, None, None, None].expand(2, 4, 1, 1)
    decoded = StabilityVAEEncoder(LinearVAE()).decode(x)
    assert decoded[0].max() == 0 and decoded[1].min() == 255


def test_normalisation_is_edm2s():
    # (z - mean) 0.5 / std, noise scaled by the stored standard deviation.
    moments = torch.cat([torch.zeros(1, 4, 1, 1), torch.full((1, 4, 1, 1), 2.0)], dim=1)
    x = sample_latents(moments, torch.full((1, 4, 1, 1), 3.0))[0, :, 0, 0]
    expected = [(6 - m) * 0.5 / s for m, s in zip((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), strict=True)]
    assert x.tolist() == pytest.approx(expected, rel=1e-6)
    z = denormalise_latents(x[None, :, None, None])
    assert z[0, :, 0, 0].tolist() == pytest.approx([6] * 4, rel=1e-6)


def test_normalised_latents_have_the_data_s_deviation():
    generator = torch.Generator().manual_seed(0)
    scale, shift = (torch.tensor(v)[None, :, None, None] for v in (LATENT_STD, LATENT_MEAN))
    mean = torch.randn(1, 4, 100, 100, generator=generator) * scale + shift
    x = sample_latents(torch.cat([mean, torch.zeros_like(mean)], dim=1), torch.zeros(1, 4, 100, 100))
    assert x.mean().item() == pytest.approx(0, abs=0.01) and x.std().item() == pytest.approx(0.5, abs=0.01)


def test_pixels_are_stored_as_they_are():
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    encoder = load_encoder('rgb')
    assert isinstance(encoder, PixelEncoder) and torch.equal(encoder.encode(images), images)
    assert torch.equal(encoder.decode(encoders.encode_pixels(images)), images)


def test_what_cannot_be_loaded(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="unknown encoder 'rbg'; did you mean rgb"):
        load_encoder('rbg')
    monkeypatch.setitem(__import__('sys').modules, 'diffusers', None)  # as if it were not installed
    with pytest.raises(UserError, match='pip install'):
        load_encoder('stabilityvae', vae=tmp_path)


def test_the_real_vae(tmp_path):
    diffusers = pytest.importorskip('diffusers')
    with torch.random.fork_rng(devices=[]):
        tiny = diffusers.AutoencoderKL(
            down_block_types=('DownEncoderBlock2D',) * 4,
            up_block_types=('UpDecoderBlock2D',) * 4,
            block_out_channels=(4,) * 4,
            norm_num_groups=2,
            latent_channels=4,
        )
    tiny.save_pretrained(tmp_path / 'vae')
    encoder = load_encoder('stabilityvae', vae=tmp_path / 'vae')
    images = flat_images()
    stored = encoder.encode(images)
    assert stored.shape == (3, 8, 2, 3) and (stored[:, 4:] > 0).all()
    assert torch.equal(encoder.encode(images[1:2]), stored[1:2])
    x = sample_latents(stored, torch.zeros(3, 4, 2, 3))
    decoded = encoder.decode(x)
    assert decoded.shape == images.shape and torch.equal(encoder.decode(x[2:]), decoded[2:])
    with pytest.raises(UserError, match='cannot load the VAE'):
        load_encoder('stabilityvae', vae=tmp_path)


def test_a_network_file_names_its_encoder(tmp_path, tiny_config):
    path = tmp_path / 'net.safetensors'
    weights = Denoiser(tiny_config).state_dict()
    save_network(path, weights, NetworkInfo(tiny_config, 1, None, 'x', encoder='stabilityvae'))
    assert read_info(path).encoder == 'stabilityvae'
    with TensorFile(path) as file:
        header = {k: v for k, v in file.header.items() if k not in ('encoder', 'digests')}  # as older files have it
    safetensors.torch.save_file(weights, path, {HEADER_KEY: json.dumps(header)})
    assert read_info(path).encoder == 'rgb'
