"""One optimizer step."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from networks.denoiser import Denoiser
from torch_utils import distributed
from torch_utils.random import stream_seed
from training.inputs import training_draws, training_inputs
from training.methods.denoising import DenoisingLoss
from training.monitor.step_stats import LossSums, StepStats, noise_edges
from training.monitor.timing import PhaseTimer
from training.order import Batch
from training.state import TrainState


class Stepper:
    """Takes the steps of a run; nothing in a step waits for the device.

    Args:
        state: What is trained.
        batches: This rank's micro-batches, without end.
        rounds: Micro-batches of each rank in a step.
        timer: Of the phases.
    """

    def __init__(self, state: TrainState, batches: Iterator[Batch], rounds: int, timer: PhaseTimer):
        self.state, self.batches, self.rounds, self.timer = state, batches, rounds, timer
        self.loss = _parallel_loss(state)
        self.edges = torch.tensor(noise_edges(state.config.levels), device=state.net.device)

    def __call__(self) -> StepStats:
        """Train on the next `config.batch` images; return sums that are still on the device."""
        state, config, timer = self.state, self.state.config, self.timer
        state.net.train()
        state.optimizer.zero_grad(set_to_none=True)
        stats = StepStats(LossSums(self.edges), config.learning_rate.at(state.nimg, config.batch))
        # DistributedDataParallel averages over ranks; the loss is averaged over the total batch.
        scale = config.loss_scaling * distributed.world_size() / config.batch
        for round_ in range(self.rounds):
            with timer.phase('data'):
                batch = next(self.batches)
            with timer.phase('forward/backward'), self._gradients_travel(round_ == self.rounds - 1):
                sigma, losses, errors = self._losses(batch)
                (losses.sum() * scale).backward()
                stats.losses.add(sigma, losses.detach(), errors.detach())
        with timer.phase('optimizer'):
            for group in state.optimizer.param_groups:
                group['lr'] = stats.learning_rate
            stats.nonfinite, norm = clean_gradients(state.net)
            stats.grad_norm = norm / config.loss_scaling
            state.optimizer.step()
        state.nimg += config.batch
        with timer.phase('ema'):
            state.update_averages()
        return stats

    def _gradients_travel(self, now: bool) -> contextlib.AbstractContextManager:
        """Gradients travel between ranks once, in the last round."""
        parallel = isinstance(self.loss, DistributedDataParallel)
        return self.loss.no_sync() if parallel and not now else contextlib.nullcontext()

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise level, loss and plain weighted squared error of each image of a micro-batch, float32 [N] each."""
        config, device = self.state.config, self.state.net.device
        numbers = batch.numbers.tolist()
        y, labels = training_inputs(batch.images, batch.labels, numbers, config, device)
        sigma, noise = training_draws(config.seed, numbers, tuple(y.shape[1:]), config.levels, device)
        if not config.network.dropout:
            return sigma, *self.loss(y, sigma, noise, labels)
        with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
            torch.manual_seed(stream_seed(config.seed, 'dropout', numbers[0]))  # dropout takes no generator of its own
            return sigma, *self.loss(y, sigma, noise, labels)


def _parallel_loss(state: TrainState) -> torch.nn.Module:
    """The loss, compiled if the config says so, over all ranks. Names in `state.net` stay as they are."""
    loss: torch.nn.Module = DenoisingLoss(state.net)
    if state.config.compile:
        loss = torch.compile(loss)
    if distributed.world_size() > 1:
        with warnings.catch_warnings():  # the argument has another name from torch 2.13 on, which older ones lack
            warnings.simplefilter('ignore', FutureWarning)
            loss = DistributedDataParallel(loss, broadcast_buffers=False)  # buffers are constants
    return loss


def clean_gradients(net: Denoiser) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace non-finite gradient elements by 0.

    Returns:
        Their number in each parameter, int64 [number of parameters], and the norm of what remains, on the device.
    """
    gradients = [p.grad for p in net.parameters()]
    nonfinite = torch.stack([(~g.isfinite()).sum() for g in gradients])
    for g in gradients:
        torch.nan_to_num(g, nan=0, posinf=0, neginf=0, out=g)
    return nonfinite, torch.stack(torch._foreach_norm(gradients)).norm()
