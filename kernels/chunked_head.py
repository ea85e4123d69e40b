"""What is computed row by row from an output head's logits, without ever holding all of them.

For T tokens and a vocabulary of V the usual route holds T x V logits and as many gradients, in fp32: 6 GB for 8,192
tokens of a 100k vocabulary. Here one chunk of rows is alive at a time. A `Scorer` turns a chunk's logits into figures
of each row and writes the first figure's gradient over them. A frozen head, as with adapters, takes that gradient back
to the hidden states while it is there: two products a chunk, and backward only scales. A trained head cannot, since
its own gradient needs what each row is weighted with: its chunks are computed again in backward.

`TokenScorer`, of most losses, passes once over a chunk: with z = logit - largest, e = exp(z) and Z = sum e, the
log-probability is z[target] - log Z, the entropy log Z - sum(e z) / Z, and the target is the likeliest token where
z[target] = 0. So entropy and accuracy cost one product and one sum a value, in cache, and no second exponential.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .derivatives import beyond_first, transformed
from .dispatch import autocast_input, fused, widened
from .launch import is_fake

CHUNK_BYTES = 64 * 2**20  # of one chunk's logits in fp32, on a CPU
CHUNK_BYTES_GPU = 512 * 2**20  # a thousand rows at 128k tokens of vocabulary: fewer do not fill a GPU's products
BLOCK_BYTES = 2**20  # of the logits, in fp32, that a scorer passes over at a time: they stay in a core's cache


class Scorer(Protocol):
    """Figures, each [n] in fp32 or fp64, of logits [n, V] in the head's dtype that belong to `rows` of hidden states.

    The logits may be overwritten; with `gradient` they then hold d figures[0] / d logits, rounded once."""

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, ...]: ...

    def plain(self, logits: Tensor) -> tuple[Tensor, ...]: ...  # the definition, of all rows, of any order


Back = Callable[[Tensor], Tensor]  # gradient of a chunk's logits -> gradient of its hidden states
Product = Callable[[Tensor, bool], tuple[Tensor, Back | None]]  # hidden states, whether to go back -> logits, the way


def dense_figures(hidden: Tensor, weight: Tensor, scorer: Scorer, rows: int) -> tuple[Tensor, ...]:
    """The scorer's figures, each [N], for logits hidden [N, D] weight [V, D]^T, `rows` of them at a time.

    Gradients flow from the first figure to hidden and weight. Memory: a chunk, and [N, D] with a frozen weight."""
    if transformed():
        return scorer.plain(widened(hidden @ weight.T))
    hidden = autocast_input(hidden)  # products that add into a gradient are not cast by themselves
    if torch.is_grad_enabled() and weight.requires_grad:
        figures: tuple[Tensor, ...] = _TrainedWeight.apply(hidden, weight, scorer, rows)
        return figures
    return _frozen_figures(hidden, _dense(autocast_input(weight)), scorer, rows)


def module_figures(hidden: Tensor, head: nn.Module, scorer: Scorer, rows: int, *, in_place: bool) -> tuple[Tensor, ...]:
    """As dense_figures for a head of any kind: 4-bit, with a bias, carrying an adapter.

    in_place: overwrite what the head returns; False, at the cost of one more chunk, where its backward needs that (a
    soft cap's does). A head with trained parameters is computed again in backward, with the same random numbers."""
    if transformed():
        return scorer.plain(widened(head(hidden)))
    if torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters()):
        pieces = zip(hidden.split(rows), _parts(hidden, rows), strict=True)  # split: slices' gradients would be [N, D]
        parts = [checkpoint(_trained_chunk, head, h, scorer, p, in_place, use_reentrant=False) for h, p in pieces]
        return _joined(parts)
    return _frozen_figures(hidden, _module(head, in_place), scorer, rows)


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Rows of logits that one chunk holds by default, at least one."""
    return max(1, (CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES_GPU) // (4 * vocabulary))


def blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk that are passed over together."""
    size = BLOCK_BYTES * (1 if logits.device.type == "cpu" else 16)  # a GPU's caches are larger, and launches cost
    step = max(1, size // (max(4, logits.element_size()) * logits.shape[1]))
    yield from (slice(i, i + step) for i in range(0, len(logits), step))


def _first_only() -> None:
    if beyond_first():
        raise NotImplementedError("a chunked head keeps first derivatives only: take torch.func's, or use head(hidden)")


def _parts(hidden: Tensor, rows: int) -> list[slice]:
    return [slice(i, i + rows) for i in range(0, max(1, len(hidden)), rows)]  # one empty part where there is no row


def _joined(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(figure) for figure in zip(*parts, strict=True))


def _dense(weight: Tensor) -> Product:
    def product(hidden: Tensor, gradient: bool) -> tuple[Tensor, Back | None]:
        return hidden @ weight.T, lambda dlogits: dlogits @ weight

    return product


def _own(logits: Tensor, in_place: bool) -> Tensor:
    """The logits as a scorer may overwrite them."""
    return logits.detach() if in_place else logits.detach().clone()


def _module(head: nn.Module, in_place: bool) -> Product:
    def product(hidden: Tensor, gradient: bool) -> tuple[Tensor, Back | None]:
        if not gradient:
            with torch.no_grad():
                return _own(head(hidden), in_place), None
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            logits = head(leaf)
        return _own(logits, in_place), lambda d: torch.autograd.grad(logits, leaf, d)[0]

    return product


def _frozen_figures(hidden: Tensor, product: Product, scorer: Scorer, rows: int) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and hidden.requires_grad:
        figures: tuple[Tensor, ...] = _FrozenHead.apply(hidden, product, scorer, rows)
        return figures
    with torch.no_grad():
        return _sweep(hidden, product, scorer, rows, None)


def _sweep(hidden: Tensor, product: Product, scorer: Scorer, rows: int, dhidden: Tensor | None) -> tuple[Tensor, ...]:
    return _joined([_chunk(hidden, product, scorer, part, dhidden) for part in _parts(hidden, rows)])


def _chunk(hidden: Tensor, product: Product, scorer: Scorer, part: slice, dhidden: Tensor | None) -> tuple[Tensor, ...]:
    """One chunk's figures; its logits die with this call, before the next chunk's are made."""
    logits, back = product(hidden[part], dhidden is not None)
    figures = scorer(logits, part, dhidden is not None)
    if dhidden is not None and back is not None:
        dhidden[part] = back(logits)
    return figures


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, product: Product, scorer: Scorer, rows: int) -> tuple[Tensor, ...]:
        dhidden = torch.empty_like(hidden)
        figures = _sweep(hidden, product, scorer, rows, dhidden)
        ctx.save_for_backward(dhidden)
        ctx.mark_non_differentiable(*figures[1:])
        return figures

    @staticmethod
    def backward(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # weights [N]: of each row's figure
        _first_only()
        (dhidden,) = ctx.saved_tensors
        return (dhidden * weights[:, None]).to(dhidden.dtype), None, None, None


class _TrainedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, scorer: Scorer, rows: int) -> tuple[Tensor, ...]:
        figures = _sweep(hidden, _dense(autocast_input(weight)), scorer, rows, None)
        ctx.save_for_backward(hidden, weight)
        ctx.scorer, ctx.rows, ctx.cast = scorer, rows, _autocast(hidden)
        ctx.mark_non_differentiable(*figures[1:])
        return figures

    @staticmethod
    def backward(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _first_only()
        hidden, weight = ctx.saved_tensors
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight)  # in its own dtype, also under autocast: chunks are added up in it
        with ctx.cast():  # a scorer may run a head itself
            own = autocast_input(weight)
            for part in _parts(hidden, ctx.rows):
                _back_chunk(hidden, own, weights[part, None], ctx.scorer, part, dhidden, dweight)
        return dhidden, dweight, None, None


