"""Runs that are stopped, killed, starved of disk space, or wrong on one rank only."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset.reader import ImageDataset
from dnnlib.background import BackgroundWriter
from dnnlib.configs import replaced
from dnnlib.errors import UserError
from dnnlib.files import locked_folder
from dnnlib.jsonl import append_record
from dnnlib.signals import StopSignals
from tests.conftest import ROOT
from tests.helpers import state_tensors
from training.config import TrainConfig
from training.loop import train
from training.monitor.log import read_stats
from training.state import remove_leftovers, state_files


@pytest.fixture
def arguments(archive) -> list[str]:
    """A run of 64 steps, seconds long, of the digits preset in small."""
    return [
        *('--preset=edm2plus-digits', f'--data={archive}', '--channels=16', '--duration=4Ki', '--batch=64'),
        *('--status=64', '--snapshot=2Ki', '--checkpoint=1Ki', '--preview=4Ki', '--rampup=640'),
        *('--set=network.architecture.num_blocks=1', '--set=sampler.steps=2'),
    ]


def start(arguments: list[str], folder: Path, ranks: int = 0) -> subprocess.Popen:
    """Start train.py; its output can be read line by line."""
    head = [sys.executable, '-u']
    if ranks:
        head += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    return subprocess.Popen(
        [*head, str(ROOT / 'train.py'), *arguments, f'--outdir={folder}'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )  # fmt: skip


def wait_for(process: subprocess.Popen, pattern: str) -> str:
    """Read its output until a line matches."""
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    raise AssertionError(f'ended with {process.wait()} without printing {pattern}')


def assert_same_runs(a: Path, b: Path) -> None:
    """Weights, averages, optimizer and losses are equal to the bit."""
    tensors = state_tensors(a), state_tensors(b)
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    losses = [[(r['nimg'], r['loss'], r['by_noise']) for r in read_stats(folder)] for folder in (a, b)]
    assert losses[0] == losses[1]


@pytest.fixture(scope='module')
def whole(archive, tmp_path_factory) -> Path:
    """The run folder of `arguments`, never interrupted."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    process = start(arguments.__wrapped__(archive), folder)
    assert process.communicate()[0] and process.returncode == 0
    return folder


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', pytest.param('SIGUSR1', marks=pytest.mark.slow)])
def test_asked_to_stop(request, arguments, tmp_path, name):
    process = start([*arguments, '--workers=1'] if name == 'SIGINT' else arguments, tmp_path)
    wait_for(process, r'^ +[12]\d\d\d images')
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    (nimg,) = re.findall(rf'stopped by {name} at (\d+) images; the same command resumes', output)
    assert 1024 < int(nimg) < 4096 and 'Traceback' not in output
    assert f'stopped by {name}' in (tmp_path / 'log.txt').read_text()
    assert not list(tmp_path.glob('.*.tmp'))
    assert ('another Ctrl-C ends it at once' in output) == (name == 'SIGINT')
    if name != 'SIGTERM':
        return
    process = start(arguments, tmp_path)
    assert f'at {nimg} images' in wait_for(process, 'resumed from')
    process.communicate()
    assert_same_runs(request.getfixturevalue('whole'), tmp_path)


def test_asked_to_stop_together_with_its_reader(arguments, tmp_path):
    """Ctrl-C ends `tee` before train.py, whose words then have nowhere to go; its state is saved all the same."""
    process = start(arguments, tmp_path)
    wait_for(process, r'^ +[12]\d\d\d images')
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    log = (tmp_path / 'log.txt').read_text()
    assert 'stopped by SIGINT at' in log and 'Traceback' not in log and state_tensors(tmp_path)


@pytest.mark.slow
def test_two_ranks_asked_to_stop(arguments, tmp_path):
    """One of them gets the signal, both stop at the same step; what they end with is that of two undisturbed ranks."""
    arguments = [*arguments, '--batch-gpu=16']  # two rounds
    process = start(arguments, tmp_path / 'whole', ranks=2)
    assert process.communicate()[0] and process.returncode == 0
    process = start(arguments, tmp_path / 'halves', ranks=2)
    wait_for(process, r'^ +[123]\d\d\d images')
    children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout.split()
    for pause, child in ((0, children[-1]), (0.3, children[0]), (0.1, children[-1])):  # a scheduler's come one by one
        time.sleep(pause)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and 'Traceback' not in output, output
    assert re.search(r'stopped by (SIGUSR1|another rank) at \d+ images', output)
    process = start(arguments, tmp_path / 'halves', ranks=2)
    wait_for(process, 'resumed from')
    process.communicate()
    assert process.returncode == 0
    assert_same_runs(tmp_path / 'whole', tmp_path / 'halves')


