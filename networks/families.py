"""The families of networks, as a table: a new one is a module or a folder of its own, and a row here.

A family has a frozen dataclass of its architecture's own numbers, with

    problems(interface)  everything that is wrong with it, in words
    width                features per pixel of the finest level

and an architecture, an `nn.Module` built from that config and a `networks.interface.Interface`, with

    forward(x, c_noise, labels, augment)  F: [N, C, H, W] in any float dtype, float32 [N], float32 [N, label_dim] or
                                          None, float32 [N, augment_dim] or None -> [N, out_channels, H, W] in x's dtype
    reset_parameters(generator)           draw all weights and random constants, on the CPU
    stages()                              (name, module) of its parts, in order of execution

Its constants are its buffers. Embeddings are computed in float32, and weights are cast to x's dtype at use.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from networks.edm.adm import ADM, ADMConfig
from networks.edm.adm import uncertainty_head as adm_head
from networks.edm.song import SongConfig, SongUNet
from networks.edm2.config import EDM2Config
from networks.edm2.magnitude import MPConv
from networks.edm2.unet import UNet
from networks.fourier import FourierFeatures
from networks.interface import Interface
from networks.ladder import Ladder, LadderConfig
from networks.ladder import uncertainty_head as ladder_head
from networks.sid2.config import UViTConfig
from networks.sid2.uvit import UViT


def edm2_head(config: Any, channels: int) -> tuple[nn.Module, nn.Module]:
    """Uncertainty head of EDM2 (section 2.1)."""
    return FourierFeatures(channels), MPConv(channels, 1, kernel=0)


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of FAMILIES.

    Args:
        config: Class of the architecture's numbers.
        build: (config, interface) -> architecture.
        head: (config, number of Fourier features) -> the features of c_noise, and the layer that makes u(sigma) of
            them, for a network with an uncertainty head.
    """

    config: type
    build: Callable[[Any, Interface], nn.Module]
    head: Callable[[Any, int], tuple[nn.Module, nn.Module]] = edm2_head


FAMILIES: dict[str, Family] = {
    'edm2': Family(EDM2Config, UNet),
    'edm-song': Family(SongConfig, SongUNet),
    'edm-adm': Family(ADMConfig, ADM, adm_head),
    'ladder': Family(LadderConfig, Ladder, ladder_head),
    'sid2': Family(UViTConfig, UViT),
}
ARCHITECTURES: dict[str, type] = {name: family.config for name, family in FAMILIES.items()}
