"""Depthwise 3x3 convolutions in channels-last against channels-first memory, measured side by side.

python benchmarks/depthwise_layout.py
"""

import statistics
import time

import click
import torch

SHAPES = ((64, 256, 8), (64, 256, 16), (16, 192, 64), (16, 768, 16))  # images, channels, side


def seconds(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    y = torch.nn.functional.conv2d(x, w, padding=1, groups=len(w))
    torch.autograd.grad(y, (x, w), g)
    return time.perf_counter() - start


@click.command()
def main() -> None:
    """Print the time of each layout and the median of their ratios, measured in turn."""
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
    print('| images x channels x side | channels-first ms | channels-last ms | ratio |')
    print('|---|---:|---:|---:|')
    for n, c, side in SHAPES:
        w = torch.randn(c, 1, 3, 3, requires_grad=True)
        first, g = torch.randn(n, c, side, side, requires_grad=True), torch.randn(n, c, side, side)
        last = first.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        g_last = g.contiguous(memory_format=torch.channels_last)
        pairs = [(seconds(first, w, g), seconds(last, w, g_last)) for _ in range(15)][3:]
        a, b = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        ratio = statistics.median(x / y for x, y in pairs)
        print(f'| {n} x {c} x {side} | {a:.1f} | {b:.1f} | {ratio:.1f} |')


if __name__ == '__main__':
    main()
