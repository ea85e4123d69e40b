"""Where a part of the first minutes on a GPU runs and writes, and its first part: the machine and its attention.

torch chooses among kernels of attention by shape, and some of them are slow the first time that they see one: packed
rows and answers that grow have a new shape every time.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fourbit.kernels.attention import causal_attention

from . import machine, shapes
from .cases import Setting
from .decoder import Parts
from .gpu_day import keep

TOY = shapes.Decoder("toy", 64, 128, 2, 1, 32, 300, 2)


@dataclass(frozen=True)
class Day:
    """One part's place: where its lines go, until when, and on what it runs."""

    part: str
    out: Path
    seconds: float
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def shape(self) -> shapes.Decoder:
        return TOY if self.dry else replace(shapes.LLAMA_8B, layers=8)

    @property
    def setting(self) -> Setting:
        dtype = torch.float32 if self.dry else torch.bfloat16
        return Setting(self.device, dtype, machine.cache_bytes(self.device))

    def say(self, what: str, **fields: Any) -> None:
        keep(self.out, {"part": self.part, "what": what, **fields})

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def parts(self) -> Parts:
        return Parts(self.shape, self.shape.layers, 16, self.setting, self.shape.vocabulary)


def probe(day: Day) -> None:
    facts = machine.facts(day.device)
    if not day.dry:
        free, total = torch.cuda.mem_get_info()
        facts |= {"free_bytes": free, "total_bytes": total, "clocks": machine.clocks()}
    day.say("machine", **facts)
    for name, (queries, keys) in {"full row": (2048, 2048), "short row": (100, 100), "one token": (1, 1000)}.items():
        q, k, v = heads(day, 1, queries // (16 if day.dry else 1) or 1, keys // (16 if day.dry else 1))
        grouped = {"is_causal": queries > 1, "enable_gqa": True}
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, **grouped))
        day.say("chosen", shape=name, backend=chosen.name)
    ways = {
        "ours, packed": lambda q, k, v, spans: causal_attention(q, k, v, spans=spans),
        "one call, flash": varlen,
        "a call a span, torch's choice": partial(by_span, None),
        "a call a span, flash": partial(by_span, SDPBackend.FLASH_ATTENTION),
        "a call a span, efficient": partial(by_span, SDPBackend.EFFICIENT_ATTENTION),
        "a call a span, cuDNN": partial(by_span, SDPBackend.CUDNN_ATTENTION),
    }
    for name, way in ways.items():
        timed(day, "packed row", name, [partial(packed, day, way, seed) for seed in range(2 if day.dry else 6)])
    for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        name = "torch's choice" if backend is None else backend.name
        lengths = range(500, 502 if day.dry else 516)
        timed(day, "one more token", name, [partial(one_token, day, backend, length) for length in lengths])


def timed(day: Day, what: str, way: str, makers: Sequence[Callable[[], Callable[[], object]]]) -> None:
    """Each maker's call is of a new shape: what its first and its third run take, in ms; or why it does not run."""
    first, later = [], []
    try:
        for make in makers:
            call = make()
            first.append(day.milliseconds(call))
            call()
            later.append(day.milliseconds(call))
    except Exception as problem:
        day.say(what, way=way, problem=str(problem).splitlines()[0][:120])
        return
    day.say(what, way=way, first_ms=statistics.median(first), worst_ms=max(first), later_ms=statistics.median(later))


def heads(day: Day, batch: int, queries: int, keys: int) -> Iterator[Tensor]:
    """q, k and v as SDPA takes them, [batch, heads, tokens, D]."""
    shape = day.shape
    for i, (tokens, count) in enumerate(((queries, shape.heads), (keys, shape.key_heads), (keys, shape.key_heads))):
        yield day.setting.normal(batch, count, tokens, shape.head_dim, seed=i)


def packed(day: Day, way: Callable[..., Tensor], seed: int) -> Callable[[], object]:
    """Forward and backward of a packed row of 20 random lengths, of which no other seed has the same."""
    total = 200 if day.dry else 4096
    cuts = torch.randperm(total - 1, generator=torch.Generator().manual_seed(seed))[:19].add(1).sort().values.tolist()
    spans = list(zip([0, *cuts], [*cuts, total], strict=True))
    q, k, v = (x.transpose(1, 2).contiguous().requires_grad_() for x in heads(day, 1, total, total))
    grad = torch.ones_like(q)
    return lambda: torch.autograd.grad(way(q, k, v, spans), (q, k, v), grad)


def by_span(backend: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    parts = []
    for start, end in spans:
        pieces = (x[:, start:end].transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend) if backend else nullcontext():
            parts.append(F.scaled_dot_product_attention(*pieces, is_causal=True, enable_gqa=True).transpose(1, 2))
    return torch.cat(parts, 1)


def varlen(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """All spans in one launch, whatever their lengths."""
    ends = torch.tensor([0, *(end for _, end in spans)], dtype=torch.int32, device=q.device)
    longest = max(end - start for start, end in spans)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    y, *_ = torch.ops.aten._flash_attention_forward(*flat, ends, ends, longest, longest, 0.0, True, False)
    return y.view(q.shape)


def one_token(day: Day, backend: SDPBackend | None, keys: int) -> Callable[[], object]:
    q, k, v = heads(day, 8, 1, keys)

    def call() -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return call
