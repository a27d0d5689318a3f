"""From a dataset of images to a dataset of latents, on any number of ranks."""

import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm

from dataset.files.writer import DatasetWriter, encode_npy, read_journal, work_folder
from dataset.making.statistics import LatentStatistics
from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from networks.encoders import Encoder
from torch_utils import distributed
from torch_utils.parallel import in_order
from torch_utils.tensor_files import TensorFile, UnreadableFileError, save_tensors

KIND = 'latents'
CHUNK = 250  # images that a rank encodes before it writes them; no more than these are lost
DOWNSAMPLING = 8  # by the VAE


def refuse_unfit(dataset: ImageDataset) -> None:
    """Check that a VAE takes the images of a dataset: RGB, sides multiples of 8 pixels."""
    channels, height, width = dataset.image_shape
    if dataset.encoder != 'rgb':
        raise UserError(f'{dataset.path} holds latents already')
    if channels != 3:
        raise UserError(f'{dataset.path} holds grayscale images, but the VAE takes RGB; convert with --color=rgb')
    if height % DOWNSAMPLING or width % DOWNSAMPLING:
        raise UserError(f'images of {width}x{height} cannot be encoded: sides must be multiples of {DOWNSAMPLING}')


def about_encoding(dataset: ImageDataset, vae: str, encoder: Encoder) -> dict[str, Any]:
    """What the latents depend on."""
    weights = hashlib.blake2b(digest_size=8)
    state_dict = getattr(getattr(encoder, 'vae', None), 'state_dict', dict)
    for name, tensor in sorted(state_dict().items()):
        weights.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return {'source': dataset.name, 'fingerprint': dataset.fingerprint, 'vae': vae, 'weights': weights.hexdigest()}


def encode_dataset(
    dataset: ImageDataset,
    dest: str | os.PathLike,
    encoder: Encoder,
    vae: str,
    device: torch.device,
    batch: int = 16,
    resume: bool = False,
    overwrite: bool = False,
    workers: int = 0,
) -> LatentStatistics | None:
    """Encode all images; rank r takes the chunks r, r + world_size, ..., and rank 0 puts them together.

    Chunks lie in the work folder, which all ranks must see, and no batch spans two of them: the number of ranks changes
    nothing in the result.

    Args:
        dataset: Images.
        dest, resume, overwrite: See `DatasetWriter`; chunks of an interrupted encoding are not made again.
        encoder: On `device`.
        vae: What to call it in the notes of the dataset.
        device: Of this rank.
        batch: Images to encode at once.
        workers: Processes that read images for this rank.

    Returns:
        Statistics of the latents, on rank 0; None on others.
    """
    refuse_unfit(dataset)
    about = about_encoding(dataset, vae, encoder)
    chunks = [range(i, min(i + CHUNK, len(dataset))) for i in range(0, len(dataset), CHUNK)]
    folder = work_folder(dest)
    if distributed.rank():
        distributed.barrier()  # until rank 0 has made the folder
        _encode_chunks(dataset, chunks, folder, encoder, device, batch, workers)
        distributed.barrier()
        return None
    with DatasetWriter(dest, about, resume, overwrite) as writer:
        writer.checkpoint(writer.state)  # from here on, finished work is kept
        distributed.barrier()
        _encode_chunks(dataset, chunks, folder, encoder, device, batch, workers)
        distributed.barrier()
        return _put_together(dataset, chunks, writer, about)


def _chunk_path(folder: Path, chunk: range) -> Path:
    return folder / f'latents-{chunk.start:08d}.safetensors'


def _is_done(folder: Path, chunk: range, count: int) -> bool:
    """Whether a chunk is written, or in the dataset of `count` images already."""
    if chunk.stop <= count:
        return True
    try:
        with TensorFile(_chunk_path(folder, chunk), KIND) as file:
            return len(file.get('latents')) == len(chunk)
    except (OSError, UnreadableFileError):
        return False


def _encode_chunks(
    dataset: ImageDataset, chunks: Sequence[range], folder: Path, encoder: Encoder, device: torch.device, batch: int,
    workers: int,
) -> None:  # fmt: skip
    """Encode this rank's share of the chunks, and write each."""
    rank, world_size = distributed.rank(), distributed.world_size()
    count = read_journal(folder)['count']
    todo = [chunk for chunk in chunks[rank::world_size] if not _is_done(folder, chunk, count)]
    batches = [range(i, min(i + batch, chunk.stop)) for chunk in todo for i in range(chunk.start, chunk.stop, batch)]
    images_of_batches = in_order(functools.partial(_read_batch, dataset), batches, workers)
    latents: list[torch.Tensor] = []
    with tqdm.tqdm(
        desc='encode' if world_size == 1 else 'encode (rank 0)',
        total=sum(map(len, todo)), unit='img', disable=True if rank else None,
    ) as bar:  # fmt: skip
        for indices, images in zip(batches, images_of_batches, strict=True):
            latents.append(encoder.encode(torch.from_numpy(images).to(device)).float().cpu())
            bar.update(len(indices))
            chunk = chunks[indices.start // CHUNK]
            if indices.stop == chunk.stop:
                save_tensors(_chunk_path(folder, chunk), {'latents': torch.cat(latents)}, {'kind': KIND})
                latents = []


def _read_batch(dataset: ImageDataset, indices: Sequence[int]) -> np.ndarray:
    """uint8 [N, 3, H, W]."""
    return np.stack([dataset.read(index) for index in indices])


def _put_together(
    dataset: ImageDataset, chunks: Sequence[range], writer: DatasetWriter, about: dict[str, Any]
) -> LatentStatistics:
    """Move all chunks, in order, into the dataset; each is removed when its content is safe."""
    statistics = LatentStatistics(writer.state.get('sums'))
    for chunk in tqdm.tqdm(chunks, 'write', unit='chunk', disable=None):
        if chunk.stop <= writer.count:
            continue
        path = _chunk_path(writer.folder, chunk)
        with TensorFile(path, KIND) as file:
            moments = file.get('latents')
        for row in moments:
            writer.add('.npy', encode_npy(row.numpy()))
        statistics.add(moments)
        writer.checkpoint({'sums': statistics.sums})
        path.unlink()
    made_with = {'encoder': 'stabilityvae', 'vae': about['vae'], 'weights': about['weights'], 'source': dataset.name}
    for key in ('transform', 'resolution'):
        if key in dataset.made_with:
            made_with[key] = dataset.made_with[key]
    made_with.setdefault('resolution', [dataset.image_shape[2], dataset.image_shape[1]])
    writer.finish(dataset.labels, {**made_with, 'before': dict(dataset.made_with)}, dataset.class_names)
    return statistics
