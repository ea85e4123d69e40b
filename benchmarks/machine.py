"""What every figure carries: the machine, the versions, the date and the commit it was measured at."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import CHECKOUT

PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "torchao", "liger_kernel")
CPU_CACHE = 32 << 20  # where the size of the last-level cache cannot be read


def facts(device: torch.device) -> dict[str, Any]:
    """Fields of every line of a result file."""
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _smi("driver_version") if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Of the packages that are installed, and of Python and fourbit."""
    import fourbit

    found = {"python": platform.python_version(), "fourbit": fourbit.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None where git cannot tell.

    The variable BENCH_COMMIT says it for a copy of the checkout that travelled without its history.
    """
    if said := os.environ.get("BENCH_COMMIT"):
        return said
    try:
        name = _output("git", "-C", str(CHECKOUT), "rev-parse", "--short=12", "HEAD")
        changed = _output("git", "-C", str(CHECKOUT), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + "+" if changed else name


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def clocks() -> str | None:
    """The GPU's clocks, temperature and power right now, for people; None without nvidia-smi."""
    return _smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return CPU_CACHE


def _smi(fields: str) -> str | None:
    try:
        return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
