"""What a layer keeps for backward, and what backward makes again: a choice for each layer, of time or of memory.

A LoRA layer keeps its input for the gradient of A. In a decoder layer these inputs are one cheap step away from tensors
that are kept anyway (the residual stream, gate and up), so a third of a layer's activations need not be stored. Beyond
that a layer can run again from its input (Chen et al. 2016, arXiv 1604.06174), which can wait in the host's memory.
What runs again runs on the same numbers and the same random state, so every choice gives the same bits.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, Literal, get_args
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..errors import shown
from ..kernels.derivatives import transformed
from ..kernels.launch import is_fake
from ..kernels.page_device import PageDevice, make_device
from ..lora.active import as_now, checkpointed
from ..lora.adapter import is_hooked
from ..lora.layer import ByRows

Keep = Literal["all", "products", "input", "host"]
"""What a layer keeps, from the quickest to the leanest: all that its ops save; what its products (linears, attention)
put out, from which the cheap rest is made again; its input, from which the layer runs again; its input in pinned memory
of the host, which comes back while the layer above is in backward (on a CPU the same as "input")."""

Checkpointing = bool | Keep | Sequence[Keep]
"""A word for each layer, or one for all. False is "products", which a CPU pays nothing for; True is "input"."""

CHUNK = 8192  # tokens that go through a feed-forward part at once: beside 8,192 rows decoding weights costs little
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


def in_chunks(module: nn.Module, part: Callable[[Tensor], Tensor], x: Tensor, *, again: bool, unread: bool) -> Tensor:
    """part(x) for x [B, T, D], a part of `module` that takes every token by itself: CHUNK of them at a time, so that
    what lies in between never exists for all of them.

    `again`: a chunk keeps its input alone, and runs again in backward. `unread`: it is a layer that runs again, of
    which the inputs of chunks are wanted and no outputs. Layers with adapters by rows get all rows at once."""
    chunks = x.reshape(1, -1, x.shape[-1]).split(CHUNK, dim=1)
    if len(chunks) == 1 or any(isinstance(getattr(m, "active", None), ByRows) for m in module.modules()):
        return part(x)
    run = (lambda chunk: chunk) if unread else part
    return torch.cat([checkpointed(module, run, c) if again else run(c) for c in chunks], dim=1).view_as(x)


class HostInputs:
    """Inputs of layers that wait in the host's memory: `pack` sends one there, `unpack` has it back and the one sent
    before it on its way. Both are hooks of saved tensors.

    No memory is reused under a copy: compute waits for a layer's copy when it begins the next layer. The allocator's
    own way, `record_stream`, would free nothing for a host that runs ahead of its GPU."""

    def __init__(self, device: PageDevice) -> None:
        self.device = device
        self.sent: list[tuple[Tensor, Callable[[], Tensor]]] = []  # in the host's memory; room for it
        self.here: dict[int, tuple[Tensor, Any]] = {}  # on the device: on its way out, or come back

    def pack(self, x: Tensor) -> int:
        number, x, host = len(self.sent), x.detach().contiguous(), self.device.pinned(x.nbytes)
        self.device.use(_bytes(x))
        event = self.device.copy("out", host, _bytes(x), [self.device.mark()])
        self.sent.append((host, partial(torch.empty, x.shape, dtype=x.dtype, device=x.device)))
        self.here[number] = x, event
        if number - 1 in self.here:
            before, left = self.here.pop(number - 1)
            self.device.wait(left)
            self.device.free(_bytes(before))
        return number

    def unpack(self, number: int) -> Tensor:
        self._fetch(number)
        self._fetch(number - 1)
        x, event = self.here.pop(number)
        self.device.wait(event)
        return x

    def _fetch(self, number: int) -> None:
        if number < 0 or number in self.here:
            return
        host, room = self.sent[number]
        x = room()
        self.device.use(_bytes(x))  # the mark is behind the copy out too, for which compute has waited
        self.here[number] = x, self.device.copy("in", _bytes(x), host, [self.device.mark()])

    def __del__(self) -> None:
        for _, event in self.here.values():  # of a backward pass that went no further
            self.device.wait(event)


def host_inputs(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """A block in which a checkpoint's input, like x, is kept in the host's memory; where it is already, it stays."""
    fake = x.is_meta and is_fake(x)  # in CUDA's place, without streams
    if not (x.is_cuda or fake) or torch.compiler.is_compiling():
        return nullcontext
    host = HostInputs(PageDevice() if fake else make_device(x.device))
    return partial(saved_tensors_hooks, host.pack, host.unpack)


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _held(x: Tensor) -> Callable[[], Tensor]:
    """x for later, or the error that autograd raises where it saves by itself: behind hooks it sees no writing."""
    held, version = x.detach(), x._version  # the tensor itself would be a cycle, never freed

    def unwritten() -> Tensor:
        if held._version != version:
            raise RuntimeError(
                "a tensor needed for gradient computation has been modified by an inplace operation: "
                f"{held.dtype} {tuple(held.shape)} is at version {held._version}, not {version}; write after backward"
            )
        return held

    return unwritten


def recomputed(
    value: Tensor, step: Callable[..., Tensor], *inputs: Tensor, active: bool = True
) -> AbstractContextManager[Any]:
    """A block inside which autograd keeps `step` and `inputs` in place of `value` = step(*inputs).

    However often `value` is saved there (as it is, or a view of some of it), the step runs once, in backward; if
    its inputs were overwritten, RuntimeError. Nothing changes where not `active`, where hooks of `step` would be called
    twice, under torch.compile, whose compiler decides what to make again, and under torch.func, which has no hooks.
    """
    hooked = isinstance(step, nn.Module) and is_hooked(step)
    off = not active or hooked or not torch.is_grad_enabled() or not value.is_contiguous()
    if off or torch.compiler.is_compiling() or transformed():
        return nullcontext()
    # not `value` itself: the hooks live as long as the graph. And no addresses, which fake tensors lack
    storage, first, size, dtype = ref(value.untyped_storage()), value.storage_offset(), value.numel(), value.dtype
    held = [_held(x) for x in (*inputs, *(step.parameters() if isinstance(step, nn.Module) else ()))]
    run = as_now(step, step) if isinstance(step, nn.Module) else step  # others may be active when backward runs
    # runs once; lives until the graph's last node that uses it goes
    again = cache(lambda: run(*[unwritten() for unwritten in held][: len(inputs)]).detach())

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        shape, own = tensor.shape, tensor.untyped_storage() is storage() and tensor.dtype == dtype
        if own and tensor.is_contiguous() and 0 <= (start := tensor.storage_offset() - first) <= size - shape.numel():
            return lambda: again().view(-1)[start : start + shape.numel()].view(shape)
        return _held(tensor)

    return saved_tensors_hooks(pack, lambda kept: kept())
