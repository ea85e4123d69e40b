"""Tensors that backward makes again instead of keeping: a normalised input, a gated product.

A LoRA layer keeps its input for the gradient of A. In a Llama layer these inputs are one cheap step away from tensors
that are kept anyway (the residual stream, gate and up), so a third of a layer's activations need not be stored. The
step is run again on the same numbers, so the values come back to the bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def recomputed(
    value: Tensor, step: Callable[..., Tensor], *inputs: Tensor, active: bool = True
) -> AbstractContextManager[Any]:
    """A block inside which autograd keeps `step` and `inputs` in place of `value` = step(*inputs).

    However often `value` is saved there (as it is or as a view of all of it), the step runs once, in backward. Anything
    else is kept as ever. The inputs must not be overwritten before backward. Not `active`: nothing changes; nor under
    torch.compile, whose compiler decides by itself what to make again.
    """
    if not active or torch.compiler.is_compiling():
        return nullcontext()
    place, size = value.data_ptr(), value.numel()  # not `value` itself: the hooks live as long as the graph
    recipe = _Recipe(step, tuple(x.detach() for x in inputs))

    def pack(tensor: Tensor) -> Any:
        same = tensor.data_ptr() == place and tensor.numel() == size and tensor.is_contiguous()
        return (recipe, tensor.shape) if same else tensor.detach()  # the tensor itself would be a cycle, never freed

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0].value().view(kept[1])

    return saved_tensors_hooks(pack, unpack)


class _Recipe:
    """Runs once; the result lives until the last node of the graph that uses it lets go of this object."""

    def __init__(self, step: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.step, self.inputs = step, inputs
        self.made: Tensor | None = None

    def value(self) -> Tensor:
        if self.made is None:
            self.made = self.step(*self.inputs).detach()
        return self.made
