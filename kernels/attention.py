"""Causal attention with grouped key-value heads, for padded rows, packed rows and cached generation.

Packed rows hold several examples; each is attended on its own, so a change in one leaves the others' numbers untouched
to the bit. An example may fork: several continuations of one text, which stands in the row once (Hydragen, Juravsky et
al. 2024, does it for generation). Three ways:

- On a GPU with flash attention (16 bits, compute capability 8.0) one call takes all of a row, whatever its lengths.
- Short segments are batched by length and written out as products, for torch's own attention on a CPU takes longer to
  begin than to end with them, above all in bf16. So is what no kernel knows, in pieces: soft caps, transforms, fp32 on
  a GPU. Neither keeps its weights: backward makes them again, batch by batch.
- torch's own attention for all else, each segment by itself.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .derivatives import beyond_first, derivatives, run, transformed
from .dispatch import path_for, product_dtype, widened
from .spans import Batch, Packed, Segment, Spans

QUICK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Scores(NamedTuple):
    """What of queries and keys goes into the softmax: c tanh(s q k^T / c) with s the scale and c the soft cap."""

    window: int = 0  # a query sees this many keys, its own and those before it; 0: all
    scale: float | None = None  # None: 1 / sqrt(D)
    softcap: float = 0.0  # 0: none


PLAIN = Scores()


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spans: Spans | Packed | None = None,
    visible: Tensor | None = None,
    scores: Scores = PLAIN,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query seeing the keys at and before its own place; `scores` says it otherwise.

    q [B, T, H, D]; k and v [B, S, K, D], with H a multiple of K and S >= T: the last T keys belong to the queries.
    `spans`: (start, end) of each example in the B * T tokens, in order and without gaps; needs S = T. In the span
    (start, fork, end_1, ..., end_n) tokens start to fork are the trunk and end_(i-1) to end_i branch i, which sees the
    trunk and itself, causally, as if it followed the trunk at once; (start, fork, end) is (start, end). Who calls it
    for many layers makes a `Packed` of them once.
    `visible` [B or 1, 1, T, S] bool, from `visible_keys`: which keys a query sees, in place of causality and window.
    Returns [B, T, H, D] in q's dtype. ValueError for other shapes, spans that leave tokens out, or spans and `visible`.
    """
    if k.shape != v.shape or k.shape[::3] != q.shape[::3] or k.shape[1] < q.shape[1] or q.shape[2] % k.shape[2]:
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"q [B, T, H, D] needs k and v [B, S, K, D], S >= T and H a multiple of K, got {shapes}")
    if spans is not None and visible is not None:
        raise ValueError("causal_attention takes spans or visible keys, not both")
    rows, tokens = q.shape[0], q.shape[1]
    if spans is None and visible is None and tokens == k.shape[1] and _as_spans(q, scores):
        spans = [(i * tokens, (i + 1) * tokens) for i in range(rows)]
    if spans is not None:
        tokens *= rows
        row = spans if isinstance(spans, Packed) else Packed(spans, tokens, q.device)
        if row.tokens != tokens or k.shape[1] != q.shape[1]:
            raise ValueError(f"spans of {row.tokens} tokens need as many queries and keys, got {tuple(q.shape[:2])}")
        return _packed(*(x.flatten(0, 1) for x in (q, k, v)), row, scores).view(q.shape)
    if visible is not None:
        return _sdpa(q, k, v, scores, attn_mask=visible)
    return _causal(q, k, v, scores)


def visible_keys(queries: int, keys: int, mask: Tensor | None, device: torch.device, window: int = 0) -> Tensor:
    """Which keys each query sees, [B or 1, 1, queries, keys] bool: those up to itself that `mask` [B, keys] shows, and
    with a `window` the last so many of them.

    Every query sees itself, also in padding, or its softmax would be 0/0."""
    here = torch.arange(keys - queries, keys, device=device).unsqueeze(-1)  # [T, 1] places of the queries
    there = torch.arange(keys, device=device)  # [S]
    seen = there <= here  # [T, S]
    if mask is None:
        return (seen & (there > here - window) if window else seen)[None, None]
    seen = seen & mask[:, None, :]
    if window:  # what the mask hides lies between no two tokens
        place = mask.cumsum(1)  # [B, S]
        seen = seen & (place[:, None, :] > place[:, keys - queries :, None] - window)
    return (seen | (there == here))[:, None]


