"""A metric against EMA length: what sweep.py measures is what the other scripts would, and nothing is done twice."""

import csv
import json

import pytest

from evaluation.sweep import read_rows

pytest.importorskip('matplotlib')


def test_sweep(trained_once, archive, run_script, run_here, tmp_path):
    common = (f'--ref={archive}', '--metrics=fd_pixels', '--seeds=0-15')
    out = tmp_path / 'out'
    command = ('sweep.py', f'--indir={trained_once}', *common, '--steps=3', f'--outdir={out}', '--memory=0')
    process = run_here(*command, '--outstd=0.05,0.10', '--outnimg=1Ki,2Ki')
    assert process.returncode == 0, process.stderr
    first = (out / 'sweep.jsonl').read_text()
    assert len(first.splitlines()) == 4
    assert not list(out.glob('*.safetensors'))

    # A row that a kill has cut short is measured again, and hides none of those that follow.
    with open(out / 'sweep.jsonl', 'w') as file:
        file.write(first[:-20])

    # The same in one pass, on two ranks, with one more length: rows that are there stay as they are.
    process = run_script(*command[:-1], '--outstd=0.05,0.10,0.20', '--outnimg=1Ki,2Ki', ranks=2)
    assert process.returncode == 0, process.stderr
    assert (out / 'sweep.jsonl').read_text().startswith(''.join(first.splitlines(keepends=True)[:3]))
    assert len((out / 'sweep.jsonl').read_text().splitlines()) == 6
    rows = read_rows(out)
    assert [(row['nimg'], row['ema_std']) for row in rows] == [(n, s) for n in (1024, 2048) for s in (0.05, 0.1, 0.2)]
    table = list(csv.DictReader((out / 'sweep.csv').read_text().splitlines()))
    assert [float(row['fd_pixels']) for row in table] == [row['metrics']['fd_pixels']['value'] for row in rows]
    assert (out / 'sweep.png').stat().st_size > 5000

    # What it says of a length is what reconstruct_phema.py and calculate_metrics.py say together.
    process = run_here('reconstruct_phema.py', f'--indir={trained_once}', '--outstd=0.20', f'--outdir={tmp_path}')
    assert process.returncode == 0, process.stderr
    net = tmp_path / 'phema-0000002-0.200.safetensors'
    process = run_here('calculate_metrics.py', 'gen', f'--net={net}', *common, '--steps=3', '--json=m.json')
    assert process.returncode == 0, process.stderr
    value = json.loads((tmp_path / 'm.json').read_text())['metrics']['fd_pixels']['value']
    assert rows[-1]['metrics']['fd_pixels']['value'] == pytest.approx(value, rel=1e-6)

    process = run_here(*command[:-1], '--outstd=0.05', '--sampler=euler')
    assert process.returncode == 2 and 'holds another sweep; sampler.sampler.name is euler, was heun' in process.stderr


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('--outstd=0.5',), 'EMA lengths must be between 0 and'),
        (('--outstd=0.1', '--outnimg=9Ki'), 'training ended at 2048 images, before 9216'),
        (('--outstd=0.1', '--guidance=1,2'), 'needs a guiding network'),
        (('--outstd=0.1', '--metrics=fd_pixel'), "unknown metric 'fd_pixel'; did you mean fd_pixels"),
        (('--outstd=0.1', '--sampler=heunn'), 'heunn'),
        (('--outstd=0.1', '--guidance-interval=1'), 'guidance'),
    ],
)
def test_wrong_use(trained_once, archive, tmp_path, options, message, run_here):
    out = tmp_path / 'out'
    process = run_here('sweep.py', f'--indir={trained_once}', f'--ref={archive}', f'--outdir={out}', *options)
    assert process.returncode == 2 and message in process.stderr and len(process.stderr.splitlines()) == 1
    assert not out.exists()
