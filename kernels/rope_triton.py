"""Rotary positions on a GPU: one program a token, all its heads; computed in fp32 and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

LARGEST = 1 << 14  # values of one token that a program holds in registers


def fits(x: Tensor) -> bool:
    """Whether a token of x [B, T, H, D] fits one program."""
    return bool(triton.next_power_of_2(x.shape[2]) * triton.next_power_of_2(x.shape[3]) <= LARGEST)


def turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """The pairs of x [B, T, H, D] turned by the tables [B or 1, T, 1, D/2]; direction -1 turns them back."""
    batch, tokens, heads, size = x.shape
    x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    launch(rope_kernel, (batch * tokens,))(
        *(x, cos, sin, y),
        tokens if cos.shape[0] == 1 else batch * tokens,  # after so many tokens the tables start again
        *(heads, size // 2, direction, triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)),
        num_warps=4,
    )
    return y


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, period, heads, half,
    DIRECTION: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Some heads turned by the angles of their positions; backward turns the other way."""
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (i < half)
    angle = (token % period) * half + i
    cos = tl.load(cos_ptr + angle, mask=i < half, other=0.0).to(tl.float32)  # [1, HALF]
    sin = tl.load(sin_ptr + angle, mask=i < half, other=0.0).to(tl.float32) * DIRECTION
    place = (token * heads + head) * 2 * half + i
    a = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + place + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, a * cos - b * sin, mask=mask)
    tl.store(y_ptr + place + half, b * cos + a * sin, mask=mask)
