"""Solvers of the probability flow ODE and SDE: a frozen dataclass for each, whose fields are its options.

Every one is called as `sampler(denoise, x, sigmas, noise=None, observe=None) -> x`:

    denoise  D(x; sigma): the network, guided or not
    x        [N, C, H, W] of standard deviation sigmas[0]; its dtype is that of the arithmetic
    sigmas   [num_steps + 1] falling noise levels, the last one 0
    noise    source of fresh noise: x -> standard normal like x
    observe  is told of every step: its number, its noise level and the denoised estimate D(x; sigma)

and returns the state at noise level 0. It tells its `order` (the error falls with this power of the step size; None for
a stochastic one, whose error does not), the `evaluations` of D that it makes, and the `problems` of its options. The
arithmetic on x is made of additions, multiplications and divisions alone, which round alike for an image alone and in a
batch. All integrate in sigma, with x in the variance-exploding scale.

A new one is a class and a row of `sampling.table.SAMPLERS`; its fields become command-line options.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch

from diffusion.posterior import posterior
from dnnlib.configs import option

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [N,C,H,W], sigma scalar) -> D [N,C,H,W]
Noise = Callable[[torch.Tensor], torch.Tensor]  # x -> standard normal noise like x
Observe = Callable[[int, float, torch.Tensor], None]  # (step, sigma, D [N,C,H,W])


class Sampler:
    """What most samplers have in common: one evaluation a step, no options that could be wrong."""

    order: ClassVar[int | None]

    def evaluations(self, num_steps: int) -> int:
        """Evaluations of the denoiser over the whole trajectory."""
        return num_steps

    def problems(self) -> list[str]:
        """Everything that is wrong with its options, in words."""
        return []


@dataclasses.dataclass(frozen=True)
class Churned(Sampler):
    """A sampler that may add noise at every step (EDM algorithm 2); S_churn = 0 is deterministic.

    Args:
        S_churn: Amount over the whole trajectory.
        S_min, S_max: Noise levels at which it is added, ends included.
        S_noise: Standard deviation of the added noise relative to the exact one.
        noise_always: Whether a seed's noise is drawn at every step, used or not, as EDM does; EDM2 draws what it uses.
    """

    S_churn: float = option(0.0, 'Noise added on the way.')
    S_min: float = option(0.0, 'Lowest noise level of churn.')
    S_max: float = option(math.inf, 'Highest one.')
    S_noise: float = option(1.0, 'Inflation of added noise.')
    noise_always: bool = option(False, 'Draw noise also where none is added, as EDM does and EDM2 does not.')

    def gamma(self, sigma: float, num_steps: int) -> float:
        """Relative increase of the noise level before a step that begins at `sigma`."""
        if not self.S_min <= sigma <= self.S_max:
            return 0.0
        return min(self.S_churn / num_steps, math.sqrt(2) - 1)

    def problems(self) -> list[str]:
        """Everything that is wrong with its options, in words."""
        found = [
            f'{name} must be at least 0, not {getattr(self, name)}'
            for name in ('S_churn', 'S_min', 'S_noise')
            if not 0 <= getattr(self, name) < math.inf
        ]
        if not self.S_min <= self.S_max:
            found.append(f'S_min <= S_max is needed, not {self.S_min} and {self.S_max}')
        return found

    def churned(
        self, denoise: Denoise, x: torch.Tensor, sigma: float, num_steps: int, noise: Noise | None
    ) -> tuple[torch.Tensor, float]:
        """Raise x from `sigma` to sigma (1 + gamma) (EDM algorithm 2, lines 4 to 6); return it with its noise level.

        A denoiser that knows some noise levels only tells the nearest one by its `round`.
        """
        if self.S_churn == 0 or not (self.noise_always or self.S_min <= sigma <= self.S_max):
            return x, sigma
        assert noise is not None, 'churn needs a source of noise'
        epsilon = noise(x)
        sigma_hat = sigma * (1 + self.gamma(sigma, num_steps))
        if hasattr(denoise, 'round'):
            sigma_hat = denoise.round(torch.tensor(sigma_hat, dtype=torch.float64)).item()
        if sigma_hat <= sigma:
            return x, sigma
        return x + (math.sqrt(sigma_hat**2 - sigma**2) * self.S_noise) * epsilon, sigma_hat


class RungeKutta(Churned):
    """Euler's step, and Heun's correction of it in all steps but the last where `order` is 2."""

    def __call__(
        self,
        denoise: Denoise,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        noise: Noise | None = None,
        observe: Observe | None = None,
    ) -> torch.Tensor:
        """See the module."""
        num_steps = len(sigmas) - 1
        for i, sigma, sigma_next in steps(sigmas):
            D = of_step(denoise, sigma)
            x, sigma = self.churned(denoise, x, sigma, num_steps, noise)
            denoised = evaluate(D, x, sigma)
            slope = (x - denoised) / sigma  # dx/dsigma (EDM eq. 3 with sigma(t) = t)
            x_next = x + (sigma_next - sigma) * slope
            if self.order == 2 and i < num_steps - 1:
                slope_next = (x_next - evaluate(D, x_next, sigma_next)) / sigma_next
                x_next = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_next)
            x = x_next
            if observe is not None:
                observe(i, sigma, denoised)
        return x


class Heun(RungeKutta):
    """Heun's method (EDM algorithms 1 and 2): two evaluations a step, one in the last, which ends at D."""

    order = 2

    def evaluations(self, num_steps: int) -> int:
        """Evaluations of the denoiser over the whole trajectory."""
        return 2 * num_steps - 1


