"""Finding values that are not finite."""

from collections.abc import Mapping

import torch


def nonfinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinities; the device is waited for once."""
    extremes = {name: t.aminmax() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not extremes:
        return []
    device = max((low.device for low, _ in extremes.values()), key=lambda device: device.type == 'cuda')
    fine = torch.stack([(low.isfinite() & high.isfinite()).to(device) for low, high in extremes.values()])
    return [name for name, is_fine in zip(extremes, fine.tolist(), strict=True) if not is_fine]


def some(names: list[str]) -> str:
    """The first of them, and how many more there are, for a message."""
    return names[0] if len(names) == 1 else f'{names[0]} and {len(names) - 1} more'
