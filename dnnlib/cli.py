"""How every script of this project runs its command line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dnnlib.errors import UserError
from dnnlib.parsing import parse_float_list, parse_int_list, parse_nimg

USAGE_ERROR = 2  # exit code of a user's mistake, as in getopt and click


def run(command: click.Command) -> None:
    """Run a click command as a program: a user's mistake becomes one line on stderr and exit code 2.

    Mistakes are click's usage errors, `UserError`, and errors of the operating system about a file that the
    user named. Anything else is a bug and keeps its traceback. Under torchrun every rank says what stopped it.
    """
    try:
        status = command.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)  # Ctrl-C
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(USAGE_ERROR)
    except click.ClickException as error:
        _fail(' '.join(error.format_message().split()))
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f'{error.filename}: {error.strerror}')
    else:
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> None:
    rank = int(os.environ.get('RANK', '0'))
    where = f' on rank {rank}' if rank else ''
    click.echo(f'{Path(sys.argv[0]).name}: error{where}: {message}', err=True)
    sys.exit(USAGE_ERROR)


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
INTS = Parsed('list', parse_int_list)
FLOATS = Parsed('list', parse_float_list)
