"""Linears with frozen 4-bit weights as one op: one of them, or several with LoRA that share their input (q, k, v).

One product makes s = dropout(x) A^T for all linears of an input, one makes all gradients of A, and the gradients of x
are added where they arise: see lora_paths.py. Kept for backward are the packed weights and, with LoRA, the narrow s
and, where an A is trained, x, which the layer below keeps anyway; a dense weight only where `keep` asks for it.

Registered with torch.library, forward and backward, so that torch.compile sees one node each. Eager mode takes the same
functions through a plain autograd rule: torch.library's dispatch of tensor lists costs a fifth of a millisecond a call.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from . import dispatch, lora_paths
from .derivatives import beyond_first, derivatives, differentiated, transformed
from .dropout import draw_seed, keep_level
from .lora_paths import Group
from .swiglu import gated, gated_reference, geglu, swiglu
from .weight4bit import Weight4bit, flatten, unflatten


def linear4bit(x: Tensor, weight: Weight4bit, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times the 4-bit weight [out, in], transposed, plus bias [out] -> [..., out] in x's dtype.

    Gradients flow to x and bias; the weight is frozen, and only its packed tensors are saved for backward. fp64 x sees
    the fp32 weight exactly. bf16 and fp16 x on a CPU are multiplied in fp32 and rounded once, unless the CPU multiplies
    bf16 itself; there and on CUDA the weight is rounded to x's dtype first (for few rows on CUDA see
    matmul4bit_triton.py). ValueError if sizes or devices disagree, or if scales require a gradient."""
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"the weight is {tuple(weight.shape)} (out, in), so x must end in {weight.shape[-1]}, got {tuple(x.shape)}"
        )
    return _run(x, Group([weight], [] if bias is None else [bias]), False)[0]


def lora_linears4bit(
    x: Tensor,
    weights: Sequence[Weight4bit],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    keep: bool = False,
    up: Tensor | None = None,
    gelu: bool = False,
) -> list[Tensor]:
    """y_i = x W_i^T + b_i + scale_i (dropout(x) A_i^T) B_i^T for x [..., in] -> each [..., out_i] in x's dtype.

    Weights [out_i, in] of one 4-bit format, A_i [rank_i, in] and B_i [out_i, rank_i] masters of any floating dtype.
    LoRA (arXiv 2106.09685, eq. 3) over frozen weights: gradients flow to x, biases, A and B, each in its own dtype.

    All linears see the same dropped x (kernels/dropout.py): a mask made once. `seed`, int64 0-d on x's device, fixes
    it; by default it is drawn from the device's generator. `keep` holds the decoded weights for backward instead of
    decoding again: for activation checkpointing, where the forward pass that runs again right before backward is the
    one that saves. With `up`, for one linear, the input is swiglu(x, up), or geglu's with `gelu`, made again from x and
    up in backward. ValueError where sizes, formats or devices disagree."""
    if not len(weights) == len(biases) == len(As) == len(Bs) == len(scales) > 0:
        raise ValueError(
            "lora_linears4bit needs a bias (or None), A, B and scale for each of its weights, and at least one weight; "
            f"got {len(weights)} weights, {len(biases)} biases, {len(As)} A, {len(Bs)} B, {len(scales)} scales"
        )
    if len({(w.quant_type, w.blocksize, w.nested_absmax is None) for w in weights}) > 1:
        raise ValueError("weights of one call must share quant_type, blocksize and whether they are double quantised")
    for weight, A, B in zip(weights, As, Bs, strict=True):
        rows, columns = weight.rows, weight.columns
        if (x.shape[-1:], A.shape[1:], B.shape) != ((columns,), (columns,), (rows, *A.shape[:1])):
            raise ValueError(
                f"for a weight {(rows, columns)} (out, in) x must be [..., in], A [rank, in] and "
                f"B [out, rank], got x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
            )
    if up is not None and (len(weights) > 1 or up.shape != x.shape or up.dtype != x.dtype):
        got = f"{len(weights)} weights, x {tuple(x.shape)} {x.dtype} and up {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"a gated input needs one weight, and x and up alike, got {got}")
    if dropout:
        keep_level(dropout)  # its ValueError
        seed = draw_seed(x.device) if seed is None and not transformed() else seed
    # Kernels read A and B row by row; a transposed master (an SVD's factor, say) is copied, others are not.
    masters = [A.contiguous() for A in As], [B.contiguous() for B in Bs]
    scales, seed = [float(scale) for scale in scales], seed if dropout else None
    group = Group(list(weights), _all_or_none(biases, weights), *masters, scales, float(dropout), seed, up, gelu)
    return _run(x, group, keep)


