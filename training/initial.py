"""Starting from weights that there are: fine-tuning of published networks, or of one's own."""

import torch

from dnnlib.configs import differences
from dnnlib.errors import UserError
from networks.config import NetworkConfig
from networks.files import fitting_network, open_network
from torch_utils import distributed
from training.state import TrainState

MAY_DIFFER = {'label_dim', 'architecture.dropout'}
LABEL_WEIGHT = 'unet.emb_label.weight'  # one column for each class: has no meaning for other classes


def check_initial(source: str, config: NetworkConfig, offline: bool = False) -> None:
    """Make sure, before anything starts, that a run can begin with the weights of a file.

    Args:
        source: Path or URL of a network file.
        config: Of the network that is to be trained. Its classes and its dropout may be others than the file's.
        offline: Only look for a URL in the download cache.

    Raises:
        UserError: with a line for each difference, or where it is no network file.
        OSError: where it cannot be read.
    """
    with open_network(source, offline) as file:
        if found := differences(file.info.config.to_json(), config.to_json(), MAY_DIFFER):
            raise UserError([f'{source} holds another network than this run has', *found])
        fitting_network(file)


def start_from(state: TrainState, source: str, offline: bool = False) -> None:
    """Give a run that has not begun the weights of a file, and its averages with them.

    The embedding of classes stays as it was drawn where the number of classes is another.

    Args:
        state: At nimg 0.
        source: As in `check_initial`, which must have passed.
        offline: As there.
    """
    assert state.nimg == 0, 'the run has begun'
    with open_network(source, offline) as file:
        same_classes = file.info.config.label_dim == state.config.network.label_dim
        with torch.no_grad():
            for name, tensor in state.net.state_dict().items():
                if same_classes or name != LABEL_WEIGHT:
                    tensor.copy_(file.get(name))
    state.begin_averages()
    note = '' if same_classes else '; the classes differ, their embedding begins anew'
    distributed.print0(f'starting from the weights of {source}{note}')
