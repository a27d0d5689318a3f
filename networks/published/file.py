"""Files of published networks, of any family."""

import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch

from dnnlib.errors import UserError, quoted
from networks.published import edm, edm2
from networks.published.models import SAMPLERS
from networks.published.reader import read_published, to_object

# By the class of its `ema`: what a file becomes, (network, content) -> (config, name of the encoder, tensors).
FAMILIES = {'Precond': edm2.read_network, **dict.fromkeys(edm.PRECONDITIONERS, edm.read_network)}

File = TypeVar('File', bound='PublishedFile')


class PublishedFile:
    """An open file of a published network, with the interface of `networks.files.NetworkFile`.

    Attributes:
        path: As given.
        config: The network's.
        nimg, ema_std, preset: As the file's name says: it is the only place that does. 0, None and '' where it
            does not. Names count thousands of images, rounded down; the time is the next multiple of 1024.
        dataset: Name of the data it was trained on, '' where the file does not say.
        sampler: How the paper samples it, where the file's name is that of a published model; {} elsewhere.
        encoder: A name of `networks.encoders.ENCODERS`.
        names: Names of the tensors, sorted.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        content = read_published(path)
        try:
            net = to_object(content.get('ema'))
            if net is None:
                raise UserError("it is no published network: there is no 'ema' in it")
            if net.class_name not in FAMILIES:
                known = ' or '.join(FAMILIES)
                raise UserError(f'its network is of the class {quoted(net.class_name)}; only {known} can be read')
            self.config, self.encoder, self._tensors = FAMILIES[net.class_name](net, content)
        except UserError as error:
            raise UserError(error.problems, where=self.path) from None
        self.dataset = dataset_name(content.get('dataset_kwargs'))
        self.nimg, self.ema_std, self.preset = describe_name(self.path)
        self.sampler = SAMPLERS.get(Path(self.path).stem, {})
        self.names = sorted(self._tensors)

    def __enter__(self: File) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        del self._tensors

    def get(self, name: str) -> torch.Tensor:
        """The tensor of that name, in the dtype it was stored in, in memory of its own."""
        return self._tensors[name].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._tensors[name].shape)


def dataset_name(arguments: Any) -> str:
    """Name of the data set that a file was trained on: the end of its path without the extension."""
    path = arguments.get('path') if type(arguments) is dict else None
    name = Path(path.replace('\\', '/')).stem if type(path) is str else ''
    return name if name.isprintable() and len(name) <= 100 else ''


def describe_name(path: str | os.PathLike) -> tuple[int, float | None, str]:
    """nimg, EMA length and preset as the names of published files give them.

    `edm2-img512-s-2147483-0.130.pkl`, or `edm2-img512-s/network-snapshot-2147483-0.050.pkl`; EDM's own tell the time
    alone, `network-snapshot-200000.pkl`.
    """
    path = Path(path)
    if match := re.fullmatch(r'network-snapshot-(\d{6})', path.stem):
        return int(match[1]) * 1000, None, ''
    match = re.fullmatch(r'(.+)-(\d{7,})-(0\.\d+)', path.stem)
    if match is None:
        return 0, None, ''
    name, kimg, std = match[1], int(match[2][:12]), float(match[3][:12])
    nimg = -(-kimg * 1000 // 1024) * 1024  # exact: batches are multiples of 1024, so one such is in the thousand
    preset = name if name != 'network-snapshot' else path.absolute().parent.name
    return nimg if nimg // 1000 == kimg else kimg * 1000, std, preset if preset.startswith('edm2-') else ''
