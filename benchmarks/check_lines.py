"""Lines of the page of `benchmarks.gpu_check`, and what several checks measure with."""

import dataclasses
import time
from collections.abc import Callable

import torch

from networks.denoiser import Denoiser

# Of float32, relative. Weights rounded to 1e-5 move golden evaluations by up to 1.4e-4, and what three steps of Adam
# make of them by up to 1e-3, which the golden file calls safe; the 11 bits of TF32 move evaluations by 1e-3 and more.
EVALUATED, TRAINED = 2e-4, 1e-3


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the page; `ok` is None where nothing was checked, and `why` says why."""

    what: str
    measured: str
    expected: str
    ok: bool | None
    why: str = ''


def within(what: str, value: float, most: float, note: str = '', least: float = 0.0) -> Line:
    """A number that is to lie between two others; NaN does not."""
    expected = f'{least:g} to {most:g}' if least else f'at most {most:g}'
    return Line(what, f'{value:.2g}' + (f' ({note})' if note else ''), expected, least <= value <= most)


def apart(actual: dict, expected: dict) -> float:
    """Largest difference, relative to the root mean square of all that is expected."""
    a, b = (torch.cat([torch.as_tensor(d[name]).double().flatten() for name in expected]) for d in (actual, expected))
    return ((a - b).abs().max() / b.square().mean().sqrt()).item()


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def busy(net: Denoiser) -> Denoiser:
    """A network with no gain at 0, where it would pass nothing on."""
    for name, parameter in net.named_parameters():
        if name.endswith('_gain'):
            torch.nn.init.ones_(parameter)
    return net
