"""The command-line options of a sampler, the same for all scripts that generate."""

from collections.abc import Callable
from typing import Any

import click

from dnnlib import cli
from sampling.pipeline import SamplerConfig
from sampling.samplers import SAMPLERS, Churn

OPTIONS = [
    click.option('--sampler', 'name', default='heun', show_default=True, metavar='|'.join(SAMPLERS),
                 help='heun makes 2 N - 1 evaluations in N steps, the others N.'),
    click.option('--steps', type=int, default=32, show_default=True, help='Sampling steps.'),
    click.option('--guidance-interval', type=cli.FLOATS, metavar='LO,HI',
                 help='Guide at noise levels in (LO, HI] only, such as 0.19,1.61; by default at all.'),
    click.option('--sigma-min', type=float, default=0.002, show_default=True, help='Lowest noise level.'),
    click.option('--sigma-max', type=float, default=80.0, show_default=True, help='Highest noise level.'),
    click.option('--rho', type=float, default=7.0, show_default=True, help='Spacing of the noise levels.'),
    click.option('--S_churn', 'S_churn', type=float, default=0.0, show_default=True, help='Noise added on the way.'),
    click.option('--S_min', 'S_min', type=float, default=0.0, show_default=True, help='Lowest noise level of churn.'),
    click.option('--S_max', 'S_max', type=float, default=float('inf'), show_default=True, help='Highest one.'),
    click.option('--S_noise', 'S_noise', type=float, default=1.0, show_default=True, help='Inflation of added noise.'),
]  # fmt: skip


def sampler_options(command: Callable) -> Callable:
    """Add them to a click command; what they give is for `sampler_config`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def sampler_config(flags: dict[str, Any], guidance: float) -> SamplerConfig:
    """Take the values of `sampler_options` out of a command's flags.

    Args:
        flags: By name; those of the sampler are removed.
        guidance: Its weight, which each script asks for in its own way.

    Raises:
        UserError: with all problems.
    """
    churn = Churn(**{name: flags.pop(name) for name in ('S_churn', 'S_min', 'S_max', 'S_noise')})
    given = {name: flags.pop(name) for name in ('name', 'steps', 'sigma_min', 'sigma_max', 'rho')}
    interval = flags.pop('guidance_interval')
    if interval is not None:
        given['guidance_interval'] = tuple(interval)
    return SamplerConfig(**given, guidance=guidance, churn=churn).check()
