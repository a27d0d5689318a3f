"""From what the dataset holds to what the loss takes."""

import torch

from networks.encoders import encode_pixels
from training.config import TrainConfig


def training_inputs(
    images: torch.Tensor, labels: torch.Tensor, config: TrainConfig, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Move a micro-batch to the device and encode it.

    Args:
        images: uint8 [N, C, H, W].
        labels: Class indices, int64 [N].
        config: Of the run; says whether labels are used.
        device: Of the network.

    Returns:
        Clean images y, float32 [N, C, H, W], and one-hot labels, float32 [N, label_dim], or None.
    """
    y = encode_pixels(images.to(device, non_blocking=True))
    if not config.network.label_dim:
        return y, None
    labels = labels.to(device, non_blocking=True)
    return y, torch.nn.functional.one_hot(labels, config.network.label_dim).float()
