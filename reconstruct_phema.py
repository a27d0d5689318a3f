"""Post-hoc EMA: networks of any EMA length from a run's snapshots."""

import click

from dnnlib import cli
from dnnlib.files import make_folder
from training.reconstruct import find_snapshots, plan, reconstruct

EPILOG = """\b
Examples:
  python reconstruct_phema.py --indir=runs/digits --outstd=0.075
  python reconstruct_phema.py --indir=runs/img64-s --outdir=out --outstd=0.010,0.020,...,0.100
"""


@click.command(epilog=EPILOG)
@click.option('--indir', required=True, metavar='DIR', help='Run folder with snapshots, or published ones.')
@click.option('--outdir', metavar='DIR', help='Where the networks go; by default the run folder.')
@click.option('--outstd', required=True, type=cli.FLOATS, help='EMA lengths wanted, such as 0.05,0.06,...,0.25.')
@click.option('--outnimg', type=cli.NIMG, help='Training time wanted; by default that of the last snapshot.')
def main(indir, outdir, outstd, outnimg):
    """Reconstruct EMA lengths that were not tracked, as least-squares combinations of the snapshots.

    Prints for each how far its profile is from the one wanted (relative L2 error), and the sum of the absolute
    coefficients, by which rounding of the snapshots is amplified.
    """
    snapshots = find_snapshots(indir)
    plan(snapshots, outstd, outnimg)  # mistakes are told before the folder is made
    for path, combination in reconstruct(snapshots, outstd, make_folder(outdir or indir), outnimg):
        click.echo(f'{path}  profile error {combination.error:.4f}  amplification {combination.amplification:.2f}')


if __name__ == '__main__':
    cli.run(main)
