"""A share of the data that is not trained on, for an evaluation loss at fixed noise."""

import math

import torch

from dataset.reader import ImageDataset
from dnnlib.errors import UserError
from networks.denoiser import Denoiser
from torch_utils import distributed
from torch_utils.random import stream, stream_seed
from training.config import TrainConfig
from training.inputs import training_draws, training_inputs
from training.methods.denoising import DenoisingLoss
from training.monitor.step_stats import LossSums, noise_edges, reduced, summarize


class Subset(torch.utils.data.Dataset):
    """Some images of a dataset, in the order of `indices` (int64 [n])."""

    def __init__(self, dataset: ImageDataset, indices: torch.Tensor):
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.dataset[int(self.indices[index])]


def split(dataset: ImageDataset, share: float, seed: int) -> tuple[Subset | ImageDataset, Subset | None]:
    """Training images and held-out ones; without a share, all images and None.

    A share rounds to at least one image, drawn at random by the seed. The order of the training images is kept.
    """
    if not share:
        return dataset, None
    count = max(round(share * len(dataset)), 1)
    order = torch.randperm(len(dataset), generator=stream(seed, 'held out'))
    if count >= len(dataset):
        raise UserError(f'holding out {count} of {len(dataset)} images leaves none to train on')
    return Subset(dataset, order[count:].sort().values), Subset(dataset, order[:count])


@torch.no_grad()
def held_out_loss(net: Denoiser, part: Subset, config: TrainConfig, batch_size: int) -> dict:
    """Loss of a network on held-out images, each at a noise level and with noise of its own that never change.

    The noise levels are evenly spaced quantiles of the training distribution, so that few images suffice. Every rank
    calls it and gets the same.

    Args:
        net: In evaluation mode.
        part: The held-out images.
        config: Of the run.
        batch_size: Images at a time.

    Returns:
        As `summarize` does: per element, and by noise level.
    """
    device, count, shape = net.device, len(part), part.dataset.image_shape
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    sigmas = config.method.levels.from_normal(math.sqrt(2) * torch.erfinv(2 * quantiles - 1)).float()
    seed = stream_seed(config.seed, 'held out')
    loss, sums = (
        DenoisingLoss(net, config.method),
        LossSums(torch.tensor(noise_edges(config.method.levels), device=device)),
    )
    mine = range(distributed.rank(), count, distributed.world_size())
    for start in range(0, len(mine), batch_size):
        chosen = list(mine[start : start + batch_size])
        images, labels = zip(*(part[i] for i in chosen), strict=True)
        inputs = training_inputs(torch.stack(images), torch.tensor(labels), chosen, config, device, held_out=True)
        sigma = sigmas[chosen].to(device)
        _, noise = training_draws(seed, chosen, tuple(shape), config.method.levels, device)
        sums.add(*loss(inputs.y, sigma, noise, inputs.labels))
    return summarize(reduced([sums.sums])[0], config.method.levels, config.elements)
