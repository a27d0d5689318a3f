"""Random streams that are pure functions of what they belong to, so that nothing about them needs saving."""

import hashlib
import struct

import torch


def stream_seed(*key: int | str) -> int:
    """Hash a key such as (seed, 'noise', image number) to a seed in [0, 2^63).

    Equal keys give equal seeds on every machine and version; keys that differ anywhere give unrelated ones.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        data = part.encode() if isinstance(part, str) else struct.pack('<q', part)
        digest.update(struct.pack('<cI', b's' if isinstance(part, str) else b'i', len(data)) + data)
    return int.from_bytes(digest.digest(), 'little') >> 1


def stream(*key: int | str, device: torch.device | str = 'cpu') -> torch.Generator:
    """A generator on `device` seeded by `stream_seed(*key)`."""
    return torch.Generator(device).manual_seed(stream_seed(*key))
