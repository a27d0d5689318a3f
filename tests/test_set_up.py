"""Setting up on machines of many kinds: a stand-in for Python notes what it is asked for, and nothing is installed."""

import os
import re
import shutil
import stat
import subprocess

import pytest

from tests.conftest import ROOT
from tests.resolve_constraints import PYTHONS, pins

# Makes a virtual environment that consists of itself; as pip, takes only what has $WORKS among its words, and is
# interrupted where there is a file of that name.
PYTHON = """#!/bin/sh
case "$*" in
    *version_info*) exit 0 ;;
    '-m venv '*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    '-m pip '*) echo "$*" >> pip.log
        [ -e interrupt ] && kill -INT $PPID && exit 1
        case "$*" in *"$WORKS"*) exit 0 ;; esac; exit 1 ;;
esac
"""


@pytest.fixture
def set_up(tmp_path):
    """Run `make setup` in a copy of what it reads; returns its process, and what pip was asked for."""
    if shutil.which('make') is None:
        pytest.skip('make is not installed')
    for name in ('Makefile', 'pyproject.toml', 'constraints.txt'):
        shutil.copy(ROOT / name, tmp_path)

    def run(works: str, nvidia_smi: str = 'exit 1', *words: str, goals: tuple[str, ...] = ('setup',)):
        folder = tmp_path / 'bin'
        folder.mkdir(exist_ok=True)
        for name, text in (('python3', PYTHON), ('nvidia-smi', f'#!/bin/sh\n{nvidia_smi}\n'), ('uname', 'echo Linux')):
            (folder / name).write_text(text if text.startswith('#') else f'#!/bin/sh\n{text}\n')
            (folder / name).chmod(stat.S_IRWXU)
        process = subprocess.run(
            ['make', *goals, *words], cwd=tmp_path, capture_output=True, text=True,
            env={'PATH': f'{folder}:{os.environ["PATH"]}', 'WORKS': works},
        )  # fmt: skip
        log = tmp_path / 'pip.log'
        return process, log.read_text().splitlines() if log.exists() else []

    return run


def test_builds_are_tried_in_turn(set_up, tmp_path):
    process, asked = set_up('torch==2.13.0 .')  # as on a machine that finds no CPU build anywhere
    assert process.returncode == 0, process.stderr
    assert [('+cpu' in line, '--extra-index-url' in line) for line in asked] == [(1, 0), (1, 1), (0, 0)]
    assert (tmp_path / '.venv/ready').exists()
    assert set_up('')[1] == asked, 'set up already'


def test_a_failed_set_up_leaves_nothing(set_up, tmp_path):
    process, asked = set_up('no build')
    assert process.returncode and len(asked) == 3 and 'Nothing could be installed' in process.stdout
    assert not (tmp_path / '.venv').exists()
    process, asked = set_up('+cpu')
    assert process.returncode == 0 and len(asked) == 4


@pytest.mark.parametrize(
    'nvidia_smi, build',
    [
        ('echo "GPU 0: a card (UUID: GPU-1)"', 'torch==2.13.0'),
        ('echo "NVIDIA-SMI has failed: no driver"; exit 9', 'torch==2.13.0+cpu'),
        ('echo "No devices were found"', 'torch==2.13.0+cpu'),
    ],
)
def test_only_a_gpu_brings_cuda(set_up, nvidia_smi, build):
    _, asked = set_up('', nvidia_smi)
    assert len(asked) == 1 and f' {build} .' in asked[0]


def test_an_interrupted_set_up_leaves_nothing(set_up, tmp_path):
    (tmp_path / 'interrupt').touch()  # as pip ends at a Ctrl-C, which its shell gets, too
    process, asked = set_up('+cpu')
    assert process.returncode and len(asked) == 1 and not (tmp_path / '.venv').exists()


def test_a_chosen_build_is_the_only_one_tried(set_up):
    process, asked = set_up('+cpu', 'exit 1', 'TORCH=torch==2.9.1')
    assert process.returncode and len(asked) == 1 and 'torch==2.9.1' in asked[0]


def test_all_optional_packages(set_up):
    """`make test-all` sets up, and then lints, which needs no other set-up; nor do later calls."""
    _, section = (ROOT / 'pyproject.toml').read_text().split('[project.optional-dependencies]\n')
    extras = re.findall(r'^(\w+) = ', section.split('\n\n')[0], re.MULTILINE)
    process, asked = set_up('+cpu', goals=('setup-all', 'setup'))
    assert process.returncode == 0 and len(asked) == 1
    assert set(re.search(r'\.\[(.*)\]', asked[0])[1].split(',')) == set(extras) > {'dino', 'latents'}
    assert set_up('', goals=('setup-all', 'setup'))[1] == asked


@pytest.mark.parametrize('python', PYTHONS)
def test_each_package_has_one_pin(python):
    names = [pin.split('==')[0] for pin in pins(python)]
    assert len(set(names)) == len(names) and {'numpy', 'networkx', 'jinja2', 'scipy'} <= set(names)


def test_workflow_runs_every_supported_python():
    text = (ROOT / '.github/workflows/tests.yml').read_text()
    assert str(list(PYTHONS)) in text and f'>={PYTHONS[0]}"' in (ROOT / 'pyproject.toml').read_text()
