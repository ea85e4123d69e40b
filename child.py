"""How a program of ours is started that runs apart, under limits: what a stranger's file makes it do stays there."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")  # what an interpreter may need, and a clock


def child_command(file: Path, packages: Sequence[str], *args: str) -> list[str]:
    """The command that runs `file`, which sees its `args`, the standard library and `packages`, and nothing else."""
    # A package may lie where an isolated interpreter does not look.
    found = [spec.origin for name in packages if (spec := find_spec(name)) and spec.origin]
    folders = list(dict.fromkeys(str(Path(origin).parent.parent) for origin in found))
    start = f"import sys, runpy; sys.path += {folders!r}; runpy.run_path(sys.argv[1], run_name='__main__')"
    return [sys.executable, "-I", "-X", "utf8", "-c", start, str(file), *args]


def child_environment() -> dict[str, str]:
    """The few variables that it is given."""
    return {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
