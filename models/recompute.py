"""What a layer keeps for backward, and what backward makes again: a choice for each layer, of time or of memory.

A LoRA layer keeps its input for the gradient of A. In a decoder layer these inputs are one cheap step away from tensors
that are kept anyway (the residual stream, gate and up), so a third of a layer's activations need not be stored. Beyond
that a layer can run again from its input (Chen et al. 2016, arXiv 1604.06174), which can wait in the host's memory.
What runs again runs on the same numbers and the same random state, so every choice gives the same bits.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import shown
from ..kernels.derivatives import transformed
from ..lora.adapter import is_hooked

Keep = Literal["all", "products", "input", "host"]
"""What a layer keeps, from the quickest to the leanest: all that its ops save; what its products (linears, attention)
put out, from which the cheap rest is made again; its input, from which the layer runs again; its input in pinned memory
of the host, which comes back while the layer above is in backward (on a CPU the same as "input")."""

Checkpointing = bool | Keep | Sequence[Keep]
"""A word for each layer, or one for all. False is "products", which a CPU pays nothing for; True is "input"."""

KEEPS: tuple[Keep, ...] = get_args(Keep)
AGAIN = ("input", "host")  # the words that run a layer again


def keeps(checkpointing: Checkpointing, layers: int | None = None) -> list[Keep]:
    """The word of each of so many layers; None: of as many as it says, at least one. ValueError for what is none."""
    one = ("input" if checkpointing else "products") if isinstance(checkpointing, bool) else checkpointing
    words: list[Any] = [one] * (layers or 1) if isinstance(one, str) else [*one]
    if len(words) != (layers or len(words) or 1) or not {*words} <= {*KEEPS}:
        rule = f"checkpointing must be True, False, one of {', '.join(KEEPS)}, or a list of one for each layer"
        raise ValueError(f"{rule}{f' ({layers})' if layers else ''}; got {shown(checkpointing)}")
    return words


def leanness(checkpointing: Checkpointing) -> float:
    """The mean place of its words in KEEPS."""
    words = keeps(checkpointing)
    return sum(map(KEEPS.index, words)) / len(words)


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
    place, size = _place(value), value.numel()  # not `value` itself: the hooks live as long as the graph
    kept_inputs = [x.detach() for x in inputs]
    again = cache(lambda: step(*kept_inputs).detach())  # runs once; lives until the graph's last node that uses it goes

    def pack(tensor: Tensor) -> Any:
        same = _place(tensor) == place and tensor.numel() == size and tensor.is_contiguous()
        return (again, tensor.shape) if same else tensor.detach()  # the tensor itself would be a cycle, never freed

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0]().view(kept[1])

    return saved_tensors_hooks(pack, unpack)


def _place(x: Tensor) -> tuple[Any, Any]:
    """Where x lies; fake tensors have no address."""
    return x.untyped_storage()._cdata, x.storage_offset()
