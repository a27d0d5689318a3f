"""One training step, whatever the method: its micro-batches, then the averages."""

from collections.abc import Iterator

from dataset.order import Batch
from torch_utils.tf32 import tf32
from training.inputs import Inputs, training_inputs
from training.monitor.step_stats import StepStats
from training.monitor.timing import PhaseTimer
from training.state import TrainState


class Stepper:
    """Takes the steps of a run; nothing in a step waits for the device.

    Args:
        state: What is trained.
        batches: This rank's micro-batches, one after another.
        timer: Of the phases.
    """

    def __init__(self, state: TrainState, batches: Iterator[Batch], timer: PhaseTimer):
        self.state, self.batches, self.timer = state, batches, timer

    def __call__(self) -> StepStats:
        """Train on the next `config.batch` images; return sums that are still on the device."""
        state = self.state
        with tf32(state.config.tf32):
            stats = state.method.step(self._inputs(), state.nimg, self.timer)
        state.nimg += state.config.batch
        with self.timer.phase('ema'):
            state.update_averages()
        return stats

    def _inputs(self) -> Iterator[Inputs]:
        """Micro-batches on the device; a step takes as many as it needs."""
        config, device = self.state.config, self.state.net.device
        for batch in self.batches:
            yield training_inputs(batch.images, batch.labels, batch.numbers.tolist(), config, device)
