"""Mixtures of experts, Qwen3-MoE and Mixtral: their sparse block, their Specs, and files that hold experts apart."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.experts import grouped_product
from ..kernels.swiglu import swiglu
from .config import Settings
from .llama import common, qwen3, window
from .spec import Spec

_APART = re.compile(r"(.+)\.\w+\.experts\.(0|[1-9][0-9]*)\.(?:(gate_proj|up_proj|w[13])|down_proj|w2)\.weight")


class Router(nn.Linear):
    """Of each token a softmax over all experts, in fp32 at least; of a class of its own, so it is never in 4 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))


class Experts(nn.Module):
    """The sum over a token's experts of weight * down(silu(gate x) * up x). Tokens are sorted by expert once, and each
    product is one of an expert's rows (kernels/experts.py), with weights dense or in 4 bits."""

    def __init__(self, experts: int, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [T, H], index [T, k] int64 and weights [T, k] -> [T, H] in x's dtype."""
        order = index.flatten().argsort(stable=True)
        ends = torch.bincount(index.flatten(), minlength=self.down_proj.shape[0]).cumsum(0, dtype=torch.int32)
        rows = x[:, None].expand(-1, index.shape[1], -1).flatten(0, 1)[order]
        gate, up = grouped_product(rows, self.gate_up_proj.mT, ends).chunk(2, -1)
        y = grouped_product(swiglu(gate, up), self.down_proj.mT, ends) * weights.reshape(-1, 1)[order]
        return y[order.argsort()].view(*index.shape, x.shape[1]).sum(1).to(x.dtype)


class Mixture(nn.Module):
    """The feed-forward part of a layer: a router, and the experts of the largest scores that it sends a token to."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.experts = spec, Experts(spec.num_experts, spec.hidden_size, spec.intermediate_size)
        self.gate = Router(spec.hidden_size, spec.num_experts, bias=False)

    def forward(self, x: Tensor, shared: object) -> Any:
        rows = x.flatten(0, -2)
        weights, index = self.gate(rows).topk(self.spec.num_experts_per_tok)
        weights = weights / weights.sum(-1, keepdim=True) if self.spec.norm_topk_prob else weights
        return self.experts(rows, index, weights).view_as(x)


def qwen3_moe(keys: Settings) -> Spec:
    """Qwen3-MoE, all of whose layers are sparse."""
    keys.one_of("decoder_sparse_step", (None, 1), "1 (every layer is sparse)")
    if keys.get("mlp_only_layers"):
        raise keys.refusal("mlp_only_layers", "empty (every layer is sparse)")
    keys.one_of("use_sliding_window", (None, False), "false")
    own = _experts(keys, 128, 8) | {"norm_topk_prob": keys.flag("norm_topk_prob")}
    size = keys.number("moe_intermediate_size", default=768)
    return replace(qwen3(keys), intermediate_size=size, **own)


def mixtral(keys: Settings) -> Spec:
    """Mixtral: a Mistral whose every layer is sparse."""
    return Spec(**common(keys, eps=1e-5, theta=1e6), **_experts(keys, 8, 2), windows=window(keys))


def _experts(keys: Settings, experts: int, each: int) -> dict[str, Any]:
    keys.one_of("hidden_act", (None, "silu", "swish"), "'silu'")
    name = "num_experts" if keys.get("num_experts") is not None else "num_local_experts"  # Qwen's in transformers 4
    count, chosen = keys.number(name, default=experts), keys.number("num_experts_per_tok", default=each)
    if chosen > count:
        raise keys.refusal("num_experts_per_tok", f"at most the {count} experts that there are")
    return {"num_experts": count, "num_experts_per_tok": chosen}


def stacked(tensors: Iterable[tuple[str, Tensor]], experts: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, with the matrices of experts that a file has apart (gate, up and down, or w1, w3 and w2) as one
    of each kind, when its last piece is there. What misses pieces, has unlike ones, or stands there twice comes as the
    file calls it, which is the name of nothing."""
    held: dict[str, dict[tuple[int, bool], tuple[str, Tensor]]] = {}
    seen = set[tuple[str, int, bool]]()
    for name, tensor in tensors:
        found = _APART.fullmatch(name)
        own = f"{found[1]}.mlp.experts.{'gate_up_proj' if found[3] else 'down_proj'}" if found else ""
        at = (int(found[2]), found[3] in ("up_proj", "w3")) if found else (0, False)
        if found is None or at[0] >= experts or (own, *at) in seen:
            yield name if found else name.replace("block_sparse_moe", "mlp"), tensor
            continue
        seen.add((own, *at))
        (pieces := held.setdefault(own, {}))[at] = name, tensor
        if len(pieces) == experts * (2 if found[3] else 1) and len({piece.shape for _, piece in pieces.values()}) == 1:
            yield own, torch.cat([held[own].pop(at)[1] for at in sorted(pieces)]).view(experts, -1, tensor.shape[-1])
    for pieces in held.values():
        yield from pieces.values()