def _packed(q: Tensor, k: Tensor, v: Tensor, row: Packed, scores: Scores) -> Tensor:
    """q [T, H, D], k and v [T, K, D] of a packed row -> [T, H, D]."""
    if _flash(q, scores):
        return _varlen(q, k, v, row, scores)
    groups, dtype = q.shape[1] // k.shape[1], product_dtype(q)
    area, room = _sizes(q, scores)
    short, long, places = row.batches(scores.window, area, room // q.shape[1], groups, dtype)
    outputs = [run(_Products, _products, q, k, v, short, scores)] if short else []
    if long:
        outputs += _one_by_one(q, k, v, row, long, scores)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return y if places is None else y.index_select(0, places)


def _as_spans(q: Tensor, scores: Scores) -> bool:
    """Whether rows of one length go the way of packed ones: soft caps, whose weights are kept only there, and windows
    that a GPU's kernel knows."""
    return bool(scores.softcap) or (0 < scores.window < q.shape[1] and _flash(q, scores))


def _flash(q: Tensor, scores: Scores) -> bool:
    """Whether torch's flash attention takes these: on a GPU that runs kernels, in 16 bits, without a soft cap."""
    sizes = q.element_size() == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return sizes and not scores.softcap and q.device.type != "cpu" and path_for(q) == "triton" and not transformed()


def _varlen(q: Tensor, k: Tensor, v: Tensor, row: Packed, scores: Scores) -> Tensor:
    """One call for all segments of a row, forward and backward: its time does not depend on how the lengths vary.

    The operator is there in every torch from 2.5 on, with the gradient that torch gives it; `torch.nn.attention.varlen`
    calls it too, and in 2.10 knows neither grouped heads nor windows."""
    queries, keys, most, taken = row.varlen(scores.window)
    if taken is not None:
        k, v = k.index_select(0, taken), v.index_select(0, taken)
    ends = {"window_size_left": scores.window - 1, "window_size_right": 0} if scores.window else {}
    flash = torch.ops.aten._flash_attention_forward
    y: Tensor = flash(q, k, v, queries, keys, *most, 0.0, True, False, scale=scores.scale, **ends)[0]
    return y


def _sizes(q: Tensor, scores: Scores) -> tuple[int | None, int]:
    """The most queries times keys of a segment that is attended as products, None: any; and of a batch of them.

    On two cores with AVX2, fp32, forward and backward, products took 0.8 of the time of torch's own at 24 tokens and
    1.2 at 64. In bf16, on two that multiply it, a batch at 53 tokens took 0.28."""
    if scores.softcap or q.device.type != "cpu" or transformed():
        return None, 1 << (22 if q.device.type == "cpu" else 26)
    return (256 * 256 if q.element_size() == 2 else 32 * 32), 1 << 22


class _Products(torch.autograd.Function):
    """`_products` that keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: list[Batch], scores: Scores) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.how = batches, scores
        return _products(q, k, v, batches, scores)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (batches, scores), wanted, kept = ctx.how, ctx.needs_input_grad[:3], ctx.saved_tensors
        if beyond_first():
            return *derivatives(lambda *x: _products(*x, batches, scores), kept, wanted, (g,)), None, None
        heads = kept[1].shape[1]
        wide, memory = widened(kept[0][:0]).dtype, torch.contiguous_format
        sums = [torch.zeros_like(_heads(x, heads).flatten(2), dtype=wide, memory_format=memory) for x in kept]
        for batch, part in zip(batches, g.split([len(batch.queries) for batch in batches]), strict=True):
            laid = _laid(*kept, batch)
            g = _heads(part, heads).to(laid[0].dtype).reshape(laid[0].shape)
            grads = _gradients(*laid, g, batch.bias, scores, wanted)
            for total, one, places in zip(sums, grads, (batch.queries, batch.keys, batch.keys), strict=True):
                if one is not None:
                    total.index_add_(1, places, one.reshape(heads, -1, total.shape[2]).to(total.dtype))
        made = (
            total.to(like.dtype).transpose(0, 1).reshape(like.shape) if want else None
            for total, like, want in zip(sums, kept, wanted, strict=True)
        )
        return *made, None, None


def _products(q: Tensor, k: Tensor, v: Tensor, batches: list[Batch], scores: Scores) -> Tensor:
    """The outputs of all queries of the batches, one after the other, filled ones too: [sum of N * L, H, D]."""
    outputs = []
    for batch in batches:
        y = _attended(*_laid(q, k, v, batch), batch.bias, scores)  # [K, N, L * G, D]
        outputs.append(y.reshape(len(y), len(batch.queries), -1).transpose(0, 1).reshape(-1, *q.shape[1:]))
    return torch.cat(outputs).to(q.dtype)


def _laid(q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> list[Tensor]:
    """The rows of a batch by head of keys: q [K, N, L * G, D], k and v [K, N, S, D], in the dtype of products."""
    count, heads = len(batch.queries) * q.shape[1] // k.shape[1] // batch.bias.shape[1], k.shape[1]
    pairs = ((q, batch.queries), (k, batch.keys), (v, batch.keys))
    laid = (_heads(x, heads).index_select(1, places) for x, places in pairs)
    return [x.view(heads, count, -1, q.shape[2]).to(product_dtype(x)) for x in laid]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[T, H, D] -> [K, T, G, D]."""
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scores: Scores) -> Tensor:
    """Written out: q [..., L, D], k and v [..., S, D], bias broadcast to [..., L, S]."""
    return _weights(q * _scale(q, scores), k, bias, scores)[0] @ v


