"""Post-hoc EMA: networks of any EMA length from a run's snapshots."""

import os
from pathlib import Path

import click

from dnnlib import cli
from dnnlib.errors import UserError
from dnnlib.files import make_folder
from dnnlib.memory import free_memory
from dnnlib.parsing import parse_float_list
from dnnlib.plots import require_matplotlib
from ema.plots import plot_profiles
from ema.reconstruct import Plan, Wanted, find_snapshots
from networks.files import save_network
from training.config import KIMG

EPILOG = """\b
Examples:
  python reconstruct_phema.py --indir=runs/digits --outstd=0.075
  python reconstruct_phema.py --indir=runs/img64-s --outdir=out --outstd=0.010,0.020,...,0.100 --plot=profiles.png
  python reconstruct_phema.py --indir=runs/img64-s --outdir=out --outstd=lengths.json
"""


@click.command(epilog=EPILOG)
@click.option('--indir', required=True, metavar='DIR', help='Run folder with snapshots, or published ones.')
@click.option('--outdir', metavar='DIR', help='Where the networks go; by default the run folder.')
@click.option(
    '--outstd',
    required=True,
    metavar='LIST|FILE',
    help='EMA lengths wanted, such as 0.05,0.06,...,0.25, or a JSON file of lengths by patterns of parameter names, '
    'such as {"unet.enc.*": 0.05, "*": 0.10}.',
)
@click.option('--outnimg', type=cli.NIMG, help='Training time, such as 8Mi, or 8388k as in names; by default the last.')
@click.option('--outprefix', default='phema', show_default=True, metavar='NAME', help='Files are NAME-KIMG-STD.')
@click.option('--instd', type=cli.FLOATS, help='Use snapshots of these lengths only, such as 0.05.')
@click.option('--plot', metavar='PNG', help='Draw the profiles wanted and achieved.')
@click.option(
    '--memory', type=click.FloatRange(min=0), metavar='GIB', help='For the networks of a pass; half of what is free.'
)
def main(indir, outdir, outstd, outnimg, outprefix, instd, plot, memory):
    """Reconstruct EMA lengths that were not tracked, as least-squares combinations of the snapshots.

    Prints for each how far its profile is from the one wanted (relative L2 error), and the sum of the absolute
    coefficients, by which rounding of the snapshots is amplified.
    """
    if not outprefix or os.sep in outprefix:
        raise UserError(f'--outprefix={outprefix!r} cannot begin a file name')
    if outprefix.startswith('network-snapshot'):
        raise UserError(f'--outprefix={outprefix!r} would make the results look like snapshots of a run')
    if plot:
        require_matplotlib()
    wanted = parse_wanted(outstd)
    plan = Plan.make(find_snapshots(indir, instd), wanted, outnimg)  # mistakes are told before the folder is made
    folder = make_folder(outdir or indir)
    if plot:  # first: it takes a second, and shows whether it can be written
        plot_profiles(Path(plot), plan)
    memory = memory * 2**30 if memory is not None else free_memory() / 2
    if (passes := len(plan.passes(memory))) > 1:
        click.echo(f'{len(wanted)} networks in {passes} passes over the snapshots, for {memory / 2**30:.1f} GiB')
    for each, info, weights in plan.reconstruct(memory):
        path = folder / f'{outprefix}-{plan.nimg // KIMG:07d}-{each.label}.safetensors'
        save_network(path, weights, info)
        for std in dict.fromkeys(std for _, std in each.lengths):
            combination = plan.combinations[std]
            length = f'  length {std:g}' if each.std is None else ''
            click.echo(
                f'{path}{length}  profile error {combination.error:.4f}  amplification {combination.amplification:.2f}'
            )
    for warning in plan.warnings():
        click.echo(f'warning: {warning}', err=True)


def parse_wanted(text: str) -> list[Wanted]:
    """What --outstd asks for."""
    if text.endswith('.json'):
        return [Wanted.from_file(text)]
    return [Wanted.of_length(std) for std in parse_float_list(text)]


if __name__ == '__main__':
    cli.run(main)
