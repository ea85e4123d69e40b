"""Base + LoRA on CUDA for bf16 and fp16: what each form launches.

With the dense weight in a workspace, LoRA costs traffic only where its product meets the base's. Three forms:

- "addmm": y = scale s B^T, then y += x W^T in the library's product, which reads y: 2 M K + 4 M N bytes more than the
  base alone.
- "augmented": one pass copies x to [x | s | 0], the weight is decoded to [W | scale B | 0], and one product of the two
  is base and LoRA: 4 M K bytes for all linears of the group, and a copy of x while it runs.
- "fused": for few rows, where the weight is decoded inside the product (`matmul4bit_triton`): nothing dense at all.

Only one weight is decoded at a time, so the extra memory is one workspace of the largest. Backward is "addmm" in every
form: the gradient of x starts as LoRA's share, which dropout masks, and every base product adds to it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import dispatch, lora_triton, matmul4bit_triton
from .dequantize4bit_triton import decode_into
from .lora_paths import Gradients, Group, Result, padded
from .project_triton import project_down


def forward(x: Tensor, group: Group, keep: bool, form: str) -> Result:
    """For x [M, K] whose last stride is 1. `dense` are the workspaces [out, K + padded(sum of ranks)], if kept."""
    if form == "fused":
        return _fused(x, group)
    rank = group.columns[-1].stop
    s, A = x.new_empty(x.shape[0], rank), group.stacked(x.dtype)
    if form == "augmented":
        left = x.new_empty(x.shape[0], x.shape[1] + padded(rank))
        lora_triton.project(x, A, s, group.dropout, group.seed, copy=left)
    else:
        left = x
        _down(x, A, s, group)
    outputs = [x.new_empty(x.shape[0], weight.rows) for weight in group.weights]
    dense = []
    for i, workspace in enumerate(_workspaces(x, group, keep)):
        _one(left, s, group, i, workspace[:, : left.shape[1]], outputs[i])
        dense += [workspace] if keep else []
    return Result(outputs, s, dense)


def plan(x: Tensor, group: Group, keep: bool) -> str:
    """The dispatcher's form, as far as it applies: "fused" leaves no weight to keep, and has conditions of its own."""
    form = dispatch.plan_lora(x, tuple(weight.rows for weight in group.weights), group.columns[-1].stop)
    fits = all(matmul4bit_triton.applies(x.dtype, weight) for weight in group.weights)
    return "addmm" if form == "fused" and (keep or not fits) else form


def _one(left: Tensor, s: Tensor, group: Group, i: int, W: Tensor, y: Tensor) -> None:
    """y of linear i, whose weight W was decoded."""
    K, part = group.weights[i].columns, group.columns[i]
    bias = group.biases[i].to(y.dtype) if group.biases else None
    if left.shape[1] > K:  # augmented
        lora_triton.fill_tail(W, K, group.B[i], group.scales[i], part.start)
        torch.mm(left, W.T, out=y) if bias is None else torch.addmm(bias, left, W.T, out=y)
        return
    B = (group.B[i] * group.scales[i]).to(y.dtype)  # and no alpha: with a bias it would cost the epilogue
    torch.mm(s[:, part], B.T, out=y) if bias is None else torch.addmm(bias, s[:, part], B.T, out=y)
    y.addmm_(left, W.T)


def _workspaces(x: Tensor, group: Group, keep: bool) -> Iterator[Tensor]:
    """Each weight, decoded to [out, K | tail]: all into one workspace in turn, or each into its own to be kept."""
    width = x.shape[1] + padded(group.columns[-1].stop)
    shared = None if keep else x.new_empty(max(weight.rows for weight in group.weights), width)
    for weight in group.weights:
        workspace = x.new_empty(weight.rows, width) if shared is None else shared[: weight.rows]
        decode_into(workspace[:, : x.shape[1]], weight)
        yield workspace


def _down(x: Tensor, A: Tensor, s: Tensor, group: Group) -> None:
    """s = dropout(x) A^T; without dropout that is a plain product."""
    if group.seed is None:
        torch.mm(x, A.T, out=s)
    else:
        lora_triton.project(x, A, s, group.dropout, group.seed)


def _fused(x: Tensor, group: Group) -> Result:
    if group.seed is None:
        s = project_down(x, group.stacked(group.A[0].dtype))
    else:
        s = x.new_empty(x.shape[0], group.columns[-1].stop)
        lora_triton.project(x, group.stacked(x.dtype), s, group.dropout, group.seed)
    outputs = []
    for i, weight in enumerate(group.weights):
        config = dispatch.plan_linear(x, weight.rows).config
        if config is None or not matmul4bit_triton.applies(x.dtype, weight):
            raise ValueError(
                f"no fused kernel for x {tuple(x.shape)} and a weight {(weight.rows, weight.columns)}: use another form"
            )
        lora = (s[:, group.columns[i]], group.B[i], group.scales[i])
        outputs.append(matmul4bit_triton.matmul(x, weight, group.biases[i] if group.biases else None, config, lora))
    return Result(outputs, s, [])


def backward(grads: list[Tensor], x: Tensor, s: Tensor, group: Group, dense: list[Tensor], need_x: bool) -> Gradients:
    """For grads [M, out] and x [M, K] whose last stride is 1."""
    grad_s = torch.empty_like(s)
    each = zip(grads, group.B, group.scales, group.columns, strict=True)
    grad_B = [lora_triton.gradient_B(g, s[:, part], B, grad_s[:, part], scale) for g, B, scale, part in each]
    grad_x = x.new_empty(x.shape) if need_x else None
    grad_A = lora_triton.gradient_A(grad_s, x, group.stacked(x.dtype), grad_x, group.dropout, group.seed)
    if grad_x is not None:
        for g, W in zip(grads, dense or _workspaces(x, group, keep=False), strict=True):
            grad_x.addmm_(g, W[:, : x.shape[1]])
    return Gradients(grad_A, grad_B, grad_x)
