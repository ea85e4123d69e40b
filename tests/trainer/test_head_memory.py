"""Bytes that log-probabilities and divergences allocate: they grow with the chunk, not with tokens x vocabulary.

Every allocation and release of torch's CPU allocator is read from the profiler, so temporaries inside of an operator
count too. The bounds are sums of what must be there; SMALL is for figures of [N] and the like.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fourbit.kernels import chunked_head
from fourbit.kernels.linear_divergence import Divergence
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA
from fourbit.trainer.losses.tokens import token_divergence, token_scores

V, D, ROWS = 8192, 64, 16  # ROWS: of a chunk
CHUNK = 4 * V * ROWS
BLOCK = 4 * V  # one row at a time
SMALL = 64 * 1024
KINDS = ("dense", "bias", "trained", "nf4", "lora-dense", "lora-nf4")


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes alive at once of those allocated by `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(chunked_head, "BLOCK_BYTES", BLOCK)


def head_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Linear(D, V, bias=kind == "bias").requires_grad_(kind == "trained")
    if kind in ("nf4", "lora-nf4"):
        dense = NF4Linear.from_weight(dense.weight)
    return AdapterLayer(dense, default=LoRA(dense, 2, 4.0)) if kind.startswith("lora") else dense


def logprob_step(head: nn.Module, hidden: Tensor) -> None:
    token_scores(head, hidden, torch.zeros(len(hidden), dtype=torch.int64)).logps.sum().backward()


def divergence_step(head: nn.Module, hidden: Tensor) -> None:
    teacher = hidden.detach()
    token_divergence(head, hidden, head, teacher, *Divergence("jsd")).sum().backward()


def test_the_measure_sees_full_logits():
    hidden = torch.randn(64, D)
    head = head_of("dense")
    assert 2 * 4 * 64 * V <= peak_bytes(lambda: torch.log_softmax(head(hidden), 1)) <= 2 * 4 * 64 * V + SMALL


def of_one_row(head: nn.Module) -> int:
    """What the head takes by itself: a decoded weight, gradients of what is trained in it."""
    hidden = torch.randn(1, D, requires_grad=True)
    return peak_bytes(lambda: head(hidden).sum().backward())


def peak_of(step: Callable[[nn.Module, Tensor], None], head: nn.Module, rows: int) -> int:
    hidden = torch.randn(rows, D, requires_grad=True)
    head.zero_grad()
    return peak_bytes(lambda: step(head, hidden))


def of_rows(rows: int) -> int:
    """Gradients of hidden states in pieces and whole, a few figures a row, the random state of each chunk."""
    return rows * (3 * 4 * D + 64) + rows // ROWS * torch.get_rng_state().nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("step", "blocks"), [(logprob_step, 1), (divergence_step, 13)])
def test_memory_is_one_chunk(kind, step, blocks):
    head = head_of(kind)
    few, many = (peak_of(step, head, rows) for rows in (64, 192))
    chunks = 2 if kind == "lora-dense" else 1  # the base's logits, and their sum with the update
    bound = of_one_row(head) + chunks * CHUNK + blocks * BLOCK + of_rows(64) + SMALL
    assert few <= bound
    assert many - few <= of_rows(192 - 64)  # logits of these rows would be 4.2 MB