def _weights(q: Tensor, k: Tensor, bias: Tensor, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """The softmax over the keys for a scaled q, [..., L, S] in q's dtype; and with a soft cap its tanh."""
    found, bent = q @ k.mT, None
    if scores.softcap:  # Gemma 2
        bent = (widened(found) / scores.softcap).tanh()
        found = bent * scores.softcap
    return found.add_(bias).softmax(-1).to(q.dtype), bent  # of 16 bits torch's softmax is in fp32 within


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bias: Tensor, scores: Scores, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Those of `_attended` in q, k and v that are wanted, for g, the gradient of its output."""
    scale = _scale(q, scores)
    q = q * scale
    weights, bent = _weights(q, k, bias, scores)
    found = torch._softmax_backward_data(g @ v.mT, weights, -1, weights.dtype)
    if bent is not None:
        found = (found * (1 - bent * bent)).to(q.dtype)
    made = (lambda: (found @ k) * scale, lambda: found.mT @ q, lambda: weights.mT @ g)
    return [make() if want else None for make, want in zip(made, wanted, strict=True)]


def _scale(q: Tensor, scores: Scores) -> float:
    return float(q.shape[-1] ** -0.5) if scores.scale is None else scores.scale


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, row: Packed, long: list[Segment], scores: Scores) -> list[Tensor]:
    """The output of each of these segments by itself, [its queries, H, D]."""
    cuts = sorted({0, row.tokens, *(place for segment in long for place in segment[:2])})
    # split, not slices: its backward is one concatenation, where each slice would fill a full-size tensor with zeros
    own = [dict(zip(cuts, x.split([b - a for a, b in pairwise(cuts)]), strict=False)) for x in (q, k, v)]
    outputs = []
    for start, _, _, (a, b) in long:
        parts = [x[start] for x in own]
        if a < b:
            parts[1:] = [torch.cat((x[a:b], y)) for x, y in zip((k, v), parts[1:], strict=True)]
        outputs.append(_causal(*(x[None] for x in parts), scores)[0])
    return outputs


def _causal(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Each query sees the last `window` keys up to its own; the last T keys are the queries' own."""
    tokens, keys, window = q.shape[1], k.shape[1], scores.window
    if not window or keys <= window:
        if tokens == keys and not scores.softcap:
            return _sdpa(q, k, v, scores, is_causal=True)
        return _sdpa(q, k, v, scores, attn_mask=None if tokens == 1 else visible_keys(tokens, keys, None, q.device))
    outputs, end = [], keys - tokens
    for part in q.split(window, dim=1):  # no part sees more than two windows
        count, first = part.shape[1], max(0, end + 1 - window)
        end += count
        mask = None if count == 1 else visible_keys(count, end - first, None, q.device, window)
        outputs.append(_sdpa(part, k[:, first:end], v[:, first:end], scores, attn_mask=mask))
    return torch.cat(outputs, dim=1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Of rows [B, T, H, D] of one length. cuDNN, which makes a plan for every shape, gets whole rows of few lengths."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, D]
    groups, gpu = q.shape[1] // k.shape[1], q.device.type != "cpu"
    if scores.softcap or (gpu and attn_mask is not None and q.shape[2] == 1):
        return _written_out(q, k, v, scores, attn_mask).transpose(1, 2)
    if gpu and attn_mask is not None and groups > 1:  # the kernel that takes a mask wants a head of keys for each
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    whole = is_causal and q.shape[2] % 256 == 0
    # its quick kernels have no rule for torch.func's vmap and jvp
    kernels = [SDPBackend.MATH] if transformed() else QUICK
    with nullcontext() if kernels is QUICK and (whole or not gpu) else sdpa_kernel(kernels):
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return y.transpose(1, 2)


def _written_out(q: Tensor, k: Tensor, v: Tensor, scores: Scores, seen: Tensor | None) -> Tensor:
    """Products for q [B, H, T, D], k and v [B, K, S, D] where they lie; `seen` [B or 1, 1, T, S], None: all."""
    groups = q.shape[1] // k.shape[1]
    bias = q.new_zeros(1) if seen is None else torch.where(seen, 0.0, -torch.inf).to(q.dtype).repeat(1, 1, groups, 1)
    rows = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [B, K, G * T, D]
    return _attended(rows, k, v, bias, scores).unflatten(2, (groups, -1)).flatten(1, 2)
