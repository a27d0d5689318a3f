"""From what a dataset stores to what a network is trained on."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from networks.encoders import encode_pixels, sample_latents
from torch_utils.random import stream, stream_seed


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device.

    Args:
        y: Clean images, float32 [N, C, H, W].
        labels: One-hot, float32 [N, label_dim], rows of zeros where they were dropped; None without classes.
        augment: How the images were augmented, float32 [N, augment_dim]; None where they were not.
        numbers: Of the images, counted from 0 over the whole run: random draws belong to them.
    """

    y: torch.Tensor
    labels: torch.Tensor | None
    augment: torch.Tensor | None
    numbers: list[int]


def to_training_images(stored: torch.Tensor, numbers: Sequence[int], seed: int) -> torch.Tensor:
    """Scale images to [-1, 1], or draw normalised latents, on the device where they are.

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
    config: Any,
    device: torch.device,
    held_out: bool = False,
) -> Inputs:
    """Move a micro-batch to the device and make of it what a method trains on.

    Args:
        stored: As the dataset gives them.
        labels: Class indices, int64 [N].
        numbers: Of the images; all random draws belong to them.
        config: Of the run, a `TrainConfig`.
        device: Of the network.
        held_out: Whether the images are held out: draws of their own, no augmentation, no dropped labels.
    """
    numbers = list(numbers)
    seed = stream_seed(config.seed, 'held out') if held_out else config.seed
    y, augment, one_hot = to_training_images(stored.to(device, non_blocking=True), numbers, seed), None, None
    if config.augment is not None and not held_out:
        y, augment = config.augment(y, seed, numbers)
    if config.network.label_dim:
        labels = labels.to(device, non_blocking=True)
        one_hot = torch.nn.functional.one_hot(labels, config.network.label_dim).float()
        if config.label_dropout and not held_out:
            draws = [torch.rand((), generator=stream(seed, 'label', number)).item() for number in numbers]
            kept = torch.tensor([draw >= config.label_dropout for draw in draws], device=device)
            one_hot = one_hot * kept[:, None]
    return Inputs(y, one_hot, augment, numbers)


def training_draws(
    seed: int, numbers: Sequence[int], shape: tuple[int, ...], levels: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise level and noise of each image; they depend on (seed, image number) alone.

    So neither the number of ranks nor gradient accumulation changes what an image is trained with, and a
    resumed run continues the same sequence.

    Args:
        seed: Of the run.
        numbers: Image numbers, counted from 0 over the whole run.
        shape: (C, H, W) of an image.
        levels: Distribution of the noise levels, see `diffusion.levels`.
        device: Where to draw.

    Returns:
        sigma float32 [N] and standard normal noise float32 [N, C, H, W].
    """
    z, noise = normal_draws(seed, 'noise', numbers, shape, device)
    return levels.from_normal(z), noise


def normal_draws(
    seed: int, purpose: str, numbers: Sequence[int], shape: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal numbers of each image for some purpose, as in `training_draws`: float32 [N] and [N, *shape]."""
    draws = torch.empty(len(numbers), 1 + math.prod(shape), device=device)
    generator = torch.Generator(device)
    for row, number in zip(draws, numbers, strict=True):
        row.normal_(generator=generator.manual_seed(stream_seed(seed, purpose, number)))
    return draws[:, 0], draws[:, 1:].reshape(len(numbers), *shape)
