"""One process or many: the same calls work with and without torchrun."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dnnlib.errors import UserError


def init(device: str | None = None) -> torch.device:
    """Join the process group that torchrun describes, if there is one, and choose this rank's device.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...; None takes this rank's GPU where there is one.

    Returns:
        The device that this rank shall use.
    """
    local_rank = int(os.environ.get('LOCAL_RANK', '0'))
    name = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        chosen = torch.device(f'cuda:{local_rank}' if name == 'cuda' else name)
    except RuntimeError:
        raise UserError(f'unknown device {name!r}; write cpu, cuda or cuda:NUMBER') from None
    if chosen.type == 'cuda' and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f'device {chosen} is not there; this machine has {torch.cuda.device_count()} GPUs')
    if chosen.type == 'cuda':
        torch.cuda.set_device(chosen)
        _full_precision()
    if int(os.environ.get('WORLD_SIZE', '1')) > 1 and not dist.is_initialized():
        # Beside NCCL, gloo lets ranks agree on something without waiting for their GPUs.
        backend = 'cpu:gloo,cuda:nccl' if chosen.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    return chosen


def _full_precision() -> None:
    """float32 means float32 on a GPU, and sums of 16-bit products are kept in it, as in EDM2's published results."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = True  # shapes repeat


@contextlib.contextmanager
def session(device: str | None = None) -> Iterator[torch.device]:
    """`init` before the block and `close` after it.

    Where the block raises, the group is left as it is: taking leave would wait for ranks that wait for this one, and
    they would end, with an error that hides this one's, before it is told. They end when this process does.
    """
    yield init(device)
    close()


def close() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks in place and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Take the elementwise maximum over all ranks in place and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; every rank calls it. Does not wait for a GPU."""
    return bool(all_reduce_max(torch.tensor([int(flag)])).item()) if dist.is_initialized() else flag


def gather_text(text: str) -> list[str]:
    """The texts of all ranks, in their order; every rank calls it."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = int(all_reduce_max(torch.tensor([len(data)])).item())
    table = torch.zeros(world_size(), length, dtype=torch.uint8)
    table[rank(), : len(data)] = data
    return [bytes(row).rstrip(b'\0').decode() for row in all_reduce_sum(table).tolist()]


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only, at once."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)
