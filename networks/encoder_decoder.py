"""What the U-Nets of EDM, EDM2 and the ladder between them share: encoder, decoder and the way through them."""

from collections.abc import Callable, Iterator

import torch
from torch import nn


def concatenate(x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """[N, Ca, H, W] and [N, Cb, H, W] -> [N, Ca + Cb, H, W]."""
    return torch.cat([x, skip], dim=1)


class EncoderDecoder(nn.Module):
    """An architecture with layers by name in `enc` and `dec`, whose decoder blocks take the encoder's features."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights and constants, layer by layer, on the CPU whatever the device."""
        for module in self.modules():
            if module is not self and (draw := getattr(module, 'reset_parameters', None)):
                draw(generator)

    def stages(self) -> Iterator[tuple[str, nn.Module]]:
        """Named parts in order of execution."""
        yield from (('enc ' + name, part) for name, part in self.enc.items())
        yield from (('dec ' + name, part) for name, part in self.dec.items())
        if (out := getattr(self, 'out_conv', None)) is not None:
            yield 'output', out

    def blocks(
        self,
        x: torch.Tensor,
        emb: torch.Tensor,
        join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = concatenate,
    ) -> torch.Tensor:
        """Through encoder and decoder, [N, C, H, W] -> [N, width, H, W]; `join` adds a skip connection."""
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith('_conv') else layer(x, emb)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(join(x, skips.pop()) if 'block' in name else x, emb)
        return x
