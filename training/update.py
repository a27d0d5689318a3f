"""One step of an optimizer: losses of all micro-batches and ranks, their gradient, the update."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from networks.folding import settled
from torch_utils import distributed
from training.monitor.step_stats import LossSums, StepStats, noise_edges
from training.monitor.timing import PhaseTimer
from training.optimizer import clean_gradients


class Update:
    """Trains one network, on all ranks together; nothing in it waits for the device.

    Args:
        loss: A module that holds what it trains: tensors of a micro-batch -> noise level, loss and plain weighted
            squared error of each image, float32 [N] each.
        optimizer: Of its parameters.
        config: Of the run, a `TrainConfig` (which imports this module through the methods).
        counted: All parameters that the method trains, in the order in which they are counted.
    """

    def __init__(
        self, loss: nn.Module, optimizer: torch.optim.Optimizer, config: Any, counted: list[nn.Parameter] | None = None
    ):
        self.config, self.optimizer = config, optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        counted = counted or self.parameters
        self.offset, self.count = next(i for i, p in enumerate(counted) if p is self.parameters[0]), len(counted)
        self.rounds = config.batch // (distributed.world_size() * config.micro_batch_for(distributed.world_size()))
        self.edges = torch.tensor(noise_edges(config.method.levels), device=self.parameters[0].device)
        self.plain, self.loss = loss, None

    def __call__(self, arguments: Iterator[tuple], nimg: int, timer: PhaseTimer) -> StepStats:
        """Train on the micro-batches of a step, which begins after `nimg` images; return sums still on the device."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        stats = StepStats(LossSums(self.edges), config.optimizer.at(nimg, config.batch))
        # DistributedDataParallel averages over ranks; the loss is averaged over the total batch.
        scale = config.loss_scaling * distributed.world_size() / config.batch
        # Between ranks, gradients that are gathered would travel when all are there, and not before.
        with settled(self.plain, self.rounds > 1 and distributed.world_size() == 1 and not config.compile):
            self._accumulate(arguments, scale, stats, timer)
        with timer.phase('optimizer'):
            for group in self.optimizer.param_groups:
                group['lr'] = stats.learning_rate
            clip = config.optimizer.clip and config.optimizer.clip * config.loss_scaling
            bad, norm = clean_gradients(self.parameters, config.optimizer.nonfinite, clip)
            stats.nonfinite = bad.new_zeros(self.count)
            stats.nonfinite[self.offset : self.offset + len(bad)] = bad
            stats.grad_norm = norm / config.loss_scaling
            self.optimizer.step()
        return stats

    def _accumulate(self, arguments: Iterator[tuple], scale: float, stats: StepStats, timer: PhaseTimer) -> None:
        """Add up the gradients of all micro-batches."""
        for round_ in range(self.rounds):
            with timer.phase('data'):
                tensors = next(arguments)
            if self.loss is None:
                self.loss = self._prepared(tensors)
            alone = round_ < self.rounds - 1 and isinstance(self.loss, DistributedDataParallel)
            # Gradients travel between ranks once, in the last round.
            with timer.phase('forward/backward'), self.loss.no_sync() if alone else contextlib.nullcontext():
                sigma, losses, errors = self.loss(*tensors)
                (losses.sum() * scale).backward()
                stats.losses.add(sigma, losses.detach(), errors.detach())

    def _prepared(self, tensors: tuple) -> nn.Module:
        """The loss, compiled if the config says so, over all ranks; names of parameters stay as they are."""
        loss = torch.compile(self.plain) if self.config.compile else self.plain
        if distributed.world_size() == 1:
            return loss
        # DistributedDataParallel must know whether parameters stay without a gradient; evaluation changes no weight.
        _, losses, _ = self.plain.eval()(*tensors)
        found = torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
        self.plain.train()
        for parameter in self.parameters:
            if parameter.ndim == 4 and 1 in parameter.shape[1:]:  # of several strides that mean the same, the buckets'
                parameter.register_hook(lambda gradient: gradient.flatten().view_as(gradient))
        with warnings.catch_warnings():  # the argument has another name from torch 2.13 on, which older ones lack
            warnings.simplefilter('ignore', FutureWarning)
            unused = any(gradient is None for gradient in found)
            return DistributedDataParallel(
                loss, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused
            )
