"""Training a denoiser on its squared error (EDM eq. 8, EDM2 eq. 14 to 21)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffusion.levels import LEVELS, LogNormal
from diffusion.weightings import EDM, WEIGHTINGS
from dnnlib.configs import tagged
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.dropout import seed_dropout
from training.inputs import Inputs, training_draws
from training.monitor.step_stats import StepStats
from training.monitor.timing import PhaseTimer
from training.update import Update


@dataclasses.dataclass(frozen=True)
class DenoisingConfig:
    """What is minimized: the weighted squared error, or, where the network has an uncertainty head, its likelihood.

    Args:
        levels: How noise levels are drawn, see `diffusion.levels`.
        weighting: What an error costs, see `diffusion.weightings`.
    """

    levels: Any = tagged(LEVELS, default=LogNormal(-0.8, 1.6))
    weighting: Any = tagged(WEIGHTINGS, default=EDM())

    trained, frozen = 1, 0

    def build(self, config: Any, device: torch.device) -> 'Denoising':
        """The method for a run, a `TrainConfig`."""
        return Denoising(config, device)

    def problems(self, network: NetworkConfig) -> list[str]:
        """Everything that is wrong with it, in words."""
        return [*self.levels.problems(), *self.weighting.problems()]

    def resolved(self, config: Any, offline: bool) -> Any:
        """The run as it is."""
        return config


class Denoising:
    """One network, one optimizer.

    Args:
        config: Of the run, a `TrainConfig`.
        device: Where it trains.

    Attributes:
        networks, optimizers: By name, see `training.methods.table`.
    """

    def __init__(self, config: Any, device: torch.device):
        self.config = config
        self.net = Denoiser(config.network, seed=config.seed, precision=config.precision).train().to(device)
        self.networks = {'net': self.net}
        self.optimizers = {'net': config.optimizer.build(self.net)}
        loss = DenoisingLoss(self.net, config.method)
        self.update = Update(loss, self.optimizers['net'], config)

    def step(self, batches: Iterator[Inputs], nimg: int, timer: PhaseTimer) -> StepStats:
        """Train on the micro-batches of a step, see `training.methods.table`."""
        self.net.train()
        return self.update((self.draw(self.net, inputs, nimg) for inputs in batches), nimg, timer)

    def draw(self, net: Denoiser, inputs: Inputs, nimg: int) -> tuple:
        """Arguments of `DenoisingLoss`: noise levels and noise of each image; dropout of `net` is seeded."""
        levels, shape = self.config.method.levels, tuple(inputs.y.shape[1:])
        sigma, noise = training_draws(self.config.seed, inputs.numbers, shape, levels, inputs.y.device)
        seed_dropout(net, self.config.seed, inputs.numbers)
        return inputs.y, sigma, noise, inputs.labels, inputs.augment, nimg


class DenoisingLoss(nn.Module):
    """Loss of every image; a module so that DistributedDataParallel can wrap it with the network inside.

    Per element: lambda(sigma) (D(y + n; sigma) - y)^2, or, of a network with an uncertainty head u,
    lambda(sigma) / e^u(sigma) (D - y)^2 + u(sigma) (EDM2 eq. 21).

    Args:
        net: The network.
        config: Gives distribution and weighting.
    """

    def __init__(self, net: Denoiser, config: DenoisingConfig):
        super().__init__()
        self.net, self.config = net, config

    def forward(
        self,
        y: torch.Tensor,
        sigma: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor | None,
        augment: torch.Tensor | None = None,
        nimg: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise levels, losses and plain weighted squared errors.

        Args:
            y: float32 [N, C, H, W], clean images.
            sigma: float32 [N].
            noise: [N, C, H, W], standard normal.
            labels: float [N, label_dim] or None.
            augment: float [N, augment_dim] or None.
            nimg: Images trained on so far.

        Returns:
            float32 [N] three times; the latter two summed over C, H and W. A loss with uncertainty is negative where
            the error is small.
        """
        D = self.net(y + sigma[:, None, None, None] * noise, sigma, labels, augment)
        error = self.config.weighting(D - y, sigma, self.config.levels, nimg)
        if not self.net.config.uncertainty:
            return sigma, error, error
        u = self.net.logvar(sigma)
        return sigma, error / u.exp() + u * y[0].numel(), error
