"""From what a dataset stores to what a network is trained on."""

from collections.abc import Sequence

import torch

from diffusion.levels import LogNormal
from networks.encoders import encode_pixels, sample_latents
from torch_utils.random import stream_seed
from training.config import TrainConfig


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


def training_inputs(
    stored: torch.Tensor,
    labels: torch.Tensor,
    numbers: Sequence[int],
    config: TrainConfig,
    device: torch.device,
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move a micro-batch to the device and make of it what the loss takes.

    Args:
        stored: As the dataset gives them.
        labels: Class indices, int64 [N].
        numbers: Of the images; they choose the draw of latents.
        config: Of the run; says whether labels are used.
        device: Of the network.
        seed: Of the draws; that of the run by default.

    Returns:
        Clean images y, float32 [N, C, H, W], and one-hot labels, float32 [N, label_dim], or None.
    """
    seed = config.seed if seed is None else seed
    y = to_training_images(stored.to(device, non_blocking=True), numbers, seed)
    if not config.network.label_dim:
        return y, None
    labels = labels.to(device, non_blocking=True)
    return y, torch.nn.functional.one_hot(labels, config.network.label_dim).float()


def training_draws(
    seed: int, numbers: list[int], shape: tuple[int, ...], levels: LogNormal, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise level and noise of each image; they depend on (seed, image number) alone.

    So neither the number of ranks nor gradient accumulation changes what an image is trained with, and a
    resumed run continues the same sequence.

    Args:
        seed: Of the run.
        numbers: Image numbers, counted from 0 over the whole run.
        shape: (C, H, W) of an image.
        levels: Distribution of the noise levels.
        device: Where to draw.

    Returns:
        sigma float32 [N] and standard normal noise float32 [N, C, H, W].
    """
    size = torch.Size(shape).numel()
    draws = torch.empty(len(numbers), 1 + size, device=device)
    generator = torch.Generator(device)
    for row, number in zip(draws, numbers, strict=True):
        row.normal_(generator=generator.manual_seed(stream_seed(seed, 'noise', number)))
    return levels.from_normal(draws[:, 0]), draws[:, 1:].reshape(len(numbers), *shape)
