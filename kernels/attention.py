"""Causal attention with grouped key-value heads, for padded rows, packed rows and cached generation.

The one place that decides how attention is computed. Packed rows hold several examples; each is attended on its own, so
nothing can cross, and a change in one leaves the others' numbers untouched to the bit.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Spans = Sequence[tuple[int, int]]


def attention(q: Tensor, k: Tensor, v: Tensor, *, spans: Spans | None = None, visible: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, each query seeing the keys at and before its own place.

    q [B, T, H, D]; k and v [B, S, K, D], with H a multiple of K and S >= T: the last T keys belong to the queries.
    `spans`: (start, end) of each example in the B * T tokens, in order and without gaps; needs S = T.
    `visible` [B or 1, 1, T, S] bool, from `visible_keys`: which keys a query sees, in place of plain causality.
    Returns [B, T, H, D] in q's dtype. ValueError for spans that do not cover the tokens, or spans and `visible`.
    """
    if spans is not None:
        if visible is not None:
            raise ValueError("attention takes spans or visible keys, not both")
        return _by_span(q, k, v, spans)
    if visible is None and q.shape[1] == k.shape[1]:
        return _sdpa(q, k, v, is_causal=True)
    if visible is None and q.shape[1] > 1:
        visible = visible_keys(q.shape[1], k.shape[1], None, q.device)
    return _sdpa(q, k, v, attn_mask=visible)


def visible_keys(queries: int, keys: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees, [B or 1, 1, queries, keys] bool: those up to itself that `mask` [B, keys] shows.

    Every query sees itself, also in padding, or its softmax would be 0/0.
    """
    here = torch.arange(keys - queries, keys, device=device).unsqueeze(-1)  # [T, 1] places of the queries
    there = torch.arange(keys, device=device)  # [S]
    seen = there <= here  # [T, S]
    if mask is None:
        return seen[None, None]
    return ((seen & mask[:, None, :]) | (there == here))[:, None]


def span_lengths(spans: Spans, tokens: int) -> list[int]:
    """The length of each span; ValueError unless they cover the tokens in order, without gaps."""
    place = 0
    for start, end in spans:
        if start != place or end <= start:
            break
        place = end
    else:
        if place == tokens:
            return [end - start for start, end in spans]
    raise ValueError(f"spans must cover the {tokens} tokens in order and without gaps, got {list(spans)}")


def _by_span(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    lengths = span_lengths(spans, q.shape[0] * q.shape[1])
    # split, not slices: its backward is one concatenation, where each slice would fill a full-size tensor with zeros
    pieces = [x.flatten(0, 1).unsqueeze(0).split(lengths, dim=1) for x in (q, k, v)]
    return torch.cat([_sdpa(*piece, is_causal=True) for piece in zip(*pieces, strict=True)], dim=1).view(q.shape)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, tokens, D]
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=grouped)
    return y.transpose(1, 2)
