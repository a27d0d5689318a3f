"""Geometric warps of images without aliasing: interpolation between pixels made twice as dense (StyleGAN2-ADA)."""

import torch

# Low-pass filter of the sym6 wavelet; its sum is sqrt(2).
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466),
    *(0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578),
    *(0.0017677118642428036, -0.007800708325034148),
)
MARGIN = 3  # pixels that the filter reaches beyond the image


def translation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Matrices that move by x to the right and y down: [N] twice -> [N, 3, 3]."""
    matrix = torch.eye(3, dtype=x.dtype).repeat(len(x), 1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


def scaling(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Matrices that stretch x and y: [N] twice -> [N, 3, 3]."""
    return torch.stack([x, y, torch.ones_like(x)], dim=1).diag_embed()


def rotation(angle: torch.Tensor) -> torch.Tensor:
    """Matrices that turn x towards y, by radians: [N] -> [N, 3, 3]."""
    matrix = torch.eye(3, dtype=angle.dtype).repeat(len(angle), 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos()
    matrix[:, 1, 0] = angle.sin()
    matrix[:, 0, 1] = -angle.sin()
    return matrix


def warp(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Images whose pixel at p is what the given ones have at G p, reflected at their borders.

    No image's result depends on the others in the batch: the margins are as wide as they can be, and all arithmetic is
    elementwise.

    Args:
        images: float32 [N, C, H, W], height and width of at least 2.
        matrices: G, [N, 3, 3]; coordinates are pixels from the center of the image, x to the right, y down.
    """
    height, width = images.shape[2:]
    margins = (width - 1, width - 1, height - 1, height - 1)
    x = torch.nn.functional.pad(images, margins, mode='reflect')
    x = _upsample(_upsample(x, 2), 3)
    shape = [2 * (side + 2 * MARGIN) for side in (height, width)]
    # Between pixels twice as dense G is 2 G / 2, and the old center lies half a new pixel before the new one.
    half = torch.full((len(matrices),), 0.5, dtype=matrices.dtype)
    double = scaling(4 * half, 4 * half)
    matrices = translation(-half, -half) @ double @ matrices @ double.inverse() @ translation(half, half)
    x = torch.nn.functional.grid_sample(x, _grid(matrices.to(x), shape, x.shape[2:]), align_corners=False)
    return _downsample(_downsample(x, 2), 3)


def _grid(matrices: torch.Tensor, shape: list[int], source: torch.Size) -> torch.Tensor:
    """Where in an image of shape `source` the pixels of one of `shape` lie, as `grid_sample` wants it."""
    y, x = ((torch.arange(side, device=matrices.device) - (side - 1) / 2) for side in shape)
    x, y = x[None, None, :], y[None, :, None]
    rows = matrices[:, :2, :, None, None].unbind(dim=1)  # each [N, 3, 1, 1]
    places = [row[:, 0] * x + row[:, 1] * y + row[:, 2] for row in rows]  # [N, H, W] of x and of y
    return torch.stack([2 * place / side for place, side in zip(places, reversed(source), strict=True)], dim=-1)


def _upsample(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Twice as many pixels along a dimension: zeros between them, smoothed by the reversed filter."""
    length = x.shape[dim]
    padding = [0, 0, MARGIN, MARGIN] if dim == 2 else [MARGIN, MARGIN]
    x = torch.nn.functional.pad(x, padding)
    even = sum(SYM6[11 - 2 * i] * x.narrow(dim, i, length) for i in range(6))
    odd = sum(SYM6[10 - 2 * i] * x.narrow(dim, i + 1, length) for i in range(6))
    return torch.stack([even, odd], dim=dim + 1).flatten(dim, dim + 1)


def _downsample(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Every second pixel along a dimension after the filter, without the margin."""
    end = x.shape[dim] - 11
    index = [slice(None)] * x.ndim
    total = 0
    for k, tap in enumerate(SYM6):
        index[dim] = slice(1 + k, end + k, 2)
        total = total + tap * x[tuple(index)]
    return total