def train_silently(config: TrainConfig, folder: Path) -> None:
    """Train in this process."""
    folder.mkdir(exist_ok=True)
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        train(config, ImageDataset(config.data), folder, torch.device('cpu'))


def kill_forks(config: TrainConfig, folder: Path, kills: int) -> None:
    """Train in `folder`, killed so many times: every other time while a state is written, else at any time of a run.

    What is killed are forks of this process, which has trained before: they lose no time with imports.
    """
    chance, writing = random.Random(0), 0
    train_silently(replace(config, slice=1024), folder.with_name('warm'))
    began = time.monotonic()
    train_silently(config, folder.with_name('warm'))
    length = time.monotonic() - began
    while kills:
        process = multiprocessing.get_context('fork').Process(target=train_silently, args=(config, folder))
        process.start()
        if kills % 2:
            while process.is_alive() and not list(folder.glob('.training-state-*.tmp')):
                time.sleep(0.001)
            time.sleep(chance.random() * 0.02)
        else:
            process.join(chance.random() * length)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills -= process.exitcode != 0
        writing += bool(list(folder.glob('.training-state-*.tmp')))
        for path in folder.glob('.*.tmp'):
            path.unlink()
        if kills and (folder / 'training-state-0000004.safetensors').exists():  # done too early: begin anew
            for path in state_files(folder):
                path.unlink()
    assert writing >= 15, f'only {writing} kills hit a state being written'
    train_silently(config, folder)


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments(config, tmp_path):
    config = replace(config, duration=4096, network=replaced(config.network, {'architecture.model_channels': 8}))
    process = multiprocessing.get_context('spawn').Process(target=kill_forks, args=(config, tmp_path / 'killed', 100))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_runs(tmp_path / 'warm', tmp_path / 'killed')
    assert not list((tmp_path / 'killed').glob('.*.tmp'))


