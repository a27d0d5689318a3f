"""Finding and replacing values that are not finite."""

from collections.abc import Mapping

import torch

SMALL = 2**18  # elements: work that takes a GPU less time than to start it


def nonfinite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the floating-point tensors that hold NaN or infinities; the device is waited for once."""
    extremes = {name: t.aminmax() for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not extremes:
        return []
    device = max((low.device for low, _ in extremes.values()), key=lambda device: device.type == 'cuda')
    fine = torch.stack([(low.isfinite() & high.isfinite()).to(device) for low, high in extremes.values()])
    return [name for name, is_fine in zip(extremes, fine.tolist(), strict=True) if not is_fine]


def replace_nonfinite(tensors: list[torch.Tensor], nan: float, infinite: float) -> torch.Tensor:
    """Replace NaN by `nan` and infinities by `infinite` with their sign, in place, and count them without waiting.

    Small tensors are treated as one, for each operation takes a GPU longer to start than to do.

    Args:
        tensors: float, on one device.

    Returns:
        Replaced elements of each, int64 [number of tensors].
    """
    counts, small = {}, {i: t for i, t in enumerate(tensors) if t.numel() <= SMALL}
    if small:
        sizes = [t.numel() for t in small.values()]
        joined = torch.cat([t.flatten() for t in small.values()])
        clean = joined.nan_to_num(nan, infinite, -infinite)
        parts = [part.view_as(t) for part, t in zip(clean.split(sizes), small.values(), strict=True)]
        torch._foreach_copy_(list(small.values()), parts)
        replaced = (clean != joined).float()  # NaN, too, equals nothing
        norms = torch._foreach_norm(replaced.split(sizes), 1)
        counts = dict(zip(small, torch.stack(norms).long(), strict=True))
    for i, t in enumerate(tensors):
        if i not in small:
            counts[i] = (t * 0).count_nonzero()  # NaN is not 0
            torch.nan_to_num(t, nan, infinite, -infinite, out=t)
    return torch.stack([counts[i] for i in range(len(tensors))])


def some(names: list[str]) -> str:
    """The first of them, and how many more there are, for a message."""
    return names[0] if len(names) == 1 else f'{names[0]} and {len(names) - 1} more'
