"""Does this machine compute what it should, and how fast? One page for anyone with a new GPU, in at most 8 minutes.

python -m benchmarks.gpu_check
python -m benchmarks.gpu_check --device=cpu --quick --dest=/tmp/gpu-check.md

Every check of `benchmarks.machine_checks` runs in a process of its own, which prints its lines as it finds them: what
ends it, an error, a crash or the clock, is a line on the page, too.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks.check_lines import Line
from benchmarks.machine_checks import CHECKS
from dnnlib import cli
from dnnlib.errors import UserError, choose

ROOT = Path(__file__).parent.parent
SECONDS = {'cuda': 480, 'cpu': 3600}  # for the whole page; a check may take what is left
SAID = 25  # last lines of a check that missed something
ERROR = r'(\[rank \d+\] )?([\w.]+(Error|Exception)\b|\S+: error:)'  # the first is the cause


def run(name: str, ranks: int, device: str, quick: bool, seconds: float) -> tuple[list[Line], str]:
    """The lines of a check, and all that it said; with ranks, torchrun starts as many."""
    torchrun = ['torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}', '-m'] if ranks else []
    command = [sys.executable, '-m', *torchrun, 'benchmarks.machine_checks', name, f'--device={device}']
    with tempfile.TemporaryDirectory(prefix='gpu-check-') as folder, open(Path(folder, 'said'), 'w+') as said:
        words = [*command, f'--folder={folder}', *['--quick'] * quick]
        process = subprocess.Popen(words, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
            ended = f'ended with exit code {status}' if status else ''
        except subprocess.TimeoutExpired:
            ended = f'did not end within {seconds:.0f} s'
        finally:  # after Ctrl-C, too, which a session of its own does not hear
            for stop in (signal.SIGTERM, signal.SIGKILL) if process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, stop)  # torchrun ends its ranks at the first
                    process.wait(30)
        said.seek(0)
        text = said.read()
    lines = [Line(**json.loads(row)) for row in text.splitlines() if row.startswith('{"what"')]
    if ended or not lines:
        rest = [row.strip() for row in text.splitlines() if row.strip() and not row.startswith('{"what"')]
        errors = [row for row in rest if re.match(ERROR, row)] or rest[-1:] or ['nothing was said']
        lines.append(Line(name, f'{ended or "found nothing"}: {errors[0][:300]}', 'ends well', False))
    return lines, text


def page(lines: list[Line], seconds: dict[str, float], said: dict[str, str]) -> str:
    """The lines as Markdown, and what checks that missed something said last."""
    words = {True: 'ok', False: '**missed**'}
    rows = [[words.get(line.ok, f'not checked: {line.why}'), line.what, line.measured, line.expected] for line in lines]
    text = ['# GPU check', '', summary(lines), '', '| | what | measured | expected |', '|---|---|---|---|']
    text += ['| ' + ' | '.join(' '.join(cell.split()).replace('|', '\\|') for cell in row) + ' |' for row in rows]
    took = ', '.join(f'{name} {value:.0f}' for name, value in seconds.items())
    text += ['', f'Seconds: {took}; together {sum(seconds.values()):.0f}.']
    for name, output in said.items():
        text += ['', f'## What {name} said last', '', *(f'    {row}' for row in output.splitlines()[-SAID:])]
    return '\n'.join(text) + '\n'


def summary(lines: list[Line]) -> str:
    """In a line."""
    missed, ok = (sum(line.ok is value for line in lines) for value in (False, True))
    return f'{missed} missed, {ok} ok, {len(lines) - missed - ok} not checked.'


@click.command()
@click.option('--device', type=click.Choice(['cpu', 'cuda']), help='By default the GPU where there is one.')
@click.option('--quick', is_flag=True, help='Small sizes, in about a minute on a CPU.')
@click.option('--checks', default=','.join(CHECKS), show_default=True, help='Which, in order.')
@click.option('--dest', default='gpu-check.md', show_default=True, type=click.Path(path_type=Path, dir_okay=False),
              help='The page; a JSON file lies beside it.')  # fmt: skip
def main(device, quick, checks, dest):
    """Check this machine, write a page, exit with 1 where something was missed."""
    gpus = torch.cuda.device_count()
    device = device or ('cuda' if gpus else 'cpu')
    if device == 'cuda' and not gpus:
        raise UserError(f'PyTorch {torch.__version__} sees no GPU here; --device=cpu checks the CPU')
    lines, seconds, said, start = [], {}, {}, time.monotonic()
    several = gpus if device == 'cuda' else 2
    for name in checks.split(','):
        choose('check', name, CHECKS)
        began = time.monotonic()
        for ranks in dict.fromkeys([1, several]) if name == 'ranks' else [0]:
            left = SECONDS[device] - (time.monotonic() - start)
            if left < 1:
                found, text = [Line(name, '', '', None, 'the others took all the time')], ''
            else:
                found, text = run(name, ranks, device, quick, left)
            for line in found:
                click.echo(
                    f'{ {True: "ok", False: "MISSED"}.get(line.ok, "not checked"):12}{line.what}: {line.measured}'
                )
            lines += found
            if any(line.ok is False for line in found):
                said[name] = said.get(name, '') + text
        if name == 'ranks' and several == 1:
            lines.append(Line('NCCL at all ranks', '', '', None, 'one GPU is all there is'))
        seconds[name] = round(time.monotonic() - began, 1)
        dest.write_text(page(lines, seconds, said), encoding='utf-8')  # so far
        record = {'seconds': seconds, 'lines': [vars(line) for line in lines]}
        dest.with_suffix('.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    click.echo(f'\n{summary(lines)} {dest}')
    sys.exit(any(line.ok is False for line in lines))


if __name__ == '__main__':
    cli.run(main)
