"""One page on runs: `python report.py runs/a runs/b --dest=report.html`."""

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from dataset.reader import ImageDataset
from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import atomic_path, make_folder, read_object
from evaluation.sweep import read_rows

EPILOG = """\b
Examples:
  python report.py demo/run --samples=demo/samples --metrics=demo/metrics.json --dest=demo/report.html
  python report.py runs/a runs/b --sweep=runs/a-sweep --samples=out/a --features=dinov2 --dest=report.html
"""
existing = click.Path(exists=True, path_type=Path)


@click.command(epilog=EPILOG)
@click.argument('folders', nargs=-1, required=True, metavar='RUN...', type=existing)
@click.option('--dest', required=True, metavar='FILE.html', type=click.Path(dir_okay=False, path_type=Path))
@click.option('--samples', metavar='DIR', type=existing, multiple=True, help='Images that generate.py made.')
@click.option('--metrics', metavar='FILE', type=existing, multiple=True, help='What calculate_metrics.py --json wrote.')
@click.option('--sweep', metavar='DIR', type=existing, multiple=True, help='What sweep.py wrote.')
@click.option('--data', metavar='ZIP|DIR', help='Training images, for the nearest; by default those of the first run.')
@click.option('--neighbours', type=click.IntRange(min=0), default=24, show_default=True, help='Samples to look up.')
@click.option('--features', metavar='pixels|dinov2', default='pixels', show_default=True, help='What they are near by.')
@click.option('--device', metavar='NAME', default='cpu', show_default=True, help='For the features.')
def main(folders, dest, samples, metrics, sweep, data, neighbours, features, device):
    """Put runs on one page that opens anywhere, without a network: curves of all runs over each other, sample grids
    over training time, nearest training images, metrics, EMA lengths, what differs between the configs, commands.
    """
    if importlib.util.find_spec('jinja2') is None or importlib.util.find_spec('matplotlib') is None:
        raise UserError("a report needs Jinja2 and matplotlib: pip install '.[report]'")
    from reporting.neighbours import features_of, find_neighbours
    from reporting.page import make_page
    from reporting.runs import read_runs

    runs = read_runs(list(folders))
    measured = [(path.name, result) for path in metrics for result in _results(path)]
    sweeps = [(path.name, read_rows(path)) for path in sweep]
    generations = [read_object(path / 'generation.json') for path in samples]
    data = data or runs[0].config['data']
    found = []
    if samples and neighbours and (data == '' or not Path(data).exists()):
        click.echo(f'note: the training images {data} are not here; --data tells where they are', err=True)
    elif samples and neighbours:
        found = find_neighbours(ImageDataset(samples[0]), ImageDataset(data), neighbours, features_of(features, device))
    grids = [grid for path in samples if (grid := path.with_name(f'{path.name}-grid.png')).exists()]
    said = [record.get('command') for record in generations]
    said += [result.get('run', {}).get('command') for _, result in measured]
    said.append(f'python {shlex.join(sys.argv)}')
    page = make_page(runs, found, features, sweeps, measured, grids, [command for command in said if command])
    make_folder(dest.parent)
    with atomic_path(dest) as beside:
        beside.write_text(page, encoding='utf-8')
    click.echo(f'{dest}: {", ".join(run.name for run in runs)}; {len(page) / 1e6:.1f} MB')


def _results(path: Path) -> list[dict[str, Any]]:
    """The results in a file of calculate_metrics.py: one, or one for each of several references."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(f'{path} is not JSON: {error}') from None
    results = content if isinstance(content, list) else [content]
    if not all(isinstance(result, dict) and isinstance(result.get('metrics'), dict) for result in results):
        raise UserError(f'{path} holds no metrics of calculate_metrics.py')
    return results


if __name__ == '__main__':
    cli.run(main)
