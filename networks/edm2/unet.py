"""The U-Net of EDM2 and EDM2+ (EDM2 figure 22): magnitude-preserving blocks with any residual branch."""

import functools
import math

import torch
from torch import nn
from torch.nn.functional import silu

from dnnlib.errors import choose
from networks.dropout import Dropout
from networks.edm2.branches import BRANCHES, LAYERS, MODULATE, SILU
from networks.edm2.config import EDM2Config
from networks.edm2.magnitude import SILU_RMS, MPConv, mp_cat, mp_silu, mp_sum, mp_sum_gains, normalize
from networks.encoder_decoder import EncoderDecoder
from networks.fourier import FourierFeatures
from networks.interface import Interface
from networks.layout import features_format, joins_upsampling

LABEL_BALANCE = 0.5  # weight of the class in the embedding
CONCAT_BALANCE = 0.5  # weight of the skip connection in a decoder block's input
RESIDUAL_BALANCE = 0.3  # weight of the residual branch
ATTENTION_BALANCE = 0.3  # weight of the attention
CLIP_ACTIVATIONS = 256.0


def resample(x: torch.Tensor, mode: str) -> torch.Tensor:
    """`down`: mean of 2x2 pixels; `up`: every pixel becomes 2x2; `keep`: x itself. [N, C, H, W]."""
    if mode == 'down':
        return nn.functional.avg_pool2d(x, 2)
    if mode == 'up':
        return nn.functional.interpolate(x, scale_factor=2, mode='nearest')
    assert mode == 'keep'
    return x


def cosine_attention(qkv: torch.Tensor, channels_per_head: int) -> torch.Tensor:
    """Attention with q, k and v of unit magnitude over each head's channels (EDM2 section 2.3).

    [N, 3 C, H, W] with channels in the order (head, channel, {q, k, v}) -> [N, C, H, W].
    """
    n, c3, h, w = qkv.shape
    qkv = qkv.permute(0, 2, 3, 1).reshape(n, h * w, c3 // 3 // channels_per_head, channels_per_head, 3)
    # {q, k, v}, N, heads, H W, d: attention in one kernel wants d without gaps
    q, k, v = normalize(qkv.permute(4, 0, 2, 1, 3).contiguous(), dims=(4,))
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).reshape(n, h, w, c3 // 3).permute(0, 3, 1, 2)


class Block(nn.Module):
    """One block of the U-Net: resampling, a residual branch with embedding modulation, attention where asked.

    Args:
        in_channels: Width of the input (in the decoder: with the skip connection).
        out_channels: Width of the output.
        emb_channels: Width of the embedding.
        config: Of the network; gives residual branch, dropout, head width.
        flavor: `enc`: widths change and pixel norm comes first; `dec`: the main path changes width at the end.
        resample_mode: `keep`, `up` or `down`, applied to the input.
        attention: Whether self-attention follows.
    """

    fused = True  # False computes the formulas as they are written, which is how operations are counted

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        config: EDM2Config,
        flavor: str,
        resample_mode: str = 'keep',
        attention: bool = False,
    ):
        super().__init__()
        branch = choose('block', config.block, BRANCHES)
        self.flavor = flavor
        self.resample_mode = resample_mode
        self.dropout = Dropout(config.dropout)
        self.channels_per_head = config.channels_per_head
        self.steps = tuple(branch.steps_of(flavor))
        self.emb_gain = nn.Parameter(torch.empty(()))
        width = out_channels if flavor == 'enc' else in_channels  # entering the residual branch
        widths = {'out': out_channels, 'wide': branch.expansion * out_channels}
        for step in self.steps:
            if step == MODULATE:
                self.emb_linear = MPConv(emb_channels, width, kernel=0)
            elif step != SILU:
                kind, width_name = LAYERS[step]
                before, width = width, widths.get(width_name, width)
                setattr(
                    self,
                    step,
                    MPConv(before, width, branch.kernel_of(kind), groups=width if kind == 'depthwise' else 1),
                )
        assert width == out_channels, f'branch {config.block} ends with {width} channels instead of {out_channels}'
        self.conv_skip = MPConv(in_channels, out_channels, kernel=1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, kernel=1) if attention else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=1) if attention else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W], float32 [N, emb_channels] -> [N, out_channels, H', W'] in x's dtype."""
        low, x = x, resample(x, self.resample_mode)
        if self.flavor == 'enc':
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dims=(1,))
        y = self._residual(low, emb, upsampling=True) if self.upsamples_in_branch(x.device) else self._residual(x, emb)
        if self.flavor == 'dec' and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = torch.add(y, x, alpha=mp_sum_gains(RESIDUAL_BALANCE)[0]) if self.fused else mp_sum(x, y, RESIDUAL_BALANCE)
        if self.attn_qkv is not None:
            y = cosine_attention(self.attn_qkv(x), self.channels_per_head)
            gain_x, gain_y = mp_sum_gains(ATTENTION_BALANCE)
            if self.fused:
                x = x * gain_x + self.attn_proj(y, gain=gain_y)  # in x's memory format
            else:
                x = mp_sum(x, self.attn_proj(y), ATTENTION_BALANCE)
        return x.clip(-CLIP_ACTIVATIONS, CLIP_ACTIVATIONS)

    def upsamples_in_branch(self, device: torch.device) -> bool:
        """Whether the branch begins before upsampling, which its first convolution does, too."""
        dense = (self.flavor, self.resample_mode, *self.steps[:2]) == ('dec', 'up', SILU, 'conv_res0')
        return dense and self.fused and joins_upsampling(device, self.training)

    def _residual(self, y: torch.Tensor, emb: torch.Tensor, upsampling: bool = False) -> torch.Tensor:
        """The branch times its gain in the sum; that gain and MP-SiLU's constant are in the weights that follow."""
        gain, modulated = 1.0, False
        for i, step in enumerate(self.steps):
            if step == MODULATE:
                scale = self.emb_linear(emb, gain=self.emb_gain) + 1
                y = y * scale[:, :, None, None].to(y.dtype)
                modulated = True
            elif step == SILU:
                y, gain = (silu(y), 1 / SILU_RMS) if self.fused else (mp_silu(y), 1.0)
                if modulated:  # right after the SiLU that follows the modulation
                    y = self.dropout(y)
                    modulated = False
            else:
                if self.fused and i == len(self.steps) - 1:
                    gain *= mp_sum_gains(RESIDUAL_BALANCE)[1]
                layer = getattr(self, step)
                y, gain = layer.of_upsampled(y, gain) if upsampling else layer(y, gain=gain), 1.0
                upsampling = False
        return y


