"""TensorBoard, for those who watch runs there (an extra: pip install tensorboard)."""

import importlib.util
from pathlib import Path
from typing import Any

from dnnlib.errors import UserError
from networks.magnitudes import Magnitudes


def require_tensorboard() -> None:
    """Make sure that TensorBoard is there."""
    if importlib.util.find_spec('tensorboard') is None:
        raise UserError('--tensorboard needs the tensorboard package: pip install tensorboard')


class Board:
    """Writes a run's events to the folder `tensorboard` in it; the x axis counts images.

    Args:
        folder: Of the run.
        nimg: Where the run resumes; what an earlier process wrote beyond is hidden.
    """

    def __init__(self, folder: Path, nimg: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=nimg + 1)

    def add_record(self, record: dict[str, Any], prefix: str = 'training') -> None:
        """The numbers of a record of stats.jsonl or metrics.jsonl; nested ones get names joined by slashes."""
        step = record['nimg']
        for name, value in _numbers({k: v for k, v in record.items() if k != 'nimg'}, prefix):
            self._writer.add_scalar(name, value, step)

    def add_magnitudes(self, found: Magnitudes, nimg: int) -> None:
        """A histogram for each bucket."""
        for kind, buckets in found.items():
            for key, values in buckets.items():
                self._writer.add_histogram(f'{kind}/{key}', values, nimg)

    def add_picture(self, pixels: Any, nimg: int) -> None:
        """A sample grid, uint8 [H, W, C]."""
        self._writer.add_image('samples', pixels, nimg, dataformats='HWC')

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _numbers(value: Any, name: str) -> list[tuple[str, float]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _numbers(inner, f'{name}/{key}')]
    if isinstance(value, list):
        return [pair for i, inner in enumerate(value) for pair in _numbers(inner, f'{name}/{i}')]
    return [(name, float(value))] if isinstance(value, int | float) else []
