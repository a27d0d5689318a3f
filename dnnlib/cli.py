"""How every script of this project runs its command line."""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from dnnlib.errors import UserError
from dnnlib.parsing import parse_float_list, parse_int_list, parse_nimg

USAGE_ERROR = 2  # exit code of a user's mistake, as in getopt and click
# Options of EDM2 that have another name or unit here, see docs/from-edm2.md.
RENAMED = {
    '--fp16': '--fp16 is --precision=fp16 here',
    '--bench': '--bench is not needed here; --compile makes networks faster',
    '--sigma_min': '--sigma_min is --sigma-min here',
    '--sigma_max': '--sigma_max is --sigma-max here',
    '--outkimg': '--outkimg is --outnimg here, in images: --outnimg=8388k for --outkimg=8388',
    '--inprefix': '--inprefix is not there: snapshots are found by their names; put others in another folder',
    '--skip': '--skip is not there: ask only for what is missing; generate.py has --skip-existing',
    '--num': '--num=N is --subset=N of calc here, and --seeds=0-M of gen',
    '--seed': '--seed=S is --seeds=S-T here, an image for each',
    '--max-images': '--max-images is an option of convert; encode takes what that has made',
    '--model-url': '--model-url is --vae=DIR here',
}


def run(command: click.Command) -> None:
    """Run a click command as a program: a user's mistake becomes one line on stderr and exit code 2.

    Mistakes are click's usage errors, `UserError`, and errors of the operating system about a file that the
    user named. Anything else is a bug and keeps its traceback. Under torchrun every rank says what stopped it.
    """
    try:
        status = command.main(standalone_mode=False)
    except click.exceptions.Abort:
        _exit(130)  # Ctrl-C
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(USAGE_ERROR)
    except click.NoSuchOption as error:
        _fail(RENAMED.get(error.option_name) or error.format_message())
    except click.ClickException as error:
        _fail(' '.join(error.format_message().split()))
    except UserError as error:
        if error.everywhere and os.environ.get('RANK', '0') != '0':
            _exit(USAGE_ERROR)
        _fail(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            _fail(f'{error.filename}: {error.strerror}')
        if 'WORLD_SIZE' not in os.environ:
            raise
        _die_at_once()
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _die_at_once() -> None:
    """Print the traceback with this rank's number, and end."""
    text = traceback.format_exc()
    tag = f'[rank {os.environ.get("RANK", "0")}] '
    sys.stderr.write(''.join(tag + line for line in text.splitlines(keepends=True)))
    _exit(1)


def _exit(status: int) -> NoReturn:
    """End the process; one of several ranks does so without taking leave of others that may wait for it."""
    if int(os.environ.get('WORLD_SIZE', '1')) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fail(message: str) -> None:
    rank = int(os.environ.get('RANK', '0'))
    where = f' on rank {rank}' if rank else ''
    click.echo(f'{Path(sys.argv[0]).name}: error{where}: {message}', err=True)
    _exit(USAGE_ERROR)


class GroupedOption(click.Option):
    """An option that `GroupedCommand` shows under a title of its own; see `group`."""

    def __init__(self, *args: Any, group: str = 'Options', **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose --help shows its options in groups, in the order in which they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """click's hook."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups.setdefault(getattr(parameter, 'group', 'Options'), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def group(title: str) -> Callable[..., Callable]:
    """`click.option` for the options of one group of a `GroupedCommand`."""
    return functools.partial(click.option, cls=GroupedOption, group=title)


class Parsed(click.ParamType):
    """A command-line value that one of the parsers of `dnnlib.parsing` reads.

    Args:
        name: What --help calls it.
        parse: text -> value, raising UserError.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name = name
        self.parse = parse

    def convert(self, value, param, ctx):
        """click's hook: defaults that are values already pass through."""
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except UserError as error:
            self.fail(str(error), param, ctx)


NIMG = Parsed('images', parse_nimg)
NIMGS = Parsed('images', lambda text: [parse_nimg(part) for part in text.split(',')])
INTS = Parsed('list', parse_int_list)
FLOATS = Parsed('list', parse_float_list)