class Euler(RungeKutta):
    """Euler's method, with churn as in EDM algorithm 2; deterministic, it is DDIM: one evaluation a step."""

    order = 1


@dataclasses.dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): one evaluation a step, for few steps.

    An exponential integrator in lambda = -ln sigma: D is taken as constant over the step, with the value that the line
    through it and the one before has in the middle of the step,

        x_next = (sigma_next / sigma) x + (1 - e^-h) D',   h = lambda_next - lambda,   e^-h = sigma_next / sigma,
        D' = (1 + 1 / (2 r)) D - 1 / (2 r) D_previous,     r = h_previous / h

    The first step has no previous D and takes D' = D, as does the last one, where h is infinite.
    """

    order = 2

    def __call__(
        self,
        denoise: Denoise,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        noise: Noise | None = None,
        observe: Observe | None = None,
    ) -> torch.Tensor:
        """See the module."""
        previous, h_previous = None, 0.0
        for i, sigma, sigma_next in steps(sigmas):
            denoised = evaluate(of_step(denoise, sigma), x, sigma)
            h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
            towards = denoised
            if previous is not None and h < math.inf:
                r = h_previous / h
                towards = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
            x = (sigma_next / sigma) * x - math.expm1(-h) * towards
            previous, h_previous = denoised, h
            if observe is not None:
                observe(i, sigma, denoised)
        return x


@dataclasses.dataclass(frozen=True)
class Ancestral(Sampler):
    """DDPM's ancestral sampler: every step draws from the posterior at D, one evaluation (SiD2 appendix A.4).

    x_next = r x + (1 - r) D + std eps,   r = sigma_next^2 / sigma^2,   ln std^2 = f ln max + (1 - f) ln min,
    min = (1 - r) sigma_next^2,           max = (1 - r) sigma^2 (1 + sigma_next^2) / (1 + sigma^2)

    The bounds are those of the variance-preserving form, for data of unit variance and for a single image; the last
    step ends at D.

    Args:
        variance: f, where the variance lies between its bounds.
        clip: Largest value of D; 0 for no bound.
    """

    variance: float = option(0.3, 'Where the variance of a step lies between its bounds, 0 to 1.')
    clip: float = option(1.0, 'Largest value of a denoised image; 0 for none.')

    order = None

    def __call__(
        self,
        denoise: Denoise,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        noise: Noise | None = None,
        observe: Observe | None = None,
    ) -> torch.Tensor:
        """See the module."""
        assert noise is not None, 'ancestral sampling needs a source of noise'
        for i, sigma, sigma_next in steps(sigmas):
            denoised = evaluate(of_step(denoise, sigma), x, sigma)
            if self.clip:
                denoised = denoised.clamp(-self.clip, self.clip)
            x, least = posterior(x, denoised, sigma, sigma_next)
            if sigma_next > 0:
                most_to_least = (1 + sigma_next**-2) / (1 + sigma**-2)
                x = x + math.sqrt(least * most_to_least**self.variance) * noise(x)
            if observe is not None:
                observe(i, sigma, denoised)
        return x

    def problems(self) -> list[str]:
        """Everything that is wrong with its options, in words."""
        found = [] if 0 <= self.variance <= 1 else [f'variance must be from 0 to 1, not {self.variance}']
        return found + ([] if self.clip >= 0 else [f'clip must be at least 0, not {self.clip}'])


def steps(sigmas: torch.Tensor) -> Iterator[tuple[int, float, float]]:
    """Number of each step, the noise level where it begins, and where it ends."""
    return ((i, *pair) for i, pair in enumerate(itertools.pairwise(sigmas.tolist())))


def of_step(denoise: Denoise, sigma: float) -> Denoise:
    """What `denoise` is throughout the step that begins at noise level `sigma`.

    Guidance in an interval is switched between steps, not within them: a solver of second order needs one and the
    same denoiser for the evaluations of a step. Most denoisers are the same everywhere and know nothing of this.
    """
    return denoise.of_step(sigma) if hasattr(denoise, 'of_step') else denoise


def evaluate(denoise: Denoise, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """D(x; sigma) in x's dtype."""
    return denoise(x, torch.full((), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)
