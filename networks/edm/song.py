"""DDPM++ and NCSN++ of Song et al. as EDM trains them (EDM appendix F)."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import nn

from dnnlib.errors import unknown_choice
from networks.edm.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    positional_embedding,
)
from networks.edm.unet import Block, Place, Style, UNetConfig, width_problems
from networks.encoder_decoder import EncoderDecoder
from networks.interface import Interface

INIT = Init('mean')
INIT_ZERO = Init('mean', 1e-5)  # almost zero
INIT_ATTENTION = Init('mean', math.sqrt(0.2))
EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SongConfig(UNetConfig):
    """DDPM++ by default; NCSN++ is embedding `fourier`, channel_mult_noise 2, taps (1, 3, 3, 1), encoder `residual`.

    Args:
        embedding: Of the noise level: `positional` or `fourier`.
        channel_mult_noise: Its width relative to `model_channels`.
        encoder: `standard`; `residual` and `skip` also feed the image, downsampled, into every level.
        decoder: `standard`, or `skip`: the output is the sum of an image from every level, upsampled.
        taps: Of the resampling filter along one axis.
    """

    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    embedding: str = 'positional'
    channel_mult_noise: int = 1
    encoder: str = 'standard'
    decoder: str = 'standard'
    taps: tuple[int, ...] = (1, 1)

    CHOICES: ClassVar = {
        'embedding': ('positional', 'fourier'),
        'encoder': ('standard', 'residual', 'skip'),
        'decoder': ('standard', 'skip'),
    }

    def places(self, interface: Interface) -> tuple[list[Place], list[Place]]:
        """The blocks of encoder and decoder."""
        return self.layout(interface, self.model_channels, attend_once=True)

    def problems(self, interface: Interface) -> list[str]:
        """Everything that is wrong, in words."""
        found = self.value_problems(interface)
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                found.append(unknown_choice(name, getattr(self, name), choices))
        noise_channels = self.model_channels * self.channel_mult_noise
        if noise_channels < 4 or noise_channels % 2:
            found.append(f'the noise embedding needs an even width of at least 4, not {noise_channels}')
        if self.taps not in ((1, 1), (1, 3, 3, 1)):
            found.append(f'taps must be (1, 1) or (1, 3, 3, 1), not {self.taps}')
        if found:
            return found
        encoder, decoder = self.places(interface)
        return width_problems([*encoder, *decoder])


class SongUNet(EncoderDecoder):
    """F of a denoiser: DDPM++, NCSN++ and their relatives.

    Args:
        config: Already checked.
        interface: Of the denoiser.
    """

    def __init__(self, config: SongConfig, interface: Interface):
        super().__init__()
        self.config, self.label_dim = config, interface.label_dim
        self.noise_channels = noise = config.model_channels * config.channel_mult_noise
        emb = config.model_channels * config.channel_mult_emb
        self.map_noise = FourierEmbedding(noise) if config.embedding == 'fourier' else None
        self.map_label = Linear(interface.label_dim, noise, INIT) if interface.label_dim else None
        self.map_augment = Linear(interface.augment_dim, noise, INIT, bias=False) if interface.augment_dim else None
        self.map_layer0 = Linear(noise, emb, INIT)
        self.map_layer1 = Linear(emb, emb, INIT)
        self.style = Style(
            emb, config.dropout, INIT, INIT_ZERO, INIT_ATTENTION, EPS,
            adaptive_scale=False, skip_scale=math.sqrt(0.5), resample_proj=True, taps=config.taps,
        )  # fmt: skip
        encoder, decoder = config.places(interface)
        self.enc = self._encoder(encoder, interface)
        self.dec = self._decoder(decoder, interface)

    def _encoder(self, places: list[Place], interface: Interface) -> nn.ModuleDict:
        config, aux = self.config, interface.in_channels
        height, breadth = interface.img_resolution
        layers = {f'{height}x{breadth}_conv': Conv2d(aux, config.model_channels, 3, INIT)}
        for place in places:
            layers[place.name] = Block(place, self.style)
            level, _, kind = place.name.partition('_')
            if kind == 'down' and config.encoder == 'skip':
                layers[f'{level}_aux_down'] = Conv2d(aux, aux, 0, INIT, 'down', config.taps)
                layers[f'{level}_aux_skip'] = Conv2d(aux, place.out_channels, 1, INIT)
            if kind == 'down' and config.encoder == 'residual':
                conv = Conv2d(aux, place.out_channels, 3, INIT, 'down', config.taps, resample_last=True)
                layers[f'{level}_aux_residual'] = conv
                aux = place.out_channels
        return nn.ModuleDict(layers)

    def _decoder(self, places: list[Place], interface: Interface) -> nn.ModuleDict:
        config, out = self.config, interface.out_channels
        layers: dict[str, nn.Module] = {}
        for i, place in enumerate(places):
            layers[place.name] = Block(place, self.style)
            level, _, kind = place.name.partition('_')
            finest = i == len(places) - 1
            if kind == f'block{config.num_blocks}' and (finest or config.decoder == 'skip'):
                if config.decoder == 'skip' and any('aux' in name for name in layers):
                    layers[f'{level}_aux_up'] = Conv2d(out, out, 0, INIT, 'up', config.taps)
                layers[f'{level}_aux_norm'] = GroupNorm(place.out_channels, EPS)
                layers[f'{level}_aux_conv'] = Conv2d(place.out_channels, out, 3, INIT_ZERO)
        return nn.ModuleDict(layers)

    def embed(self, c_noise: torch.Tensor, labels: torch.Tensor | None, augment: torch.Tensor | None) -> torch.Tensor:
        """What conditions the blocks, float32 [N, emb_channels]; sines come before cosines here."""
        if self.map_noise is None:
            emb = positional_embedding(c_noise, self.noise_channels, endpoint=True)
        else:
            emb = self.map_noise(c_noise)
        emb = emb.roll(self.noise_channels // 2, dims=1)
        if self.map_label is not None:
            labels = emb.new_zeros(1, self.label_dim) if labels is None else labels
            emb = emb + self.map_label(labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = nn.functional.silu(self.map_layer0(emb))
        return nn.functional.silu(self.map_layer1(emb))

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N, C, H, W] in any float dtype, float32 [N], [N, label_dim], [N, augment_dim] -> [N, out, H, W]."""
        emb = self.embed(c_noise, labels, augment)
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith('aux_down'):
                aux = layer(aux)
            elif name.endswith('aux_skip'):
                x = skips[-1] = x + layer(aux)
            elif name.endswith('aux_residual'):
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)
        image, features = None, None
        for name, layer in self.dec.items():
            if name.endswith('aux_up'):
                image = layer(image)
            elif name.endswith('aux_norm'):
                features = nn.functional.silu(layer(x))
            elif name.endswith('aux_conv'):
                image = layer(features) if image is None else layer(features) + image
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if 'block' in name else x, emb)
        return image
