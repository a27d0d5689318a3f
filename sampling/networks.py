"""The networks of a sampling job: the main one, and the one that guides it."""

from typing import Any

import torch

from dnnlib.download import file_sha256
from dnnlib.errors import UserError
from networks.denoiser import Denoiser
from networks.files import NetworkInfo, load_network, network_path

SELF = 'self'


def load_networks(
    path: str, guiding_path: str | None, device: torch.device, precision: str, offline: bool = False
) -> tuple[Denoiser, NetworkInfo, Denoiser | None, dict[str, Any]]:
    """Load a network and the one that guides it.

    Args:
        path: File, run folder or URL.
        guiding_path: Likewise; `self` for the network itself, which then guides with its labels dropped; None for none.
        device, precision: Of both.
        offline: Download nothing.

    Returns:
        The network, what its file says, the guiding network or None, and `net` and `guiding_net` for a record.

    Raises:
        UserError: where one is not available, or they make no pictures together.
    """
    net, info = load_network(path, device, precision, offline)
    record = {'net': _describe(path, info), 'guiding_net': guiding_path}
    if guiding_path in (None, SELF):
        guiding_net = net if guiding_path else None
    else:
        guiding_net, guiding_info = load_network(guiding_path, device, precision, offline)
        record['guiding_net'] = _describe(guiding_path, guiding_info)
        if guiding_info.encoder != info.encoder:
            raise UserError(
                f'the guiding network has the encoder {guiding_info.encoder}, the main network {info.encoder}'
            )
    if info.encoder == 'rgb' and (channels := info.config.img_channels) not in (1, 3):
        raise UserError(f'{channels} channels make no picture, and the network file names no encoder of latents')
    return net, info, guiding_net, record


def _describe(path: str, info: NetworkInfo) -> dict[str, Any]:
    return {'file': path, 'sha256': file_sha256(network_path(path)), **info.to_header()}