class UNet(EncoderDecoder):
    """F of the preconditioned denoiser: image and noise label to image, all features at unit magnitude.

    Args:
        config: What to build; already checked.
        interface: What goes in and out.
    """

    def __init__(self, config: EDM2Config, interface: Interface):
        super().__init__()
        levels = config.levels(interface)
        emb_channels = max(channels for _, _, channels in levels)
        self.label_dim = label_dim = interface.label_dim
        self.depthwise = any(
            LAYERS.get(step, ('',))[0] == 'depthwise' for step in BRANCHES[config.block].steps_of('dec')
        )
        self.out_gain = nn.Parameter(torch.empty(()))
        self.emb_fourier = FourierFeatures(levels[0][2])
        self.emb_noise = MPConv(levels[0][2], emb_channels, kernel=0)
        self.emb_label = MPConv(label_dim, emb_channels, kernel=0) if label_dim else None

        self.enc = nn.ModuleDict()
        width = levels[0][2]
        height, breadth = interface.img_resolution
        self.enc[f'{height}x{breadth}_conv'] = MPConv(interface.in_channels + 1, width, kernel=3)
        skips = [width]
        for level, (height, breadth, channels) in enumerate(levels):
            name, attention = f'{height}x{breadth}', config.has_attention(height, breadth)
            if level > 0:
                self.enc[f'{name}_down'] = Block(width, width, emb_channels, config, 'enc', 'down')
                skips.append(width)
            for i in range(config.num_blocks):
                block = Block(width, channels, emb_channels, config, 'enc', attention=attention)
                self.enc[f'{name}_block{i}'] = block
                width = channels
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level, (height, breadth, channels) in reversed(list(enumerate(levels))):
            name, attention = f'{height}x{breadth}', config.has_attention(height, breadth)
            if level == len(levels) - 1:
                self.dec[f'{name}_in0'] = Block(width, width, emb_channels, config, 'dec', attention=True)
                self.dec[f'{name}_in1'] = Block(width, width, emb_channels, config, 'dec')
            else:
                self.dec[f'{name}_up'] = Block(width, width, emb_channels, config, 'dec', 'up')
            for i in range(config.num_blocks + 1):
                block = Block(width + skips.pop(), channels, emb_channels, config, 'dec', attention=attention)
                self.dec[f'{name}_block{i}'] = block
                width = channels
        self.out_conv = MPConv(width, interface.out_channels, kernel=3)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw all weights from N(0, 1); gains become 0, so that at first F = 0."""
        for name, parameter in self.named_parameters():
            if name.endswith('_gain'):
                nn.init.zeros_(parameter)
        super().reset_parameters(generator)

    def embed(self, c_noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """float32 [N] noise labels and [N, label_dim] class labels (None: none of the classes) -> [N, emb_channels]."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            if labels is None:
                labels = emb.new_zeros(1, self.label_dim)
            emb_label = self.emb_label(labels * math.sqrt(self.label_dim))
            emb = mp_sum(emb, emb_label.expand_as(emb), LABEL_BALANCE)
        return mp_silu(emb)

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[N, C, H, W] in any float dtype, float32 [N], float32 [N, label_dim] or None -> [N, C, H, W] in x's dtype."""
        assert augment is None
        emb = self.embed(c_noise, labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = x.contiguous(memory_format=features_format(x.device, self.depthwise, self.training))
        x = self.blocks(x, emb, join=functools.partial(mp_cat, t=CONCAT_BALANCE))
        return self.out_conv(x, gain=self.out_gain)
