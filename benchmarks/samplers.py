"""Quality against evaluations: fd_pixels of images made with every sampler at equal numbers of evaluations.

make demo
python benchmarks/samplers.py --net=demo/run/phema-0000049-0.120.safetensors --ref=demo/digits.zip

Every row is two commands, generate.py and calculate_metrics.py calc; all rows have the same seeds.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
EVALUATIONS = (5, 9, 15, 25, 35, 63)  # odd: Heun's method makes 2 N - 1
STEPS = {'heun': lambda evaluations: (evaluations + 1) // 2, 'euler': int, 'dpm++2m': int}


def run(script: str, *arguments: str) -> None:
    """Run a script of the root, quietly."""
    subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True, capture_output=True, text=True)


def distance(net: str, ref: str, seeds: str, sampler: str, evaluations: int, folder: Path) -> float:
    """fd_pixels of one row."""
    images, result = folder / f'{sampler}-{evaluations}', folder / 'metrics.json'
    steps = STEPS[sampler](evaluations)
    run('generate.py', f'--net={net}', f'--seeds={seeds}', f'--sampler={sampler}', f'--steps={steps}',
        f'--outdir={images}', '--batch=250')  # fmt: skip
    record = json.loads((images / 'generation.json').read_text())
    assert record['evaluations_per_image']['net'] == evaluations
    run('calculate_metrics.py', 'calc', f'--images={images}', f'--ref={ref}', f'--json={result}')
    return json.loads(result.read_text())['metrics']['fd_pixels']['value']


@click.command()
@click.option('--net', required=True, metavar='FILE', help='Network file.')
@click.option('--ref', required=True, metavar='DATASET', help='The real images.')
@click.option('--seeds', default='0-999', show_default=True, help='An image for each.')
def main(net: str, ref: str, seeds: str) -> None:
    """Print the table of docs/sampling.md."""
    click.echo(f'| evaluations | {" | ".join(STEPS)} |')
    click.echo(f'|---:|{"---:|" * len(STEPS)}')
    with tempfile.TemporaryDirectory() as folder:
        for evaluations in EVALUATIONS:
            values = [distance(net, ref, seeds, name, evaluations, Path(folder)) for name in STEPS]
            click.echo(f'| {evaluations} | {" | ".join(f"{value:.3f}" for value in values)} |')


if __name__ == '__main__':
    main()
