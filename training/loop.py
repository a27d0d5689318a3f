"""The training loop."""

import contextlib
import dataclasses
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dataset.order import BatchOrder, make_loader
from dataset.reader import ImageDataset
from dnnlib.background import BackgroundWriter
from dnnlib.configs import differences
from dnnlib.errors import UserError
from dnnlib.files import locked_folder, read_object, write_json
from dnnlib.signals import StopSignals
from networks.denoiser import Denoiser
from networks.magnitudes import Magnitudes, magnitudes
from torch_utils import distributed
from torch_utils.allocator import keep_freed_memory
from torch_utils.finite import some
from torch_utils.tensor_files import UnreadableFileError
from training.config import TrainConfig, refuse_differences
from training.heldout import Subset, held_out_loss, split
from training.initial import start_from
from training.inputs import training_draws, training_inputs
from training.monitor.log import RunLog
from training.monitor.plots import plot_loss
from training.monitor.status import Progress
from training.monitor.timing import Growing, PhaseTimer
from training.state import TrainState, remove_leftovers, state_files, way_back
from training.step import Stepper

# (network with EMA weights, nimg) -> picture, uint8 [H, W, C]; on rank 0.
Preview = Callable[[Denoiser, int], Any]
# (network with EMA weights, nimg) -> metrics, by name; on every rank.
Measure = Callable[[Denoiser, int], dict[str, Any]]
LOCAL_FIELDS = {'data', 'workers', 'method.teacher'}  # may differ between ranks
MAGNITUDES_EVERY = 16  # status intervals between measurements of magnitudes
MAGNITUDES_IMAGES = 16


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    folder: Path,
    device: torch.device,
    preview: Preview | None = None,
    measure: Measure | None = None,
    allow_rounding: bool = False,
    tensorboard: bool = False,
    signals: StopSignals | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Train, or resume training, until `config.duration` images have been seen, `config.slice` in this process, or
    until a signal asks to stop; then the state is saved.

    Args:
        config: The run, already checked for this number of ranks.
        dataset: Its images.
        folder: Run folder; a run in it is resumed from the newest state.
        device: Of this rank.
        preview: Called on rank 0 with the shortest EMA: after 1, 2, 4, ... minutes, at intervals, and at every stop.
        measure: Called on every rank with every EMA at snapshots.
        allow_rounding: Whether a resumed run may change what alters its rounding.
        tensorboard: Whether to write for TensorBoard too.
        signals: What tells to stop, where the caller listens already; it stops listening at the end.
        notes: Lines for the log, once the folder is this process's.

    Raises:
        UserError: where another process trains in the folder, it holds another run, ranks disagree, an image cannot be
            read, or gradients stay not finite.
        OSError: where the folder cannot be written, for a full disk, say; states from before are as they were.
    """
    agree(config)
    if device.type == 'cpu':
        keep_freed_memory()
    lead = distributed.rank() == 0
    with signals or StopSignals() as signals, locked_folder(folder) if lead else contextlib.nullcontext():
        state = TrainState(config, device)
        resume(state, folder, allow_rounding)
        if state.nimg >= config.duration:
            distributed.print0(f'{folder} is trained: {state.nimg} of {config.duration} images')
            return
        if config.init and not state.nimg:
            start_from(state, config.init)
        if lead:
            remove_leftovers(folder)
            write_json(folder / 'config.json', config.to_json())
            for note in notes:
                RunLog(folder).say(note, show=False)
        timer = PhaseTimer(device)
        part, held_out = split(dataset, config.held_out, config.seed)
        order = _order(config, len(part), state.nimg)
        end = min(config.duration, state.nimg + (config.slice or config.duration))
        with (
            contextlib.closing(make_loader(part, order, config.workers, device.type == 'cuda')) as batches,
            Progress(state, folder, timer, end, tensorboard) as progress,
            _logged(folder),
            BackgroundWriter() as writer,
        ):
            routine = Routine(state, folder, dataset, held_out, progress, writer, timer, preview, measure)
            step = Stepper(state, batches, timer)
            stopping = distributed.any_rank(signals.received is not None)
            while not stopping and state.nimg < end:
                progress.add(step())
                stopping = distributed.any_rank(signals.received is not None)
                routine(last=stopping or state.nimg >= end)
            writer.wait()
            if state.nimg < config.duration:
                routine.draw()  # the state is safe by now
                reason = f'by {signals.received or "another rank"}' if stopping else 'as told'
                progress.say(f'stopped {reason} at {state.nimg} images; the same command resumes')
        distributed.barrier()  # the others wait for rank 0's files, and take signals meanwhile


@dataclasses.dataclass(frozen=True)
class Routine:
    """What is done between steps, each at its interval and at the end of the run; see `train` for the fields."""

    state: TrainState
    folder: Path
    dataset: ImageDataset
    held_out: Subset | None
    progress: Progress
    writer: BackgroundWriter
    timer: PhaseTimer
    preview: Preview | None
    measure: Measure | None
    early: Growing = dataclasses.field(default_factory=Growing)  # pictures come before their first interval

    def __call__(self, last: bool) -> None:
        """Do what is due; every rank calls it after every step.

        Args:
            last: Whether this process stops here; then the state is saved whatever its interval.
        """
        self.writer.check()
        state, config, lead = self.state, self.state.config, distributed.rank() == 0
        if self._due(config.status):
            measured = lead and self._due(MAGNITUDES_EVERY * config.status)
            self.progress.report(_measure_magnitudes(state, self.dataset) if measured else None)
        save = self._due(config.checkpoint) or last
        if save or self._due(config.snapshot):
            self._refuse_poison()
        if lead and self._due(config.snapshot):
            with self.timer.phase('saving'):
                self.writer.submit(state.saving_snapshots(self.folder))
        with self.timer.phase('measuring'):
            if self._due(config.snapshot) and (self.held_out or self.measure):
                self._measure_averages()
            if self.early.due() or self._due(config.preview):
                self.draw()
        # Last: where there is a state, all that was due before it has been done.
        if save:
            state.stats.collect()
            if lead:
                with self.timer.phase('saving'):
                    self.writer.submit(state.saving(self.folder))

    def draw(self) -> None:
        """Draw the loss and samples of the shortest EMA, on rank 0."""
        if distributed.rank() != 0:
            return
        plot_loss(self.folder)
        if self.preview:
            net = self.state.averaged_net(min(self.state.config.ema.stds))
            self.progress.add_picture(self.preview(net, self.state.nimg))

    def _refuse_poison(self) -> None:
        """Stop before anything is written where weights or averages are not finite; every rank calls it."""
        bad = self.state.nonfinite()
        if distributed.any_rank(bool(bad)):
            self.writer.wait()
            nimg, what = self.state.nimg, some(bad) if bad else 'tensors of another rank'
            raise UserError(f'{what} not finite at {nimg} images; this was not saved; {way_back(self.folder, nimg)}')

    def _due(self, interval: int) -> bool:
        return self.state.nimg % interval == 0 or self.state.nimg >= self.state.config.duration

    def _measure_averages(self) -> None:
        """Held-out loss and metrics of every EMA; every rank calls it."""
        config = self.state.config
        for std in config.ema.stds:
            net = self.state.averaged_net(std)
            record: dict[str, Any] = {'nimg': self.state.nimg, 'ema_std': std}
            if self.held_out:
                batch_size = config.micro_batch_for(distributed.world_size())
                record['held_out'] = held_out_loss(net, self.held_out, config, batch_size)
            if self.measure:
                record['metrics'] = self.measure(net, self.state.nimg)
            self.progress.add_measurement(record)


def agree(config: TrainConfig) -> None:
    """Make sure that all ranks train the same; every rank calls it.

    Raises:
        UserError: on every rank, with a line for each difference to rank 0.
    """
    configs = [json.loads(text) for text in distributed.gather_text(json.dumps(config.to_json()))]
    found = [
        f'rank {rank} disagrees with rank 0: {line}'
        for rank, other in enumerate(configs)
        for line in differences(configs[0], other, LOCAL_FIELDS)
    ]
    if found:
        raise UserError(found)


def resume(state: TrainState, folder: Path, allow_rounding: bool = False) -> None:
    """Resume from the newest readable state in the folder, if there is one; a broken one is skipped with a warning.

    Raises:
        UserError: where the folder holds another run (with a line per difference), or no state of several is readable.
    """
    if (folder / 'config.json').exists():
        refuse_differences(folder, read_object(folder / 'config.json'), state.config, allow_rounding)
    log = RunLog(folder if distributed.rank() == 0 else None)
    paths, broken = state_files(folder), []
    for path in reversed(paths):
        try:
            state.load(path, allow_rounding)
        except (UnreadableFileError, OSError) as error:
            log.say(f'warning: {error}')
            broken.append(path)
            continue
        log.say(f'resumed from {path} at {state.nimg} images')
        break
    positions = distributed.gather_text(str(state.nimg))
    if len(set(positions)) > 1:
        raise UserError(f'ranks would resume at {", ".join(positions)} images; do all see the same folder {folder}?')
    if paths and not state.nimg:
        raise UserError(f'no training state in {folder} can be read; remove them to start over')
    for path in broken if distributed.rank() == 0 else []:  # it shall not count as one of those that are kept
        path.rename(path.with_suffix('.unreadable'))


def _order(config: TrainConfig, dataset_size: int, nimg: int) -> BatchOrder:
    """Which images this rank trains on from `nimg` on."""
    rank, world_size = distributed.rank(), distributed.world_size()
    return BatchOrder(
        dataset_size, config.seed, config.batch, config.micro_batch_for(world_size), rank, world_size, nimg
    )


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """Keep what ends a run in its log, on whichever rank, if that can be written."""
    try:
        yield
    except Exception as error:
        text = f'error: {error}' if isinstance(error, UserError) else traceback.format_exc()
        with contextlib.suppress(OSError):
            RunLog(folder).say(f'rank {distributed.rank()}: {text}', show=False)
        raise


def _measure_magnitudes(state: TrainState, dataset: ImageDataset) -> Magnitudes:
    """Magnitudes on the first images of the dataset with noise of their own, the same each time."""
    config, device = state.config, state.net.device
    numbers = list(range(min(MAGNITUDES_IMAGES, len(dataset))))
    images, labels = zip(*(dataset[i] for i in numbers), strict=True)
    inputs = training_inputs(torch.stack(images), torch.tensor(labels), numbers, config, device)
    shape, levels = config.network.image_shape, config.method.levels
    sigma, noise = training_draws(config.seed, numbers, shape, levels, device)
    return magnitudes(state.net, inputs.y + sigma[:, None, None, None] * noise, sigma, inputs.labels)
