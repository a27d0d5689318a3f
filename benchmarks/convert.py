"""Converting a published network of 280 M parameters, against reading it: time and peak memory.

python -m benchmarks.convert [FOLDER]

The file is written here, in the published structure (edm2-img64-s, FP16). Each measurement is a process of its own,
with the file in the page cache; the times leave out what importing torch takes. `stock` is Python's unpickler with
stubs in place of the file's classes and torch.load for each tensor: how one would read it without this project.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

NAME = 'edm2-img64-s-1073741-0.075.pkl'
REPEATS = 5
MEASURE = """
import sys, time, torch
path, dest = sys.argv[1:]
import networks.convert, networks.files
{prepare}
def peak():
    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024
before, start = peak(), time.perf_counter()
{work}
print(time.perf_counter() - start, peak(), before)
"""
STOCK = """
import io, pickle
class Stub:
    def __init__(self, *args): self.args = args
    def __setstate__(self, state): self.state = state
class EasyDict(dict): pass
class Reader(pickle.Unpickler):
    def find_class(self, module, name):
        if name == 'EasyDict': return EasyDict
        if name == '_load_from_bytes': return lambda b: torch.load(io.BytesIO(b), weights_only=True)
        if module in ('torch._utils', 'collections'): return super().find_class(module, name)
        return Stub
"""
TASKS = {
    'bytes of the file (`read_bytes`)': ('', 'import pathlib; x = pathlib.Path(path).read_bytes()'),
    'stock: unpickled, FP16': (
        STOCK,
        "import warnings; warnings.simplefilter('ignore'); x = Reader(open(path, 'rb')).load()",
    ),
    'all tensors, FP16 (`open_network`)': (
        '',
        'with networks.files.open_network(path) as f: x = {n: f.get(n) for n in f.names}',
    ),
    'network, float32 (`load_network`)': ('', 'x = networks.files.load_network(path)'),
    'bytes written and flushed to disk': (
        'import os, pathlib; data = pathlib.Path(path).read_bytes()',
        "f = open(dest, 'wb'); f.write(data); f.flush(); os.fsync(f.fileno())",
    ),
    '`convert`, FP16': ('', 'networks.convert.convert(path, dest)'),
    '`convert --dtype=fp32`': ('', "networks.convert.convert(path, dest, 'fp32')"),
}


def measure(path: Path, prepare: str, work: str) -> tuple[float, int, int]:
    """Seconds, peak memory in bytes, and that before the work began."""
    code = MEASURE.format(prepare=prepare, work=work)
    dest = path.with_name('out.safetensors')
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent.parent)}
    command = [sys.executable, '-c', code, str(path), str(dest)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    dest.unlink(missing_ok=True)
    seconds, peak, before = output.split()
    return float(seconds), int(peak), int(before)


def write_file(folder: Path) -> Path:
    """A network of 280 M parameters as a published file; in a process of its own, for its memory's sake."""
    path = folder / NAME
    code = f"""
import torch
from networks.denoiser import Denoiser
from tests.published_files import write_published
from training.presets.table import get_preset
from pathlib import Path
net = Denoiser(get_preset('edm2-img64-s').network)
write_published(Path({str(path)!r}), net, torch.float16)
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(__file__).parent.parent)
    return path


@click.command()
def main() -> None:
    """Print medians of time and the highest memory of each task, measured in turn."""
    if not all(Path(name).is_dir() for name in sys.argv[1:]):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        path = write_file(Path(folder))
        size = path.stat().st_size
        found = {name: [] for name in TASKS}
        for _ in range(REPEATS):
            for name, (prepare, work) in TASKS.items():
                found[name].append(measure(path, prepare, work))
    print(f'the file: {size / 2**20:.0f} MiB; medians of {REPEATS}')
    print('| what | seconds | peak memory MiB | relative to the file | of that before the work |')
    print('|---|---:|---:|---:|---:|')
    for name, runs in found.items():
        seconds, peak = statistics.median(run[0] for run in runs), max(run[1] for run in runs)
        before = max(run[2] for run in runs)
        print(f'| {name} | {seconds:.2f} | {peak / 2**20:.0f} | {peak / size:.2f} | {before / 2**20:.0f} |')


if __name__ == '__main__':
    main()
