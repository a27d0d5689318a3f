"""What a run tells while it goes: progress bar, status lines, stats.jsonl, TensorBoard."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dnnlib.errors import UserError
from dnnlib.jsonl import append_record, cut_records
from networks.magnitudes import Magnitudes, mean_and_max
from torch_utils import distributed
from training.monitor.board import Board
from training.monitor.log import METRICS_FILE, STATS_FILE, RunLog
from training.monitor.step_stats import StepStats, summarize
from training.monitor.timing import PhaseTimer
from training.state import TrainState, way_back


class Progress:
    """The bar, the lines, the files. Every rank adds its steps; rank 0 speaks and writes.

    Args:
        state: Its nimg is the position.
        folder: Of the run. What its records hold beyond the state's nimg is cut off, so that a resumed run has every
            line once.
        timer: Of the phases of training.
        end: Number of images at which this process stops.
        tensorboard: Whether to write for TensorBoard too.
    """

    def __init__(self, state: TrainState, folder: Path, timer: PhaseTimer, end: int, tensorboard: bool = False):
        self.state, self.config, self.folder, self.timer, self.end = state, state.config, folder, timer, end
        self.since, self.since_nimg = time.monotonic(), state.nimg
        self.names = list(state.parameters())
        self.bar = self.board = None
        self.log = RunLog(folder if distributed.rank() == 0 else None)
        if distributed.rank() == 0:
            for name in (STATS_FILE, METRICS_FILE):
                cut_records(folder / name, state.nimg)
            self.board = Board(folder, state.nimg) if tensorboard else None
            self.bar = tqdm(total=end, initial=state.nimg, unit='img', unit_scale=True, disable=None)

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()

    def add(self, stats: StepStats) -> None:
        """Count a step."""
        self.state.stats.add(stats)
        self.learning_rate = stats.learning_rate
        if self.bar is not None:
            self.bar.update(self.config.batch)

    def report(self, magnitudes: Magnitudes | None = None) -> None:
        """Sum up the steps since the last report over all ranks; show and store them."""
        stats = self.state.stats
        stats.collect()
        losses = summarize(stats.sums.sum(dim=0), self.config.method.levels, self.config.elements)
        nonfinite, exceeded = stats.bad_gradients(self.names, self.config.nonfinite_steps)
        seconds = self.timer.take()  # waits for the device, so that the clock below counts finished steps
        now = time.monotonic()
        record = {
            'nimg': self.state.nimg,
            **{name: losses[name] for name in ('loss', 'mse')},
            'learning_rate': self.learning_rate,
            'grad_norm': stats.grad_norm.mean().item(),
            **nonfinite,
            'images_per_second': (self.state.nimg - self.since_nimg) / (now - self.since),
            'memory_gib': _peak_memory(self.state.net.device),
            'seconds': seconds,
            'by_noise': losses['by_noise'],
            **({'magnitudes': mean_and_max(magnitudes)} if magnitudes else {}),
        }
        vanished, steps = stats.vanished(), len(stats.grad_norm)
        stats.clear()
        self.since, self.since_nimg = now, self.state.nimg
        if self.bar is not None:
            self._tell(record, magnitudes)
            if vanished:
                self.say(f'warning: gradients were 0 in {vanished} of {steps} steps; a larger --ls may help, or fp32')
        if exceeded:
            culprits = ', '.join(record['nonfinite_in'])
            before = record['nimg'] - self.config.batch * int(stats.streak)
            raise UserError(
                f'gradients were not finite in {self.config.nonfinite_steps} steps in a row, last at '
                f'{record["nimg"]} images, mostly of {culprits}; this state was not saved; '
                f'{way_back(self.folder, before)}'
            )

    def _tell(self, record: dict[str, Any], magnitudes: Magnitudes | None) -> None:
        rate, loss = record['images_per_second'], record['loss']
        self.bar.set_postfix(
            loss=f'{loss:.4f}', lr=f'{record["learning_rate"]:.4f}', mem=f'{record["memory_gib"]:.1f}G', refresh=False
        )
        left = (self.end - record['nimg']) / rate
        self.log.say(
            f'{record["nimg"]:>9} images  loss {loss:8.4f}  mse {record["mse"]:7.4f}  '
            f'lr {record["learning_rate"]:.5f}  {rate:7.1f} img/s  {record["memory_gib"]:.2f} GiB  {left:6.0f} s left',
            show=self.bar.disable,  # not a terminal: lines instead of a bar
        )
        if record['nonfinite']:
            self.say(f'warning: {record["nonfinite"]} gradient elements were not finite: {record["nonfinite_in"]}')
        append_record(self.folder / STATS_FILE, record)
        if self.board is not None:
            self.board.add_record(record)
            if magnitudes:
                self.board.add_magnitudes(magnitudes, record['nimg'])

    def say(self, text: str) -> None:
        """Tell people something beside the bar, on rank 0."""
        if self.bar is not None and not self.bar.disable:
            self.bar.clear()
        self.log.say(text)

    def add_picture(self, pixels: Any) -> None:
        """Show a sample grid, uint8 [H, W, C], where there is a board."""
        if self.board is not None:
            self.board.add_picture(pixels, self.state.nimg)

    def add_measurement(self, record: dict[str, Any]) -> None:
        """Store what was measured of an EMA, and say it."""
        if self.bar is None:
            return
        append_record(self.folder / METRICS_FILE, record)
        if self.board is not None:
            std = record['ema_std']
            values = {key: value for key, value in record.items() if key != 'ema_std'}
            self.board.add_record(values, f'EMA {std:g}')
        shown = [f'held-out mse {record["held_out"]["mse"]:.4f}'] if 'held_out' in record else []
        shown += [f'{name} {numbers["value"]:.5g}' for name, numbers in record.get('metrics', {}).items()]
        self.say(f'{record["nimg"]:>9} images  EMA {record["ema_std"]:g}  {"  ".join(shown)}')


def _peak_memory(device: torch.device) -> float:
    """Most memory in use so far on any rank, GiB: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return distributed.all_reduce_max(torch.tensor([peak / 2**30], dtype=torch.float64)).item()
