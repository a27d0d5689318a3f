"""The command-line options of a sampler, the same for all scripts that generate.

Each is a field of `SamplerConfig`, or of a sampler or a discretization, whose fields are options by themselves.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch

from diffusion.schedules import DISCRETIZATIONS
from dnnlib import cli
from dnnlib.configs import replaced, tag_of
from dnnlib.errors import UserError, quoted, unknown_choice
from dnnlib.parsing import parse_int_list
from networks.denoiser import EMULATED, is_emulated
from sampling.config import SamplerConfig
from sampling.portions import Execution
from sampling.table import SAMPLERS
from torch_utils import distributed

WORTH_COMPILING = 64  # images of a rank, about: a minute or two against a tenth to a third of each image's time
TABLES = {'sampler': SAMPLERS, 'disc': DISCRETIZATIONS}


def _owned() -> dict[str, dict[str, dataclasses.Field]]:
    """Options of the samplers and of the discretizations: table -> name -> field."""
    return {
        key: {field.name: field for cls in table.values() for field in dataclasses.fields(cls)}
        for key, table in TABLES.items()
    }


def _option(name: str, field: dataclasses.Field) -> Callable:
    """The option of a field: --S_churn for S_churn, --sigma-min for sigma_min."""
    flag = name if name[0].isupper() else name.replace('_', '-')
    default = field.default if not isinstance(field.default, float) else f'{field.default:g}'
    kind = type(field.default) if field.default is not None else str
    return click.option(f'--{flag}', name, type=kind, help=f'{field.metadata["help"]}  [default: {default}]')


def sampler_options(command: Callable) -> Callable:
    """Add them to a click command; what they give is for `sampler_config`."""
    options = [
        click.option('--sampler', metavar='|'.join(SAMPLERS), help='How to get from noise to images; docs/sampling.md '
                     'compares them.  [default: what the network file says, or heun]'),
        click.option('--steps', type=int, help='Sampling steps.  [default: what the network file says, or 32]'),
        click.option('--guidance-interval', type=cli.FLOATS, metavar='LO,HI',
                     help='Guide at noise levels in (LO, HI] only, such as 0.19,1.61; by default at all.'),
        click.option('--noise-device', metavar='cpu|cuda', help='Where random numbers are drawn: cuda gives the images '
                     'that EDM and EDM2 give for a seed.  [default: cpu, the same on every machine]'),
        click.option('--disc', metavar='|'.join(DISCRETIZATIONS),
                     help='Where the noise levels lie.  [default: what the network file says, or edm]'),
    ]  # fmt: skip
    options += [_option(name, field) for fields in _owned().values() for name, field in fields.items()]
    for option in reversed(options):
        command = option(command)
    return command


def execution_options(command: Callable) -> Callable:
    """Add to a click command how networks are evaluated; it takes an `execution`."""

    @click.option('--exact', is_flag=True, help='On a CPU: the same bits for every number of threads.')
    @click.option(
        '--compile', 'compiled', is_flag=True, help='Compile the networks first (minutes; pays on long runs).'
    )
    @click.option('--tf32', is_flag=True, help='On a GPU: faster products of float32, of 10 bits of mantissa.')
    @functools.wraps(command)
    def run(exact, compiled, tf32, **flags):
        return command(execution=Execution(exact, compiled, tf32), **flags)

    return run


def note_execution(execution: Execution, images: int, precision: str, device: torch.device) -> None:
    """Say, on rank 0, where compiling will hardly pay, and where a precision is slow."""
    if is_emulated(precision, device) and distributed.rank() == 0:
        click.echo(EMULATED, err=True)
    if execution.compiled and images < WORTH_COMPILING * distributed.world_size() and distributed.rank() == 0:
        click.echo(f'--compile takes minutes, and saves a part of each image: {images} are few for it', err=True)


def sampler_config(
    flags: dict[str, Any], guidance: float | None, own: dict[str, Any] | SamplerConfig | None = None
) -> SamplerConfig:
    """What the options ask for; where they say nothing, what the network file does.

    Args:
        flags: By name, as `take_sampler_flags` took them.
        guidance: Its weight, which each script asks for in its own way; None for what the file says.
        own: Settings in the network file, or a config.
    """
    config = own = own if isinstance(own, SamplerConfig) else SamplerConfig.from_json(own or {})
    given = {name: value for name, value in flags.items() if value is not None}
    changes = {name: given.pop(name) for name in TABLES if name in given and given[name] != _name(config, name)}
    for name in given:
        able = [sampler for sampler, cls in SAMPLERS.items() if name in {f.name for f in dataclasses.fields(cls)}]
        if len(able) == 1 and not flags['sampler']:
            changes['sampler'] = able[0]  # the only one with this option
    config = replaced(config, changes)
    if 'guidance_interval' in given:
        interval = given['guidance_interval']
        if len(interval) != 2:
            text = ','.join(f'{v:g}' for v in interval)
            raise UserError(f'the guidance interval must be LO,HI with 0 <= LO < HI, not {text}')
        given['guidance_interval'] = tuple(interval)
    if guidance is not None:
        given['guidance'] = guidance
    owned, found, changes = _owned(), [], {}
    for name, value in given.items():
        where = next(
            (key for key, fields in owned.items() if name in fields and hasattr(getattr(config, key), name)), ''
        )
        if not where and any(name in fields for fields in owned.values()):
            found.append(_not_taken(config, name))
        changes[f'{where}.{name}' if where else name] = value
    if found:
        raise UserError(found)
    asked = replaced(config, changes).check()
    if config.distilled and (asked.steps, asked.sampler, asked.disc) != (own.steps, own.sampler, own.disc):
        click.echo(f'warning: the network was distilled for {own.steps} steps of its own sampler', err=True)
    return asked


def parse_classes(text: str | None, names: Sequence[str]) -> list[int] | None:
    """Classes as `--class` gives them: `3`, `0-9`, `cat,dog`; a number is an index, a name is one of the network's."""
    if text is None:
        return None
    found: list[int] = []
    for part in [text] if text in names else text.split(','):
        if re.fullmatch(r'\s*\d+(-\d+)?\s*', part):
            found += parse_int_list(part)
        elif part.strip() in names:
            found.append(list(names).index(part.strip()))
        else:
            raise UserError(
                unknown_choice('class', part.strip(), names)
                if names
                else f'the network file names no classes; give --class as numbers, such as 0-9, not {quoted(part)}'
            )
    return found


def take_sampler_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `sampler_options` out of a command's flags."""
    names = [
        'sampler',
        'steps',
        'guidance_interval',
        'noise_device',
        'disc',
        *(name for f in _owned().values() for name in f),
    ]
    return {name: flags.pop(name) for name in dict.fromkeys(names)}


def _name(config: SamplerConfig, key: str) -> str:
    return tag_of(getattr(config, key), TABLES[key])


def _not_taken(config: SamplerConfig, name: str) -> str:
    """Message for an option that the chosen sampler or discretization has not."""
    for key, table in TABLES.items():
        able = [n for n, cls in table.items() if name in {f.name for f in dataclasses.fields(cls)}]
        if able:
            return f'the {key} {_name(config, key)} has no option {name}, which is one of {", ".join(able)}'
    raise AssertionError(name)
