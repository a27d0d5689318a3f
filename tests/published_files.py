"""Files of the structure of the published EDM and EDM2 networks, written by the tests themselves.

The classes are stand-ins with the names that the published files use; as there, each object is pickled as a call of
`torch_utils.persistence._reconstruct_persistent_obj` on a dict that carries Python source. Here that source raises.
"""

import collections
import contextlib
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from networks.denoiser import Denoiser

SOURCE = '\n'.join(["raise RuntimeError('the source in the file was run')", *['# dummy source text'] * 500])
CLASSES = {
    'Denoiser': 'Precond',
    'UNet': 'UNet',
    'Block': 'Block',
    'MPConv': 'MPConv',
    'FourierFeatures': 'MPFourier',
}
SCALE = np.float32(0.5) / np.float32([4.17, 4.62, 3.71, 3.28])
BIAS = np.float32(0) - np.float32([5.81, 3.25, 0.12, -2.15]) * SCALE


class EasyDict(dict):
    """Takes the place of the class of that name, whose items are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


EasyDict.__module__, EasyDict.__qualname__ = 'dnnlib.util', 'EasyDict'


def _reconstruct_persistent_obj(meta):
    raise RuntimeError('the file was unpickled')


_reconstruct_persistent_obj.__module__ = 'torch_utils.persistence'


class Persistent:
    """An object as those files hold it."""

    def __init__(self, class_name: str, state: dict):
        self.meta = {'type': 'class', 'version': 6, 'module_src': SOURCE, 'class_name': class_name, 'state': state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


@contextlib.contextmanager
def modules_of_the_files() -> Iterator[None]:
    """Let `pickle` find the stand-ins under the published names, while it writes (or, to compare, reads)."""
    util, persistence = types.ModuleType('dnnlib.util'), types.ModuleType('torch_utils.persistence')
    util.EasyDict, persistence._reconstruct_persistent_obj = EasyDict, _reconstruct_persistent_obj
    with mock.patch.dict(sys.modules, {'dnnlib.util': util, 'torch_utils.persistence': persistence}):
        yield


def arguments_of(net: Denoiser) -> dict:
    """What the published constructor gets for a network of block A."""
    config, shape = net.config.architecture, net.config
    return {
        'model_channels': config.model_channels,
        'dropout': config.dropout,
        'use_fp16': True,
        'channel_mult': list(config.channel_mult),
        'num_blocks': config.num_blocks,
        'attn_resolutions': list(config.attn_resolutions),
        'channels_per_head': config.channels_per_head,
        'img_resolution': shape.img_resolution[0],
        'img_channels': shape.img_channels,
        'label_dim': shape.label_dim,
    }


# What else such modules have among their attributes: of every type, none of which the reader needs.
ATTRIBUTES = {
    'out_channels': 16,
    'flavor': 'enc',
    'resample_filter': [1, 1],
    'conv_skip': None,
    'attn_balance': 0.3,
    'skip_scale': np.float64(0.5**0.5),
    'sizes': (np.float32(1), {'a': (1, 2)}),
}


def stored(module: torch.nn.Module, dtype: torch.dtype, arguments: dict):
    """A module as the files hold it: published classes with their source, PyTorch's containers as they are."""
    own = {'config', 'precision', 'label_dim', 'groups', 'steps', 'flavor', 'resample_mode', 'dropout'}
    state = {name: value for name, value in module.__dict__.items() if name not in own}
    # PyTorch of 2023, which wrote the files, had OrderedDicts here and the same hooks beside them as today.
    state['_parameters'] = collections.OrderedDict(
        (name, None if p is None else torch.nn.Parameter(p.detach().to(dtype), requires_grad=False))
        for name, p in module._parameters.items()
    )
    state['_buffers'] = collections.OrderedDict((name, b.detach().to(dtype)) for name, b in module._buffers.items())
    state['_modules'] = collections.OrderedDict(
        (name, None if child is None else stored(child, dtype, {}))
        for name, child in module._modules.items()
        if name not in own
    )
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container.__dict__.update(state)
        return container
    own = {'_init_args': (), '_init_kwargs': EasyDict(arguments)}
    return Persistent(CLASSES[type(module).__name__], {**ATTRIBUTES, **own, **state})


def encoder_of(name: str | None, **changes):
    """The encoder as the files hold it."""
    if name is None:
        return None
    state = {'_init_args': (), '_init_kwargs': EasyDict()}
    if name == 'StabilityVAEEncoder':
        state |= {'vae_name': 'stabilityai/sd-vae-ft-mse', '_vae': None, 'batch_size': 8, 'scale': SCALE, 'bias': BIAS}
    return Persistent(name, {**state, **changes})