def _run(x: Tensor, group: Group, keep: bool) -> list[Tensor]:
    weights, biases, A, B, scales, dropout, seed, up, gelu = group
    compiling = torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter, FakeTensor)
    compiling = compiling or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None  # make_fx's
    for weight in () if compiling else weights:
        weight.check()
        if any(tensor is not None and differentiated(tensor) for tensor in weight[:4]):
            raise ValueError("scales of a 4-bit weight get no gradient here: freeze them, or take dequantize(weight)")
        if x.device != weight.packed.device:
            raise ValueError(f"x is on {x.device}, the weight on {weight.packed.device}")
    for weight, bias in zip(weights, biases, strict=False):  # none, or one for each
        if bias.shape != (weight.rows,):
            raise ValueError(f"a bias must be [{weight.rows}], one for each output, got {tuple(bias.shape)}")
    if up is not None and (compiling or transformed()):
        x = (geglu if gelu else swiglu)(x, up)
    if transformed():
        with _no_autocast(x):
            return lora_paths.plain(x, group)
    if compiling:
        stored, *layout = flatten(weights)
        lists = stored, list(biases), list(A), list(B)
        return _forward_op(x, *lists, seed, *layout, scales, dropout, keep)[: len(weights)]
    return list(_Eager.apply(x, up, group, keep, *biases, *A, *B))


def _all_or_none(biases: Sequence[Tensor | None], weights: Sequence[Weight4bit]) -> list[Tensor]:
    """No bias at all, or one for each: zeros where a linear has none."""
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return []
    return [some.new_zeros(w.rows) if bias is None else bias for bias, w in zip(biases, weights, strict=True)]