def _autocast(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """What makes blocks of the autocast that is on here, for a backward outside it."""
    kind = x.device.type
    on = not x.is_meta and torch.is_autocast_enabled(kind)
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind)) if on else nullcontext


def _back_chunk(
    hidden: Tensor, weight: Tensor, scale: Tensor, scorer: Scorer, part: slice, dhidden: Tensor | None, dweight: Tensor
) -> None:
    """Put in the gradient of one chunk's hidden states, if it is wanted, and add that of the weight to dweight."""
    dlogits = hidden[part] @ weight.T
    scorer(dlogits, part, True)
    scaled = (hidden[part] * scale).to(weight.dtype)  # [n, D] is cheaper to scale than [n, V]
    if dweight.dtype == weight.dtype:
        dweight.addmm_(dlogits.T, scaled)
    else:
        dweight += dlogits.T @ scaled
    if dhidden is not None:
        dhidden[part] = (dlogits @ weight) * scale


def _trained_chunk(head: nn.Module, hidden: Tensor, scorer: Scorer, part: slice, in_place: bool) -> tuple[Tensor, ...]:
    figures: tuple[Tensor, ...] = _LogitFigures.apply(head(hidden), scorer, part, in_place)
    return figures


class _LogitFigures(torch.autograd.Function):
    """A scorer on logits that autograd made. For checkpointed chunks only: backward consumes what forward saved."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scorer: Scorer, part: slice, in_place: bool) -> tuple[Tensor, ...]:
        own = _own(logits, in_place)
        figures = scorer(own, part, ctx.needs_input_grad[0])
        ctx.save_for_backward(own)
        ctx.mark_non_differentiable(*figures[1:])
        return figures

    @staticmethod
    def backward(ctx: Any, weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        _first_only()
        (dlogits,) = ctx.saved_tensors
        return dlogits.mul_(weights[:, None]), None, None, None


class TokenScores(NamedTuple):
    """What a model says of one token each: [N] tensors, of which only `logps` carries a gradient."""

    logps: Tensor  # log-probability of the target, nats, at most 0; fp32, or float64 for float64 hidden states
    entropy: Tensor  # of the whole distribution, nats, at least 0; same dtype
    correct: Tensor  # bool: no token is likelier than the target (ties count as correct)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """ValueError unless all of `targets` are tokens of the vocabulary. Looks at real tensors on a CPU only."""
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if targets.device.type != "cpu" or not len(targets) or transformed() or is_fake(targets):
        return
    least, most = (bound.item() for bound in targets.aminmax())
    if least < 0 or most >= vocabulary:
        wrong = least if least < 0 else most
        raise ValueError(
            f"targets must be in 0..{vocabulary - 1}, the head's vocabulary, got {wrong}; leave out the rows that are "
            "not trained, and check that tokenizer and model belong together"
        )


class TokenScorer:
    """The three figures of TokenScores for chunks of logits; targets int64 [N] in 0..V-1. ValueError as check_targets.

    On CUDA a target out of range ends the process by a device-side assertion: `check_targets` before they are sent."""

    def __init__(self, targets: Tensor, vocabulary: int) -> None:
        check_targets(targets, vocabulary)
        self.targets = targets

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> tuple[Tensor, ...]:
        target = self.targets[rows, None]
        if len(target) != len(logits):
            raise ValueError(f"each row of hidden states needs one target, got {len(target)} for {len(logits)} rows")
        if fused(logits) and logits.stride(1) == 1:
            from . import chunked_head_triton  # only here: Triton exists for Linux only and is slow to import

            return chunked_head_triton.token_scores(logits, target, gradient)
        above = widened(logits.gather(1, target))
        top, total, weighted = above.new_empty(3, len(logits), 1)
        for block in blocks(logits):
            wide = widened(logits[block])  # of 16 bits a copy, which is in cache
            _pass_over(wide, top[block], total[block], weighted[block], gradient)
            if gradient:
                wide.scatter_add_(1, target[block], top.new_ones(()).expand(len(wide), 1))
                if wide.dtype != logits.dtype:
                    logits[block] = wide
        above -= top
        log_total = total.log()
        figures = above - log_total, log_total - weighted / total, above == 0
        return tuple(figure.squeeze(1) for figure in figures)

    def plain(self, logits: Tensor) -> tuple[Tensor, ...]:
        all_logps = torch.log_softmax(logits, dim=1)
        logps = all_logps.gather(1, self.targets[:, None]).squeeze(1)
        return logps, torch.special.entr(all_logps.detach().exp()).sum(1), logps == all_logps.amax(1)


def _pass_over(logits: Tensor, top: Tensor, total: Tensor, weighted: Tensor, gradient: bool) -> None:
    """Largest logit, sum of e = exp(z) and sum of e z of each row; with `gradient` the logits become -softmax."""
    torch.amax(logits, 1, keepdim=True, out=top)
    z = (logits - top).clamp_(min=torch.finfo(logits.dtype).min)  # of a token banned by -inf, 0 * z is 0 then, not NaN
    torch.exp(z, out=logits)
    torch.sum(logits, 1, keepdim=True, out=total)
    torch.sum(z.mul_(logits), 1, keepdim=True, out=weighted)
    if gradient:
        logits.div_(-total)
