"""One HTML page that needs nothing beside itself."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from dnnlib.images import to_pil
from reporting.curves import plot_runs, plot_sweep
from reporting.neighbours import Neighbour
from reporting.runs import Run, compare_configs

TEMPLATE = Path(__file__).parent / 'page.html'
MOST_PREVIEWS = 60  # of a run, evenly chosen: they are in the page


def make_page(
    runs: Sequence[Run],
    neighbours: Sequence[Neighbour] = (),
    compared_by: str = '',
    sweeps: Sequence[tuple[str, list[dict[str, Any]]]] = (),
    measured: Sequence[tuple[str, dict[str, Any]]] = (),
    grids: Sequence[Path] = (),
    commands: Sequence[str] = (),
) -> str:
    """The page as HTML.

    Args:
        runs: At least one.
        neighbours: Samples and their nearest training images.
        compared_by: The features that these are nearest by.
        sweeps: Names of sweeps with their rows, as sweep.py writes them.
        measured: Names of results with what calculate_metrics.py writes.
        grids: Pictures of samples.
        commands: That made all this, beside those of the runs.
    """
    different, same = compare_configs(list(runs))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding='utf-8')).render(
        runs=[_summary(run) for run in runs],
        different=different,
        same=same,
        curves=plot_runs(runs),
        films=[(run.name, _film(run)) for run in runs if run.previews],
        grids=[(path.name, picture_uri(path.read_bytes())) for path in grids],
        neighbours=[
            {'sample': _pixels_uri(n.sample), 'nearest': _pixels_uri(n.nearest), 'index': n.index, 'ratio': n.ratio}
            for n in sorted(neighbours, key=lambda n: n.ratio)
        ],
        compared_by=compared_by,
        sweeps=[(name, rows, list(dict.fromkeys(m for row in rows for m in row['metrics'])), plot_sweep(rows))
                for name, rows in sweeps],
        measured=[(name, number, values) for name, result in measured for number, values in result['metrics'].items()],
        tracked=[(run.name, record, number, values) for run in runs for record in run.measured
                 for number, values in record.get('metrics', {}).items()],
        commands=[*(command for run in runs for command in run.commands), *commands],
    )  # fmt: skip


def _summary(run: Run) -> dict[str, Any]:
    """The row of a run in the first table."""
    last = run.stats[-1]
    seconds: dict[str, float] = {}
    for record in run.stats:
        for phase, spent in record['seconds'].items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    return {
        'name': run.name,
        'preset': run.config['preset'],
        'nimg': last['nimg'],
        'duration': run.config['duration'],
        'loss': last['loss'],
        'mse': last['mse'],
        'speed': float(np.median([record['images_per_second'] for record in run.stats])),
        'memory': max(record['memory_gib'] for record in run.stats),
        'seconds': seconds,
    }


def _film(run: Run) -> list[tuple[int, str]]:
    """Training times, in thousands of images, and pictures of a run's sample grids."""
    places = np.linspace(0, len(run.previews) - 1, min(len(run.previews), MOST_PREVIEWS)).round().astype(int)
    return [(run.previews[i][0], picture_uri(run.previews[i][1].read_bytes())) for i in places]


def picture_uri(content: bytes) -> str:
    """A PNG as a data URI."""
    return f'data:image/png;base64,{base64.b64encode(content).decode()}'


def _pixels_uri(pixels: np.ndarray) -> str:
    """uint8 [C, H, W] as a data URI."""
    file = io.BytesIO()
    to_pil(pixels.transpose(1, 2, 0)).save(file, format='png')
    return picture_uri(file.getvalue())
