"""Dropout whose masks belong to images: neither the batch that an image is in nor the rank that has it matters."""

import torch
from torch import nn

from torch_utils.random import stream_seed


@torch.library.custom_op('edm2plus::image_mask', mutates_args=())
def image_mask(x: torch.Tensor, seeds: torch.Tensor, keep: float) -> torch.Tensor:
    """1 / keep with probability `keep`, else 0, in the shape of x [N, ...]; row i from seeds[i] (int64 [N])."""
    mask, generator = torch.empty_like(x), torch.Generator(x.device)
    for row, seed in zip(mask, seeds.tolist(), strict=True):
        row.bernoulli_(keep, generator=generator.manual_seed(seed))
    return mask.div_(keep)


@image_mask.register_fake
def _(x: torch.Tensor, seeds: torch.Tensor, keep: float) -> torch.Tensor:
    return torch.empty_like(x)


class Dropout(nn.Module):
    """Drop features of x [N, ...] in training mode, scaling the others up.

    Args:
        p: Share that is dropped.

    Attributes:
        seeds: Of the masks, int64 [N] on the CPU; `seed_dropout` sets them.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.seeds: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> the same; x itself in evaluation mode."""
        if not self.training or not self.p:
            return x
        assert self.seeds is not None and len(self.seeds) == len(x), 'seed_dropout comes before a forward pass'
        return x * image_mask(x.detach(), self.seeds, 1 - self.p)


def seed_dropout(net: nn.Module, seed: int, numbers: list[int]) -> None:
    """Choose the masks of the next forward passes: they depend on (seed, image number, layer) alone.

    Args:
        net: Its `Dropout` layers are told.
        seed: Of the run.
        numbers: Image numbers, counted from 0 over the whole run.
    """
    for i, layer in enumerate(module for module in net.modules() if isinstance(module, Dropout) and module.p):
        seeds = [stream_seed(seed, f'dropout {i}', number) for number in numbers]
        layer.seeds = torch.tensor(seeds)
