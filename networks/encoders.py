"""Between stored pixels and what a denoiser sees."""

import torch


def encode_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def decode_pixels(x: torch.Tensor) -> torch.Tensor:
    """float [N, C, H, W] -> uint8: trunc(clip(127.5 x + 128, 0, 255)), as EDM writes its images."""
    return (x.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)
