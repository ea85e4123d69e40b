"""Which examples train, which are held out, and which make up which step: pure functions of the data and the number of
the step, so a resumed run needs no saved cursor."""

import hashlib
import json
import math
from functools import lru_cache

import torch

from ..errors import InputError
from .encode import Dataset, digest, measure


def steps_per_epoch(n_examples: int, batch_size: int) -> int:
    """Steps that visit every example once; the last one may be short."""
    return -(-n_examples // batch_size)


def step_indices(n_examples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The examples of one optimizer step (steps count from 0), in the shuffled order of its epoch.

    Every example comes once an epoch; an epoch's last batch is kept even if short, and the next epoch starts a new
    step. The result depends on the four arguments alone."""
    epoch, position = divmod(step, steps_per_epoch(n_examples, batch_size))
    order = _epoch_order(n_examples, seed, epoch)
    return list(order[position * batch_size : (position + 1) * batch_size])


@lru_cache(maxsize=2)
def _epoch_order(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation for one epoch; seed and epoch are hashed, so one seed's second epoch is no other seed's first."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return tuple(torch.randperm(n_examples, generator=generator, device="cpu").tolist())


def split_validation(dataset: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """(train, validation): a row's side depends on its topic alone, so it stays when rows are added or moved.

    The topic of a conversation is all of it, of preference rows the prompt; rows of one topic go to one side.
    `fraction` is the expected share of validation; each side gets at least one row where there are two topics. What was
    skipped or dropped on reading stays in the report of the training side. InputError for a share of less than a row.
    """
    if not 0 < fraction < 1:
        raise InputError(f"a share of rows for validation must lie between 0 and 1, got {fraction:g}")
    if len(dataset) and round(min(fraction, 1 - fraction) * len(dataset), 6) < 1:
        raise InputError(
            f"a share of {fraction:.4%} of {len(dataset):,} rows for validation is less than a row on one side: each "
            f"side needs {math.ceil(10_000 / len(dataset)) / 100:.2f}% at least; or give validation rows of their own"
        )
    keys = [digest(row.topic()) for row in dataset.samples]
    held = {key for key in keys if int.from_bytes(key[:8], "big") < fraction * 2**64}
    if len(set(keys)) >= 2:
        held = held or {min(keys)}
        held = held - {max(keys)} if held == set(keys) else held
    train = _subset(dataset, [key not in held for key in keys])
    train.report.skipped, train.report.dropped = dataset.report.skipped, dataset.report.dropped
    return train, _subset(dataset, [key in held for key in keys])


def _subset(dataset: Dataset, chosen: list[bool]) -> Dataset:
    examples = [example for example, keep in zip(dataset.examples, chosen, strict=True) if keep]
    part = Dataset(dataset.kind, examples, [s for s, keep in zip(dataset.samples, chosen, strict=True) if keep])
    part.template = dataset.template
    measure(part)
    return part


def count_overlap(train: Dataset, validation: Dataset) -> int:
    """Validation rows whose topic (see `split_validation`) also stands in train: a leak; a score that means little."""
    seen = {digest(row.topic()) for row in train.samples}
    return sum(digest(row.topic()) in seen for row in validation.samples)


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 (hex) of all that training sees, in order: every example's token ids and mask, and its judgement."""
    whole = hashlib.sha256()
    for example in dataset.examples:
        whole.update(json.dumps(example.content(), separators=(",", ":")).encode())
    return whole.hexdigest()
