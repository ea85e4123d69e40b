"""Rotary position embedding (Su et al. 2021) in the half-split layout of Hugging Face checkpoints.

Feature i and feature i + D/2 of a head form a pair that turns by position * frequency_i. The gradient of a rotation is
the rotation back, so nothing but the shared tables is kept for backward.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .derivatives import beyond_first, run
from .dispatch import fused


def frequencies(
    head_dim: int, theta: float, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """theta^(-2i / head_dim) for i = 0 .. head_dim/2 - 1, in radians a position: [head_dim / 2]."""
    exponent = torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim
    return 1.0 / theta**exponent


def llama3_frequencies(frequency: Tensor, factor: float, low: float, high: float, original_length: int) -> Tensor:
    """Llama 3.1's stretch: wavelengths above original_length / low are slowed by `factor`, below original_length / high
    kept, blended between."""
    turns = original_length * frequency / (2 * math.pi)  # full turns over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / factor)


def yarn_frequencies(
    frequency: Tensor, theta: float, factor: float, fast: float, slow: float, original_length: int, *, truncate: bool
) -> Tensor:
    """YaRN's stretch (Peng et al. 2023, section 3.2): pairs that make more than `fast` turns over original_length are
    kept, those of fewer than `slow` slowed by `factor`, between the two blended by their place; truncate: whole places.
    """
    dim = 2 * len(frequency)
    low, high = (dim * math.log(original_length / (2 * math.pi * n)) / (2 * math.log(theta)) for n in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    place = torch.arange(len(frequency), device=frequency.device).to(frequency.dtype)
    slowed = ((place - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequency * (slowed / factor + 1 - slowed)


def tables(position_ids: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [B, T, 1, D/2] each, of positions [B, T] times frequencies [D/2] or [B, T or 1, D/2], in the
    frequencies' dtype."""
    angle = (position_ids.to(frequency.dtype).unsqueeze(-1) * frequency).unsqueeze(2)  # [B, T, 1, D/2]
    return angle.cos(), angle.sin()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition. Tests hold `rope` to it."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of `x` [B, T, H, D] by the tables [B or 1, T, 1, D/2] (same dtype)."""
    batch, tokens, _, width = x.shape
    if cos.shape != sin.shape or cos.shape not in ((batch, tokens, 1, width / 2), (1, tokens, 1, width / 2)):
        raise ValueError(
            f"rope needs tables [B or 1, T, 1, D / 2] for x [B, T, H, D], got x {tuple(x.shape)}, "
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
    if cos.requires_grad or sin.requires_grad:
        return rope_reference(x, cos, sin)
    return run(_RoPE, rope_reference, x, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    if fused(x):
        from . import rope_triton

        if rope_triton.fits(x):
            return rope_triton.turn(x, cos, sin, direction)
    a, b = x.chunk(2, dim=-1)
    y = torch.empty_like(x)
    ya, yb = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=ya).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=yb).addcmul_(a, sin, value=direction)
    return y


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]  # ctx has none
        cos, sin = ctx.saved_tensors
        return rope_reference(dy, cos, -sin) if beyond_first() else _turn(dy, cos, sin, -1), None, None
