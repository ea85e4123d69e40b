"""What ops with a backward of their own do where torch asks for more than first gradients of plain tensors.

Such a backward computes in place, in kernels and from what forward kept: it leaves no graph behind. So each op names
its composition of torch's own calls, which is taken at once where a transform is in force, and in backward where
gradients are to be differentiated again. Second and higher orders are right, then, or an error.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func's transforms (grad, vmap, jvp, ...), batched gradients or forward-mode AD are in force."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiated(x: Tensor) -> bool:
    """Whether anything is to be differentiated by x, backward or forward."""
    return x.requires_grad or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None)


def run(op: Any, plain: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """The op, without gradients its forward alone, which is quick; plain(*inputs) for a transform or a compiler."""
    if torch.compiler.is_compiling() or transformed():
        return plain(*inputs)
    alone = partial(op.forward, SimpleNamespace(save_for_backward=lambda *kept: None))
    return cast(Tensor, (op.apply if torch.is_grad_enabled() else alone)(*inputs))


def beyond_first() -> bool:
    """Asked in backward: whether its gradients are to be a graph (create_graph=True), or are transformed."""
    return torch.is_grad_enabled() or transformed()


def derivatives(
    plain: Callable[..., Any], inputs: Sequence[Tensor], wanted: Sequence[bool], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradient of each input that is wanted, for `grads` of plain(*inputs), a tensor or several; as a graph."""
    with torch.enable_grad():
        own = [x.view_as(x) for x in inputs]  # where the way back ends, even if one input was made of another
        outputs = plain(*own)
    leaves = [x for x, want in zip(own, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=torch.is_grad_enabled()) if leaves else ())
    return [next(found) if want else None for want in wanted]
