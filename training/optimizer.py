"""Learning rate as a function of training time."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Linear ramp-up, then inverse square root decay (EDM2 eq. 67).

    Args:
        ref: alpha_ref, the highest learning rate.
        decay: t_ref, iterations after which it falls; 0 for never.
        rampup: Images over which it rises from 0.
    """

    ref: float
    decay: float
    rampup: int

    def at(self, nimg: int, batch: int) -> float:
        """Learning rate of the step that begins after `nimg` images."""
        rate = self.ref
        if self.decay:
            rate /= math.sqrt(max(nimg / (self.decay * batch), 1))
        if self.rampup:
            rate *= min(nimg / self.rampup, 1)
        return rate
