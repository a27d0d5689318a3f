"""The steps between EDM's ADM and EDM2's network (EDM2 table 1): configs C, D, E and F (figures 18 to 21).

Configs A and B are ADM (`networks.edm.adm`), G is the network of EDM2 (`networks.edm2`).
"""

import dataclasses
import math

import torch
from torch import nn

from dnnlib.errors import unknown_choice
from networks.dropout import Dropout
from networks.edm.adm import ADMConfig
from networks.edm.layers import GroupNorm
from networks.edm.unet import Place
from networks.edm2.magnitude import MPConv, normalize
from networks.edm2.unet import cosine_attention, resample
from networks.encoder_decoder import EncoderDecoder
from networks.fourier import FourierFeatures
from networks.interface import Interface

GROUP_NORM_EPS = 1e-4


class PlainConv(MPConv):
    """A layer without weight normalization; it starts uniform in +-1 / sqrt(fan_in)."""

    forced = False

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weight."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        with torch.no_grad():
            self.weight.copy_(bound * (2 * torch.rand(self.weight.shape, generator=generator) - 1))

    def used_weight(self, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        """The stored one, as a tensor that a layer may keep, which a parameter is not."""
        return self.weight.view_as(self.weight)


class NormalizedConv(MPConv):
    """A layer whose weight is normalized where it is used, while the stored one may grow."""

    forced = False


WEIGHTS = {'plain': PlainConv, 'normalized': NormalizedConv, 'forced': MPConv}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderConfig(ADMConfig):
    """ADM streamlined; the defaults are those of config C for latents of ImageNet-512.

    Args:
        weights: `plain` (C), `normalized` where they are used (D), or also `forced` to be stored so (E, F).
        group_norm: Whether blocks have group norms (C to E). Without them (F) there is pixel norm at the head of
            encoder blocks, and less of the rest: no second layer of the embedding, resampling before the branches
            part, no SiLU before the output.
    """

    attn_resolutions: tuple[int, ...] = (16, 8)
    clip: float | None = 256.0
    weights: str = 'plain'
    group_norm: bool = True

    def problems(self, interface: Interface) -> list[str]:
        """Everything that is wrong, in words."""
        found = [] if self.weights in WEIGHTS else [unknown_choice('weights', self.weights, WEIGHTS)]
        found += ['EDM2 has no augmentation labels'] if interface.augment_dim else []
        return [*found, *super().problems(interface)]


def rms_group_norm(x: torch.Tensor) -> torch.Tensor:
    """Divide each group of channels of [N, C, H, W] by its root mean square (EDM2 eq. 29), in x's dtype."""
    groups = x.unflatten(1, (GroupNorm.groups(x.shape[1]), -1))
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(groups, dim=(2, 3, 4), keepdim=True, dtype=dtype)
    rms = (norm.square() / groups[0, 0].numel() + GROUP_NORM_EPS).sqrt()
    return (groups / rms.to(x.dtype)).flatten(1, 2)


class Block(nn.Module):
    """A residual block, and attention where asked."""

    def __init__(self, place: Place, encoder: bool, config: LadderConfig):
        super().__init__()
        Conv, channels = WEIGHTS[config.weights], place.out_channels
        self.config, self.resample_mode = config, place.resample
        self.pixel_norm = encoder and not config.group_norm
        width = channels if self.pixel_norm else place.in_channels  # entering the residual branch
        self.conv_res0 = Conv(width, channels, kernel=3)
        self.emb_linear = Conv(config.model_channels * config.channel_mult_emb, channels, kernel=0)
        self.dropout = Dropout(config.dropout)
        self.conv_res1 = Conv(channels, channels, kernel=3)
        self.conv_skip = Conv(place.in_channels, channels, kernel=1) if place.in_channels != channels else None
        self.attn_qkv = Conv(channels, 3 * channels, kernel=1) if place.attention else None
        self.attn_proj = Conv(channels, channels, kernel=1) if place.attention else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W], float32 [N or 1, emb_channels] -> [N, out_channels, H', W'] in x's dtype."""
        silu, norm = nn.functional.silu, rms_group_norm if self.config.group_norm else nn.Identity()
        if self.config.group_norm:
            y = resample(silu(norm(x)), self.resample_mode)
            x = self._skip(resample(x, self.resample_mode))
        elif self.pixel_norm:
            x = normalize(self._skip(resample(x, self.resample_mode)), dims=(1,))
            y = silu(x)
        else:
            x = resample(x, self.resample_mode)
            y = silu(x)
            x = self._skip(x)
        scale = self.emb_linear(emb) + 1
        y = norm(self.conv_res0(y)) * scale[:, :, None, None].to(y.dtype)
        x = x + self.conv_res1(self.dropout(silu(y)))
        if self.attn_qkv is not None:
            x = x + self.attn_proj(cosine_attention(self.attn_qkv(x), self.config.channels_per_head))
        return x if self.config.clip is None else x.clip(-self.config.clip, self.config.clip)

    def _skip(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)


class Ladder(EncoderDecoder):
    """F of a denoiser: configs C to F.

    Args:
        config: Already checked.
        interface: Of the denoiser.
    """

    def __init__(self, config: LadderConfig, interface: Interface):
        super().__init__()
        self.config, self.label_dim = config, interface.label_dim
        Conv, noise, emb = (
            WEIGHTS[config.weights],
            config.model_channels,
            config.model_channels * config.channel_mult_emb,
        )
        self.emb_fourier = FourierFeatures(noise, gain=1.0)
        self.emb_noise = Conv(noise, emb, kernel=0)
        self.emb_noise1 = Conv(emb, emb, kernel=0) if config.group_norm else None
        self.emb_label = Conv(interface.label_dim, emb, kernel=0) if interface.label_dim else None
        encoder, decoder = config.places(interface)
        height, breadth = interface.img_resolution
        first = {f'{height}x{breadth}_conv': Conv(interface.in_channels + 1, config.width, kernel=3)}
        self.enc = nn.ModuleDict(first | {place.name: Block(place, True, config) for place in encoder})
        self.dec = nn.ModuleDict({place.name: Block(place, False, config) for place in decoder})
        self.out_conv = Conv(config.width, interface.out_channels, kernel=3)

    def embed(self, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """What conditions the blocks, float32 [N, emb_channels]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_noise1 is not None:
            emb = self.emb_noise1(nn.functional.silu(emb))
        if self.emb_label is not None:
            labels = emb.new_zeros(1, self.label_dim) if labels is None else labels
            emb = emb + self.emb_label(labels * math.sqrt(self.label_dim))
        return nn.functional.silu(emb)

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N, C, H, W] in any float dtype, float32 [N], [N, label_dim] or None -> [N, out, H, W] in x's dtype."""
        assert augment is None
        emb = self.embed(c_noise, labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # in place of biases
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.blocks(x, emb)
        if self.config.group_norm:
            x = nn.functional.silu(rms_group_norm(x))
        return self.out_conv(x)


def uncertainty_head(config: LadderConfig, channels: int) -> tuple[FourierFeatures, MPConv]:
    """Features of c_noise, and the layer that makes u(sigma) of them, in the style of the network."""
    return FourierFeatures(channels, gain=1.0), WEIGHTS[config.weights](channels, 1, kernel=0)
