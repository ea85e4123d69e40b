"""Memory in use, by metrics that say what they are, and an estimate of what activations will need."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.protocol import evaluating
from .config import TrainingConfig


def memory_used(device: torch.device) -> tuple[str, int]:
    """(what it is, bytes): the allocator's peak on CUDA, else this process' anonymous resident memory."""
    if device.type == "cuda":
        return "max_memory_allocated", torch.cuda.max_memory_allocated(device)
    return "rss_anon", _proc_bytes("/proc/self/status", "RssAnon")


def memory_free(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _proc_bytes("/proc/meminfo", "MemAvailable")


def _proc_bytes(file: str, key: str) -> int:
    path = Path(file)
    if not path.exists():  # not Linux: no number is better than a made-up one
        return 0
    line = next(line for line in path.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


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
