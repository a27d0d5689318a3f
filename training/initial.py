"""Starting from weights that there are: fine-tuning of published networks, or of one's own."""

import torch

from dnnlib.configs import differences
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.denoiser import Denoiser
from networks.files import NetworkFile, PublishedNetworkFile, fitting_network, open_network
from torch_utils import distributed
from torch_utils.finite import nonfinite, some
from training.state import TrainState

MAY_DIFFER = {'img_resolution', 'label_dim', 'augment_dim', 'architecture.dropout'}
MAY_BEGIN_ANEW = ('label', 'augment')  # in names of tensors: embeddings of classes have no meaning for other ones


def check_initial(source: str, config: NetworkConfig, offline: bool = False) -> None:
    """Make sure, before anything starts, that a run can begin with the weights of a file.

    Args:
        source: Path or URL of a network file.
        config: Of the network that is to be trained. Its classes, augmentation and dropout may be others than the
            file's; so may its resolution, if its weights do not depend on it.
        offline: Only look for a URL in the download cache.
    """
    with open_network(source, offline) as file:
        if found := differences(file.info.config.to_json(), config.to_json(), MAY_DIFFER):
            raise UserError([f'{source} holds another network than this run has', *found])
        fitting_network(file)
        with torch.device('meta'):
            net = Denoiser(config)
        if found := [line for line in misfits(file, net) if not any(part in line for part in MAY_BEGIN_ANEW)]:
            there, here = ('x'.join(map(str, c.img_resolution)) for c in (file.info.config, config))
            line = (
                f'the weights of {source}, for {there} pixels, do not fit {here}: {len(found)} tensors differ, such as'
            )
            raise UserError(f'{line} {found[0]}')
        if bad := [name for name in file.names if nonfinite({name: file.get(name)})]:
            raise UserError(f'{source} holds values that are not finite, in {some(bad)}')


def misfits(file: NetworkFile | PublishedNetworkFile, net: Denoiser) -> list[str]:
    """Names of tensors that only one of them has, or in another shape."""
    theirs = {name: tuple(file.shape(name)) for name in file.names}
    ours = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    return sorted(name for name in theirs | ours if theirs.get(name) != ours.get(name))


def start_from(state: TrainState, source: str, offline: bool = False) -> None:
    """Give a run that has not started the weights of a file, and its averages with them.

    Embeddings of classes and augmentations stay as they were drawn where their number is another.

    Args:
        state: At nimg 0.
        source: As in `check_initial`, which must have passed.
        offline: As there.
    """
    assert state.nimg == 0, 'the run has started'
    with open_network(source, offline) as file, torch.no_grad():
        unfit = misfits(file, state.net)
        for name, tensor in state.net.state_dict().items():
            if name not in unfit:
                tensor.copy_(file.get(name))
    state.begin_averages()
    note = f'; what does not fit is left out or starts from scratch: {", ".join(unfit)}' if unfit else ''
    distributed.print0(f'starting from the weights of {source}{note}')
