"""ADM of Dhariwal and Nichol as EDM trains it (EDM appendix F)."""

import dataclasses
import math

import torch
from torch import nn

from networks.edm.layers import Conv2d, GroupNorm, Init, Linear, positional_embedding
from networks.edm.unet import Block, Place, Style, UNetConfig, width_problems
from networks.encoder_decoder import EncoderDecoder
from networks.fourier import FourierFeatures
from networks.interface import Interface

INIT = Init('in', math.sqrt(1 / 3), math.sqrt(1 / 3))
INIT_ZERO = Init('in', 0.0)
EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADMConfig(UNetConfig):
    """ADM; the defaults are those of ImageNet-64.

    Args:
        channels_per_head: Width of an attention head.
        clip: Largest feature that leaves a block, as EDM2 clips them; None for any.
    """

    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    channels_per_head: int = 64
    clip: float | None = None

    def places(self, interface: Interface) -> tuple[list[Place], list[Place]]:
        """The blocks of encoder and decoder."""
        return self.layout(interface, self.width, attend_once=False)

    def problems(self, interface: Interface) -> list[str]:
        """Everything that is wrong, in words."""
        found = self.value_problems(interface)
        if self.channels_per_head < 1:
            found.append(f'channels_per_head must be at least 1, not {self.channels_per_head}')
        if self.clip is not None and not self.clip > 0:
            found.append(f'clip must be positive, not {self.clip}')
        if self.model_channels % 2:
            found.append(f'model_channels must be even, not {self.model_channels}')
        if found:
            return found
        encoder, decoder = self.places(interface)
        places = [*encoder, *decoder]
        found = width_problems(places)
        for channels in dict.fromkeys(place.out_channels for place in places if place.attention):
            if channels % self.channels_per_head:
                found.append(f'heads of {self.channels_per_head} channels do not divide an attention of {channels}')
        return found


class ADM(EncoderDecoder):
    """F of a denoiser: ADM.

    Args:
        config: Already checked.
        interface: Of the denoiser.
    """

    def __init__(self, config: ADMConfig, interface: Interface):
        super().__init__()
        self.config, self.label_dim = config, interface.label_dim
        noise, emb = config.model_channels, config.model_channels * config.channel_mult_emb
        zero = Init('in', 0.0)
        self.map_augment = Linear(interface.augment_dim, noise, zero, bias=False) if interface.augment_dim else None
        self.map_layer0 = Linear(noise, emb, INIT)
        self.map_layer1 = Linear(emb, emb, INIT)
        self.map_label = None
        if interface.label_dim:
            init = Init('in', math.sqrt(interface.label_dim), normal=True)  # N(0, 1)
            self.map_label = Linear(interface.label_dim, emb, init, bias=False)
        style = Style(
            emb, config.dropout, INIT, INIT_ZERO, INIT, EPS,
            adaptive_scale=True, skip_scale=1.0, resample_proj=False, channels_per_head=config.channels_per_head,
            clip=config.clip,
        )  # fmt: skip
        encoder, decoder = config.places(interface)
        height, breadth = interface.img_resolution
        first = {f'{height}x{breadth}_conv': Conv2d(interface.in_channels, config.width, 3, INIT)}
        self.enc = nn.ModuleDict(first | {place.name: Block(place, style) for place in encoder})
        self.dec = nn.ModuleDict({place.name: Block(place, style) for place in decoder})
        self.out_norm = GroupNorm(config.width, EPS)
        self.out_conv = Conv2d(config.width, interface.out_channels, 3, INIT_ZERO)

    def embed(self, c_noise: torch.Tensor, labels: torch.Tensor | None, augment: torch.Tensor | None) -> torch.Tensor:
        """What conditions the blocks, float32 [N, emb_channels]."""
        emb = positional_embedding(c_noise, self.config.model_channels, endpoint=False)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(nn.functional.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(emb.new_zeros(1, self.label_dim) if labels is None else labels)
        return nn.functional.silu(emb)

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N, C, H, W] in any float dtype, float32 [N], [N, label_dim], [N, augment_dim] -> [N, out, H, W]."""
        emb = self.embed(c_noise, labels, augment)
        x = self.blocks(x, emb)
        return self.out_conv(nn.functional.silu(self.out_norm(x)))


def uncertainty_head(config: ADMConfig, channels: int) -> tuple[FourierFeatures, Linear]:
    """Features of c_noise, and the layer that makes u(sigma) of them, in the style of the network (EDM2's config B)."""
    return FourierFeatures(channels, gain=1.0), Linear(channels, 1, INIT)
