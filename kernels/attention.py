"""Causal attention with grouped key-value heads, for padded rows, packed rows and cached generation.

Packed rows hold several examples; each is attended on its own, so a change in one leaves the others' numbers untouched
to the bit. An example may fork: several continuations of one text, which stands in the row once (Hydragen, Juravsky et
al. 2024, does it for generation).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .derivatives import transformed
from .dispatch import widened

Spans = Sequence[tuple[int, ...]]
"""Of each example (start, end), or of one that forks (start, fork, end_1, ..., end_n): its trunk, then n branches."""


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
    spans: Spans | None = None,
    visible: Tensor | None = None,
    scores: Scores = PLAIN,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query seeing the keys at and before its own place; `scores` says it otherwise.

    q [B, T, H, D]; k and v [B, S, K, D], with H a multiple of K and S >= T: the last T keys belong to the queries.
    `spans`: (start, end) of each example in the B * T tokens, in order and without gaps; needs S = T. In the span
    (start, fork, end_1, ..., end_n) tokens start to fork are the trunk and end_(i-1) to end_i branch i, which sees the
    trunk and itself, causally, as if it followed the trunk at once; (start, fork, end) is (start, end).
    `visible` [B or 1, 1, T, S] bool, from `visible_keys`: which keys a query sees, in place of causality and window.
    Returns [B, T, H, D] in q's dtype. ValueError for other shapes, spans that leave tokens out, or spans and `visible`.
    """
    if k.shape != v.shape or k.shape[::3] != q.shape[::3] or k.shape[1] < q.shape[1] or q.shape[2] % k.shape[2]:
        shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
        raise ValueError(f"q [B, T, H, D] needs k and v [B, S, K, D], S >= T and H a multiple of K, got {shapes}")
    if spans is not None:
        if visible is not None:
            raise ValueError("causal_attention takes spans or visible keys, not both")
        return _by_span(q, k, v, spans, scores)
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


def span_lengths(spans: Spans, tokens: int) -> list[tuple[int, ...]]:
    """The lengths of each span's parts: (all,), or of one that forks (trunk, branch 1, ..., branch n).

    ValueError unless spans cover the tokens in order and without gaps. Only a trunk may be empty."""
    place = 0
    lengths = []
    for span in spans:
        parts = tuple(b - a for a, b in pairwise(span))
        if not parts or span[0] != place or parts[0] < (len(parts) == 1) or any(part < 1 for part in parts[1:]):
            break
        lengths.append((sum(parts),) if len(parts) <= 2 else parts)
        place = span[-1]
    else:
        if place == tokens:
            return lengths
    raise ValueError(
        f"spans must cover the {tokens} tokens in order and without gaps, each (start, end) or"
        f" (start, fork, end_1, ..., end_n) with no empty branch, got {list(spans)}"
    )


def span_positions(spans: Spans, device: torch.device) -> Tensor:
    """The place of every token in its own text, [tokens] int64: from 0 in each span, from the fork in each branch."""
    ranges = []
    for start, *ends in spans:
        ranges.append((0, ends[0] - start))
        ranges += [(ends[0] - start, ends[0] - start + b - a) for a, b in pairwise(ends)]
    return torch.cat([torch.arange(first, end, device=device) for first, end in ranges])


def _by_span(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scores: Scores) -> Tensor:
    lengths = span_lengths(spans, q.shape[0] * q.shape[1])
    # split, not slices: its backward is one concatenation, where each slice would fill a full-size tensor with zeros
    pieces = [x.flatten(0, 1).unsqueeze(0).split(list(chain.from_iterable(lengths)), dim=1) for x in (q, k, v)]
    each = iter(zip(*pieces, strict=True))
    parts = [y for parts in lengths for y in _span([next(each) for _ in parts], scores)]
    return torch.cat(parts, dim=1).view(q.shape)


def _span(parts: list[tuple[Tensor, Tensor, Tensor]], scores: Scores) -> list[Tensor]:
    """Attention of one example from the q, k, v of its parts. Each branch has its keys after the trunk's."""
    if len(parts) == 1:
        return [_causal(*parts[0], scores)]
    trunk, first, *others = parts
    q, k, v = (torch.cat(pair, dim=1) for pair in zip(trunk, first, strict=True))
    outputs = [_causal(q, k, v, scores)]
    for q, k, v in others:
        outputs.append(_causal(q, torch.cat((trunk[1], k), dim=1), torch.cat((trunk[2], v), dim=1), scores))
    return outputs


def _causal(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Each query sees the last `window` keys up to its own; the last T keys are the queries' own."""
    tokens, keys, window = q.shape[1], k.shape[1], scores.window
    if not window or keys <= window:
        if tokens == keys:
            return _sdpa(q, k, v, scores, is_causal=True)
        return _sdpa(q, k, v, scores, attn_mask=None if tokens == 1 else _after(tokens, keys, q.device))
    outputs, end = [], keys - tokens
    for part in q.split(window, dim=1):  # no part sees more than two windows
        count, first = part.shape[1], max(0, end + 1 - window)
        end += count
        mask = None if count == 1 else visible_keys(count, end - first, None, q.device, window)
        outputs.append(_sdpa(part, k[:, first:end], v[:, first:end], scores, attn_mask=mask))
    return torch.cat(outputs, dim=1)


def _after(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask of queries that are the last of the keys; on a GPU one that its kernels know without reading it."""
    if device.type == "cpu" or transformed():
        return visible_keys(queries, keys, None, device)
    from torch.nn.attention.bias import causal_lower_right  # here: it brings in half of torch's compiler

    bias: Tensor = causal_lower_right(queries, keys)
    return bias


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, D]
    if scores.softcap:
        seen = visible_keys(q.shape[2], k.shape[2], None, q.device) if is_causal else attn_mask
        return _capped(q, k, v, scores, seen).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    # its quick kernels have no rule for torch.func's vmap and jvp
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scores.scale, enable_gqa=grouped
        )
    return y.transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, scores: Scores, seen: Tensor | None) -> Tensor:
    """Attention with a soft cap (Gemma 2), which torch's own does not know: written out, [B, heads, tokens, D] each."""
    groups = q.unflatten(1, (k.shape[1], -1))  # [B, K, H / K, T, D]
    scale = q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    found = widened(groups @ k.unsqueeze(2).mT) * (scale / scores.softcap)
    found = found.tanh() * scores.softcap  # [B, K, H / K, T, S]
    if seen is not None:
        found = found.masked_fill(~seen.unsqueeze(2), -torch.inf)
    return (found.softmax(-1).to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2)
