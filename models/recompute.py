"""Tensors that backward makes again instead of keeping: a normalised input, a gated product.

A LoRA layer keeps its input for the gradient of A. In a decoder layer these inputs are one cheap step away from tensors
that are kept anyway (the residual stream, gate and up), so a third of a layer's activations need not be stored. The
step runs again on the same numbers, so the values come back to the bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..kernels.derivatives import transformed
from ..lora.adapter import is_hooked


def recomputed(
    value: Tensor, step: Callable[..., Tensor], *inputs: Tensor, active: bool = True
) -> AbstractContextManager[Any]:
    """A block inside which autograd keeps `step` and `inputs` in place of `value` = step(*inputs).

    However often `value` is saved there (as it is or as a view of all of it), the step runs once, in backward. The
    inputs must not be overwritten before. Nothing changes where not `active`, where hooks of `step` would be called a
    second time, and under torch.compile, whose compiler decides what to make again, and torch.func, which has no hooks.
    """
    hooked = isinstance(step, nn.Module) and is_hooked(step)
    if not active or hooked or torch.compiler.is_compiling() or transformed():
        return nullcontext()
    place, size = value.data_ptr(), value.numel()  # not `value` itself: the hooks live as long as the graph
    kept_inputs = [x.detach() for x in inputs]
    again = cache(lambda: step(*kept_inputs).detach())  # runs once; lives until the graph's last node that uses it goes

    def pack(tensor: Tensor) -> Any:
        same = tensor.data_ptr() == place and tensor.numel() == size and tensor.is_contiguous()
        return (again, tensor.shape) if same else tensor.detach()  # the tensor itself would be a cycle, never freed

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0]().view(kept[1])

    return saved_tensors_hooks(pack, unpack)
