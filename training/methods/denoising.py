"""The training loss of EDM2, and the random draws that go into it."""

import torch
from torch import nn

from diffusion.levels import LogNormal
from networks.denoiser import Denoiser
from torch_utils.random import stream_seed


class DenoisingLoss(nn.Module):
    """Uncertainty-weighted denoising loss (EDM2 eq. 14 to 21).

    Per element: lambda(sigma) / e^u(sigma) (D(y + n; sigma) - y)^2 + u(sigma), lambda = (sigma^2 + sigma_data^2) /
    (sigma sigma_data)^2. It is a module so that DistributedDataParallel can wrap it with the network inside.

    Args:
        net: The network in training.
    """

    def __init__(self, net: Denoiser):
        super().__init__()
        self.net = net

    def forward(
        self, y: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of every image.

        Args:
            y: float32 [N, C, H, W], clean images.
            sigma: float32 [N].
            noise: [N, C, H, W], standard normal.
            labels: float [N, label_dim] or None.

        Returns:
            float32 [N] twice: the loss, summed over C, H and W (negative where the error is small), and the plain
            weighted squared error lambda (D - y)^2, likewise.
        """
        sigma_data = self.net.config.sigma_data
        D = self.net(y + sigma[:, None, None, None] * noise, sigma, labels)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        error = weight * (D - y).square().flatten(1).sum(dim=1)
        u = self.net.logvar(sigma)
        return error / u.exp() + u * y[0].numel(), error


def training_draws(
    seed: int, numbers: list[int], shape: tuple[int, ...], levels: LogNormal, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise level and noise of each image; they depend on (seed, image number) alone.

    So neither the number of ranks nor gradient accumulation changes what an image is trained with, and a
    resumed run continues the same sequence.

    Args:
        seed: Of the run.
        numbers: Image numbers, counted from 0 over the whole run.
        shape: (C, H, W) of an image.
        levels: Distribution of the noise levels.
        device: Where to draw.

    Returns:
        sigma float32 [N] and standard normal noise float32 [N, C, H, W].
    """
    size = torch.Size(shape).numel()
    draws = torch.empty(len(numbers), 1 + size, device=device)
    generator = torch.Generator(device)
    for row, number in zip(draws, numbers, strict=True):
        row.normal_(generator=generator.manual_seed(stream_seed(seed, 'noise', number)))
    return levels.from_normal(draws[:, 0]), draws[:, 1:].reshape(len(numbers), *shape)
