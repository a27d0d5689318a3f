"""Methods of training, as a table: a new one is a module and a row here.

A method has a frozen dataclass of its own numbers, `config.method` of a run, with at least

    levels, weighting          what images are noised with, and what an error costs on held-out images
    build(config, device)      the method for a run
    problems(network)          everything that is wrong with it, in words
    resolved(config, offline)  the run with what files decide, such as a teacher's; most change nothing
    trained, frozen            number of networks of each kind, for the plan of a run

and what `build` returns has

    networks                   what is trained, by name, saved under it; the first is averaged, sampled and snapshotted
    optimizers                 of these networks, by the same names
    step(batches, nimg, timer) train on the micro-batches of a step (`training.inputs.Inputs`, from an iterator that
                               has exactly those), which begins after `nimg` images; returns `StepStats`

`training.update.Update` takes a step of one optimizer with accumulation, over all ranks. Networks that are not trained,
such as a teacher, belong to the method alone: they are built again when a run is resumed.
"""

from training.methods.denoising import DenoisingConfig
from training.methods.moment_matching import MomentMatchingConfig

METHODS: dict[str, type] = {'denoising': DenoisingConfig, 'moment-matching': MomentMatchingConfig}
