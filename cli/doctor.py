"""`fourbit doctor`: what is installed, what the machine has, and what fourbit will use here."""

import os
import platform
import shutil
import textwrap
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from ..errors import EnvironmentProblem
from ..kernels import dispatch
from ..kernels.dispatch import memory_free
from .load import choose_device, choose_dtype
from .options import ResultOptions
from .parse import Sources
from .show import pairs, result

NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "jinja2", "pyyaml", "rich", "gguf", "matplotlib")
OPTIONAL = {"triton": "for kernels on a GPU", "tensorboard": "for --log tensorboard"}
TORCH_FLOOR = "2.10"


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    """Print versions, devices, memory, and which device, dtype and kernels fourbit will use."""


def run(options: Options, sources: Sources) -> int:
    """Print everything; EnvironmentProblem at the end when something that is needed is missing or too old."""
    found = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    instead = dict.fromkeys(NEEDED, "missing") | {name: f"not installed ({why})" for name, why in OPTIONAL.items()}
    own = {"fourbit": __version__, "python": platform.python_version()}
    facts = {
        "versions": own | {name: number or instead[name] for name, number in found.items()},
        "machine": machine(),
        "used": used(),
    }
    tables = (f"{title}\n{textwrap.indent(pairs(list(rows.items())), '  ')}" for title, rows in facts.items())
    result(facts, "\n\n".join(tables), as_json=options.json)
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
        "processor": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
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
        "dtype": choose_dtype("auto", device),
        "kernels": dispatch.path_for(torch.empty(0, device=device)),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores (OMP_NUM_THREADS sets it)",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