def content_of(net: Denoiser, dtype=torch.float16, encoder: object = 'StandardRGBEncoder', **arguments) -> dict:
    """What is pickled for a network of block A."""
    return EasyDict(
        ema=stored(net, dtype, {**arguments_of(net), **arguments}),
        encoder=encoder_of(encoder) if encoder is None or isinstance(encoder, str) else encoder,
        dataset_kwargs=EasyDict(
            class_name='dataset.reader.ImageFolderDataset', path='/data/img64.zip', use_labels=True
        ),
        loss_fn=Persistent('EDM2Loss', {'P_mean': -0.8, 'P_std': 1.6, 'sigma_data': 0.5}),
    )


def write(path: Path, content: object, protocol: int = 4) -> Path:
    """Pickle it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with modules_of_the_files(), open(path, 'wb') as file:
        pickle.dump(content, file, protocol)
    return path


def write_published(path: Path, net: Denoiser, dtype=torch.float16, **options) -> Path:
    """Write a network of block A as a published file."""
    return write(path, content_of(net, dtype, **options))


# EDM's

EDM_CLASSES = {
    'SongUNet': 'SongUNet',
    'ADM': 'DhariwalUNet',
    'Block': 'UNetBlock',
    'FourierEmbedding': 'FourierEmbedding',
    'Conv2d': 'Conv2d',
    'Linear': 'Linear',
    'GroupNorm': 'GroupNorm',
}
EDM_PRECONDITIONERS = {'EDM': 'EDMPrecond', 'VP': 'VPPrecond', 'VE': 'VEPrecond', 'IDDPM': 'iDDPMPrecond'}


def edm_arguments(config) -> dict:
    """What the published constructor gets for a network of EDM's families."""
    names = {'embedding': 'embedding_type', 'encoder': 'encoder_type', 'decoder': 'decoder_type'}
    names |= {'taps': 'resample_filter', 'channels_per_head': None, 'clip': None}
    unet = {names.get(name, name): value for name, value in vars(config.architecture).items()}
    unet = {name: list(value) if isinstance(value, tuple) else value for name, value in unet.items() if name}
    shape = {'img_resolution': config.img_resolution[0], 'img_channels': config.img_channels}
    model_type = 'SongUNet' if 'embedding_type' in unet else 'DhariwalUNet'
    return {**shape, 'label_dim': config.label_dim, 'use_fp16': False, 'model_type': model_type,
            'augment_dim': config.augment_dim, **unet, **vars(config.preconditioning)}  # fmt: skip


def edm_stored(module: torch.nn.Module):
    """A module as EDM's files hold it."""
    state = {
        'training': False,
        '_parameters': collections.OrderedDict(module._parameters),
        '_buffers': collections.OrderedDict(module._buffers),
        '_modules': collections.OrderedDict(
            (name, None if child is None else edm_stored(child))
            for name, child in module._modules.items()
            if type(child).__name__ != 'Dropout'
        ),
    }
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container.__dict__.update(state)
        return container
    return Persistent(EDM_CLASSES[type(module).__name__], {'skip_scale': np.float64(0.5**0.5), **state})


def edm_content(net: Denoiser, **arguments) -> dict:
    """What is pickled for a network of EDM's families, by its training script."""
    preconditioning = net.config.preconditioning
    state = {
        '_init_args': (),
        '_init_kwargs': EasyDict({**edm_arguments(net.config), **arguments}),
        'sigma_min': 0,
        'sigma_max': float('inf'),
        '_modules': collections.OrderedDict(model=edm_stored(net.unet)),
        '_parameters': collections.OrderedDict(),
        '_buffers': collections.OrderedDict(),
    }
    if type(preconditioning).__name__ == 'IDDPM':
        state['_buffers']['u'] = torch.tensor(preconditioning.levels)
    return {
        'ema': Persistent(EDM_PRECONDITIONERS[type(preconditioning).__name__], state),
        'loss_fn': Persistent('EDMLoss', {'P_mean': -1.2, 'P_std': 1.2, 'sigma_data': 0.5}),
        'augment_pipe': Persistent('AugmentPipe', {'p': 0.12, 'xflip': 1e8, 'Hz_geom': torch.ones(12)}),
        'dataset_kwargs': EasyDict(class_name='training.dataset.ImageFolderDataset', path='./cifar10-32x32.zip'),
    }
