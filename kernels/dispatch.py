"""The one place that decides which implementation of an op runs, and the one switch that overrides it.

"reference" is plain PyTorch on any device and defines the result; "cpu" is the quick form for the CPU: codes and
decoded values are equal to it bit for bit, products within the rounding of their sums; "triton" runs kernels on CUDA
(or, forced, in Triton's interpreter on the CPU: for tests). Which way a 4-bit product goes on a GPU is a matter of the
rows of x: see `border`.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

PATHS = ("reference", "cpu", "triton")
_forced: str | None = None


def path_for(x: Tensor) -> str:
    """The path that ops on x take: the forced one, else "cpu" on a CPU, "triton" on CUDA, "reference" elsewhere.

    GPUs older than compute capability 8.0 count as elsewhere: they have neither bf16 nor the shared memory."""
    if _forced is not None:
        return _forced
    if x.device.type == "cpu":
        return "cpu"
    return "triton" if x.device.type == "cuda" and has_triton() and _runs_kernels(x.device) else "reference"


def fused(x: Tensor) -> bool:
    """Whether the kernels of an activation run for x: on the path "triton", in 16 or 32 bits, not empty."""
    return path_for(x) == "triton" and x.dtype != torch.float64 and x.numel() > 0


@cache
def _runs_kernels(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it exists for Linux only, and is imported when a kernel first runs."""
    return find_spec("triton") is not None


@contextmanager
def force_path(name: str) -> Iterator[None]:
    """Every op takes path `name` inside this context, in all threads: for tests and for finding a fault."""
    global _forced
    if name not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@cache
def model(device: torch.device) -> str:
    """The GPU's own name, such as "NVIDIA H200"; "" where there is no GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def architecture(device: torch.device) -> str:
    """That of a GPU, such as "sm_90"; "" where there is no GPU."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else ""


def widened(x: Tensor) -> Tensor:
    """x in at least fp32: of 16-bit logits an exponential is no softmax, of 16-bit rows a square no norm."""
    return x if x.dtype == torch.float64 else x.float()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype for matrix products with x: its own, but on a CPU fp32 for fp16, and for bf16 if it cannot multiply it.

    Without arithmetic of its own for them a CPU takes 6 to 100 times as long in bf16 and fp16 as in fp32."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 and _cpu_multiplies_bf16() else torch.float32


def bucketed(size: int, x: Tensor) -> int:
    """The number of rows that `size` rows of x are padded to: where oneDNN makes their products, in bf16 on a CPU, the
    next of sixteen sizes a doubling (of 8 below 128), so at most a sixteenth more; elsewhere their own.

    It compiles a program for each shape that it meets and keeps it: memory would grow with the number of lengths."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or product_dtype(x) != torch.bfloat16:
        return size
    unit = max(8, (1 << max(size - 1, 0).bit_length()) // 32)
    return -(-size // unit) * unit


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has arithmetic for bf16 products: then they are the quickest, and what `dtype auto` takes."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_multiplies_bf16()


@cache
def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the GPU has; 1 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def memory_free(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return proc_bytes("/proc/meminfo", "MemAvailable")


def trim_heap() -> None:
    """Give back to the system what the C library holds free, whole pages of it: glibc alone keeps them, and blocks that
    are aligned, as torch's are, seldom fit where one of another size was (glibc bug 14581)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)


def proc_bytes(file: str, key: str) -> int:
    """The figure of `key` in a file such as /proc/meminfo. 0 where it is not Linux: better none than a made-up one."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


def autocast_input(x: Tensor) -> Tensor:
    """`x` as torch.autocast wants the input of a linear layer; it casts nn.Linear's by itself, but not ours."""
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # meta knows no autocast
        return x.to(torch.get_autocast_dtype(device))
    return x
