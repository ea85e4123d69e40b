"""A whole decoder layer with LoRA on its seven linears, forward and backward.

Judged against the layer in float64 over the decoded weights: the result and every adapter gradient may be at most twice
as far from it (Frobenius norm) as the same layer with dense weights in plain PyTorch, in the run's dtype.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import fourbit
from fourbit.kernels.dispatch import force_path
from fourbit.models.decoder import Decoder

from . import decoder
from .cases import OURS, Case, Point, Setting, Variant, Work, present
from .decoder import Parts
from .peers import bnb, liger, peft_lora
from .shapes import Grid
from .timing import Call
from .weights import BYTES_PER_PARAMETER

DENSE = "ours over dense weights"
LENGTH = 2048  # tokens of one sequence; more tokens are more sequences
VOCABULARY = 64  # not used by a layer


def cases(grid: Grid, setting: Setting) -> list[Case]:
    return [
        Case(
            Point("layer", grid.decoder.model, "", 0, 0, tokens, grid.ranks[0]),
            2,
            partial(layer, Parts(grid.decoder, 1, grid.ranks[0], setting, VOCABULARY), tokens),
        )
        for tokens in grid.tokens
    ]


class Given(nn.Module):
    """Stands where the embedding stands, so that the decoder runs on given hidden states."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, ids: Tensor) -> Tensor:
        return self.x


def layer(parts: Parts, tokens: int) -> Work:
    shape, setting, absent = parts.shape, parts.setting, dict[str, str]()
    length = min(LENGTH, tokens)
    x = setting.normal(tokens // length, length, shape.hidden, seed=1).requires_grad_()
    grad = setting.normal(*x.shape, seed=2)

    def run_ours(model: Decoder, x: Tensor, grad: Tensor) -> list[Tensor]:
        adapters = fourbit.lora.layer.adapter_parameters(model).values()
        model.model.embed_tokens = Given(x)
        y = model.hidden(torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
        return [y, *torch.autograd.grad(y, [x, *adapters], grad)]

    def built(**how: Any) -> Decoder:
        model = decoder.ours(parts, **how)
        decoder.randomise(model)
        model.model.norm = nn.Identity()
        return model

    @cache
    def truth() -> tuple[list[Tensor], list[float]]:
        """The results in float64, and how far plain PyTorch in the run's dtype is from each."""
        model = built(quantised=False, dtype=torch.float64)
        with force_path("reference"):
            wide = run_ours(model, x.detach().double().requires_grad_(), grad.double())
            plain = run_ours(built(quantised=False), x, grad)
        return wide, [distance(a, b) for a, b in zip(plain, wide, strict=True)]

    def judge(given: list[Tensor]) -> float:
        wide, plain = truth()
        return max(distance(a, b) / (2 * far) for a, b, far in zip(given, wide, plain, strict=True))

    def ours(quantised: bool) -> Call:
        model = built(quantised=quantised)
        return lambda i: run_ours(model, x, grad)

    def peer(quantised: bool, with_liger: bool = False) -> Call:
        model = decoder.transformers(parts, built(), quantised=quantised)
        if with_liger:
            liger.apply(model)
        adapters = [tensor for module in peft_modules(model) for tensor in peft_lora.adapter(module)]
        positions = torch.arange(length, device=x.device).unsqueeze(0)

        def call(i: int) -> list[Tensor]:
            rotary = model.model.rotary_emb(x, positions)
            y = model.model.layers[0](x, position_embeddings=rotary, attention_mask=None)
            y = y[0] if isinstance(y, tuple) else y  # transformers 4
            return [y, *torch.autograd.grad(y, [x, *adapters], grad)]

        return liger.patched(call) if with_liger else call

    variants = [Variant(OURS, lambda: ours(True), judge, own=True), Variant(DENSE, lambda: ours(False), judge)]
    if present(peft_lora.missing(), absent, "peft"):
        variants.append(Variant(peft_lora.DENSE, lambda: peer(False), judge))
        if present(bnb.missing(), absent, "bitsandbytes"):
            variants.append(Variant(peft_lora.QLORA, lambda: peer(True), judge))
            if present(liger.missing(), absent, "Liger"):
                variants.append(Variant(liger.NAME, lambda: peer(True, True), judge))
    flops, bytes_ = layer_flops(parts, tokens, length), layer_bytes(parts, tokens)
    return Work(variants, flops, bytes_, 1, setting.way, absent, peak=True)


def peft_modules(model: Any) -> list[Any]:
    """Those of the first layer, in the order of our adapters."""
    return [model.get_submodule(f"model.layers.0.{name}") for name in decoder.LINEARS]


def distance(given: Tensor, exact: Tensor) -> float:
    """Relative Frobenius distance."""
    wide = exact.detach().double()
    return float((given.detach().double() - wide).norm() / wide.norm())


def layer_flops(parts: Parts, tokens: int, length: int) -> float:
    """Frozen products forward and backward, LoRA 3 times its forward, causal attention 3.5 times."""
    shape = parts.shape
    narrow = sum(n * parts.rank * (p.N + p.K) for p, n in uses(shape))
    attention = 2.0 * length * shape.heads * shape.head_dim  # of a token, forward, half of the square
    return tokens * (4.0 * shape.layer_weights() + 6.0 * narrow + 3.5 * attention)


def uses(shape: Any) -> list[tuple[Any, int]]:
    """Every projection and how many linears of a layer have its shape."""
    return [(p, list(decoder.LINEARS.values()).count(p.name)) for p in shape.projections()]


def layer_bytes(parts: Parts, tokens: int) -> float:
    """The 4-bit weights twice, and the layer's input, output and their gradients."""
    activations = 4.0 * parts.setting.dtype.itemsize * tokens * parts.shape.hidden
    return 2 * BYTES_PER_PARAMETER * parts.shape.layer_weights() + activations
