"""Which examples make up which step, as a pure function of the step's number: a resumed run needs no saved cursor."""

import hashlib
from functools import lru_cache

import torch


def steps_per_epoch(n_examples: int, batch_size: int) -> int:
    """Steps that visit every example once; the last one may be short."""
    if n_examples < 1 or batch_size < 1:
        raise ValueError(f"n_examples and batch_size must be at least 1, not {n_examples} and {batch_size}")
    return -(-n_examples // batch_size)


def step_indices(n_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of one optimizer step (steps count from 0), in the shuffled order of its epoch.

    Every example comes once an epoch; an epoch's last batch is kept even if short, and the next epoch starts a new
    step. The result depends on the four arguments alone.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, not {step}")
    epoch, position = divmod(step, steps_per_epoch(n_examples, batch_size))
    order = _epoch_order(n_examples, seed, epoch)
    return list(order[position * batch_size : (position + 1) * batch_size])


@lru_cache(maxsize=2)
def _epoch_order(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation for one epoch; seed and epoch are hashed, so one seed's second epoch is no other seed's first."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return tuple(torch.randperm(n_examples, generator=generator).tolist())
