"""From what a dataset stores to what a network is trained on."""

from collections.abc import Sequence

import torch

from networks.encoders import encode_pixels, sample_latents
from torch_utils.random import stream_seed


def to_training_images(stored: torch.Tensor, numbers: Sequence[int], seed: int) -> torch.Tensor:
    """Scale images to [-1, 1], or draw normalised latents anew, on the device where they are.

    The draw of a visit depends on (seed, image number) alone, so that neither ranks nor resuming change it.

    Args:
        stored: uint8 [N, C, H, W], images; or float32 [N, 8, H, W], mean and standard deviation of latents.
        numbers: Image numbers, counted from 0 over the whole run.
        seed: Of the run.

    Returns:
        float32 [N, C, H, W], or [N, 4, H, W] of latents, of standard deviation about sigma_data = 0.5.
    """
    if stored.dtype == torch.uint8:
        return encode_pixels(stored)
    noise = torch.empty_like(stored[:, : stored.shape[1] // 2])
    generator = torch.Generator(stored.device)
    for row, number in zip(noise, numbers, strict=True):
        row.normal_(generator=generator.manual_seed(stream_seed(seed, 'latent', number)))
    return sample_latents(stored, noise)
