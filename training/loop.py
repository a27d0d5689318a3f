"""The training loop."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from dnnlib.errors import UserError
from dnnlib.files import write_json
from networks.denoiser import Denoiser
from torch_utils import distributed
from torch_utils.random import stream_seed
from torch_utils.tensor_files import UnreadableFileError
from training.config import TrainConfig, refuse_differences
from training.dataset import ImageDataset
from training.inputs import to_training_images
from training.loss import DenoisingLoss, training_draws
from training.order import Batch, BatchOrder, make_loader
from training.state import TrainState, state_files
from training.status import Progress, StepStats, plot_loss

Preview = Callable[[Denoiser, int], None]  # (network with EMA weights, nimg); draws a sample grid, say


def train(
    config: TrainConfig, dataset: ImageDataset, folder: Path, device: torch.device, preview: Preview | None = None
) -> None:
    """Train, or go on training, until `config.duration` images have been seen.

    Args:
        config: The run, already checked for this number of ranks.
        dataset: Its images.
        folder: Run folder; states in it are continued from the newest one.
        device: Of this rank.
        preview: Called on rank 0 at intervals with the shortest EMA.

    Raises:
        UserError: where the folder holds another run, or an image cannot be read.
    """
    state = TrainState(config, device)
    resume(state, folder)
    if state.nimg >= config.duration:
        distributed.print0(f'{folder} is trained: {state.nimg} of {config.duration} images')
        return
    lead = distributed.rank() == 0
    if lead:
        write_json(folder / 'config.json', config.to_json())
    order = BatchOrder(
        len(dataset),
        config.seed,
        config.batch,
        config.micro_batch_for(distributed.world_size()),
        distributed.rank(),
        distributed.world_size(),
        state.nimg,
    )
    loss = DenoisingLoss(state.net)
    if distributed.world_size() > 1:
        with warnings.catch_warnings():  # the argument has another name from torch 2.13 on, which older ones lack
            warnings.simplefilter('ignore', FutureWarning)
            loss = DistributedDataParallel(loss, broadcast_buffers=False)  # buffers are constants
    with (
        contextlib.closing(make_loader(dataset, order, config.workers)) as batches,
        Progress(config, folder, state) as progress,
    ):
        while state.nimg < config.duration:
            stats = train_step(state, loss, batches, order.rounds)
            progress.add(stats)
            done = state.nimg >= config.duration
            if state.nimg % config.status == 0 or done:
                progress.report()
            if lead and (state.nimg % config.snapshot == 0 or done):
                state.save_snapshots(folder)
            if lead and (state.nimg % config.preview == 0 or done):
                plot_loss(folder)
                if preview:
                    preview(state.averaged_net(min(config.ema_stds)), state.nimg)
            if lead and (state.nimg % config.checkpoint == 0 or done):
                state.save(folder)
    distributed.barrier()


def resume(state: TrainState, folder: Path) -> None:
    """Continue from the newest readable state in the folder, if there is one; a broken one is passed over aloud.

    Raises:
        UserError: where the folder holds another run (with a line per difference), or no state of several is readable.
    """
    if (folder / 'config.json').exists():
        refuse_differences(folder, json.loads((folder / 'config.json').read_text(encoding='utf-8')), state.config)
    paths = state_files(folder)
    for path in reversed(paths):
        try:
            state.load(path)
        except UnreadableFileError as error:
            distributed.print0(f'warning: {error}')
            continue
        distributed.print0(f'continuing from {path} at {state.nimg} images')
        return
    if paths:
        raise UserError(f'no training state in {folder} can be read; remove them to begin anew')


def train_step(state: TrainState, loss: torch.nn.Module, batches: Iterator[Batch], rounds: int) -> StepStats:
    """One optimizer step over `rounds` micro-batches of this rank; nothing here waits for the device."""
    config = state.config
    state.net.train()
    state.optimizer.zero_grad(set_to_none=True)
    stats = StepStats.zeros(state.net.device)
    for round_ in range(rounds):
        last = round_ == rounds - 1
        sync = contextlib.nullcontext() if last or not hasattr(loss, 'no_sync') else loss.no_sync()
        with sync:  # gradients travel between ranks once, in the last round
            losses, errors = micro_batch_losses(state, loss, next(batches))
            # DistributedDataParallel averages over ranks; the loss is averaged over the total batch.
            (losses.sum() * (distributed.world_size() / config.batch)).backward()
        stats.add(losses.detach(), errors.detach())
    stats.learning_rate = config.learning_rate.at(state.nimg, config.batch)
    for group in state.optimizer.param_groups:
        group['lr'] = stats.learning_rate
    stats.nonfinite, stats.grad_norm = clean_gradients(state.net)
    state.optimizer.step()
    state.nimg += config.batch
    state.ema.update(state.net.state_dict(), state.nimg, config.batch)
    return stats


def micro_batch_losses(state: TrainState, loss: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and plain weighted squared errors of the images of one micro-batch, float32 [N] each."""
    config, device = state.config, state.net.device
    numbers = batch.numbers.tolist()
    y = to_training_images(batch.images.to(device, non_blocking=True), numbers, config.seed)
    labels = None
    if config.network.label_dim:
        labels = batch.labels.to(device, non_blocking=True)
        labels = torch.nn.functional.one_hot(labels, config.network.label_dim).float()
    sigma, noise = training_draws(config.seed, numbers, tuple(y.shape[1:]), config.levels, device)
    if not config.network.dropout:
        return loss(y, sigma, noise, labels)
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        torch.manual_seed(stream_seed(config.seed, 'dropout', numbers[0]))  # dropout takes no generator of its own
        return loss(y, sigma, noise, labels)


def clean_gradients(net: Denoiser) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace non-finite gradient elements by 0; return their number and the norm of what remains, on the device."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    nonfinite = torch.stack([(~g.isfinite()).sum() for g in gradients]).sum()
    for g in gradients:
        torch.nan_to_num(g, nan=0, posinf=0, neginf=0, out=g)
    return nonfinite, torch.stack(torch._foreach_norm(gradients)).norm()


def open_dataset(path: str, use_labels: bool) -> tuple[ImageDataset, int]:
    """Open the training data and tell the number of classes to train with, 0 for none.

    Raises:
        UserError: where the data cannot be used, or have no labels although they shall be used.
    """
    dataset = ImageDataset(path)
    if use_labels and not dataset.num_classes:
        raise UserError(f'{path} has no labels; train with --cond=False, or convert folders of classes')
    return dataset, dataset.num_classes if use_labels else 0
