"""What a network that NVIDIA published for EDM2 is here: its config and encoder.

It is rebuilt from the arguments that its constructor once got. The names of its tensors are those of our block A.
"""

from typing import Any

import torch

from dnnlib.errors import UserError, quoted
from networks.config import NetworkConfig
from networks.encoders import DEFAULT_VAE, LATENT_MEAN, LATENT_STD, SIGMA_DATA
from networks.published.reader import PublishedObject, find_tensors, keyword_arguments, plain, to_object
from torch_utils.pickles import Call, to_array

# Arguments of EDM2's constructor that our config has, with their defaults there (EDM2 table 6); `...` for none.
CONFIG_ARGUMENTS = {
    'img_resolution': ...,
    'img_channels': ...,
    'label_dim': ...,
    'model_channels': 192,
    'channel_mult': (1, 2, 3, 4),
    'num_blocks': 3,
    'attn_resolutions': (16, 8),
    'channels_per_head': 64,
    'dropout': 0.0,
    'sigma_data': 0.5,
}
# Arguments that are constants here: another value would be another network.
FIXED_ARGUMENTS = {
    'logvar_channels': 128,
    'channel_mult_noise': None,
    'channel_mult_emb': None,
    'label_balance': 0.5,
    'concat_balance': 0.5,
    'res_balance': 0.3,
    'attn_balance': 0.3,
    'clip_act': 256,
    'resample_filter': (1, 1),
}
IGNORED_ARGUMENTS = {'use_fp16'}  # says how to compute, not what; see `Denoiser`'s precision


def read_network(net: PublishedObject, content: dict) -> tuple[NetworkConfig, str, dict[str, torch.Tensor]]:
    """Config, name of the encoder, and tensors, whose names are ours.

    Args:
        net: The file's `Precond`.
        content: Of the file.
    """
    config = rebuild_config(net)
    return config, find_encoder(content.get('encoder'), config), find_tensors(net)


def rebuild_config(net: PublishedObject) -> NetworkConfig:
    """The config of the network that EDM2's constructor makes of the arguments in the file."""
    values = {name: value for name, value in keyword_arguments(net).items() if name not in IGNORED_ARGUMENTS}
    known = CONFIG_ARGUMENTS | FIXED_ARGUMENTS
    found = [f'the network has an unknown argument {quoted(name)}' for name in values if name not in known]
    values = known | {name: known[name] if value is None else value for name, value in values.items() if name in known}
    for name, expected in known.items():
        value = values[name]
        if value is ...:
            found.append(f'the network lacks the argument {name}')
        elif name in FIXED_ARGUMENTS and value != expected:
            found.append(f'{name} is {quoted(value)}; only {expected} can be read')
    if found:
        raise UserError(found)
    values = {name: values[name] for name in CONFIG_ARGUMENTS}
    side = values.pop('img_resolution')
    return NetworkConfig.from_json({'img_resolution': (side, side), 'block': 'A', **values})


def find_encoder(encoder: Any, config: NetworkConfig) -> str:
    """Name of our encoder that has the numbers of the one in the file."""
    if encoder is None and config.img_channels in (1, 3):
        return 'rgb'
    found = to_object(encoder)
    if found is None or found.class_name not in ('StandardRGBEncoder', 'StabilityVAEEncoder'):
        name = 'missing' if found is None else quoted(found.class_name)
        raise UserError(f'its encoder ({name}) is none of StandardRGBEncoder and StabilityVAEEncoder')
    if found.class_name == 'StandardRGBEncoder':
        return 'rgb'
    vae = found.state.get('vae_name', DEFAULT_VAE)
    if type(vae) is not str or vae != DEFAULT_VAE:
        raise UserError(f'its latents are of another VAE than {DEFAULT_VAE}')
    # x = scale mean + bias, as the published encoder writes it
    scale = SIGMA_DATA / torch.tensor(LATENT_STD, dtype=torch.float64)
    for key, expected in (('scale', scale), ('bias', -scale * torch.tensor(LATENT_MEAN, dtype=torch.float64))):
        value = found.state.get(key)
        value = plain(to_array(value).reshape(-1).tolist() if type(value) is Call else value)
        if type(value) is not tuple or len(value) != len(expected):
            raise UserError(f'its encoder has no {key} of {len(expected)} channels')
        if not torch.allclose(torch.tensor(value, dtype=torch.float64), expected, rtol=1e-5, atol=0):
            raise UserError(f'its encoder has the {key} {list(value)}; only {expected.tolist()} can be read')
    return 'stabilityvae'
