"""The training loss of EDM2, and the random draws that go into it."""

import torch
from torch import nn

from networks.denoiser import Denoiser


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
