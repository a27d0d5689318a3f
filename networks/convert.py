"""Published networks to our files, and any network file to a plain state dict: `python -m networks.convert IN OUT`."""

import os
from pathlib import Path

import click
import torch
from tqdm import tqdm

from dnnlib import cli
from dnnlib.download import is_url
from dnnlib.errors import UserError, unknown_choice
from dnnlib.files import make_folder
from networks.denoiser import PRECISIONS
from networks.files import (
    NetworkFile,
    NetworkInfo,
    PublishedNetworkFile,
    fitting_network,
    open_network,
    save_network,
)
from torch_utils.tensor_files import save_tensors

SUFFIX = '.safetensors'
KEEP = 'keep'
EPILOG = """\b
Examples:
  python -m networks.convert edm2-img512-s-2147483-0.130.pkl edm2-img512-s.safetensors
  python -m networks.convert raw-snapshots/edm2-img512-s snapshots/edm2-img512-s
  python -m networks.convert phema-0002147-0.120.safetensors weights.safetensors --plain
"""


@click.command(epilog=EPILOG)
@click.argument('source', metavar='IN')
@click.argument('dest', metavar='OUT')
@click.option('--dtype', default=KEEP, show_default=True, metavar='keep|fp32|fp16|bf16', help='Of the parameters.')
@click.option('--plain', is_flag=True, help="A state dict and nothing else, by EDM2's names, for other programs.")
@click.option('--offline', is_flag=True, help='Download nothing; URLs come from the cache.')
def main(source, dest, dtype, plain, offline):
    """Convert the published EDM or EDM2 network IN (a file, a URL, or a folder of them) to OUT, running no code in it.

    The weights keep their precision. A folder is converted file by file, without those that are already there.
    """
    if Path(source).is_dir() and not is_url(source):
        convert_folder(source, dest, dtype, plain)
        return
    info = convert(source, dest, dtype, plain, offline)
    click.echo(f'{dest}: {_summary(info)}')


def convert(
    source: str | os.PathLike, dest: str | os.PathLike, dtype: str = KEEP, plain: bool = False, offline: bool = False
) -> NetworkInfo:
    """Write one network file, whole or not at all, and return what it is.

    Args:
        source: Path or URL of a published network, or of a network file of ours.
        dest: A name that ends in `.safetensors`.
        dtype: To store the parameters in: `fp32`, `fp16`, `bf16`; `keep` for that of the source. Buffers become
            float32, as in all our files.
        plain: Whether to write the tensors alone, without what rebuilds the network.
        offline: See `dnnlib.download`.
    """
    if Path(dest).suffix != SUFFIX:
        raise UserError(f'{dest} must end in {SUFFIX}')
    if dtype != KEEP and dtype not in PRECISIONS:
        raise UserError(unknown_choice('dtype', dtype, [KEEP, *PRECISIONS]))
    with open_network(source, offline) as file:
        net = fitting_network(file)
        names, constants = list(net.state_dict()), dict(net.named_buffers())
        make_folder(Path(dest).parent)
        weights = {name: _get(file, name, dtype, name in constants) for name in names}
        if plain:
            save_tensors(dest, weights, None)
        else:
            save_network(dest, weights, file.info, dtype=None)
        return file.info


def _get(file: NetworkFile | PublishedNetworkFile, name: str, dtype: str, constant: bool) -> torch.Tensor:
    """A tensor of an open file as it shall be stored."""
    if constant:
        return file.get(name).float()
    return file.get(name) if dtype == KEEP else file.get(name).to(PRECISIONS[dtype])


def convert_folder(source: str | os.PathLike, dest: str | os.PathLike, dtype: str = KEEP, plain: bool = False) -> None:
    """Convert all pickles of a folder, one after another, to files of the same name; those that exist stay.

    Raises:
        UserError: where there are none, or one is no network: those before it have been converted.
        OSError: where a file cannot be read or written.
    """
    paths = sorted(Path(source).glob('*.pkl'))
    if not paths:
        raise UserError(f'{source} holds no *.pkl')
    folder = make_folder(dest)
    missing = [path for path in paths if not (folder / f'{path.stem}{SUFFIX}').exists()]
    for path in tqdm(missing, unit='file', disable=None):
        convert(path, folder / f'{path.stem}{SUFFIX}', dtype, plain)
    click.echo(f'{folder}: {len(missing)} files converted, {len(paths) - len(missing)} were there')


def _summary(info: NetworkInfo) -> str:
    """A network in a line."""
    shape = 'x'.join(map(str, (info.config.img_channels, *info.config.img_resolution)))
    when = f'{info.nimg // 1000} kimg' if info.nimg else 'unknown training time'
    ema = '' if info.ema_std is None else f', EMA {info.ema_std:.3f}'
    kind = f'{info.config.label_dim} classes, encoder {info.encoder}'
    return f'{info.preset or "network"}, {shape}, {kind}, {when}{ema}'


if __name__ == '__main__':
    cli.run(main)
