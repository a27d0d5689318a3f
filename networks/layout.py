"""In which memory layout features are fastest, as measured (docs/performance.md)."""

import torch


def features_format(device: torch.device, depthwise: bool, training: bool) -> torch.memory_format:
    """Channels-last, but channels-first where a CPU trains dense convolutions without matrix units (AMX).

    Args:
        device: Of the features.
        depthwise: Whether there are depthwise convolutions, up to three times as fast in channels-last.
        training: Whether there is a backward pass; there alone the layouts of dense convolutions differ.
    """
    if device.type != 'cpu' or depthwise or not training or _has_amx():
        return torch.channels_last
    return torch.contiguous_format


def _has_amx() -> bool:
    probe = getattr(torch.cpu, '_is_amx_tile_supported', None)  # not public; torch 2.8 to 2.13 have it
    return bool(probe and probe())
