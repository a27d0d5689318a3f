"""Magnitudes of activations and weights per resolution (EDM2 appendix A.6), which should stay near 1."""

from collections import defaultdict

import torch
from torch import nn

from networks.denoiser import Denoiser

Magnitudes = dict[str, dict[str, torch.Tensor]]


@torch.no_grad()
def magnitudes(net: Denoiser, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> Magnitudes:
    """Measure a network on some noisy images, in evaluation mode; it is left as it was.

    The magnitude of a feature is the root mean square of its map (EDM2 eq. 3), averaged over the images; that of a
    weight, of what leads to one output feature. Activations are the outputs of the layers of the blocks, gains
    applied and before any nonlinearity.

    Args:
        net: What to measure.
        x: float32 [N, C, H, W], image plus noise.
        sigma: float32 [N].
        labels: float32 [N, label_dim] or None.

    Returns:
        `activations` and `weights`: bucket such as `enc 16x16` -> magnitude of every feature in it, float32 on the CPU.
    """
    activations, weights = defaultdict(list), defaultdict(list)
    hooks = []
    for stage, part in net.unet.stages():
        key, _, block = stage.rpartition('_')
        for layer in part.modules() if key and block != 'conv' else ():
            if isinstance(getattr(layer, 'weight', None), nn.Parameter) and layer.weight.ndim > 1:
                weights[key].append(_rms(layer.weight[None])[0])
                hooks.append(layer.register_forward_hook(_collect(activations[key])))
    training = net.training
    net.eval()
    try:
        net(x, sigma, labels)
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    return {
        'activations': {key: torch.cat(values).cpu() for key, values in activations.items()},
        'weights': {key: torch.cat(values).cpu() for key, values in weights.items()},
    }


def _collect(found: list[torch.Tensor]):
    def hook(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        found.append(_rms(output).mean(dim=0))

    return hook


def _rms(h: torch.Tensor) -> torch.Tensor:
    """[N, C, ...] -> root mean square over all but the first two dimensions, float32 [N, C]."""
    return h.float().reshape(*h.shape[:2], -1).square().mean(dim=2).sqrt()


def mean_and_max(found: Magnitudes) -> dict[str, dict[str, list[float]]]:
    """What the paper's figures 3 and 15 show: [mean, max] over the features of each bucket."""
    return {
        kind: {key: [values.mean().item(), values.max().item()] for key, values in buckets.items()}
        for kind, buckets in found.items()
    }
