"""Memory in use, by metrics that say what they are, and an estimate of what activations will need."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..kernels.dispatch import memory_free as memory_free
from ..kernels.dispatch import proc_bytes
from ..models.protocol import evaluating
from .config import TrainingConfig


def memory_used(device: torch.device) -> tuple[str, int]:
    """(what it is, bytes): the allocator's peak on CUDA, else this process' anonymous resident memory."""
    if device.type == "cuda":
        return "max_memory_allocated", torch.cuda.max_memory_allocated(device)
    return "rss_anon", proc_bytes("/proc/self/status", "RssAnon")


def state_bytes(config: TrainingConfig, parameters: Iterable[Tensor]) -> int:
    """Bytes of the optimizer's state for these, about: scales of 8-bit state and padding are left out."""
    moments = (1 if "lion" in config.optimizer else 2) * (1 if "8bit" in config.optimizer else 4)
    return moments * sum(parameter.numel() for parameter in parameters)


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`, parameters and buffers not counted. It runs once,
    in evaluation mode, so no random number is drawn."""
    mine = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with evaluating(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(kept.values())
