"""Networks that NVIDIA published for EDM2, read from their pickles without running what is in them.

Such a file holds Python source for every class in it, which the usual loader runs. Here that text is passed over: a
network is rebuilt from the arguments that its constructor once got, and gets the tensors of the file, by name. The
names of EDM2's parameters are those of our block A, so nothing is laid out anew.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.encoders import DEFAULT_VAE, LATENT_MEAN, LATENT_STD, SIGMA_DATA
from torch_utils.pickled_tensors import TENSORS, PickledTensor
from torch_utils.pickles import Buildable, plain_dict, read_pickle

# Arguments of EDM2's constructor that our config has, with their defaults there (EDM2 table 6).
CONFIG_ARGUMENTS = {
    'img_resolution': None,
    'img_channels': None,
    'label_dim': None,
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
MOST_LISTED = 20  # lines of an error
Mi = 2**20


class PublishedObject(Buildable):
    """An object of the file: the name of its class and its attributes. The source text beside them is dropped.

    Args:
        description: type, version, module_src, class_name and state, as EDM2 pickles its own classes; or nothing,
            for containers of PyTorch, whose state follows.
    """

    def __init__(self, description: Any = None, class_name: str = 'Module'):
        self.class_name, self.state = class_name, {}
        if description is not None:
            if type(description) is not dict or description.get('type') != 'class':
                raise TypeError('an object in an unknown form')
            self.class_name = description.get('class_name')
            if type(self.class_name) is not str:
                raise TypeError('an object without a class')
            self.build(description.get('state'))

    def build(self, state: Any) -> 'PublishedObject':
        if type(state) is not dict:
            raise TypeError('an object without attributes')
        self.state = state
        return self

    def part(self, name: str) -> dict:
        """One of the dicts in which a PyTorch module keeps what it is made of."""
        found = self.state.get(name, {})
        if type(found) is not dict or not all(type(key) is str for key in found):
            raise UserError(f'{self.shown_class}: {name} is no dictionary of names')
        return found

    @property
    def shown_class(self) -> str:
        """The name of the class, fit for messages whatever it is."""
        return ascii(self.class_name[:50])[1:-1]


NAMES = {
    **TENSORS,
    'torch_utils.persistence._reconstruct_persistent_obj': PublishedObject,
    'dnnlib.util.EasyDict': plain_dict,
    'torch.nn.modules.container.ModuleDict': PublishedObject,
    'torch.nn.modules.container.ModuleList': PublishedObject,
}


class PublishedFile:
    """An open file of a published network, with the interface of `networks.files.NetworkFile`.

    Args:
        path: The file.

    Attributes:
        path: As given.
        config: The network's.
        nimg, ema_std, preset: As the file's name says: it is the only place that does. 0, None and '' where it
            does not. Names count thousands of images; the time is taken to be the whole number of Mi that fits.
        dataset: Name of the data it was trained on, '' where the file does not say.
        encoder: A name of `networks.encoders.ENCODERS`.
        names: Names of the tensors, sorted.

    Raises:
        UserError: where it is no such file, or of a network that cannot be rebuilt exactly.
        OSError: where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        content = read_pickle(path, NAMES, views=True)
        try:
            self._read(content)
        except UserError as error:
            raise UserError([f'{self.path}: {problem}' for problem in error.problems]) from None

    def _read(self, content: Any) -> None:
        net = content.get('ema') if type(content) is dict else None
        if not isinstance(net, PublishedObject):
            raise UserError("it is no published network: there is no 'ema' in it")
        if net.class_name != 'Precond':
            raise UserError(f"its network is of the class {net.shown_class}; only EDM2's Precond can be read")
        self.config = rebuild_config(net.state.get('_init_args'), net.state.get('_init_kwargs'))
        self.encoder = find_encoder(content.get('encoder'), self.config)
        self.dataset = dataset_name(content.get('dataset_kwargs'))
        self.nimg, self.ema_std, self.preset = describe_name(self.path)
        self._tensors = dict(find_tensors(net))
        self.names = sorted(self._tensors)

    def __enter__(self) -> 'PublishedFile':
        return self

    def __exit__(self, *_: object) -> None:
        del self._tensors

    def get(self, name: str, share: bool = False) -> torch.Tensor:
        """The tensor of that name, in the dtype it was stored in; to `share`, see `PickledTensor.read`."""
        return self._tensors[name].read(share)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._tensors[name].shape

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors with their names, read one by one."""
        for name in self.names:
            yield name, self.get(name)


def rebuild_config(args: Any, arguments: Any) -> NetworkConfig:
    """The config of the network that EDM2's constructor makes of these arguments.

    Raises:
        UserError: with all that our networks cannot be, or that nobody knows.
    """
    if type(arguments) is not dict or not (args is None or (type(args) is tuple and not args)):
        raise UserError('the arguments of the network are missing')
    found, values = [], {}
    for name, value in arguments.items():
        value, known = _plain_value(value)
        if type(name) is not str or not name.isidentifier():
            found.append('an argument of the network has no name')
        elif name in CONFIG_ARGUMENTS and known:
            values[name] = CONFIG_ARGUMENTS[name] if value is None else value
        elif name in FIXED_ARGUMENTS or name in CONFIG_ARGUMENTS:
            fixed = FIXED_ARGUMENTS.get(name, 'a number')
            if not known or value != fixed:
                found.append(f'{name} is {value if known else "something else"}; only {fixed} can be read')
        elif name not in IGNORED_ARGUMENTS:
            found.append(f'the network has an unknown argument {name[:50]}')
    found += [
        f'the network lacks the argument {name}'
        for name in CONFIG_ARGUMENTS
        if name not in arguments and CONFIG_ARGUMENTS[name] is None
    ]
    if found:
        raise UserError(_shortened(found))
    values = {**CONFIG_ARGUMENTS, **values}
    side = values.pop('img_resolution')
    return NetworkConfig.from_json({'img_resolution': (side, side), 'block': 'A', **values})


def _plain_value(value: Any) -> tuple[Any, bool]:
    """A value as config fields have it, lists as tuples; and whether it is one: no more than some numbers."""
    if type(value) in (list, tuple) and len(value) <= 32 and all(type(v) in (int, float) for v in value):
        return tuple(value), True
    return value, value is None or type(value) in (bool, int, float)


def find_tensors(net: PublishedObject) -> Iterator[tuple[str, PickledTensor]]:
    """Walk a tree of modules: names as in a state dict, tensors not yet read.

    Raises:
        UserError: for modules or numbers that occur twice, so that the walk and what is read later are no larger
            than the file, and for values that do not belong there.
    """
    modules, places = set(), set()
    left = [('', net)]
    while left:
        prefix, module = left.pop()
        if id(module) in modules:
            raise UserError(f'the module {_shown(prefix)} occurs twice')
        modules.add(id(module))
        for name, tensor in [*module.part('_parameters').items(), *module.part('_buffers').items()]:
            if tensor is None:
                continue
            if not isinstance(tensor, PickledTensor):
                raise UserError(f'{_shown(prefix + name)} is no tensor')
            if not tensor.dtype.is_floating_point:
                raise UserError(f'{_shown(prefix + name)} is of {tensor.dtype}, not of floating-point numbers')
            place = tensor.storage.place()
            if place in places:
                raise UserError(f'{_shown(prefix + name)} shares its numbers with another tensor')
            if place is not None:
                places.add(place)
            if not name.isprintable() or len(name) > 100:
                raise UserError(f'a tensor has the name {_shown(prefix + name)}')
            yield prefix + name, tensor
        for name, child in module.part('_modules').items():
            if not isinstance(child, PublishedObject | None):
                raise UserError(f'{_shown(prefix + name)} is no module')
            if child is not None:
                if len(prefix) + len(name) > 200 or not name.isprintable():
                    raise UserError(f'a module has the name {_shown(prefix + name)}')
                left.append((f'{prefix}{name}.', child))


def find_encoder(encoder: Any, config: NetworkConfig) -> str:
    """Name of our encoder that has the numbers of the one in the file.

    Raises:
        UserError: where there is none, or its numbers are others.
    """
    if encoder is None and config.img_channels in (1, 3):
        return 'rgb'
    name = encoder.class_name if isinstance(encoder, PublishedObject) else None
    if name == 'StandardRGBEncoder':
        return 'rgb'
    if name != 'StabilityVAEEncoder':
        kind = encoder.shown_class if isinstance(encoder, PublishedObject) else 'missing'
        raise UserError(f'its encoder ({kind}) is none of StandardRGBEncoder and StabilityVAEEncoder')
    vae = encoder.state.get('vae_name', DEFAULT_VAE)
    if type(vae) is not str or vae != DEFAULT_VAE:
        raise UserError(f'its latents are of another VAE than {DEFAULT_VAE}')
    # x = scale mean + bias, as the published encoder writes it
    scale = SIGMA_DATA / torch.tensor(LATENT_STD, dtype=torch.float64)
    for key, expected in (('scale', scale), ('bias', -scale * torch.tensor(LATENT_MEAN, dtype=torch.float64))):
        value = encoder.state.get(key)
        if hasattr(value, 'reshape'):  # an array
            value = value.reshape(-1)[:5].tolist()
        value, _ = _plain_value(value)
        if type(value) is not tuple or len(value) != len(expected):
            raise UserError(f'its encoder has no {key} of {len(expected)} channels')
        if not torch.allclose(torch.tensor(value, dtype=torch.float64), expected, rtol=1e-5, atol=0):
            raise UserError(f'its encoder has the {key} {list(value)}; only {expected.tolist()} can be read')
    return 'stabilityvae'


def dataset_name(arguments: Any) -> str:
    """Name of the data set that a file was trained on: the end of its path without the extension."""
    path = arguments.get('path') if type(arguments) is dict else None
    name = Path(path.replace('\\', '/')).stem if type(path) is str else ''
    return name if name.isprintable() and len(name) <= 100 else ''


def describe_name(path: str | os.PathLike) -> tuple[int, float | None, str]:
    """nimg, EMA length and preset as the names of published files give them.

    `edm2-img512-s-2147483-0.130.pkl`, or `edm2-img512-s/network-snapshot-2147483-0.050.pkl`.
    """
    path = Path(path)
    match = re.fullmatch(r'(.+)-(\d{7,})-(0\.\d+)', path.stem)
    if match is None:
        return 0, None, ''
    name, kimg, std = match[1], int(match[2][:12]), float(match[3][:12])
    nimg = -(-kimg * 1000 // Mi) * Mi
    preset = name if name != 'network-snapshot' else path.absolute().parent.name
    return nimg if nimg // 1000 == kimg else kimg * 1000, std, preset if preset.startswith('edm2-') else ''


def _shown(name: str) -> str:
    """A name from a file, fit for messages whatever it is."""
    return name if name.isprintable() and len(name) <= 100 else ascii(name[:100])


def _shortened(lines: list[str]) -> list[str]:
    """The first of many problems."""
    return lines if len(lines) <= MOST_LISTED else [*lines[:MOST_LISTED], f'and {len(lines) - MOST_LISTED} more']
