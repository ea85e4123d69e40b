"""A whole training step (forward, loss, backward, clipping, AdamW) of a decoder with random 4-bit weights and LoRA.

Timed by the host's clock, as a user would: tokens a second, peak memory, and the share of the tokens that the machine's
matrix rate allows without recomputing (docs/numbers.md says how they are counted). Judged by the loss of the first
step: within one unit of bf16 of what the reference path gives. The parts have gates of their own.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fourbit.data.batch import Batch, Encoded, Example, pad
from fourbit.kernels.dispatch import force_path
from fourbit.trainer.config import TrainingConfig
from fourbit.trainer.loop import Run, cross_entropy
from fourbit.trainer.step import make_optimizer

from . import decoder
from .cases import OURS, Case, Point, Setting, Variant, Work, present
from .decoder import Parts
from .layer import LENGTH, uses
from .peers import bnb, liger, peft_lora
from .shapes import Decoder, Grid
from .timing import Call

RECOMPUTED = ", recomputed"
PAGED = OURS + ", paged AdamW"  # with a budget of a quarter of its state
RATE = 1e-5
UNIT = 2.0**-8


def cases(grid: Grid, setting: Setting) -> list[Case]:
    shape = grid.decoder
    parts = Parts(shape, shape.layers, grid.ranks[0], setting, shape.vocabulary)
    return [
        Case(Point("step", shape.model, "", 0, 0, tokens, grid.ranks[0]), 2, partial(step, parts, tokens))
        for tokens in grid.tokens
    ]


def step(parts: Parts, tokens: int) -> Work:
    absent: dict[str, str] = {}
    length = min(LENGTH, tokens)
    batch = random_batch(parts, tokens // length, length)

    @cache
    def truth() -> float:
        model = decoder.ours(parts)
        with force_path("reference"), torch.no_grad():
            return float(cross_entropy(model, batch).loss) / batch.trained

    def judge(loss: Any) -> float:
        return abs(float(loss) - truth()) / (UNIT * abs(truth()))

    def ours(recompute: bool, paged: bool = False) -> Call:
        model = decoder.ours(parts)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        state = 8 * sum(parameter.numel() for parameter in parameters.values())
        options: dict[str, Any] = {"optimizer": "paged-adamw", "optimizer_budget": f"{state // 4 >> 10}KiB"}
        config = TrainingConfig(out="none", weight_decay=0.0, max_grad_norm=1.0, **(options if paged else {}))
        run = Run(model, parameters=parameters, optimizer=make_optimizer(parameters, config))

        def call(i: int) -> Tensor:
            model.checkpointing = recompute
            run.forward_backward(batch)
            return run.optim_step(RATE).loss

        return call

    def peer(recompute: bool, with_liger: bool = False) -> Call:
        model = decoder.transformers(parts, decoder.ours(parts))
        if with_liger:
            liger.apply(model)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        call = peer_step(model, batch.to(parts.setting.device))
        return liger.patched(call) if with_liger else call

    variants = [
        Variant(OURS, lambda: ours(False), judge, own=True),
        Variant(OURS + RECOMPUTED, lambda: ours(True), judge, own=True),
    ]
    if parts.setting.device.type == "cuda":  # a CPU only simulates paging
        variants.append(Variant(PAGED, lambda: ours(False, paged=True), judge, own=True))
    if present(bnb.missing(), absent, "bitsandbytes") and present(peft_lora.missing(), absent, "peft"):
        variants.append(Variant(peft_lora.QLORA, lambda: peer(False), judge))
        variants.append(Variant(peft_lora.QLORA + RECOMPUTED, lambda: peer(True), judge))
        if present(liger.missing(), absent, "Liger"):
            variants.append(Variant(liger.NAME, lambda: peer(False, True), judge))
    flops = tokens * flops_a_token(parts.shape, parts.rank, length)
    return Work(
        variants,
        flops,
        0.0,
        1,
        ("wall",),
        absent,
        peak=True,
        least_rounds=3,
        extra={"tokens": tokens, "length": length},
    )


def random_batch(parts: Parts, sequences: int, length: int) -> Batch:
    """Random ids, every token but each sequence's last trained."""
    ids = torch.randint(parts.vocabulary, (sequences, length), generator=torch.Generator().manual_seed(3))
    return pad([(i, Example((Encoded(row, [True] * length, "", ""),))) for i, row in enumerate(ids.tolist())], 0)


def peer_step(model: Any, batch: Batch) -> Call:
    """Its own loss from labels, clipping, and torch's fused AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    def call(i: int) -> Tensor:
        loss: Tensor = model(input_ids=batch.input_ids, labels=batch.input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return call


def flops_a_token(shape: Decoder, rank: int, length: int) -> float:
    """Frozen products forward and backward, LoRA 3 and causal attention 3.5 times their forward, nothing recomputed."""
    frozen = shape.layers * shape.layer_weights() + shape.vocabulary * shape.hidden
    attention = 2.0 * length * shape.heads * shape.head_dim * shape.layers
    lora = shape.layers * sum(n * rank * (p.N + p.K) for p, n in uses(shape))
    return 4.0 * frozen + 3.5 * attention + 6.0 * lora
