"""4-bit linears that share an input, with LoRA or without: y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T.

Many rows of x: a weight is decoded and the products are left to the library. LoRA's share comes first and the base is
added to it where it lies, forward and backward: y is read once more, and no other pass is made. On the CPU a weight of
up to WHOLE values is decoded at once; a larger one goes slab by slab through one buffer, each slab multiplied while it
is still in cache. On CUDA the workspace of a whole weight comes from torch's caching allocator and goes back at once.
So no dense copy of a large weight ever lasts.

Few rows on CUDA (border.py says how many) take a kernel that decodes inside the product, LoRA's second product and bias
included.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import gcd, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .border import LARGEST, STEP, border
from .dequantize4bit import decode_into, dequantize
from .dropout import keep_mask, keep_scale
from .swiglu import gated, gated_backward
from .weight4bit import Weight4bit

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
WHOLE = 1 << 21  # values decoded at once on a CPU: 8 MB of fp32
LARGEST_RANK = 64  # whose sums a program of the gate's backward holds, in 16 bits; of more, or in fp32, it would spill
SLAB = 1 << 20  # values in a slab of a larger weight, about


class Group(NamedTuple):
    """What the linears of one input x [M, K] hold; the lists have one entry for each, or none without LoRA or bias."""

    weights: list[Weight4bit]  # [out, K]
    biases: Sequence[Tensor] = ()  # [out]
    A: Sequence[Tensor] = ()  # [rank, K]
    B: Sequence[Tensor] = ()  # [out, rank]
    scales: Sequence[float] = ()
    dropout: float = 0.0
    seed: Tensor | None = None  # of dropout, where there is one
    up: Tensor | None = None  # x is swiglu(x, up), or with `gelu` geglu's
    gelu: bool = False

    def split(self, s: Tensor) -> Sequence[Tensor]:
        """Each linear's part of s = x A^T [M, sum of ranks]."""
        return s.split([A.shape[0] for A in self.A], 1) if len(self.A) > 1 else [s]

    @property
    def scaling(self) -> tuple[float, Sequence[float]]:
        """What s carries and what is left to each B: the scale, or, where linears have different ones, 1 and each."""
        return (self.scales[0], [1.0] * len(self.scales)) if len({*self.scales}) == 1 else (1.0, self.scales)

    def masters(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """All of A, one below the other, [sum of ranks, K], and each B, scaled by what is left to it: in one launch."""
        A, B = torch.cat([*self.A]) if len(self.A) > 1 and self.A[0].dtype == dtype else self.A[0], [*self.B]
        if any(tensor.dtype != dtype for tensor in (*self.A, *B)):
            A = A.new_empty(sum(a.shape[0] for a in self.A), A.shape[1], dtype=dtype)
            B = [b.new_empty(b.shape, dtype=dtype) for b in B]
            torch._foreach_copy_([*A.split([a.shape[0] for a in self.A]), *B], [*self.A, *self.B])
        return A, [b if rest == 1 else b * rest for b, rest in zip(B, self.scaling[1], strict=True)]

    @property
    def keep_scale(self) -> float:
        """What dropout multiplies survivors by."""
        return keep_scale(self.dropout) if self.seed is not None else 1.0


def few_rows(x: Tensor, group: Group, keep: bool) -> bool:
    """Whether x [M, K] takes the kernel that decodes inside the product: chosen once for all linears of a call."""
    if keep or dispatch.path_for(x) != "triton" or x.dtype not in KERNEL_DTYPES:
        return False
    fits = all(w.columns % STEP == 0 and 0 < w.rows * w.columns < LARGEST for w in group.weights)
    return fits and 0 < len(x) <= border(dispatch.model(x.device), dispatch.architecture(x.device))


def forward_many(x: Tensor, group: Group, keep: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Each y [M, out] in x's dtype, s [M, sum of ranks], which one product gives, and the weights to keep."""
    h = x.to(dispatch.product_dtype(x))
    s, B = _projected(x, h, group)
    lora = list(zip(group.split(s), B, strict=True)) if B else []
    dense = [dequantize(weight, h.dtype) for weight in group.weights] if keep else []
    return [_output(h, lora, group, i, dense, x.dtype) for i in range(len(group.weights))], s, dense


def plain(x: Tensor, group: Group) -> list[Tensor]:
    """The definition in torch's differentiable calls, each y [..., out] for x [..., K]: see derivatives.py."""
    h = x.to(dispatch.product_dtype(x))
    if group.seed is None:  # of a transform: torch's own dropout knows what vmap's `randomness` asks for
        dropped = F.dropout(h, group.dropout) if group.dropout else h
    else:
        mask = keep_mask((prod(x.shape[:-1]), x.shape[-1]), group.dropout, group.seed)
        dropped = h * mask.view(x.shape) * group.keep_scale
    outputs = []
    for i, weight in enumerate(group.weights):
        decode = partial(dequantize, weight)  # a compiler takes no rule with a jvp
        compiling, stored = torch.compiler.is_compiling(), [tensor for tensor in weight[:4] if tensor is not None]
        y: Tensor = h @ decode(h.dtype).T if compiling else TimesFrozen.apply(h, decode, True, *stored)
        if group.A:
            y = y + (dropped @ group.A[i].to(h.dtype).T) @ (group.B[i] * group.scales[i]).to(h.dtype).T
        outputs.append((y + group.biases[i].to(h.dtype) if group.biases else y).to(x.dtype))
    return outputs


class TimesFrozen(torch.autograd.Function):
    """x W^T, or g W: each is the other's derivative, of any order and direction. Kept is `stored` alone, what `decode`
    reads, so that autograd sees whether it is written into before backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, decode: Callable[[torch.dtype], Tensor], ahead: bool, *stored: Tensor) -> Tensor:
        dense = decode(x.dtype)
        return x @ (dense.mT if ahead else dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.decode, ctx.ahead, *stored = inputs
        ctx.save_for_backward(*stored)
        ctx.save_for_forward(*stored)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        return TimesFrozen.apply(g, ctx.decode, not ctx.ahead, *stored), None, None, *[None] * len(stored)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return TimesFrozen.apply(tangent, ctx.decode, ctx.ahead, *ctx.saved_tensors)


def _output(h: Tensor, lora: list[Any], group: Group, i: int, dense: list[Tensor], dtype: torch.dtype) -> Tensor:
    """y [M, out] of linear i in `dtype`, rounded once where the products are wider than it."""
    rows, bias = group.weights[i].rows, group.biases[i].to(h.dtype) if group.biases else None
    (s, B), y = lora[i] if lora else (h, None), None
    for start, part in [(0, dense[i])] if dense else slabs(group.weights[i], h.dtype):
        if part.shape[0] == rows:
            return _affine(h, part, s, B, bias).to(dtype)
        y = h.new_empty(h.shape[0], rows, dtype=dtype) if y is None else y
        own = slice(start, start + part.shape[0])
        some_B, some_bias = (None if each is None else each[own] for each in (B, bias))
        if dtype == h.dtype:
            _affine(h, part, s, some_B, some_bias, y[:, own])
        else:
            y[:, own].copy_(_affine(h, part, s, some_B, some_bias))
    return h.new_empty(h.shape[0], rows, dtype=dtype) if y is None else y


def _affine(
    h: Tensor, W: Tensor, s: Tensor, B: Tensor | None, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """h W^T, plus s B^T and bias where there are."""
    left, right = (h, W) if B is None else (s, B)
    y = torch.mm(left, right.T, out=out) if bias is None else torch.addmm(bias, left, right.T, out=out)
    return y if B is None else y.addmm_(h, W.T)


def backward(
    grads: list[Tensor], x: Tensor | None, s: Tensor | None, group: Group, dense: list[Tensor], need_x: bool
) -> list[Tensor]:
    """Gradients: with LoRA of all A [sum of ranks, K] and each B, then of x, if wanted. Without LoRA s is None, and x
    as well where no A is trained: then those of A are left out."""
    like = grads[0]
    dtype = dispatch.product_dtype(like) if s is None else s.dtype
    grads = [g.to(dtype) for g in grads]
    made, grad_x = list[Tensor](), None
    if s is not None:
        dropped = _dropper((s.shape[0], group.A[0].shape[1]), s, group)
        A, Bs = group.masters(dtype)
        grad_s, of_B = _narrow(grads, Bs, s, group)
        if x is not None:
            made.append(_wide_product(grad_s.T, dropped(x.to(dtype)), group.keep_scale))
        made += of_B
        if need_x:
            grad_x = _product(grad_s, A, group.keep_scale)
            dropped(grad_x, grad_x)
    if need_x:
        made.append(_add_base(grad_x, grads, group, dense).to(like.dtype))
    return made


def backward_gated(g: Tensor, gate: Tensor, s: Tensor, group: Group, dense: list[Tensor]) -> list[Any]:
    """The gradients of A, B, gate and up where x is f(gate) * up [..., K]; a kernel neither reads nor writes x."""
    assert group.up is not None
    up, gelu = group.up, group.gelu
    if group.seed is not None or not _on_kernels(group, gate):
        x = gated(gate, up, gelu).view(len(g), -1)
        *made, dx = backward([g], x, s, group, dense, True)
        return [*made, *gated_backward(dx.view(gate.shape), gate, up, gelu)]
    from .swiglu_triton import backward as one_pass  # only here: Triton exists for Linux only and is slow to import

    (A, Bs), g = group.masters(s.dtype), g.to(s.dtype)
    grad_s, (of_B,) = _narrow([g], Bs, s, group)
    dx = _add_base(None, [g], group, dense).view(gate.shape)
    dgate, dup, of_A = one_pass(dx, gate, up, gelu, (grad_s, A))
    return [of_A, of_B, dgate, dup]


def _on_kernels(group: Group, *tensors: Tensor) -> bool:
    """Whether the kernels that hold LoRA's sums take these tensors."""
    few = max(len(A) for A in group.A) <= LARGEST_RANK
    return few and all(dispatch.fused(t) and t.dtype in KERNEL_DTYPES for t in tensors)


def _narrow(grads: list[Tensor], Bs: list[Tensor], s: Tensor, group: Group) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x A^T [M, sum of ranks] and of each B, in its dtype."""
    carried, left = group.scaling
    each = list(zip(grads, Bs, group.split(s), left, strict=True))
    if _on_kernels(group, s, *grads):
        from .lora_gradients_triton import narrow  # only here: as below

        outs = group.split(grad_s := torch.empty_like(s))
        of_B = [narrow(g, B, part, out, carried, rest) for (g, B, part, rest), out in zip(each, outs, strict=True)]
    else:
        grad_s = torch.cat([_product(g, B, carried) for g, B, *_ in each], 1)
        of_B = [_wide_product(g.T, part, rest) for g, _, part, rest in each]
    return grad_s, [of.to(B.dtype) for of, B in zip(of_B, group.B, strict=True)]


def _add_base(total: Tensor | None, grads: list[Tensor], group: Group, dense: list[Tensor]) -> Tensor:
    """LoRA's share of the gradient of x [M, K], if there is one, plus each g W; sums over slabs are wide ones."""
    for i, g in enumerate(grads):
        total = _add(total, g, [(0, dense[i])] if dense else slabs(group.weights[i], g.dtype))
    return grads[0].new_zeros(grads[0].shape[0], group.weights[0].columns) if total is None else total


def _add(total: Tensor | None, g: Tensor, parts: Iterable[tuple[int, Tensor]]) -> Tensor | None:
    """One weight's; a function, so that its workspace is gone before the next one's is made."""
    for start, part in parts:
        whole = part.shape[0] == g.shape[1]
        some = g if whole else g[:, start : start + part.shape[0]]
        if total is not None and (not whole or total.dtype != g.dtype):
            total = dispatch.widened(total)
        if total is None or total.dtype != g.dtype:
            made = torch.mm(some, part)
            total = made if total is None else total.add_(made)
        else:
            total.addmm_(some, part)
    return total


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [..., out] + scale * (x [..., in] A^T) B^T, A [rank, in], B [out, rank] (LoRA, arXiv 2106.09685, eq. 3).

    Gradients flow to y, x, A and B, each in its own dtype; x and x A^T are saved. A and B may be fp32 masters under
    lower-precision x: the products run in dispatch.product_dtype(x). ValueError if the shapes do not fit."""
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and x.shape[-1:] == A.shape[1:]
    if not fits or y.shape != x.shape[:-1] + B.shape[:1]:
        raise ValueError(
            "lora_update needs y [..., out], x [..., in], A [rank, in], B [out, rank], got "
            f"y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
    dtype = dispatch.product_dtype(x)
    s = x.to(dtype).reshape(-1, x.shape[-1]) @ A.to(dtype).T  # [N, rank]
    if y.dtype != dtype:
        return y + (scale * (s @ B.to(dtype).T)).to(y.dtype).view(y.shape)
    return torch.addmm(y.reshape(-1, y.shape[-1]), s, B.to(dtype).T, alpha=scale).view(y.shape)


def forward_few(x: Tensor, group: Group, keep: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Each y, s, and nothing to keep: one launch a linear, and nothing dense at all."""
    from .matmul4bit_triton import matmul  # only here: Triton exists for Linux only and is slow to import

    s, B = _projected(x, x, group)
    parts, outputs = group.split(s), []
    for i, weight in enumerate(group.weights):
        bias = group.biases[i] if group.biases else None
        lora = (parts[i], B[i], 1.0) if group.A else None
        outputs.append(matmul(x, weight, bias, lora))
    return outputs, s, []


def _projected(x: Tensor, h: Tensor, group: Group) -> tuple[Tensor, list[Tensor]]:
    """s = dropout(x) A^T, scaled, [M, sum of ranks], and each B, in the dtype of h, x in the dtype of the products."""
    if not group.A:
        return h.new_empty(h.shape[0], 0), []
    A, B = group.masters(h.dtype)
    return _product(_dropper(x.shape, x, group)(h), A.T, group.keep_scale * group.scaling[0]), B


def _product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a b, rounded once."""
    if factor == 1:
        return torch.mm(a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=factor, out=out)  # beta 0: what was there before is not read


def _wide_product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a b in fp32 or wider, not rounded to less on CUDA: the gradients of masters."""
    if a.device.type != "cpu" and a.dtype in KERNEL_DTYPES and dispatch.path_for(a) == "triton":
        wide = torch.mm(a, b, out_dtype=torch.float32)
        return wide if factor == 1 else wide.mul_(factor)
    return dispatch.widened(_product(a, b, factor))


def _dropper(shape: tuple[int, ...], like: Tensor, group: Group) -> Callable[..., Tensor]:
    """f(t, out=None): t of `shape`, on the path of `like`, with zeros for what dropout removes, unscaled; `out` may be
    t, undropped it is."""
    p, seed = group.dropout, group.seed
    if seed is None:
        return lambda t, out=None: t
    if dispatch.path_for(like) == "triton" and like.numel():
        from .dropout_triton import drop  # only here: as above

        return lambda t, out=None: drop(t, p, seed, out)
    mask = keep_mask(shape, p, seed)
    return lambda t, out=None: torch.mul(t, mask, out=out)


def slabs(weight: Weight4bit, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, W[first row : ...] in `dtype`) for all of W; each slab overwrites the one before."""
    rows, step = weight.rows, _slab_rows(weight)
    buffer = torch.empty(step, weight.columns, dtype=dtype, device=weight.packed.device)
    if rows == step:
        decode_into(buffer, weight)
        yield 0, buffer
        return
    if rows > step:  # then scales are decoded once, not for each slab
        weight = weight._replace(absmax=weight.scales, nested_absmax=None, nested_offset=None)
    for start in range(0, rows, step):
        slab = buffer[: rows - start]
        decode_into(slab, weight, start * weight.columns)
        yield start, slab


def _slab_rows(weight: Weight4bit) -> int:
    """Rows decoded at a time: all of them, or as many as make about SLAB values and whole blocks."""
    rows, columns, blocksize = weight.rows, weight.columns, weight.blocksize
    if rows * columns <= WHOLE or weight.packed.device.type != "cpu":
        return max(rows, 1)
    aligned = blocksize // gcd(blocksize, columns)  # rows after which a block ends with the row
    return min(rows, aligned * max(1, SLAB // (aligned * columns)))
