"""Causal attention with grouped key-value heads, for padded rows, packed rows and cached generation.

Packed rows hold several texts; each is attended on its own, so a change in one leaves the others' numbers untouched to
the bit. What texts begin with in common stands in the row once, and they fork from it (Hydragen, Juravsky et al. 2024,
does it for generation). On a GPU one flash call takes all of a row. On a CPU, where torch's own attention takes longer
to begin than to end with short texts, above all in bf16, those are products, in batches.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .derivatives import derivatives, run, transformed
from .dispatch import path_for, product_dtype, widened
from .spans import Packed, Spans


class Scores(NamedTuple):
    """What of queries and keys goes into the softmax: c tanh(s q k^T / c) with s the scale and c the soft cap."""

    window: int = 0  # a query sees this many keys, its own and those before it; 0: all
    scale: float | None = None  # None: 1 / sqrt(D)
    softcap: float = 0.0  # 0: none


Row = Spans | Packed
PLAIN = Scores()
QUICK = {  # torch's kernels that need no plan for a shape, and whether the caller has them on
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, spans: Row | None = None, visible: Tensor | None = None, scores: Scores = PLAIN
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query seeing the keys at and before its own place; `scores` says it otherwise.

    q [B, T, H, D]; k and v [B, S, K, D], with H a multiple of K and S >= T: the last T keys belong to the queries.
    `spans`: (start, end) of each text in the B * T tokens, in order and without gaps; needs S = T. One that goes on
    from the earlier span number p is (start, end, p): it sees that one, what that one sees and itself, causally, as if
    it followed at once. Or a `Packed`.
    `visible` [B or 1, 1, T, S] bool, from `visible_keys`: which keys a query sees, in place of causality and window.
    Returns [B, T, H, D] in q's dtype. ValueError for other shapes, spans that leave tokens out, or spans and `visible`.
    """
    if k.shape != v.shape or k.shape[::3] != q.shape[::3] or k.shape[1] < q.shape[1] or q.shape[2] % k.shape[2]:
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"q [B, T, H, D] needs k and v [B, S, K, D], S >= T and H a multiple of K, got {shapes}")
    if spans is not None:
        if visible is not None:
            raise ValueError("causal_attention takes spans or visible keys, not both")
        row = spans if isinstance(spans, Packed) else Packed(spans, q.shape[0] * q.shape[1], q.device)
        if row.spans or q.numel():
            return _packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), row, scores).view(q.shape)
    if not q.numel():
        return q + k.sum() + v.sum()  # nothing, of a graph all the same
    return _causal(q, k, v, scores) if visible is None else _sdpa(q, k, v, scores, visible)


def visible_keys(queries: int, keys: int, mask: Tensor | None, device: torch.device, window: int = 0) -> Tensor:
    """Which keys each query sees, [B or 1, 1, queries, keys] bool: those up to itself that `mask` [B, keys] shows, with
    a `window` the last so many of them; and itself, also in padding, or its softmax would be 0/0."""
    here = torch.arange(keys - queries, keys, device=device).unsqueeze(-1)  # [T, 1] places of the queries
    there = torch.arange(keys, device=device)  # [S]
    seen = (there <= here)[None] if mask is None else (there <= here) & mask[:, None]
    if window:  # what the mask hides lies between no two tokens
        place = there[None] if mask is None else mask.cumsum(1)  # [B or 1, S]
        seen = seen & (place[:, None, :] > place[:, keys - queries :, None] - window)
    return (seen | (there == here))[:, None]


def _packed(q: Tensor, k: Tensor, v: Tensor, row: Packed, scores: Scores) -> Tensor:
    """q [T, H, D], k and v [T, K, D] of a packed row -> [T, H, D]."""
    # Of torch's own time, both ways, products at 53 tokens took 0.28 in bf16 that the CPU multiplied, 1.1 in fp32
    cpu = q.device.type == "cpu"
    dtype = product_dtype(q) if cpu and q.element_size() == 2 else None
    laid = row.batches(scores.window, 256 * 256 * cpu, q.shape[1] // k.shape[1], dtype)
    q, k, v = _taken(q, laid.queries), _taken(k, laid.keys), _taken(v, laid.keys)
    if _flash(q, scores):  # torch.nn.attention.varlen calls this too; in 2.10 it knows neither groups nor windows
        window: dict[str, Any] = dict(window_size_left=scores.window - 1, window_size_right=0) if scores.window else {}
        how = *laid.starts, 0.0, True, False  # no dropout, causal, no mask for debugging
        y: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, *how, scale=scores.scale, **window)[0]
        return y
    each = [x.split([size[0] * size[i] for size in laid.sizes]) for x, i in ((q, 1), (k, 2), (v, 2))]
    made = []
    for (count, *_), bias, *parts in zip(laid.sizes, laid.biases, *each, strict=True):
        q, k, v = (x.view(count, -1, *x.shape[1:]) for x in parts)  # [N, L, H, D], [N, S, K, D]
        if bias is None or bias.dtype == torch.bool:
            y = _causal(q, k, v, scores) if bias is None else _sdpa(q, k, v, scores, bias)
        else:
            y = run(_Written, _written, q, k, v, bias, scores)
        made.append(y.flatten(0, 1))
    return _taken(torch.cat(made), laid.outputs)


