"""`fourbit doctor`: what is installed, what the machine has, and what fourbit will use here."""

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__
from ..errors import EnvironmentProblem
from ..kernels import dispatch, plan
from ..trainer.memory import memory_free
from .load import choose_device, choose_dtype
from .options import ResultOptions
from .parse import Sources
from .show import pairs, result

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "pyyaml", "rich", "gguf", "matplotlib", "msgspec")
OPTIONAL = {"triton": "for kernels on a GPU", "tensorboard": "for --log tensorboard"}
TORCH_FLOOR = "2.10"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))  # weights that the dispatch table is shown for
ROWS = [2**power for power in range(14)]


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    """Print versions, devices, memory, and which device, dtype and kernels fourbit will use."""


def run(options: Options, sources: Sources) -> int:
    """Print everything; EnvironmentProblem at the end when something that is needed is missing or too old."""
    found = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    instead = dict.fromkeys(NEEDED, "missing") | {name: f"not installed ({why})" for name, why in OPTIONAL.items()}
    versions = {name: number or instead[name] for name, number in found.items()}
    own = {"fourbit": __version__, "python": platform.python_version()}
    facts = {"versions": own | versions, "machine": machine(), "used": used(), "dispatch table": dispatch_table()}
    result(facts, "\n\n".join(f"{title}\n{_table(facts[title])}" for title in facts), as_json=options.json)
    if missing := [name for name in NEEDED if found[name] is None]:
        raise EnvironmentProblem(f"missing: pip install {' '.join(missing)}")
    if torch.__version__ < TORCH_FLOOR:  # a TorchVersion: compares as versions do
        raise EnvironmentProblem(f"torch {torch.__version__} is too old; fourbit needs {TORCH_FLOOR} or newer")
    return 0


def machine() -> dict[str, str]:
    """Processor, memory, disk and GPUs."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{_gib(total)}, {_gib(memory_free(torch.device('cpu')))} of it free",
        "disk": f"{_gib(shutil.disk_usage('.').free)} free here",
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"cuda:{index}"] = f"{gpu.name}, {_gib(gpu.total_memory)}, sm_{gpu.major}{gpu.minor}"
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        facts["cuda"] = f"none seen; torch is {built}"
    return facts


def used() -> dict[str, str]:
    """The choices that `auto` makes on this machine."""
    device = choose_device("auto")
    return {
        "device": device,
        "dtype": str(choose_dtype("auto", device)).removeprefix("torch."),
        "kernels": dispatch.path_for(torch.empty(0, device=device)),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores (OMP_NUM_THREADS sets it)",
    }


def dispatch_table() -> dict[str, str]:
    """For each GPU architecture of kernels/table.json, where from, and up to how many rows of x decoding is fused."""
    here = dispatch.architecture(torch.device("cuda", 0)) if torch.cuda.is_available() else ""
    facts = {}
    for name, entry in plan.table().items():
        fused = ", ".join(f"{N}x{K} to {_fused_rows(name, N, K)}" for N, K in SHAPES)
        measured = f"{len(entry['measured'])} points measured" if entry["measured"] else "nothing measured"
        facts[name] = f"{entry['gpu']}, {entry['source']}, {measured}; rows decoded inside the product: {fused}"
    if here:
        taken = plan.entry(here)
        used_by = next((name for name, entry in plan.table().items() if entry is taken), None)
        facts["this GPU"] = f"{here}: {'not in the table, so decode first' if used_by is None else f'takes {used_by}'}"
    return facts


def _fused_rows(architecture: str, N: int, K: int) -> int:
    """The most rows of bf16 x, in powers of two, for which a [N, K] weight is decoded inside the product."""
    fused = [M for M in ROWS if plan.linear(architecture, "bfloat16", plan.Size(M, N, K)).path == "fused"]
    return max(fused, default=0)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _table(facts: Mapping[str, str]) -> str:
    return "\n".join(f"  {line}" for line in pairs(list(facts.items())).splitlines())
