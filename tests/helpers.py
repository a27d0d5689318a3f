"""Small data that several tests make."""

import io
import json
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from dataset.files.writer import DatasetWriter, encode_png
from metrics.inception import InceptionV3
from networks.config import NetworkConfig
from networks.edm2.config import EDM2Config
from torch_utils.tensor_files import TensorFile
from training.state import state_files

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler on this machine'
)


def edm2_network(img_resolution: tuple[int, int], img_channels: int, label_dim: int, *args, **kwargs) -> NetworkConfig:
    """The config of a network of EDM2: shape and classes, then the arguments of `EDM2Config`."""
    return NetworkConfig(img_resolution, img_channels, label_dim, EDM2Config(*args, **kwargs), uncertainty=128)


def make_archive(path: Path, count: int, classes: int, shape: tuple[int, int, int] = (1, 8, 8)) -> Path:
    """Write a dataset zip of random images; images of one class share a pattern. Classes 0 makes no labels."""
    rng = np.random.default_rng(0)
    channels, height, width = shape
    patterns = rng.integers(0, 200, (max(classes, 1), height, width, channels))
    labels = []
    with zipfile.ZipFile(path, 'w') as archive:
        for i in range(count):
            name, label = f'{i // 1000:05d}/img{i:08d}.png', i % max(classes, 1)
            pixels = (patterns[label] + rng.integers(0, 50, (height, width, channels))).astype(np.uint8)
            file = io.BytesIO()
            PIL.Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(file, format='png')
            archive.writestr(name, file.getvalue())
            labels.append([name, label])
        if classes:
            archive.writestr('dataset.json', json.dumps({'labels': labels}))
    return path


def write_dataset(path: Path, images: Iterable[np.ndarray], labels: np.ndarray | None) -> None:
    """Write uint8 [H, W, C] images as PNGs with `dataset.json`."""
    with DatasetWriter(path) as writer:
        for image in images:
            writer.add('.png', encode_png(image))
        writer.finish(labels)


def make_latents(path: Path, count: int, side: int = 8) -> Path:
    """Write a dataset zip of random latents, float32 [8, side, side]."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, 'w') as archive:
        for i in range(count):
            file = io.BytesIO()
            np.save(file, rng.standard_normal((8, side, side), dtype=np.float32))
            archive.writestr(f'00000/img{i:08d}.npy', file.getvalue())
    return path


def state_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest training state of a run folder."""
    with TensorFile(state_files(folder)[-1], 'training state') as file:
        return dict(file.items())


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Make sure that both hold the same bits; what differs is named, with how far and in how many elements."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    found = {
        name: f'{(a[name] != b[name]).sum()} of {a[name].numel()}, by {(a[name] - b[name]).abs().max()}'
        for name in a
        if a[name].shape != b[name].shape or not torch.equal(a[name], b[name])
    }
    assert not found, f'{len(found)} of {len(a)} tensors differ: {found}'


def random_inception(path: Path, seed: int = 0) -> Path:
    """Write a state dict in the layout of the public Inception weights, random but of sensible scale (2 / fan-in)."""
    with torch.device('meta'):
        net = InceptionV3()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in net.state_dict().items():
        if tensor.ndim > 1:
            scale = (2 / tensor[0].numel()) ** 0.5
            weights[name] = torch.randn(tensor.shape, generator=generator) * scale
        elif name.endswith(('bn.weight', 'running_var')):
            weights[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        elif name.endswith('num_batches_tracked'):
            weights[name] = torch.tensor(0)
        else:
            weights[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    torch.save(weights, path)
    return path
