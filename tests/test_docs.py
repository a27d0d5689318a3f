"""Every command of README and docs: all of them are understood, and those that a CPU can run do run, in small."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import click
import numpy as np
import PIL.Image
import pytest

from tests.conftest import ROOT

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
# What is appended to a command so that it takes seconds: options given twice count as they come last.
SMALL = {
    'train.py --preset=edm2plus-digits': '--channels=16 --channel-mult=1 --channels-per-head=16 '
    '--snapshot=16Ki --batch=256',
    'train.py --preset=edm2plus-img32-tiny': '--channels=48 --channel-mult=1 --num-blocks=1 '
    '--duration=1Ki --batch=64 --rampup=256 --status=512',
    'train.py --preset=ladder-c-digits': '--duration=2Ki --snapshot=2Ki',
    'sweep.py': '--seeds=0-19 --steps=2 --outstd=0.05,0.10',
    'calculate_metrics.py gen': '--seeds=0-49 --steps=2',
    'calculate_metrics.py selftest': '--metrics=fd_pixels',
    'generate.py': '--steps=2',
    'report.py': '--neighbours=4',
}
# Commands that nothing here can run: they need a GPU or a network, data that are not here, or hours.
ELSEWHERE = re.compile(
    r'torchrun|imagenet64|img64|img512|https?:|edm2-img|runs/x|FILE|NET|real\.zip|sid2|edm-|--model|raw-snapshots|benchmarks'
)


def commands(page) -> list[list[str]]:
    """Words of each command for one of our scripts in an indented block of a page."""
    text = re.sub(r'\\\n\s*', '', page.read_text(encoding='utf-8'))
    found = re.findall(r'^ {4}(?:[A-Z_]+=\S+ )*((?:python|torchrun) [^|\n]*?\.py[^|\n]*)', text, re.MULTILINE)
    return [words for line in found if '...' not in (words := shlex.split(line, comments=True))]


ALL = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(('page', 'words'), ALL, ids=lambda value: value if isinstance(value, str) else value[1])
def test_commands_are_understood(page, words):
    place = next(i for i, word in enumerate(words) if word.endswith('.py'))
    script, args = words[place], words[place + 1 :]
    if '/' in script:  # benchmarks say themselves what they take
        assert (ROOT / script).exists()
        return
    command: click.Command = importlib.import_module(script.removesuffix('.py')).main
    while isinstance(command, click.Group):
        command, args = command.commands[args[0]], args[1:]
    try:
        command.make_context(script, list(args))
    except click.BadParameter as error:
        assert 'does not exist' in str(error), f'{page}: {error}'  # its files are not here


def snippets(page) -> list[str]:
    """Blocks of Python in a page, fenced or indented by four, that load something that commands of the pages leave."""
    text = page.read_text(encoding='utf-8')
    fenced = re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r'(?:^(?: {4}.*)?\n)+', text, re.MULTILINE)
    code = [*fenced, *(re.sub(r'^ {4}', '', block, flags=re.MULTILINE) for block in blocks)]
    return [block for block in code if re.match(r'\s*(from|import) \w+', block) and re.search(r"'(demo|data)/", block)]


@pytest.mark.slow
def test_what_a_cpu_can_run(tmp_path):
    rng = np.random.default_rng(0)
    for name in ('ant', 'bee'):
        (tmp_path / 'pictures' / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / 'pictures' / name / f'{i}.png')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'CUDA_VISIBLE_DEVICES': ''}
    seen = []
    for page, words in ALL:
        line = shlex.join(words)
        if ELSEWHERE.search(line) or '/' in words[1] or line in seen:
            continue
        seen.append(line)
        extra = next((more for start, more in SMALL.items() if line.startswith(f'python {start}')), '')
        run = [sys.executable, str(ROOT / words[1]), *words[2:], *extra.split()]
        process = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert process.returncode == 0, f'{page}: {line}: {process.stderr[-2000:]}'
    assert len(seen) > 15 and (tmp_path / 'demo/report.html').exists() and (tmp_path / 'out/photos-grid.png').exists()
    for page in PAGES:
        for code in snippets(page):
            process = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True)
            assert process.returncode == 0, f'{page.name}: {code}: {process.stderr.decode()[-2000:]}'
            seen.append(page.name)
    assert {'README.md', 'metrics.md', 'sampling.md', 'datasets.md'} <= set(seen)


COMMANDS = [path.stem for path in sorted((ROOT / 'benchmarks').glob('*.py')) if '__main__' in path.read_text('utf-8')]


@pytest.mark.slow
@pytest.mark.parametrize('name', [*COMMANDS, 'study'])
def test_benchmarks_say_what_they_take(name, tmp_path):
    process = subprocess.run(
        [sys.executable, '-m', f'benchmarks.{name}', '--help'], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0 and process.stdout.lower().startswith('usage'), process.stderr
