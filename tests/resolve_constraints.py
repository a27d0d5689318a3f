"""Ask the package index whether every pin of constraints.txt can be installed: `python -m tests.resolve_constraints`.

pip evaluates markers for the Python that runs it, so they are evaluated here, for each supported Python. `make resolve`
and CI run this; it needs the package index, and tests/test_set_up.py checks what can be checked without one.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

CONSTRAINTS = Path(__file__).parent.parent / 'constraints.txt'
PYTHONS = ('3.10', '3.11', '3.12', '3.13', '3.14')


def pins(python: str) -> list[str]:
    """`name==version` of everything that is pinned for a Python such as '3.10', on Linux."""
    lines = [line.strip() for line in CONSTRAINTS.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith('#')]
    environment = {'python_version': python, 'python_full_version': f'{python}.1', 'sys_platform': 'linux'}
    return [f'{r.name}{r.specifier}' for r in requirements if r.marker is None or r.marker.evaluate(environment)]


def resolve(python: str) -> str:
    """What pip has against the pins for a Python; '' where each has a wheel for it."""
    with tempfile.TemporaryDirectory() as folder:
        options = ['--dry-run', '--quiet', '--ignore-installed', '--no-deps', '--only-binary=:all:']
        target = ['--python-version', python, '--target', folder]
        command = [sys.executable, '-m', 'pip', 'install', *options, *target, *pins(python)]
        process = subprocess.run(command, capture_output=True, text=True)
    return '' if process.returncode == 0 else process.stderr.strip()


if __name__ == '__main__':
    found = {python: resolve(python) for python in sys.argv[1:] or PYTHONS}
    for python, problem in found.items():
        print(f'Python {python}: {problem or "resolves"}')
    sys.exit(any(found.values()))