def _flash(q: Tensor, scores: Scores) -> bool:
    """Whether torch's flash attention, if it is on, takes these: on a GPU that runs kernels, in 16 bits, uncapped."""
    sizes = q.element_size() == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    gpu = q.device.type != "cpu" and path_for(q) == "triton" and _on(SDPBackend.FLASH_ATTENTION)
    return sizes and not scores.softcap and gpu and not transformed()


def _on(kind: SDPBackend) -> bool:
    return torch.compiler.is_compiling() or QUICK[kind]()  # a compiler cannot ask


def _taken(x: Tensor, places: Tensor | None) -> Tensor:
    """x[places]; as an embedding, whose backward is quick, and on a GPU adds in one order."""
    return x if places is None else F.embedding(places, x.flatten(1)).unflatten(1, x.shape[1:])


class _Written(torch.autograd.Function):
    """`_written` that keeps its inputs alone: backward makes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scores: Scores) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.how = bias, scores
        return _written(q, k, v, bias, scores)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        made = derivatives(lambda *x: _written(*x, *ctx.how), ctx.saved_tensors, ctx.needs_input_grad[:3], (g,))
        return *made, None, None


def _written(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scores: Scores) -> Tensor:
    """Attention as products: q [N, L, H, D], k and v [N, S, K, D], bias [1 or N, 1, L * G, S]."""
    a, k, v = (x.to(bias.dtype).transpose(1, 2) for x in (q, k, v))  # [N, heads, tokens, D]
    rows = a.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(2, 3)  # [N, K, L * G, D]
    found = (rows * (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)) @ k.mT
    if scores.softcap:  # Gemma 2
        found = (widened(found) / scores.softcap).tanh() * scores.softcap
    y = found.add_(bias).softmax(-1).to(v.dtype) @ v  # of 16 bits torch's softmax is in fp32 within
    return y.unflatten(2, (q.shape[1], -1)).transpose(1, 2).flatten(2, 3).to(q.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Each query sees the last `window` keys up to its own, in parts that see two windows at most."""
    outputs, end, window = [], k.shape[1] - q.shape[1], scores.window or k.shape[1]
    for part in q.split(window, dim=1) if window < q.shape[1] else (q,):
        count, first, end = part.shape[1], max(0, end + 1 - window), end + part.shape[1]
        seen = None if count in (1, end - first) else visible_keys(count, end - first, None, q.device, scores.window)
        outputs.append(_sdpa(part, k[:, first:end], v[:, first:end], scores, seen, count == end - first))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scores: Scores, seen: Tensor | None, causal: bool = False) -> Tensor:
    groups, gpu = q.shape[2] // k.shape[2], q.device.type != "cpu"
    # torch's own knows no soft caps, its quick kernels no vmap and jvp; on a GPU none takes a mask and grouped heads
    if scores.softcap or transformed() or (gpu and seen is not None and q.shape[1] == 1):
        seen = visible_keys(q.shape[1], k.shape[1], None, q.device) if seen is None else seen
        bias = torch.where(seen, 0.0, -torch.inf).to(product_dtype(q)).repeat_interleave(groups, 2)
        return run(_Written, _written, q, k, v, bias, scores)
    if gpu and seen is not None:
        k, v, groups = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, D]
    # cuDNN makes a plan for every shape, so it gets whole rows of few lengths
    quick = [kind for kind in QUICK if _on(kind)]
    fits = gpu and SDPBackend.MATH in quick  # which takes whatever the others do not
    with sdpa_kernel(quick) if fits and not (causal and q.shape[2] % 256 == 0) else nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=scores.scale, enable_gqa=groups > 1)
    return y.transpose(1, 2)