def _forward(x: Tensor, group: Group, keep: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Each y [..., out], s [M, sum of ranks], and the decoded weights to keep."""
    rows = _matrix(x)
    with _no_autocast(x):
        few = lora_paths.few_rows(rows, group, keep)
        made, s, dense = (lora_paths.forward_few if few else lora_paths.forward_many)(rows, group, keep)
    unsafe_view = torch.ops.aten._unsafe_view  # not a view of another tensor: the caller may write into it
    return [unsafe_view(y, (*x.shape[:-1], y.shape[1])) for y in made], s, dense


def _backward(
    grads: list[Tensor], x: Tensor | None, s: Tensor | None, group: Group, dense: list[Tensor], need_x: bool
) -> list[Tensor]:
    """As `lora_paths.backward`, for grads [..., out]; x is None without a trained A, s without LoRA."""
    rows = None if x is None else _matrix(x)
    with _no_autocast(grads[0]):
        made = lora_paths.backward([_matrix(g) for g in grads], rows, s, group, dense, need_x)
    if need_x:
        made[-1] = made[-1].view(*grads[0].shape[:-1], made[-1].shape[1])
    return made


def _matrix(x: Tensor) -> Tensor:
    """x [..., features] as [M, features], also where a size is 0; columns at stride 1."""
    matrix = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The op settles its dtypes itself; autocast would change them once more inside."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


@torch.library.custom_op("fourbit::linears4bit", mutates_args=())
def _forward_op(
    x: Tensor,
    stored: list[Tensor], biases: list[Tensor], A: list[Tensor], B: list[Tensor], seed: Tensor | None,
    sizes: list[int], quant_type: str, blocksize: int, scales: list[float], dropout: float, keep: bool,
) -> list[Tensor]:  # fmt: skip
    group = Group(unflatten(stored, sizes, quant_type, blocksize), biases, A, B, scales, dropout, seed)
    made, s, dense = _forward(x, group, keep)
    return [*made, s, *dense]


@torch.library.custom_op("fourbit::linears4bit_backward", mutates_args=())
def _backward_op(
    grads: list[Tensor], x: Tensor | None, s: Tensor | None, dense: list[Tensor], stored: list[Tensor],
    A: list[Tensor], B: list[Tensor], seed: Tensor | None,
    sizes: list[int], quant_type: str, blocksize: int, scales: list[float], dropout: float, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    group = Group(unflatten(stored, sizes, quant_type, blocksize), [], A, B, scales, dropout, seed)
    return _backward(grads, x, s, group, dense, need_x)


@_forward_op.register_fake
def _(
    x: Tensor, stored: list[Tensor], biases: Any, A: list[Tensor], B: Any, seed: Any, sizes: list[int], *rest: Any
) -> list[Tensor]:
    quant_type, blocksize, _, _, keep = rest
    _prepare(x, quant_type)
    group = Group(unflatten(stored, sizes, quant_type, blocksize))
    rows, dtype = prod(x.shape[:-1]), dispatch.product_dtype(x)
    if dtype != x.dtype and lora_paths.few_rows(x.new_empty(rows, sizes[-1]), group, keep):
        dtype = x.dtype
    s = x.new_empty(rows, sum(a.shape[0] for a in A), dtype=dtype)
    dense = [x.new_empty(size, sizes[-1], dtype=dtype) for size in sizes[:-1] if keep]
    return [*(x.new_empty(*x.shape[:-1], size) for size in sizes[:-1]), s, *dense]


@_backward_op.register_fake
def _(
    grads: list[Tensor], x: Any, s: Tensor | None, dense: Any, stored: Any, A: Any, B: list[Tensor], seed: Any,
    sizes: list[int], *rest: Any,
) -> list[Tensor]:  # fmt: skip
    of_x = [grads[0].new_empty(*grads[0].shape[:-1], sizes[-1])] if rest[-1] else []
    if s is None:
        return of_x
    of_A = [] if x is None else [dispatch.widened(s.new_empty(s.shape[1], sizes[-1]))]
    return [*of_A, *(b.new_empty(b.shape) for b in B), *of_x]


def _prepare(x: Tensor, quant_type: str) -> None:
    """The tables that kernels share, made now: here a compiler only asks what an op returns.

    Made later, on the first run, they would lie in the memory of the CUDA graphs that torch.compile records."""
    if x.device.type == "cuda" and dispatch.path_for(x) == "triton":
        from . import matmul4bit_triton  # only here: Triton exists for Linux only and is slow to import

        with unset_fake_temporarily():
            matmul4bit_triton.prepare(x.device, x.dtype, quant_type)


def _save(ctx: Any, x: Tensor, group: Group, s: Tensor, dense: list[Tensor]) -> None:
    """Keep for backward. All of it through autograd, packed weights too, so that it sees what is written meanwhile."""
    A, B = group.A, group.B
    trained = any(a.requires_grad for a in A)
    lists = (dense, [tensor for weight in group.weights for tensor in weight[:4]], A, B)
    own = x if trained or group.up is not None else None, group.up, *((s, group.seed) if A else (None, None))
    ctx.save_for_backward(*own, *chain.from_iterable(lists))
    ctx.set_materialize_grads(False)
    ctx.lengths, ctx.formats = [len(tensors) for tensors in lists], [weight[4:] for weight in group.weights]
    ctx.scales, ctx.dropout, ctx.gelu = group.scales, group.dropout, group.gelu
    ctx.biases = [bias.dtype if bias.requires_grad else None for bias in group.biases]


def _save_op(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, stored, biases, A, B, seed, *layout, scales, dropout, _ = inputs
    weights, ctx.stored = unflatten(stored, *layout), len(stored)
    n = len(weights)
    ctx.mark_non_differentiable(*output[n:])
    _save(ctx, x, Group(weights, biases, A, B, scales, dropout, seed), output[n], output[n + 1 :])


def _differentiate(
    ctx: Any, grads: Sequence[Tensor | None], backward: Callable[..., list[Tensor]] = _backward
) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The gradients of x and up, biases, A and B."""
    x, up, s, seed, *rest = ctx.saved_tensors
    places = iter(rest)
    dense, stored, A, B = ([*islice(places, length)] for length in ctx.lengths)
    weights = [Weight4bit(*stored[4 * i : 4 * i + 4], *form) for i, form in enumerate(ctx.formats)]
    group = Group(weights, [], A, B, ctx.scales, ctx.dropout, seed, up, ctx.gelu)
    need_x, rows = ctx.needs_input_grad[0], [weight.rows for weight in weights]
    some = next((g for g in grads if g is not None), None)
    if some is None:
        return [None, None], [None] * len(ctx.biases), [None] * len(A), [None] * len(B)
    pairs = zip(grads, rows, strict=False)  # a gradient of None: an output that the loss does not use
    each = [some.new_zeros(*some.shape[:-1], size) if g is None else g for g, size in pairs]
    if beyond_first():
        n, columns = len(A), weights[0].columns
        if A and x is None:
            raise RuntimeError("second derivatives need the input, which is not kept where A is frozen: train A too")
        if x is None:  # without LoRA it is not kept, nor asked for: y is linear in it
            x = torch.zeros(*some.shape[:-1], columns, dtype=some.dtype, device=some.device, requires_grad=True)

        def plain(x: Tensor, other: Tensor, *masters: Tensor) -> list[Tensor]:
            h = x if up is None else gated_reference(x, other, ctx.gelu)
            return lora_paths.plain(h, group._replace(A=masters[:n], B=masters[n:]))

        wanted = [need_x, up is not None and ctx.needs_input_grad[1], *(master.requires_grad for master in (*A, *B))]
        with _no_autocast(x):
            of_x, of_up, *rest = derivatives(plain, (x, x if up is None else up, *A, *B), wanted, each)
        of_A, of_B = rest[:n], rest[n:]
    else:
        made, of_up = list[Any](), None
        if up is not None:
            with _no_autocast(some):
                *made, of_up = lora_paths.backward_gated(_matrix(each[0]), x, s, group, dense)
        elif need_x or A:
            made = backward(each, x, s, group, dense, need_x)
        of_x = made[-1] if need_x else None
        of_A, begin = [None] * len(A), int(x is not None)
        if x is not None:
            of_A = [p.to(a.dtype) for p, a in zip(made[0].split([len(a) for a in A]), A, strict=True)]
        of_B = made[begin : begin + len(B)] if A else []
    of_biases = [None if d is None else _matrix(g).sum(0, dtype=d) for g, d in zip(each, ctx.biases, strict=False)]
    return [of_x, of_up], of_biases, of_A, of_B


def _differentiate_op(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    def one_node(grads: list[Tensor], x: Any, s: Any, group: Group, dense: list[Tensor], need_x: bool) -> list[Tensor]:
        (stored, *layout), (_, _, A, B, *numbers) = flatten(group.weights), group
        return _backward_op(grads, x, s, dense, stored, A, B, group.seed, *layout, *numbers[:2], need_x)

    (of_x, _), of_biases, of_A, of_B = _differentiate(ctx, grads, one_node)
    scales: list[float] | None = None if of_A else []  # torch takes an empty list for one of tensors
    return of_x, [None] * ctx.stored, of_biases, of_A, of_B, *[None] * 4, scales, None, None


_forward_op.register_autograd(_differentiate_op, setup_context=_save_op)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None, group: Group, keep: bool, *_: Tensor) -> tuple[Tensor, ...]:
        """What is in the group and may train is given apart too, for autograd to see it."""
        made, s, dense = _forward(x if up is None else gated(x, up, group.gelu), group, keep)
        _save(ctx, x, group, s, dense)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_inputs, *lists = _differentiate(ctx, grads)
        return *of_inputs, None, None, *chain.from_iterable(lists)
