"""A metric against EMA length: reconstruct, generate, measure, without writing a network."""

import json
import os
from pathlib import Path
from typing import Any

import click

from dnnlib import cli
from dnnlib.configs import differences
from dnnlib.errors import UserError
from dnnlib.files import locked_folder, make_folder, read_object, write_json
from dnnlib.memory import free_memory
from dnnlib.plots import require_matplotlib
from ema.reconstruct import find_snapshots
from evaluation.measure import Evaluator, Generation
from evaluation.options import measure_config, measure_options
from evaluation.records import format_int_list
from evaluation.sweep import Sweep, plot_sweep
from networks.encoders import load_encoder
from networks.files import load_network
from sampling.options import execution_options, note_execution, sampler_config, sampler_options, take_sampler_flags
from torch_utils import distributed
from torch_utils.tensor_files import library_versions

EPILOG = """\b
Examples:
  python sweep.py --indir=demo/run --outstd=0.05,0.10,...,0.25 --ref=demo/digits.zip --seeds=0-999 --outdir=demo/sweep
  torchrun --standalone --nproc_per_node=8 sweep.py --indir=runs/img64-s --outstd=0.02,0.03,...,0.10 \\
      --ref=img64-ref.safetensors --metrics=fid --gnet=WEAKER --guidance=1.0,1.2,1.4 --outdir=runs/sweep
"""


@click.command(epilog=EPILOG)
@click.option('--indir', required=True, metavar='DIR', help='Run folder with snapshots.')
@click.option('--outdir', required=True, metavar='DIR', help='For sweep.jsonl, sweep.csv and sweep.png.')
@click.option('--outstd', required=True, type=cli.FLOATS, help='EMA lengths, such as 0.05,0.06,...,0.25.')
@click.option('--outnimg', type=cli.NIMGS, help='Training times, such as 64Mi,128Mi; by default the last.')
@measure_options(True, 'Reference file, published statistics, or the real images; may be repeated.')
@click.option('--seeds', type=cli.INTS, default='0-49999', show_default=True, help='An image for each.')
@click.option('--gnet', 'gnet_path', metavar='FILE|URL', help='Guiding network file.')
@click.option('--guidance', type=cli.FLOATS, default='1', show_default=True, help='Guidance weights, such as 1,1.2.')
@sampler_options
@click.option('--batch', type=click.IntRange(min=1), default=64, show_default=True, help='Images at a time.')
@click.option('--precision', default='fp32', show_default=True, metavar='fp32|bf16|fp16', help='Of the features.')
@click.option('--instd', type=cli.FLOATS, help='Use snapshots of these lengths only.')
@click.option('--memory', type=click.FloatRange(min=0), metavar='GIB', help='For networks; half of what is free.')
@click.option('--vae', metavar='DIR', help='Folder of the VAE, for latents on machines without a network.')
@click.option('--device', metavar='NAME', help='cpu or cuda; by default the GPU where there is one.')
@execution_options
def main(execution, indir, outdir, outstd, outnimg, seeds, gnet_path, guidance, batch, precision, instd, memory, vae,
         device, **flags):  # fmt: skip
    """Measure networks of many EMA lengths (and training times, and guidance weights), a row for each.

    The same command continues a sweep that was stopped, and measures nothing twice; lengths, times and weights may be
    added. sweep.png shows each metric against EMA length.
    """
    require_matplotlib()
    config = measure_config(flags, batch, sources=())
    if gnet_path is None and any(weight != 1 for weight in guidance):
        raise UserError('guidance other than 1 needs a guiding network: --gnet=FILE')
    snapshots = find_snapshots(indir, instd)
    sampler = sampler_config(take_sampler_flags(flags), max(guidance, key=abs), snapshots[0].info.sampler)
    sweep = Sweep.make(snapshots, outstd, outnimg, guidance)  # mistakes are told before the folder is made
    settings: dict[str, Any] = {
        'indir': os.fspath(Path(indir).resolve()),
        'metrics': list(config.metrics),
        'ref': config.refs[0] if len(config.refs) == 1 else list(config.refs) or None,
        'any_weights': [config.detectors.inception, config.detectors.dinov2] if config.detectors.any_weights else None,
        'seeds': format_int_list(seeds),
        'guiding_net': gnet_path,
        'sampler': {key: value for key, value in sampler.to_json().items() if key != 'guidance'},
        'instd': instd,
        'precision': precision,
        'versions': library_versions(),
    }
    with distributed.session(device) as chosen:
        encoder = load_encoder(snapshots[0].info.encoder, chosen, vae)
        guiding_net = load_network(gnet_path, chosen, precision)[0] if gnet_path else None
        how = Generation(seeds, sampler, encoder, guiding_net, execution=execution)
        note_execution(execution, len(seeds), precision, chosen)
        evaluator = Evaluator(config, chosen)
        evaluator.prepare(how.describe(snapshots[0].info.config))
        if distributed.rank() == 0:
            folder = make_folder(outdir)
            with locked_folder(folder):
                check_settings(folder / 'sweep.json', settings)
                sweep.run(folder, evaluator, how, chosen, precision, _memory(memory))
                plot_sweep(folder)
            click.echo(f'{folder}/sweep.csv, {folder}/sweep.png')
        else:
            sweep.run(Path(outdir), evaluator, how, chosen, precision, _memory(memory))


def _memory(gib: float | None) -> float:
    """Bytes for this rank's networks."""
    share = int(os.environ.get('LOCAL_WORLD_SIZE', '1'))
    return gib * 2**30 if gib is not None else free_memory() / (2 * share)


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write what all rows share, or make sure that it is what it was."""
    if path.exists():
        found = differences(read_object(path), json.loads(json.dumps(settings)), {'versions'})
        if found:
            raise UserError([f'{path.parent} holds another sweep', *found])
    write_json(path, settings)


if __name__ == '__main__':
    cli.run(main)
