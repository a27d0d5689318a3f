"""What a network costs: parameters, operations, memory, without allocating it."""

import dataclasses
import json

import click

from dnnlib import cli
from dnnlib.configs import parse_setting, tag_of
from dnnlib.errors import UserError
from networks.complexity import Complexity, complexity, saved_bytes
from networks.config import NetworkConfig
from networks.families import ARCHITECTURES
from networks.files import read_info
from training.presets.paper_tables import TABLES, PublishedRow
from training.presets.table import get_preset, make_config

EPILOG = """\b
Examples:
  python count_flops.py --preset=edm2plus-img64-s
  python count_flops.py --net=runs/digits/phema-0000049-0.120.safetensors --json
  python count_flops.py --tables
"""


@click.command(epilog=EPILOG)
@click.argument('path', metavar='[NET]', required=False)
@click.option('--preset', metavar='NAME', help='Training preset.')
@click.option('--set', 'settings', multiple=True, metavar='FIELD=VALUE', help="Change a field of the preset's config.")
@click.option('--net', 'net_path', metavar='FILE|URL', help='Network file, or a published EDM or EDM2 pickle.')
@click.option('--offline', is_flag=True, help='Download nothing; a URL comes from the cache.')
@click.option('--tables', is_flag=True, help="The size columns of the papers' tables beside ours, as Markdown.")
@click.option('--json', 'as_json', is_flag=True, help='For programs.')
def main(path, preset, settings, net_path, offline, tables, as_json):
    """Count parameters, operations and memory of one forward pass at batch 1.

    GFLOPs are in the papers' convention (EDM2 appendix D.5): the formulas as they are written, a multiply-accumulate
    counts as one. No weight is allocated.
    """
    if sum(map(bool, (path, preset, net_path, tables))) != 1:
        raise UserError('give one of --preset=NAME, --net=FILE and --tables')
    net_path = net_path or path
    if tables:
        counted = _count_tables()
        click.echo(json.dumps(counted, indent=2) if as_json else _markdown(counted))
        return
    if preset:
        config = make_config(preset, dict(map(parse_setting, settings))).network.check()
    else:
        config = read_info(net_path, offline).config
    cost, saved = complexity(config), saved_bytes(config)
    if as_json:
        values = {'config': config.to_json(), **dataclasses.asdict(cost), 'saved_bytes': saved}
        click.echo(json.dumps(values, indent=2))
    else:
        click.echo(_report(config, cost, saved))
        if preset and get_preset(preset).result:
            click.echo(f'\nthe paper reports {get_preset(preset).result}')


def _report(config: NetworkConfig, cost: Complexity, saved: int) -> str:
    """The numbers for people."""
    shape = 'x'.join(map(str, config.image_shape))
    numbers = ', '.join(f'{name} {value}' for name, value in vars(config.architecture).items())
    described = f'{tag_of(config.architecture, ARCHITECTURES)}: {numbers}'
    lines = [
        f'{described}, images {shape}, {config.label_dim} classes',
        '',
        f'{"parameters":<44}{cost.parameters / 1e6:12.2f} M',
        f'{"operations, papers convention":<44}{cost.operations / 1e9:12.2f} GFLOPs',
        f'{"multiply-accumulates of convolutions, matmuls":<44}{cost.macs / 1e9:11.2f} G',
        f'{"activations of one forward pass, at their peak":<44}{cost.peak_bytes / 2**20:10.1f} MiB',
        f'{"activations kept for training, per image":<44}{saved / 2**20:12.1f} MiB',
    ]
    for title, shares in (('operation', cost.by_kind), ('resolution', cost.by_place)):
        lines += ['', f'{title:<44}{"GFLOPs":>12}{"share":>9}']
        rows = [(name, n) for name, n in shares.items() if n >= 1e-4 * cost.operations]
        lines += [f'{name:<44}{n / 1e9:12.3f}{n / cost.operations:9.2%}' for name, n in rows]
    return '\n'.join(lines)


def _sizes(row: PublishedRow, unit: str, counted: dict[NetworkConfig, Complexity]) -> tuple[float, float]:
    """Mparams, and GFLOPs or GMACs, of a row's networks together; `counted` remembers those of earlier rows."""
    mparams = gflops = 0.0
    for name in row.presets:
        name, _, label_dim = name.partition('/')
        config = get_preset(name).network
        if label_dim:
            config = dataclasses.replace(config, label_dim=int(label_dim))
        if config not in counted:
            counted[config] = complexity(config)
        mparams += counted[config].parameters / 1e6
        gflops += (counted[config].macs if unit == 'GMACs' else counted[config].operations) / 1e9
    return mparams, gflops


def _as_printed(value: float, printed: str) -> str:
    """`value` with as many decimals as the paper prints."""
    return f'{value:.{len(printed.partition(".")[2])}f}'


def _count_tables() -> list[dict]:
    """The papers' tables as plain values, with our sizes in every row."""
    result, counted = [], {}
    for table in TABLES:
        rows = []
        for row in table.rows:
            mparams, gflops = _sizes(row, table.unit, counted)
            rows.append({**dataclasses.asdict(row), 'our_mparams': mparams, 'our_gflops': gflops})
        result.append({'title': table.title, 'note': table.note, 'unit': table.unit, 'rows': rows})
    return result


def _markdown(tables: list[dict]) -> str:
    """What `_count_tables` gives, with a numbered note wherever ours differs from what the paper prints."""
    lines, notes = [], []
    for table in tables:
        lines += [f'### {table["title"]}', '', *([table['note'], ''] if table['note'] else [])]
        lines += [
            f'| Architecture | Mparams | paper | {table["unit"]} | paper | FID-50K (paper) |',
            '|---|---:|---:|---:|---:|---:|',
        ]
        for row in table['rows']:
            cells = []
            for name in ('mparams', 'gflops'):
                value, printed = row[f'our_{name}'], row[name]
                ours = _as_printed(value, printed)
                if printed and ours != printed and not table['note']:
                    notes.append(f'{row["label"]}: {value:.2f} here, {printed} in the paper. {row["note"]}'.strip())
                    ours += f' [{len(notes)}]'
                cells += [ours, printed]
            lines.append(f'| {row["label"]} | {" | ".join(cells)} | {row["fid"]} |')
        lines.append('')
    lines += [f'[{i}] {note}' for i, note in enumerate(notes, start=1)]
    return '\n'.join(lines)


if __name__ == '__main__':
    cli.run(main)
