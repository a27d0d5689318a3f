"""Evaluating a network so that what an image becomes does not depend on the images beside it.

A convolution or a matrix product of another size may be summed in another order, and so may one that is divided among
another number of threads: the same image then differs in its last bits. On a CPU networks are therefore evaluated a
fixed number of images at a time, by one thread each; several threads take several such portions. Within a portion,
neither an image's place nor its neighbours matter (a test holds the networks to that).
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from networks.config import NetworkConfig
from networks.denoiser import Denoiser

LARGEST_PORTION = 16  # images; tiny networks take as long for one as for several
PORTION_FEATURES = 2**18  # features of the finest level that are worth a call


def portion_size(config: NetworkConfig) -> int:
    """Images that a CPU evaluates at a time, a power of two: 16 of 8x8 pixels, 1 of 64x64 with 64 channels or more.

    It depends on the network alone. More would waste time where few images are asked for, as a portion is always
    filled up; fewer would waste it on small networks.
    """
    height, width = config.img_resolution
    channels = config.architecture.width
    size = LARGEST_PORTION
    while size > 1 and size * height * width * channels > PORTION_FEATURES:
        size //= 2
    return size


class Portions:
    """A network that is evaluated a fixed number of images at a time.

    Args:
        net: The network, in evaluation mode.
        size: Images at a time; a last portion is filled up with copies of its last image.
        workers: Threads that evaluate portions; None evaluates them one after the other in the caller's thread.
    """

    def __init__(self, net: Denoiser, size: int, workers: ThreadPoolExecutor | None = None):
        self.net = net
        self.size = size
        self.workers = workers

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """As `Denoiser.forward`: float [N, C, H, W], scalar sigma, float [N, label_dim] or None -> [N, C, H, W]."""
        xs = self._portions(x)
        rows = [None] * len(xs) if labels is None else self._portions(labels)
        run = map if self.workers is None else self.workers.map
        return torch.cat(list(run(self._evaluate, xs, [sigma] * len(xs), rows)))[: len(x)]

    def _portions(self, batch: torch.Tensor) -> list[torch.Tensor]:
        missing = -len(batch) % self.size
        if missing:
            batch = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
        return list(batch.split(self.size))

    @torch.inference_mode()  # for each thread anew
    def _evaluate(self, x, sigma, labels):
        return self.net(x, sigma, labels)


@contextlib.contextmanager
def evaluating(nets: list[Denoiser], batch_size: int) -> Iterator[list[Portions]]:
    """Give networks, all on one device, as sampling evaluates them.

    Args:
        nets: Networks in evaluation mode.
        batch_size: What a GPU evaluates at a time: always as many, so that it chooses (and compiles) its kernels once.
    """
    if not nets or nets[0].device.type != 'cpu':
        yield [Portions(net, batch_size) for net in nets]
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, 'evaluating', torch.set_num_threads, (1,)) as workers:
        try:
            yield [Portions(net, portion_size(net.config), workers) for net in nets]
        finally:
            torch.set_num_threads(threads)  # the workers' setting holds for all threads to come
