"""TF32: on a GPU, faster products of float32, with factors of 10 bits of mantissa; off unless asked for."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether convolutions and matrix products in the block may use it; without a GPU that changes nothing."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = allowed
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
