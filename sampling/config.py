"""How images are generated."""

import dataclasses
import math
from typing import Any

import torch

from diffusion.preconditioning import Preconditioning
from diffusion.schedules import DISCRETIZATIONS, EDM
from dnnlib.configs import from_json, tagged, to_json
from dnnlib.errors import UserError, unknown_choice
from sampling.samplers import Heun
from sampling.table import SAMPLERS

NOISE_DEVICES = ('cpu', 'cuda')


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How images are generated; the defaults are EDM2's (EDM2 table 6).

    Args:
        steps: Number of noise levels above 0.
        sampler: With its options, see `sampling.samplers`.
        disc: Where the noise levels lie, see `diffusion.schedules`.
        guidance: Weight of the main network against the guiding one; 1 is no guidance.
        guidance_interval: Noise levels (low, high] at which there is guidance.
        noise_device: Where random numbers are drawn, `cpu` or `cuda`.
        distilled: Whether the network was trained for these steps of this sampler, and takes no others well.
    """

    steps: int = 32
    sampler: Any = tagged(SAMPLERS, default=Heun())
    disc: Any = tagged(DISCRETIZATIONS, default=EDM())
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    noise_device: str = 'cpu'
    distilled: bool = False

    def sigmas(self, preconditioning: Preconditioning | None = None) -> torch.Tensor:
        """The noise levels, float64 [steps + 1], the last one 0; within the range that the network knows, if given."""
        if preconditioning is None:
            return self.disc.sigmas(self.steps)
        sigmas = known_range(self.disc, preconditioning).sigmas(self.steps)
        return torch.cat([preconditioning.round(sigmas[:-1]), sigmas[-1:]])

    @property
    def evaluations(self) -> int:
        """Evaluations of the main network for an image."""
        return self.sampler.evaluations(self.steps)

    def to_json(self) -> dict[str, Any]:
        """As plain values; `from_json` is its inverse."""
        return to_json(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> 'SamplerConfig':
        """Rebuild a config that `to_json` wrote."""
        return from_json(cls, values).check()

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [] if math.isfinite(self.guidance) else [f'guidance must be a finite number, not {self.guidance}']
        if self.steps < 1:
            found.append(f'steps must be at least 1, not {self.steps}')
        low, high = self.guidance_interval
        if not 0 <= low < high:
            found.append(f'the guidance interval must be LO,HI with 0 <= LO < HI, not {low:g},{high:g}')
        if self.noise_device not in NOISE_DEVICES:
            found.append(unknown_choice('noise device', self.noise_device, NOISE_DEVICES))
        return [*found, *self.disc.problems(), *self.sampler.problems()]

    def check(self) -> 'SamplerConfig':
        """Return self."""
        if found := self.problems():
            raise UserError(found)
        return self


def known_range(disc: Any, preconditioning: Preconditioning) -> Any:
    """A discretization whose ends are within the noise levels that a network knows."""
    ends = {'sigma_min': max(disc.sigma_min, preconditioning.sigma_min),
            'sigma_max': min(disc.sigma_max, preconditioning.sigma_max)}  # fmt: skip
    return disc if ends == {name: getattr(disc, name) for name in ends} else dataclasses.replace(disc, **ends)