def test_no_room_for_a_line(arguments, tmp_path):
    """Writing to /dev/full fails as writing to a full disk does."""
    (tmp_path / 'log.txt').symlink_to('/dev/full')
    process = start(arguments, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and 'Traceback' not in output, output
    assert f'train.py: error: {tmp_path}/log.txt: No space left on device' in output
    (tmp_path / 'stats.jsonl').unlink(missing_ok=True)
    (tmp_path / 'stats.jsonl').symlink_to('/dev/full')
    with pytest.raises(OSError, match='No space left') as error:
        append_record(tmp_path / 'stats.jsonl', {'nimg': 1})
    assert error.value.filename == str(tmp_path / 'stats.jsonl')


def test_a_folder_takes_one_process(arguments, tmp_path):
    with locked_folder(tmp_path):
        output, _ = start(arguments, tmp_path).communicate(timeout=60)
        assert f'train.py: error: another process is at work in {tmp_path}' in output
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    for name in ('.training-state-0000001.safetensors.abc.tmp', '.network-snapshot-0000001-0.050.safetensors.x.tmp'):
        (tmp_path / name).write_text('half')
    (tmp_path / '.mine.tmp').write_text('not ours')
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['.mine.tmp']


def test_no_room_for_a_state(arguments, tmp_path):
    """A limit on the size of files stands for a full disk: states are larger than it, snapshots smaller."""
    first = [*arguments, '--duration=1Ki', '--preview=1Ki', '--snapshot=1Ki']
    assert start(first, tmp_path).communicate()[0]
    before = {path.name: path.read_bytes() for path in state_files(tmp_path)}
    limit = len(before['training-state-0000001.safetensors']) // 1024 - 1
    command = [sys.executable, str(ROOT / 'train.py'), *arguments, f'--outdir={tmp_path}', '--checkpoint=2Ki']
    process = subprocess.run(
        ['bash', '-c', f'ulimit -f {limit}; exec "$@"', 'bash', *command],
        capture_output=True, text=True, env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''}, timeout=60,
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith(f'train.py: error: {tmp_path}/training-state-0000002.safetensors: ') and 'large' in line
    assert {path.name: path.read_bytes() for path in state_files(tmp_path)} == before
    assert not list(tmp_path.glob('.*.tmp'))
    assert 'Error' in (tmp_path / 'log.txt').read_text()


RANK1_IS_WRONG = """
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import click

from dataset.reader import ImageDataset
from dnnlib import cli
from dnnlib.configs import from_json
from torch_utils import distributed
from training.config import TrainConfig
from training.loop import train


def measure(net, nimg):
    if distributed.rank() == 1:
        raise ZeroDivisionError('the deliberate one')
    return {}


@click.command()
def main():
    config = from_json(TrainConfig, json.loads('''CONFIG'''))
    with distributed.session('cpu') as device:
        seed = 10 * int(os.environ['RANK']) if 'disagree' in os.environ else 0
        folder = Path(sys.argv[0]).parent
        train(replace(config, seed=seed), ImageDataset(config.data), folder, device, measure=measure)


cli.run(main)
"""


def run_two(config, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Two ranks of which the second raises at the first snapshot, or has another seed."""
    (folder / 'wrong.py').write_text(RANK1_IS_WRONG.replace('CONFIG', json.dumps(config.to_json())))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return subprocess.run(
        [*command, str(folder / 'wrong.py')],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT), **environment},
    )  # fmt: skip


def test_a_rank_that_raises_ends_the_run_and_is_heard_first(config, tmp_path):
    process = run_two(replace(config, duration=1024, preview=1024), tmp_path)
    assert process.returncode != 0
    tracebacks = re.findall(r'^\[rank (\d)\] Traceback', process.stderr, re.MULTILINE)
    assert tracebacks[0] == '1', process.stderr
    assert '[rank 1] ZeroDivisionError: the deliberate one' in process.stderr


def test_ranks_that_disagree_do_not_start(config, tmp_path):
    process = run_two(config, tmp_path, disagree='yes')
    assert process.returncode != 0 and 'rank 1 disagrees with rank 0: seed is 10, was 0' in process.stderr
    assert '[rank' not in process.stderr  # no traceback
    assert not (tmp_path / 'config.json').exists()


def test_signals_are_noted_and_the_second_interrupt_is_obeyed():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == 'SIGTERM'
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before
    try:
        with StopSignals(last=True):
            pass
        os.kill(os.getpid(), signal.SIGUSR1)  # would end this process
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for name in ('SIGTERM', 'SIGUSR1'):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_writer_raises_what_stopped_it():
    done = []
    with pytest.raises(OSError, match='no room'), BackgroundWriter() as writer:
        writer.submit(lambda: done.append(1))
        writer.submit(lambda: (_ for _ in ()).throw(OSError('no room')))
        writer.wait()
    with pytest.raises(OSError, match='no room'), BackgroundWriter() as writer:
        writer.submit(lambda: (_ for _ in ()).throw(OSError('no room')))  # raised at the end
    with pytest.raises(ValueError, match='first'), BackgroundWriter() as writer:
        writer.submit(lambda: (_ for _ in ()).throw(OSError('no room')))
        raise ValueError('first')
    with pytest.raises(OSError, match='no room'), BackgroundWriter() as writer:
        writer.submit(lambda: (_ for _ in ()).throw(OSError('no room')))
        while True:
            time.sleep(0.01)
            writer.check()
    assert done == [1]


def test_gradients_that_stay_bad_stop_the_run(config, run, tmp_path, monkeypatch):
    from training import update

    def spoil(parameters, policy, clip):
        parameters[-2].grad[0, 0, 0, 0] = float('nan')  # the last of the U-Net
        return clean(parameters, policy, clip)

    clean = update.clean_gradients
    monkeypatch.setattr(update, 'clean_gradients', spoil)
    config = replace(config, nonfinite_steps=3, batch=64, status=128)
    with pytest.raises(UserError, match=r'3 steps in a row, last at 256 images, mostly of unet\.out_conv\.weight'):
        run('bad', config)
    records = read_stats(tmp_path / 'bad')
    assert [r['nonfinite'] for r in records] == [2, 2]
    assert records[0]['nonfinite_in'] == {'unet.out_conv.weight': 2}
    assert 'rank 0: error: gradients were not finite' in (tmp_path / 'bad/log.txt').read_text()


def test_slice_stops_and_saves(config, run, capsys):
    folder = run('slices', replace(config, slice=512))
    assert 'stopped as told at 512 images; the same command resumes' in capsys.readouterr().out
    assert json.loads((folder / 'config.json').read_text())['slice'] == 512
    run('slices', replace(config, slice=512))
    assert state_files(folder)[-1].name == 'training-state-0000001.safetensors'
    assert read_stats(folder)[-1]['nimg'] == 1024
