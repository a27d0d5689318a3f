"""In which memory layout features and weights are fastest, as measured (docs/performance.md)."""

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


def joins_upsampling(device: torch.device, training: bool) -> bool:
    """Whether a dense 3x3 convolution of upsampled pixels runs before upsampling, in 4/9 of the multiplications."""
    return device.type == 'cpu' and not training


def packed(weight: torch.Tensor, x: torch.Tensor, groups: int) -> torch.Tensor:
    """A convolution's weight in the order that oneDNN's kernel reads, which else copies it in every call: same bits.

    At 8x8 pixels that copy takes up to twice as long as the convolution itself. Weights that PyTorch gives to other
    kernels, and matrices, stay as they are.

    Args:
        weight: float [Cout, Cin / groups, kh, kw], without a gradient.
        x: [N, Cin, H, W], as the features will be; oneDNN chooses by their shape, and may be very slow with another.
        groups: Of channels.
    """
    if weight.ndim != 4 or x.device.type != 'cpu' or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return weight
    padding, one = [weight.shape[-1] // 2] * 2, [1, 1]
    # Not public, as the kernels below are not; torch 2.8 to 2.13 have them.
    chosen = torch._C._select_conv_backend(x, weight, None, one, padding, one, False, [0, 0], groups)
    if chosen.name != 'Mkldnn':
        return weight
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), padding, one, one, groups, x.shape)


def conv2d(x: torch.Tensor, weight: torch.Tensor, groups: int, is_packed: bool) -> torch.Tensor:
    """Convolution of [N, Cin, H, W] with `same` padding; a compiler does not see whether the weight is `packed`."""
    padding = weight.shape[-1] // 2
    if not is_packed:
        return torch.nn.functional.conv2d(x, weight, padding=padding, groups=groups)
    one, nothing = [1, 1], ('none', (), '')  # stride and dilation; fused with it
    return torch.ops.mkldnn._convolution_pointwise(x, weight, None, [padding] * 2, one, one, groups, *nothing)


def _has_amx() -> bool:
    probe = getattr(torch.cpu, '_is_amx_tile_supported', None)  # not public; torch 2.8 to 2.13 have it
    return bool(probe and probe())
