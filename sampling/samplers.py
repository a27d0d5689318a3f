"""Solvers of the probability flow ODE and SDE, all of one signature; a new one is a function and a row of SAMPLERS.

Every solver is `solve(denoise, x, sigmas, noise=None, churn=None, observe=None) -> x`:

    denoise  D(x; sigma): the network, guided or not
    x        [N, C, H, W] of standard deviation sigmas[0]; its dtype is that of the arithmetic
    sigmas   [N + 1] decreasing noise levels, the last one 0
    noise    source of fresh noise, needed with churn
    churn    stochasticity; None is deterministic
    observe  is told of every step: its number, its noise level and the denoised estimate D(x; sigma)

and returns the state at noise level 0. All but the last step make the same number of evaluations; the last one, to
noise level 0, makes one: x becomes D(x; sigma) there, whatever the solver. The arithmetic on x is made of additions,
multiplications and divisions alone, which round alike for an image alone and in a batch.

The solvers integrate in sigma, with x in the variance-exploding scale. The general sampler of EDM's ablations
(schedules sigma(t) and scalings s(t)) will be a row here too.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch

from dnnlib.errors import UserError, unknown_choice

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [N,C,H,W], sigma scalar) -> D [N,C,H,W]
Noise = Callable[[torch.Tensor], torch.Tensor]  # x -> standard normal noise like x
Observe = Callable[[int, float, torch.Tensor], None]  # (step, sigma, D [N,C,H,W])


@dataclasses.dataclass(frozen=True)
class Churn:
    """Noise added at every step (EDM algorithm 2); S_churn = 0 is the deterministic sampler.

    Args:
        S_churn: Amount over the whole trajectory.
        S_min, S_max: Noise levels at which it is added, ends included.
        S_noise: Standard deviation of the added noise relative to the exact one.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def gamma(self, sigma: float, num_steps: int) -> float:
        """Relative increase of the noise level before a step that begins at `sigma`."""
        if not self.S_min <= sigma <= self.S_max:
            return 0.0
        return min(self.S_churn / num_steps, math.sqrt(2) - 1)

    def problems(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        found = [
            f'{name} must be at least 0, not {getattr(self, name)}'
            for name in ('S_churn', 'S_min', 'S_noise')
            if not 0 <= getattr(self, name) < math.inf
        ]
        if not self.S_min <= self.S_max:
            found.append(f'S_min <= S_max is needed, not {self.S_min} and {self.S_max}')
        return found


def heun(
    denoise: Denoise,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    noise: Noise | None = None,
    churn: Churn | None = None,
    observe: Observe | None = None,
) -> torch.Tensor:
    """Heun's method (EDM algorithms 1 and 2): order 2, two evaluations per step, 2 N - 1 for N steps."""
    num_steps = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        D = of_step(denoise, sigma)
        x, sigma = _add_churn(x, sigma, num_steps, noise, churn)
        denoised = _evaluate(D, x, sigma)
        slope = (x - denoised) / sigma  # dx/dsigma (EDM eq. 3 with sigma(t) = t)
        x_next = x + (sigma_next - sigma) * slope
        if i < num_steps - 1:
            slope_next = (x_next - _evaluate(D, x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (0.5 * slope + 0.5 * slope_next)
        x = x_next
        if observe is not None:
            observe(i, sigma, denoised)
    return x


def euler(
    denoise: Denoise,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    noise: Noise | None = None,
    churn: Churn | None = None,
    observe: Observe | None = None,
) -> torch.Tensor:
    """Euler's method, with churn as in EDM algorithm 2; deterministic, it is DDIM: order 1, one evaluation per step."""
    num_steps = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        D = of_step(denoise, sigma)
        x, sigma = _add_churn(x, sigma, num_steps, noise, churn)
        denoised = _evaluate(D, x, sigma)
        x = x + (sigma_next - sigma) * ((x - denoised) / sigma)
        if observe is not None:
            observe(i, sigma, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    noise: Noise | None = None,
    churn: Churn | None = None,
    observe: Observe | None = None,
) -> torch.Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): order 2, one evaluation per step, for few steps.

    An exponential integrator in lambda = -ln sigma: D is taken as constant over the step, with the value that the line
    through it and the one before has in the middle of the step,

        x_next = (sigma_next / sigma) x + (1 - e^-h) D',   h = lambda_next - lambda,   e^-h = sigma_next / sigma,
        D' = (1 + 1 / (2 r)) D - 1 / (2 r) D_previous,     r = h_previous / h

    The first step has no previous D and takes D' = D, as does the last one, where h is infinite.
    """
    assert churn is None or churn.S_churn == 0, 'dpm++2m is deterministic'
    previous, h_previous = None, 0.0
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas.tolist())):
        denoised = _evaluate(of_step(denoise, sigma), x, sigma)
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
class Sampler:
    """A row of SAMPLERS.

    Args:
        solve: Of the signature above.
        order: The error falls with this power of the step size.
        evaluations_per_step: Of the denoiser; the last step makes one.
        takes_churn: Whether it can add noise.
    """

    solve: Callable[..., torch.Tensor]
    order: int
    evaluations_per_step: int
    takes_churn: bool

    def evaluations(self, num_steps: int) -> int:
        """Of the denoiser over the whole trajectory."""
        return self.evaluations_per_step * (num_steps - 1) + 1


SAMPLERS: dict[str, Sampler] = {
    'heun': Sampler(heun, order=2, evaluations_per_step=2, takes_churn=True),
    'euler': Sampler(euler, order=1, evaluations_per_step=1, takes_churn=True),
    'dpm++2m': Sampler(dpmpp_2m, order=2, evaluations_per_step=1, takes_churn=False),
}


def get_sampler(name: str) -> Sampler:
    """Look a sampler up by its name.

    Raises:
        UserError: where there is none of that name.
    """
    if name not in SAMPLERS:
        raise UserError(unknown_choice('sampler', name, SAMPLERS))
    return SAMPLERS[name]


def of_step(denoise: Denoise, sigma: float) -> Denoise:
    """What `denoise` is throughout the step that begins at noise level `sigma`.

    Guidance in an interval is switched between steps, not within them: a solver of second order needs one and the
    same denoiser for the evaluations of a step. Most denoisers are the same everywhere and know nothing of this.
    """
    return denoise.of_step(sigma) if hasattr(denoise, 'of_step') else denoise


def _evaluate(denoise: Denoise, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """D(x; sigma) in x's dtype."""
    return denoise(x, torch.full((), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)


def _add_churn(
    x: torch.Tensor, sigma: float, num_steps: int, noise: Noise | None, churn: Churn | None
) -> tuple[torch.Tensor, float]:
    """Raise x from `sigma` to sigma (1 + gamma) (EDM algorithm 2, lines 4 to 6); return it with its noise level.

    Noise is drawn at every step, used or not, so that the stream of a seed does not depend on S_min and S_max.
    """
    if churn is None or churn.S_churn == 0:
        return x, sigma
    assert noise is not None, 'churn needs a source of noise'
    epsilon = noise(x)
    sigma_hat = sigma * (1 + churn.gamma(sigma, num_steps))
    if sigma_hat == sigma:
        return x, sigma
    return x + (math.sqrt(sigma_hat**2 - sigma**2) * churn.S_noise) * epsilon, sigma_hat
