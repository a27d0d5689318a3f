"""Draw docs/branches.png from the table of residual branches: `python -m docs.draw_branches`."""

import click
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dnnlib import cli
from dnnlib.files import atomic_path
from networks.edm2.branches import BRANCHES, DECODER_ONLY, LAYERS, MODULATE, SILU, Branch

COLOURS = {'dense': '#e4572e', 'depthwise': '#4c9f70', 'pointwise': '#3f88c5', SILU: '#d9d9d9', MODULATE: '#f3a712'}
WIDTHS = {'out': 1.0, 'wide': 1.7}  # of the drawn boxes: how many channels come out


def rows(branch: Branch) -> list[tuple[str, str, float]]:
    """(text, colour, width) of each step, from input to output."""
    result, width = [], 1.0
    for word in branch.steps.split():
        step = word.removeprefix(DECODER_ONLY)
        note = '\nin decoders' if word != step else ''
        if step == SILU:
            result.append(('MP-SiLU', COLOURS[SILU], width))
        elif step == MODULATE:
            result.append(('x embedding', COLOURS[MODULATE], width))
        else:
            kind, out = LAYERS[step]
            kernel = branch.kernel_of(kind)
            width = WIDTHS.get(out, width)
            text = {'dense': 'conv', 'depthwise': 'dwconv', 'pointwise': 'conv'}[kind]
            result.append((f'{text} {kernel}x{kernel}{note}', COLOURS[kind], width))
    return result


def fingerprint() -> str:
    """What is drawn, as text; it is stored in the picture, and a test compares the two."""
    return repr({name: rows(branch) for name, branch in BRANCHES.items()})


def draw() -> Figure:
    """All branches side by side, the input at the bottom; wide boxes have more channels."""
    figure = Figure(figsize=(2.05 * len(BRANCHES), 7.2), layout='constrained')
    tallest = max(len(rows(branch)) for branch in BRANCHES.values())
    for axes, (name, branch) in zip(figure.subplots(1, len(BRANCHES)), BRANCHES.items(), strict=True):
        steps = rows(branch)
        for i, (text, colour, width) in enumerate(steps):
            box = FancyBboxPatch((-width / 2, i + 0.15), width, 0.62, boxstyle='round,pad=0.02,rounding_size=0.1',
                                 facecolor=colour, edgecolor='#333333', linewidth=0.8)  # fmt: skip
            axes.add_patch(box)
            axes.text(0, i + 0.46, text, ha='center', va='center', fontsize=9)
            axes.annotate('', (0, i + 0.13), (0, i - 0.2), arrowprops={'arrowstyle': '-|>', 'linewidth': 0.8})
        axes.annotate(
            '', (0, len(steps) + 0.15), (0, len(steps) - 0.2), arrowprops={'arrowstyle': '-|>', 'linewidth': 0.8}
        )
        axes.set_title(f'{name}\nexpansion {branch.expansion}' if branch.expansion > 1 else f'{name}\n', fontsize=12)
        axes.set(xlim=(-1, 1), ylim=(-0.4, tallest + 0.3))
        axes.axis('off')
    return figure


@click.command()
@click.option('--dest', default='docs/branches.png', show_default=True, help='Where the picture goes.')
def main(dest):
    """Draw the residual branches of networks/edm2/branches.py."""
    with atomic_path(dest) as beside:
        draw().savefig(beside, format='png', dpi=80, metadata={'Description': fingerprint()})


if __name__ == '__main__':
    cli.run(main)
