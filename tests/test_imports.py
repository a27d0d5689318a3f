"""Imports point one way, as CONTRIBUTING.md says, and no two modules import each other."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

LAYERS = [
    {'dnnlib'},
    {'torch_utils'},
    {'diffusion'},
    {'networks'},
    {'dataset', 'ema', 'metrics', 'sampling'},
    {'evaluation', 'reporting', 'training'},
]
BELOW = {room: set().union(*LAYERS[:i]) for i, layer in enumerate(LAYERS) for room in sorted(layer)}
SCRIPTS = {path.stem for path in ROOT.glob('*.py')}


def imported(path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names.add(node.module.split('.')[0])
    return names


@pytest.mark.parametrize('room', BELOW)
def test_rooms(room):
    files = list((ROOT / room).rglob('*.py'))
    assert files
    for path in files:
        ours = imported(path) & (BELOW.keys() | SCRIPTS | {'tests'})
        assert ours <= BELOW[room] | {room}, f'{path} imports {ours - BELOW[room] - {room}}'


def test_scripts():
    assert {'train', 'generate', 'calculate_metrics', 'reconstruct_phema', 'dataset_tool'} <= SCRIPTS
    for script in SCRIPTS:
        ours = imported(ROOT / f'{script}.py') & (SCRIPTS | {'tests'})
        assert not ours, f'{script}.py imports {ours}'


def test_no_two_modules_import_each_other():
    """Importing needs an order: one module after another whose imports have all been there."""
    waiting = {}
    for path in ROOT.glob('*/**/*.py'):
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
        if name.split('.')[0] in BELOW:
            tree = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
            nodes = [node for node in tree if isinstance(node, ast.ImportFrom)]
            waiting[name] = {node.module for node in nodes} | {f'{n.module}.{a.name}' for n in nodes for a in n.names}
    waiting = {name: modules & waiting.keys() for name, modules in waiting.items()}
    while free := [name for name, modules in waiting.items() if not modules & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f'these import each other: {sorted(waiting)}'


def test_files_are_short_and_rooms_alike():
    """No file over 400 lines, `training/` under 3,000, no other room over a fifth of the code."""
    lines = {path: len(path.read_text(encoding='utf-8').splitlines()) for path in ROOT.glob('[!.]*/**/*.py')}
    lines = {path: n for path, n in lines.items() if path.relative_to(ROOT).parts[0] not in ('tests', 'demo')}
    lines |= {path: len(path.read_text(encoding='utf-8').splitlines()) for path in ROOT.glob('*.py')}
    assert not {path: n for path, n in lines.items() if n > 400}
    rooms = {room: sum(n for path, n in lines.items() if ROOT / room in path.parents) for room in BELOW}
    assert rooms.pop('training') < 3000 and max(rooms.values()) < sum(lines.values()) / 5, rooms


def test_scripts_start_without_what_takes_seconds_to_import():
    """The compiler, say, which one decorator of `torch.compiler` brings."""
    slow = ('torch._dynamo', 'sympy', 'scipy.stats', 'matplotlib', 'sklearn', 'requests')
    code = f'import sys, {", ".join(sorted(SCRIPTS))}; print([name for name in {slow} if name in sys.modules])'
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == '[]\n', process


def test_no_numpy_in_a_forward_pass():
    for path in (ROOT / 'networks').rglob('*.py'):
        assert 'numpy' not in imported(path), path
    assert 'torch' not in set().union(*(imported(path) for path in (ROOT / 'dnnlib').rglob('*.py')))


def test_no_pickles():
    for path in [*ROOT.glob('*.py'), *ROOT.glob('[!.]*/**/*.py')]:
        if path.relative_to(ROOT).parts[0] not in ('tests', 'benchmarks'):  # which compare with it
            text, one_reader = path.read_text(), path == ROOT / 'torch_utils' / 'pickles.py'
            assert imported(path) & {'pickle', 'dill', 'cloudpickle'} <= ({'pickle'} if one_reader else set()), path
            written = 'dump' if one_reader else 'dumps?'  # there, references for EDM2's tools
            assert not re.search(rf'pickle\.(loads?|{written}|Unpickler|Pickler|_Pickler)\b', text), path
            assert 'torch.save(' not in text, path
            loads = re.findall(r'torch\.load\(.*', text)  # other people's weights, tensors only
            assert all('weights_only=True)' in load for load in loads), path
