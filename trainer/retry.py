"""The gradients of one micro-batch, made again with more room when memory runs out: all of them count, or none.

A long sequence can need for one backward what the optimizer's pages take. Its micro-batch is then run again without
them. Autograd adds into .grad as it goes, so what a failed backward leaves there is part of a micro-batch. Gradients
that earlier micro-batches left are therefore set aside while one runs, and the new ones are added when it is through:
the additions that autograd would have made, in the same order, so the sums are equal bit for bit. This costs no copy;
from the second micro-batch of a step on, it costs memory for one more set of gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .rng import rng_states, set_rng_states


def backward_or_retry(
    parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], make_room: Callable[[], object]
) -> Tensor:
    """Backward through loss(); returns its value. One torch.OutOfMemoryError is answered by make_room() and a retry.

    The retry draws the same random numbers. Whatever loss, its backward or make_room raises, parameters' gradients then
    are as they were before.
    """
    device = parameters[0].device
    rng, before = rng_states(device), [p.grad for p in parameters]
    try:
        value = _attempt(parameters, loss)
        if value is None:  # and what it had taken is free again: no exception holds its frames
            make_room()
            set_rng_states(rng, device)
            value = _backward(parameters, loss)
    except BaseException:
        _put(parameters, before)
        raise
    new = [p.grad for p in parameters]
    both = [(old, fresh) for old, fresh in zip(before, new, strict=True) if old is not None and fresh is not None]
    if both:
        torch._foreach_add_([old for old, _ in both], [fresh for _, fresh in both])
    _put(parameters, [fresh if old is None else old for old, fresh in zip(before, new, strict=True)])
    return value


def _attempt(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]) -> Tensor | None:
    try:
        return _backward(parameters, loss)
    except torch.OutOfMemoryError:
        return None


def _backward(parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]) -> Tensor:
    _put(parameters, [None] * len(parameters))
    value = loss()
    value.backward()
    return value.detach()


def _put(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
