"""Adam, its learning rate over time, and what is done about gradients that are not finite."""

import dataclasses
import math

import torch
from torch import nn

from torch_utils.finite import replace_nonfinite

LARGEST = torch.finfo(torch.float32).max
NONFINITE = {'zero': (0.0, 0.0), 'clamp': (0.0, 1e5)}  # what NaN and infinities become; `clamp` is EDM's


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Adam with a linear ramp-up and inverse square root decay of the learning rate (EDM2 eq. 67).

    Args:
        lr: alpha_ref, the highest learning rate.
        decay: t_ref, iterations after which it falls; 0 for never.
        rampup: Images over which it rises from 0.
        beta1, beta2, eps: Of Adam.
        clip: Largest norm of the gradient of a step; None for any.
        nonfinite: What becomes of gradient elements that are not finite: `zero`, or `clamp` (infinities to 1e5).
    """

    lr: float
    decay: float = 0.0
    rampup: int = 0
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float | None = None
    nonfinite: str = 'zero'

    def at(self, nimg: int, batch: int) -> float:
        """Learning rate of the step that begins after `nimg` images."""
        rate = self.lr
        if self.decay:
            rate /= math.sqrt(max(nimg / (self.decay * batch), 1))
        if self.rampup:
            rate *= min(nimg / self.rampup, 1)
        return rate

    def build(self, net: nn.Module) -> torch.optim.Adam:
        """The optimizer of a network; its learning rate is set at every step."""
        return torch.optim.Adam(net.parameters(), 0.0, (self.beta1, self.beta2), self.eps, fused=True)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [
            f'{field.name} must be a finite number in float32, not {value}'
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), float) and not abs(value) <= LARGEST
        ]
        if self.lr <= 0 or self.decay < 0 or self.rampup < 0:
            given = f'{self.lr}, {self.decay} and {self.rampup}'
            found.append(f'a positive learning rate, decay and ramp-up of at least 0 are needed, not {given}')
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps >= 0):
            found.append(f'Adam needs betas in [0, 1) and eps >= 0, not {self.beta1}, {self.beta2}, {self.eps}')
        if self.clip is not None and self.clip <= 0:
            found.append(f'clip must be positive, not {self.clip}')
        if self.nonfinite not in NONFINITE:
            found.append(f'nonfinite must be {" or ".join(NONFINITE)}, not {self.nonfinite}')
        return found


def clean_gradients(
    parameters: list[nn.Parameter], policy: str = 'zero', clip: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace gradient elements that are not finite, then scale the whole gradient down to a norm of `clip`.

    Args:
        parameters: Those without a gradient are skipped.
        policy: See `Optimizer.nonfinite`.
        clip: Largest norm; None for any.

    Returns:
        Number of replaced elements of each parameter, int64 [number of parameters], and the norm of the gradient
        before it was scaled, on the device.
    """
    nonfinite = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return nonfinite, torch.zeros((), device=parameters[0].device)
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if norm.device.type != 'cpu' or not norm.isfinite():  # looking makes a CPU wait for nothing
        counts = iter(replace_nonfinite(gradients, *NONFINITE[policy]))
        nonfinite = torch.stack([nonfinite[0] if p.grad is None else next(counts) for p in parameters])
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if clip is not None:
        torch._foreach_mul_(gradients, (clip / norm.clamp(min=clip)))
    return nonfinite, norm
