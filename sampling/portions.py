"""Evaluating a network so that what an image becomes does not depend on the images beside it.

A convolution or a matrix product of another size may be summed in another order, and so may one that is divided among
another number of threads: the same image then differs in its last bits. On a CPU networks are therefore evaluated a
fixed number of images at a time. Within a portion, neither an image's place nor its neighbours matter (a test holds the
networks to that). What the threads do is decided by the networks, never by the batch: where portions hold one image,
all threads work on one portion after the other; where a network is so small that they hold several, each thread takes
portions of its own. The latter, asked for as `exact`, makes the bits independent of the number of threads, too.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.folding import folded
from torch_utils.tf32 import tf32
from torch_utils.threads import one_thread_each

LARGEST_PORTION = 16  # images; tiny networks take as long for one as for several
PORTION_FEATURES = 2**17  # features of the finest level that are worth a call


@dataclasses.dataclass(frozen=True)
class Execution:
    """How networks are evaluated; it moves the last bits at most, except by `tf32`.

    Args:
        exact: On a CPU, whether the bits are to be the same for every number of threads.
        compiled: Whether to compile the networks; takes minutes, unless PyTorch's cache on disk holds them already.
        tf32: On a GPU, whether products of float32 may be of TF32 (10 bits of mantissa).
    """

    exact: bool = False
    compiled: bool = False
    tf32: bool = False


EAGER = Execution()


def portion_size(config: NetworkConfig) -> int:
    """Images that a CPU evaluates at a time, a power of two: 16 of 8x8 pixels, 1 of 64x64 with 32 channels or more.

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
        execution: How; it is compiled for portions of this size.
    """

    def __init__(
        self, net: Denoiser, size: int, workers: ThreadPoolExecutor | None = None, execution: Execution = EAGER
    ):
        self.net = net
        self.size = size
        self.workers = workers
        self.tf32 = execution.tf32 and workers is None  # it is a setting of all threads together
        self.forward = torch.compile(net, dynamic=False) if execution.compiled else net
        self.ready = not execution.compiled

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """As `Denoiser.forward`: float [N, C, H, W], scalar sigma, float [N, label_dim] or None -> [N, C, H, W]."""
        xs = self._portions(x)
        rows = [None] * len(xs) if labels is None else self._portions(labels)
        run = map if self.workers is None else self.workers.map
        if not self.ready:  # compile in one thread, which has the others' setting, and with the weights folded
            list(run(self._prepare, xs[:1], [sigma], rows[:1]))
        return torch.cat(list(run(self._evaluate, xs, [sigma] * len(xs), rows)))[: len(x)]

    def _portions(self, batch: torch.Tensor) -> list[torch.Tensor]:
        missing = -len(batch) % self.size
        if missing:
            batch = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
        return list(batch.split(self.size))

    @torch.inference_mode()  # it is a state of each thread
    def _evaluate(self, x, sigma, labels):
        with tf32(True) if self.tf32 else contextlib.nullcontext():
            return self.forward(x, sigma, labels)

    @torch.inference_mode()
    def _prepare(self, x, sigma, labels):
        self.net(x, sigma, labels)
        self._evaluate(x, sigma, labels)
        self.ready = True


@contextlib.contextmanager
def evaluating(nets: list[Denoiser], batch_size: int, execution: Execution = EAGER) -> Iterator[list[Portions]]:
    """Give networks, all on one device, as sampling evaluates them: their weights computed once.

    Args:
        nets: Networks in evaluation mode, whose parameters do not change meanwhile. One that follows itself is given
            batches of twice the size.
        batch_size: What a GPU evaluates at a time: always as many, so that it chooses (and compiles) its kernels once.
        execution: How.
    """
    with folded(nets):
        if not nets or nets[0].device.type != 'cpu':
            sizes = [batch_size * (1 + any(net is other for other in nets[:i])) for i, net in enumerate(nets)]
            yield [Portions(net, size, None, execution) for net, size in zip(nets, sizes, strict=True)]
            return
        sizes = [portion_size(net.config) for net in nets]
        if max(sizes) == 1 and not execution.exact:
            yield [Portions(net, 1, None, execution) for net in nets]
            return
        with one_thread_each() as workers:
            yield [Portions(net, size, workers, execution) for net, size in zip(nets, sizes, strict=True)]
