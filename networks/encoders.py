"""Encoders: between the uint8 images of a data set, what is stored of them, and the x that a denoiser sees.

Three forms, and who needs which:

    images  uint8 [N, C, H, W]       --encode-->  stored   what a data set keeps     (dataset_tool.py encode)
    stored                           --sample-->  x        what a denoiser sees      (training)
    x       float [N, C', H', W']    --decode-->  images   what people look at       (sampling)

For RGB (and grayscale) images the first step is nothing. For latent diffusion the stored form is the mean and the
standard deviation of the VAE's posterior, from which training draws at every visit (EDM2 section 5, spec of
img512); `sample` then needs no VAE.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from dnnlib.errors import UserError, unknown_choice

# Mean and standard deviation of the channels of stabilityai/sd-vae-ft-mse on ImageNet, by which EDM2 normalises.
LATENT_MEAN = (5.81, 3.25, 0.12, -2.15)
LATENT_STD = (4.17, 4.62, 3.71, 3.28)
SIGMA_DATA = 0.5  # standard deviation of normalised latents

DEFAULT_VAE = 'stabilityai/sd-vae-ft-mse'
VAE_FACTOR = 8  # side of an image over that of its latents
VAE_CHUNK = 8  # images that a GPU decodes at a time; 512x512 of them take some GiB


class Encoder(Protocol):
    """What the pipelines know of an encoder."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images -> what a data set stores of them."""

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """What a denoiser sees -> uint8 images."""

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C', H', W') of what a denoiser sees -> (C, H, W) of the images that `decode` makes of it."""


def encode_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def decode_pixels(x: torch.Tensor) -> torch.Tensor:
    """float [N, C, H, W] -> uint8: trunc(clip(127.5 x + 128, 0, 255)), as EDM writes its images."""
    return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def sample_latents(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw normalised latents from the posterior that a data set stores.

    x = ((mean + std noise) - LATENT_MEAN) SIGMA_DATA / LATENT_STD

    Args:
        moments: float32 [N, 8, H, W], four channels of mean, then four of standard deviation.
        noise: float32 [N, 4, H, W], standard normal.

    Returns:
        float32 [N, 4, H, W], of standard deviation about SIGMA_DATA.
    """
    mean, std = moments.float().chunk(2, dim=1)
    shift, scale = _latent_constants(moments.device)
    return (mean + std * noise - shift) * (SIGMA_DATA / scale)


def denormalise_latents(x: torch.Tensor) -> torch.Tensor:
    """float32 [N, 4, H, W] as a denoiser sees them -> the VAE's own scale; inverse of `sample_latents` for std 0."""
    shift, scale = _latent_constants(x.device)
    return x.float() * (scale / SIGMA_DATA) + shift


def _latent_constants(device: torch.device) -> Iterator[torch.Tensor]:
    """LATENT_MEAN and LATENT_STD as [1, 4, 1, 1]."""
    return (torch.tensor(values, device=device)[None, :, None, None] for values in (LATENT_MEAN, LATENT_STD))


class PixelEncoder:
    """Images themselves, grayscale or RGB: stored as they are, seen by a denoiser in [-1, 1]."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, C, H, W] -> itself."""
        return images

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """float [N, C, H, W] -> uint8, see `decode_pixels`."""
        return decode_pixels(x)

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) -> itself."""
        return shape


class StabilityVAEEncoder:
    """Latents of the Stable Diffusion VAE, 8x smaller and of 4 channels, as EDM2 uses them for ImageNet-512.

    As in the published models, the VAE is fed pixels in [0, 1] and its decoder's output is read as [0, 1].

    Args:
        vae: Like diffusers' AutoencoderKL: `encode(x).latent_dist.mean` and `.std`, `decode(z).sample`, in float32.
    """

    def __init__(self, vae: Any):
        self.vae = vae

    @classmethod
    def load(cls, path: str | os.PathLike | None = None, device: torch.device | str = 'cpu') -> 'StabilityVAEEncoder':
        """Load the VAE through diffusers (`pip install 'diffusers>=0.30'`, the extra `latents`).

        Args:
            path: Folder with config.json and diffusion_pytorch_model.safetensors, or a name on the model hub;
                None is DEFAULT_VAE.
            device: Where to put it.
        """
        return cls(_load_vae(os.fspath(path) if path else DEFAULT_VAE).to(device).eval().requires_grad_(False))

    @torch.inference_mode()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, 8, H/8, W/8]: mean, then standard deviation; what a data set stores."""
        parts = []
        for chunk in self._chunks(images):
            posterior = self.vae.encode(chunk.float() / 255).latent_dist
            parts.append(torch.cat([posterior.mean, posterior.std], dim=1))
        return torch.cat(parts)

    @torch.inference_mode()
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """float [N, 4, H, W], normalised latents -> uint8 [N, 3, 8 H, 8 W]."""
        chunks = self._chunks(denormalise_latents(x))
        return torch.cat([(self.vae.decode(z).sample.clip(0, 1) * 255).to(torch.uint8) for z in chunks])

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(4, H, W) -> (3, 8 H, 8 W)."""
        return 3, VAE_FACTOR * shape[1], VAE_FACTOR * shape[2]

    def _chunks(self, batch: torch.Tensor) -> Iterator[torch.Tensor]:
        """Few images at a time, for memory's sake; on a CPU one, so that a result does not depend on its batch."""
        return iter(batch.split(1 if batch.device.type == 'cpu' else VAE_CHUNK))


ENCODERS = {'rgb': PixelEncoder, 'stabilityvae': StabilityVAEEncoder}


def load_encoder(name: str, device: torch.device | str = 'cpu', vae: str | os.PathLike | None = None) -> Encoder:
    """The encoder that a network file or a data set names.

    Args:
        name: `rgb` or `stabilityvae`.
        device: Where a VAE goes.
        vae: Folder of a VAE, for machines without a network; None is DEFAULT_VAE.
    """
    if name not in ENCODERS:
        raise UserError(unknown_choice('encoder', name, ENCODERS))
    return StabilityVAEEncoder.load(vae, device) if name == 'stabilityvae' else PixelEncoder()


def _load_vae(path: str) -> Any:
    logging.getLogger('diffusers').setLevel(logging.ERROR)  # no advice on stderr
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(f"latents need diffusers: pip install 'diffusers>=0.30' ({error})") from None
    folder = Path(path)
    if not folder.is_dir() and (folder.is_absolute() or path.startswith('.')):
        raise UserError(f'{path}: no folder of a VAE')
    here = {'local_files_only': True} if folder.is_dir() else {}
    try:
        with _global_randomness_kept():
            return AutoencoderKL.from_pretrained(
                path, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=torch.float32, **here
            )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        how = f'download {DEFAULT_VAE} (config.json, diffusion_pytorch_model.safetensors) to a folder and give that'
        raise UserError(f'cannot load the VAE {path}: {reason} Without a network, {how}') from None


@contextlib.contextmanager
def _global_randomness_kept() -> Iterator[None]:
    """diffusers initialises weights, before it loads them, from the global generator."""
    with torch.random.fork_rng(devices=[]):
        yield
