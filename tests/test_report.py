"""The page of report.py: what is on it, in a browser too; nearest neighbours with known answers."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from click.testing import CliRunner

import report
from dnnlib.errors import UserError
from dnnlib.images import image_grid, save_png
from dnnlib.jsonl import append_record
from reporting.neighbours import features_of, find_neighbours
from reporting.runs import compare_configs, read_run, read_runs
from tests.helpers import make_archive

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
QUIET = ('--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking')


class Set(list):
    """Images of one grey level each."""

    def __init__(self, *levels):
        super().__init__(np.full((1, 4, 4), level, np.uint8) for level in levels)

    def read(self, index):
        """See `Images`."""
        return self[index]


def test_neighbours():
    data = Set(*range(0, 200, 10))  # each is 10 from the next
    found = find_neighbours(Set(50, 54, 195, 230), data, 4, features_of('pixels'))
    assert [n.index for n in found] == [5, 5, 19, 19] and [int(n.nearest[0, 0, 0]) for n in found] == [50, 50, 190, 190]
    assert [n.ratio for n in found] == pytest.approx([0, 0.4, 0.5, 4], abs=1e-5)
    assert len(find_neighbours(Set(1, 2, 3), data, 2, features_of('pixels'))) == 2


def test_neighbours_by_the_features_of_a_detector(monkeypatch):
    """Near by what the detector sees, here brightness modulo 100, not by pixels."""
    seen = {'dinov2': lambda images: {'dinov2': images.flatten(1).double().mean(dim=1, keepdim=True) % 100}}
    monkeypatch.setattr(
        'reporting.neighbours.load_detectors', lambda names, device: {name: seen[name] for name in names}
    )
    samples, data = Set(252), Set(10, 151, 254, 200)
    assert [find_neighbours(samples, data, 1, features_of(name))[0].index for name in ('dinov2', 'pixels')] == [1, 2]


def test_neighbours_in_many_batches():
    rng = np.random.default_rng(0)
    data = Set(*[0] * 150)
    for image in data:
        image[:] = rng.integers(0, 256, image.shape)
    samples = Set(0, 0, 0)
    for i, sample in zip((3, 77, 149), samples, strict=True):
        sample[:] = data[i]
    assert [(n.index, n.ratio) for n in find_neighbours(samples, data, 3, features_of('pixels'))] == [
        (3, 0), (77, 0), (149, 0),
    ]  # fmt: skip


def test_images_that_cannot_be_compared():
    with pytest.raises(UserError, match='cannot be compared'):
        find_neighbours(Set(1), Set(1), 1, features_of('pixels'))
    with pytest.raises(UserError, match="unknown detector 'colour'"):
        features_of('colour')


@pytest.fixture
def page(finished, tmp_path):
    """The page on two runs, a sweep, metrics and samples; returns its text and path."""
    a, b = finished('a'), finished('b')
    for run, shade in ((a, 0), (b, 100)):
        for kimg in (1, 2):
            save_png(run / f'samples-{kimg:07d}.png', np.full((8, 8, 1), shade + kimg, np.uint8))
    config = json.loads((b / 'config.json').read_text())
    config['optimizer']['lr'] = 0.02
    (b / 'config.json').write_text(json.dumps(config))
    (a / 'log.txt').write_text('2026-01-01 00:00:00 command: python train.py --preset=<b>\n')
    samples = make_archive(tmp_path / 'samples.zip', 12, 10)
    shutil.unpack_archive(samples, tmp_path / 'samples')
    (tmp_path / 'samples/generation.json').write_text(json.dumps({'command': 'python generate.py --seeds=0-11'}))
    save_png(tmp_path / 'samples-grid.png', image_grid(np.zeros((12, 8, 8, 1), np.uint8), 4))
    for std, value in ((0.1, 3.25), (0.05, 4.5)):
        row = {'nimg': 2048, 'guidance': 1.0, 'ema_std': std, 'profile_error': 0.01, 'amplification': 1.0,
               'metrics': {'fd_pixels': {'value': value}}}  # fmt: skip
        (tmp_path / 'sweep').mkdir(exist_ok=True)
        append_record(tmp_path / 'sweep/sweep.jsonl', row)
    result = {'metrics': {'fd_pixels': {'value': 0.0625, 'num_images': 77}}, 'run': {'command': 'calculate_metrics.py'}}
    (tmp_path / 'metrics.json').write_text(json.dumps([result]))
    words = [f'--{name}={tmp_path / path}' for name, path in (('samples', 'samples'), ('metrics', 'metrics.json'),
             ('sweep', 'sweep'), ('dest', 'out/page.html'))]  # fmt: skip
    done = CliRunner().invoke(report.main, [str(a), str(b), *words, '--neighbours=5'], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return (tmp_path / 'out/page.html').read_text(), tmp_path / 'out/page.html'


def test_page(page):
    text, _ = page
    for part in ('0.0625', '<td class="number">77', '3.25', '4.5', 'python generate.py --seeds=0-11', 'fd_pixels',
                 'train.py --preset=&lt;b&gt;', 'samples-grid.png', 'metrics.json'):  # fmt: skip
        assert part in text, part
    different = text[text.index('<table id="different">') :].partition('</table>')[0]
    assert re.findall(r'<tr><td>(\S+?)<td>(\S+?)<td>(\S+?)</tr>', different) == [('optimizer.lr', '0.01', '0.02')]
    assert text.count('class="pair"') == 5 and text.count('data-kimg=') == 4


def test_page_needs_nothing_beside_itself(page):
    text, _ = page
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith('data:image/') for source in sources)
    assert '<link' not in text and 'url(' not in text and 'import' not in text.partition('<script>')[2]
    for source in sources:
        content = base64.b64decode(source.partition(',')[2])
        assert content.startswith((b'\x89PNG', b'<?xml')), source[:60]


@pytest.mark.skipif(BROWSER is None, reason='no browser on this machine')
def test_slider_in_a_browser(page, tmp_path):
    text, path = page

    def shown(script: str) -> list[tuple[str, str]]:
        path.write_text(text.replace('</body>', f'<script>{script}</script></body>'))
        words = [*QUIET, f'--user-data-dir={tmp_path / "profile"}', '--dump-dom', path.as_uri()]
        dom = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=60).stdout
        films = dom.split('<section class="film">')[1:]
        frame = r'<img data-kimg="(\d+)"[^>]*class="shown"'
        return [(re.search(r'<output>(\d*)</output>', film)[1], *re.findall(frame, film)) for film in films]

    assert shown('') == [('2', '2'), ('2', '2')], 'the last grid first'
    move = "const s = document.querySelector('.film input'); s.value = 0; s.dispatchEvent(new Event('input'));"
    assert shown(move) == [('1', '1'), ('2', '2')], 'the slider of the first run moves its grids'


def test_runs(finished):
    run = read_run(finished('a'), 'a')
    assert run.stats[-1]['nimg'] == 2048 and run.commands == [] and run.config['batch'] == 256
    other = dataclasses.replace(run, config={**run.config, 'seed': 5, 'network': {**run.config['network'], 'x': 1}})
    different, same = compare_configs([run, other])
    assert sorted(different) == [('network.x', [None, 1]), ('seed', [0, 5])]
    assert ('batch', 256) in same


def test_mistakes(finished, tmp_path):
    with pytest.raises(UserError, match='is no run folder'):
        read_run(tmp_path, 'x')
    folder = finished('a')
    names = [run.name for run in read_runs([folder, folder])]
    assert names == [str(folder)] * 2, 'two of one name are told apart by their paths'
    (folder / 'stats.jsonl').unlink()
    with pytest.raises(UserError, match='no lines in stats'):
        read_run(folder, 'x')
    (tmp_path / 'bad.json').write_text('{}')
    with pytest.raises(UserError, match='holds no metrics'):
        report._results(tmp_path / 'bad.json')
