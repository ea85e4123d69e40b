"""How a Triton kernel of ours starts, and how those who count instead of computing see that it would have.

Fake tensors (torch's FakeTensorMode, or plain ones of device "meta" while a TorchDispatchMode listens) have no numbers.
Those of device "meta" under `dispatch.force_path("triton")` do what tensors on CUDA do, all but compute, also where
torch is built without CUDA. A TorchDispatchMode hears each op of torch's under its name, each launch of ours as
`fourbit::launched` with the kernel's name and tensors. So `benchmarks.passes` adds up bytes, memory can be foretold
from storages that such a mode sees made and let go. Without a mode meta tensors are launched with, to be compiled.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Each tensor that the kernel reads or writes, once for each: what it overwrites stands there twice. A rule for fake
# tensors and none for others, so that a graph traced with fake ones fails where it runs: the kernel is not in it.
torch.library.define("fourbit::launched", "(str kernel, Tensor[] tensors) -> ()")
torch.library.register_fake("fourbit::launched", lambda kernel, tensors: None)


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """kernel[grid], to be called: on the device of its tensors; with fake tensors the launch is counted.

    ValueError, from the call, for tensors of several devices: a kernel would read addresses of another's memory."""

    def start(*args: Any, **options: Any) -> None:
        tensors = list(_tensors(args))
        first = tensors[0]
        if other := next((tensor.device for tensor in tensors if tensor.device != first.device), None):
            raise ValueError(f"{kernel.__name__} takes tensors of one device, got {first.device} and {other}")
        if is_fake(first):
            torch.ops.fourbit.launched(kernel.__name__, tensors)
            return
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            kernel[grid](*args, **options)

    return start


def is_fake(x: Tensor) -> bool:
    """Whether x has no numbers and no address: one of torch's fake ones, or on meta while a mode listens."""
    return isinstance(x, FakeTensor) or (x.is_meta and torch._C._len_torch_dispatch_stack() > 0)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)
