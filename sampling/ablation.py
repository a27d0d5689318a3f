"""EDM's general sampler, for any noise schedule sigma(t) and any scaling s(t) (EDM appendix C, table 1)."""

import dataclasses
import math

import torch

from diffusion import noise_schedules
from dnnlib.configs import option
from dnnlib.errors import unknown_choice
from sampling.samplers import Churned, Denoise, Noise, Observe, evaluate, of_step, steps

EPSILON_S = 1e-3  # where the VP schedule has the lowest noise level
SOLVERS = ('heun', 'euler')
SCHEDULES = ('linear', 'vp', 've')
SCALINGS = ('none', 'vp')


@dataclasses.dataclass(frozen=True)
class Path:
    """x(t) = s(t) (image + sigma(t) noise), and the ODE that follows it.

    Args:
        schedule: sigma(t), of `diffusion.noise_schedules`.
        scaled: Whether s = 1 / sqrt(1 + sigma^2), which makes x's variance about constant, instead of 1.
    """

    schedule: noise_schedules.VP | noise_schedules.VE | noise_schedules.Linear
    scaled: bool

    def time(self, sigma: float) -> float:
        """t with sigma(t) = sigma; 0 at 0, where VP schedules of some ranges have two such times."""
        return 0.0 if sigma == 0 else self.schedule.time(torch.tensor(sigma, dtype=torch.float64)).item()

    def at(self, t: float) -> tuple[float, float, float, float]:
        """sigma, d sigma / dt, s and ds / dt at t > 0."""
        time = torch.tensor(t, dtype=torch.float64)
        sigma, rate = self.schedule.sigma(time).item(), self.schedule.derivative(time).item()
        s = 1 / math.sqrt(1 + sigma**2) if self.scaled else 1.0
        return sigma, rate, s, -sigma * rate * s**3 if self.scaled else 0.0

    def slope(self, denoise: Denoise, x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """dx/dt = (sigma'/sigma + s'/s) x - sigma' s / sigma D(x / s; sigma) (EDM eq. 4), and that D."""
        sigma, rate, s, s_rate = self.at(t)
        denoised = evaluate(denoise, x / s, sigma)
        return (rate / sigma + s_rate / s) * x - (rate * s / sigma) * denoised, denoised


@dataclasses.dataclass(frozen=True)
class Ablation(Churned):
    """Euler's or a second-order method on the ODE of a chosen sigma(t) and s(t), with churn (EDM appendix C).

    Linear and unscaled, it is `heun` or `euler`. The VP schedule is that which has the given range of noise levels.

    Args:
        solver: `heun` is of second order, with `alpha`; `euler` of first.
        schedule: sigma(t): `linear` is t, `ve` sqrt(t), `vp` sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1).
        scaling: s(t): `none` is 1, `vp` 1 / sqrt(1 + sigma^2).
        alpha: Where in the step the slope is taken again: 1 is Heun's method, 1/2 the midpoint's, 2/3 Ralston's.
    """

    solver: str = option('heun', 'heun or euler, of the sampler ablation.')
    schedule: str = option('linear', 'Its noise level over time: linear, vp or ve.')
    scaling: str = option('none', "Its signal's scale over time: none or vp.")
    alpha: float = option(1.0, 'Where its second slope is taken: 1 Heun, 0.5 midpoint, 0.667 Ralston.')

    @property
    def order(self) -> int:
        """Of the solver."""
        return 2 if self.solver == 'heun' else 1

    def evaluations(self, num_steps: int) -> int:
        """Evaluations of the denoiser over the whole trajectory."""
        return self.order * (num_steps - 1) + 1

    def problems(self) -> list[str]:
        """Everything that is wrong with its options, in words."""
        found = super().problems()
        for name, choices in (('solver', SOLVERS), ('schedule', SCHEDULES), ('scaling', SCALINGS)):
            if getattr(self, name) not in choices:
                found.append(unknown_choice(name, getattr(self, name), choices))
        if not 0 < self.alpha <= 1:
            found.append(f'alpha must be greater than 0 and at most 1, not {self.alpha}')
        return found

    def path(self, sigma_min: float, sigma_max: float) -> Path:
        """The chosen sigma(t) and s(t) for a range of noise levels."""
        if self.schedule == 'vp':
            schedule = noise_schedules.VP.of_range(sigma_min, sigma_max, EPSILON_S)
        else:
            schedule = {'ve': noise_schedules.VE, 'linear': noise_schedules.Linear}[self.schedule]()
        return Path(schedule, self.scaling == 'vp')

    def __call__(
        self,
        denoise: Denoise,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        noise: Noise | None = None,
        observe: Observe | None = None,
        path: Path | None = None,
    ) -> torch.Tensor:
        """See `sampling.samplers`.

        Args:
            path: Instead of the one that has the range of `sigmas`.
        """
        num_steps = len(sigmas) - 1
        path = path or self.path(sigmas[num_steps - 1].item(), sigmas[0].item())
        x = x * path.at(path.time(sigmas[0].item()))[2]
        for i, sigma, sigma_next in steps(sigmas):
            D, s = of_step(denoise, sigma), path.at(path.time(sigma))[2]
            x, sigma_hat = self.churned(denoise, x / s, sigma, num_steps, noise)
            t, t_next = path.time(sigma_hat), path.time(sigma_next)
            x, h = x * path.at(t)[2], t_next - t
            slope, denoised = path.slope(D, x, t)
            if self.solver == 'heun' and i < num_steps - 1:
                again, _ = path.slope(D, x + self.alpha * h * slope, t + self.alpha * h)
                slope = (1 - 0.5 / self.alpha) * slope + (0.5 / self.alpha) * again
            x = x + h * slope
            if observe is not None:
                observe(i, sigma_hat, denoised)
        return x
