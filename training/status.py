"""What a run tells while it goes: progress bar, status lines, stats.jsonl, a picture of the loss."""

import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dnnlib.files import atomic_path
from torch_utils import distributed
from training.config import TrainConfig

STATS_FILE = 'stats.jsonl'


@dataclasses.dataclass
class StepStats:
    """Sums over the images of one rank, kept on the device so that no step waits for them.

    Args:
        sums: float32 [3]: number of images, loss, plain weighted squared error.
        learning_rate: Of the step.
        nonfinite: Gradient elements that were replaced by 0.
        grad_norm: Norm of the gradient.
    """

    sums: torch.Tensor
    learning_rate: float = 0.0
    nonfinite: torch.Tensor | None = None
    grad_norm: torch.Tensor | None = None

    @classmethod
    def zeros(cls, device: torch.device) -> 'StepStats':
        """No images yet."""
        return cls(torch.zeros(3, dtype=torch.float32, device=device))

    def add(self, losses: torch.Tensor, errors: torch.Tensor) -> None:
        """Count a micro-batch: float32 [N] each."""
        self.sums += torch.stack([self.sums.new_tensor(float(len(losses))), losses.sum(), errors.sum()])


class Progress:
    """The bar, the lines, the files. Every rank adds its steps; rank 0 speaks and writes.

    Args:
        config: Of the run.
        folder: Where stats.jsonl lies; what it holds beyond the state's nimg is cut off, so that a continued run
            has every line once.
        state: Its nimg is the position.
    """

    def __init__(self, config: TrainConfig, folder: Path, state: Any):
        self.config, self.folder, self.state = config, folder, state
        self.steps: list[StepStats] = []
        self.since = time.monotonic()
        self.elements = (
            config.network.img_channels * config.network.img_resolution[0] * config.network.img_resolution[1]
        )
        self.bar = None
        if distributed.rank() == 0:
            _truncate(folder / STATS_FILE, state.nimg)
            self.bar = tqdm(total=config.duration, initial=state.nimg, unit='img', unit_scale=True, disable=None)

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, stats: StepStats) -> None:
        """Count a step."""
        self.steps.append(stats)
        if self.bar is not None:
            self.bar.update(self.config.batch)

    def report(self) -> None:
        """Sum up the steps since the last report over all ranks; show and store them."""
        sums = distributed.all_reduce_sum(torch.stack([s.sums for s in self.steps]).sum(dim=0))
        count, loss, error = sums.tolist()
        now = time.monotonic()
        record = {
            'nimg': self.state.nimg,
            'loss': loss / (count * self.elements),
            'mse': error / (count * self.elements),
            'learning_rate': self.steps[-1].learning_rate,
            'grad_norm': torch.stack([s.grad_norm for s in self.steps]).mean().item(),
            'nonfinite': int(sum(s.nonfinite for s in self.steps)),
            'images_per_second': len(self.steps) * self.config.batch / (now - self.since),
        }
        self.steps.clear()
        self.since = now
        if self.bar is not None:
            self._show(record)
            with open(self.folder / STATS_FILE, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')

    def _show(self, record: dict[str, Any]) -> None:
        rate = record['images_per_second']
        self.bar.set_postfix(loss=f'{record["loss"]:.4f}', lr=f'{record["learning_rate"]:.4f}', refresh=False)
        if self.bar.disable:  # not a terminal: lines instead of a bar
            left = (self.config.duration - record['nimg']) / rate
            print(
                f'{record["nimg"]:>9} images  loss {record["loss"]:8.4f}  mse {record["mse"]:7.4f}  '
                f'lr {record["learning_rate"]:.5f}  {rate:7.1f} img/s  {left:6.0f} s left',
                flush=True,
            )


def read_stats(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's stats.jsonl; a last line that was cut short is left out."""
    path = folder / STATS_FILE
    records = []
    for line in path.read_text(encoding='utf-8').splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _truncate(path: Path, nimg: int) -> None:
    kept = [record for record in read_stats(path.parent) if record['nimg'] <= nimg]
    with atomic_path(path) as beside:
        beside.write_text(''.join(json.dumps(record) + '\n' for record in kept), encoding='utf-8')


def plot_loss(folder: Path) -> None:
    """Draw loss and plain weighted squared error over training time to loss.png, if matplotlib is installed."""
    if importlib.util.find_spec('matplotlib') is None:
        return
    from matplotlib.figure import Figure

    records = read_stats(folder)
    nimg = [record['nimg'] / 1000 for record in records]
    figure = Figure(figsize=(8, 3.2), layout='constrained')
    for axes, key, title in zip(
        figure.subplots(1, 2), ('loss', 'mse'), ('uncertainty-weighted loss', 'weighted squared error'), strict=True
    ):
        axes.plot(nimg, [record[key] for record in records], linewidth=1)
        axes.set(xlabel='training images (thousands)', title=title)
        axes.grid(alpha=0.3)
    with atomic_path(folder / 'loss.png') as beside:
        figure.savefig(beside, format='png', dpi=120)
