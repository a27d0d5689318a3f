"""What a network that NVIDIA published for EDM is here: its config, and its tensors by our names.

It is rebuilt from the arguments that the constructor of its preconditioner once got, which also hold those of the
network inside.
"""

import math

import torch

from dnnlib.errors import UserError, quoted
from networks.config import NetworkConfig
from networks.published.reader import PublishedObject, find_tensors, keyword_arguments

# Arguments of the constructors, whose defaults are those of our configs.
COMMON = ('img_resolution', 'img_channels', 'label_dim', 'augment_dim')
UNET = ('model_channels', 'channel_mult', 'channel_mult_emb', 'num_blocks', 'attn_resolutions', 'dropout')
SONG = ('embedding_type', 'channel_mult_noise', 'encoder_type', 'decoder_type', 'resample_filter')
UNETS = {'SongUNet': ('edm-song', (*UNET, *SONG)), 'DhariwalUNet': ('edm-adm', UNET)}
PRECONDITIONERS = {  # class -> our name, arguments, and the class of the network inside, by default
    'EDMPrecond': ('edm', ('sigma_data',), 'DhariwalUNet'),
    'VPPrecond': ('vp', ('beta_d', 'beta_min', 'M', 'epsilon_t'), 'SongUNet'),
    'VEPrecond': ('ve', ('sigma_min', 'sigma_max'), 'SongUNet'),
    'iDDPMPrecond': ('iddpm', ('C_1', 'C_2', 'M'), 'DhariwalUNet'),
}
OURS = {'embedding_type': 'embedding', 'encoder_type': 'encoder', 'decoder_type': 'decoder', 'resample_filter': 'taps'}
IGNORED = {'use_fp16', 'label_dropout', 'model_type'}  # how to compute, and how to train
NEEDED = (0.002, 80.0)  # noise levels that EDM's sampler asks for


def read_network(net: PublishedObject, content: dict) -> tuple[NetworkConfig, str, dict[str, torch.Tensor]]:
    """Config, name of the encoder, and tensors by our names.

    Args:
        net: The file's `ema`, of one of the classes of PRECONDITIONERS.
        content: Of the file.
    """
    config = rebuild_config(net)
    tensors = find_tensors(net)
    if net.class_name == 'iDDPMPrecond':
        levels, theirs = torch.tensor(config.preconditioning.levels), tensors.pop('u', torch.zeros(0)).float()
        if theirs.shape != levels.shape or not torch.allclose(theirs, levels, rtol=1e-3, atol=0):
            raise UserError('its table of noise levels (u) is not that of its C_1, C_2 and M')
    return config, 'rgb', {name.replace('model.', 'unet.', 1): tensor for name, tensor in tensors.items()}


def rebuild_config(net: PublishedObject) -> NetworkConfig:
    """The config of the network that EDM's constructors make of the arguments in the file."""
    arguments = keyword_arguments(net)
    name, own, unet = PRECONDITIONERS[net.class_name]
    unet = arguments.get('model_type', unet)
    if unet not in UNETS:
        raise UserError(f'its U-Net is of the class {quoted(unet)}; only {" or ".join(UNETS)} can be read')
    family, inner = UNETS[unet]
    if name == 'edm':
        ends = arguments.pop('sigma_min', 0), arguments.pop('sigma_max', math.inf)
        if not all(type(v) in (int, float) for v in ends) or not (ends[0] <= NEEDED[0] and NEEDED[1] <= ends[1]):
            raise UserError(f'it knows noise levels from {ends[0]} to {ends[1]}, which must include {NEEDED}')
    known = {*COMMON, *own, *inner, *IGNORED}
    found = [f'the network has an unknown argument {quoted(n)}' for n in arguments if n not in known]
    found += [f'the network lacks the argument {n}' for n in COMMON[:2] if arguments.get(n) is None]
    if found:
        raise UserError(found)
    values = {'label_dim': 0} | {n: v for n, v in arguments.items() if v is not None}
    side = values['img_resolution']
    return NetworkConfig.from_json(
        {
            **{n: values[n] for n in COMMON if n in values},
            'img_resolution': (side, side),
            'architecture': {'family': family, **{OURS.get(n, n): values[n] for n in inner if n in values}},
            'preconditioning': {'name': name, **{n: values[n] for n in own if n in values}},
        }
    )
