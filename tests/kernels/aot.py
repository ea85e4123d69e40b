"""Compile kernels for GPUs that are not there, exactly as they are launched, and read what they cost.

    python -P aot.py FILE 80 90       FILE defines SCENARIOS: name -> function that runs ops on meta tensors

Each function runs with every kernel launch replaced by a compilation for each compute capability: the arguments, so the
specialisation, are those of the real launch, and only the launch itself is left out. Prints one JSON list of costs.
A process of its own, because kernels imported under Triton's interpreter cannot be compiled.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (80, 89, 90, 100, 120)  # 8.6 compiles to what 8.9 does, but for the name
# CUDA programming guide, compute capabilities: KB of shared memory that one program may use, that all programs of a
# multiprocessor share, and warps that it runs at a time. Each program takes 1 KB beside its own.
SHARED = {80: (163, 164), 89: (99, 100), 90: (227, 228), 100: (227, 228), 120: (99, 100)}
WARPS = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}


@dataclass(frozen=True)
class Cost:
    """What one compiled kernel costs; instruction counts are of SASS, trailing padding left out."""

    scenario: str
    kernel: str
    capability: int
    registers: int  # per thread
    spill_bytes: int  # stack and local memory per thread: 0 means nothing spilled
    shared_bytes: int  # per program
    warps: int
    instructions: int  # of the whole kernel
    loop_instructions: int  # of the longest loop body, or of the whole kernel if it has no loop
    path_instructions: int  # of the shortest way through the kernel that no condition leaves early; loops once
    proxy_fences: int  # in PTX, between what threads write to shared memory and what wgmma reads there
    constants: dict[str, Any]  # the kernel's constexpr arguments

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def programs(self) -> int:
        """How many a multiprocessor has room for at a time; registers are given out eight a thread at a time."""
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = (SHARED[self.capability][1] << 10) // (self.shared_bytes + 1024)
        return min(65536 // registers, shared, WARPS[self.capability] // self.warps)


@cache
def costs_of(file: str, capabilities: tuple[int, ...]) -> list[Cost]:
    """The costs of every launch in the SCENARIOS of a test file, compiled in another process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, file, *map(str, capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return [Cost(**cost) for cost in json.loads(done.stdout.splitlines()[-1])]


def assert_no_spills(costs: list[Cost]) -> None:
    """Nothing spills and shared memory fits, for every kernel; there is at least one."""
    assert costs
    for cost in costs:
        assert cost.spill_bytes == 0, f"{cost} spills"
        assert cost.shared_bytes <= SHARED[cost.capability][0] << 10, f"{cost} needs too much shared memory"


class _Driver:
    """Stands in for a GPU's driver: it names the target and is never asked to launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def _compile_only(capability: int) -> Iterator[list[Any]]:
    """Launches inside the context compile for `capability` and are collected, each specialisation once."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched: dict[str, Any] = {}
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not all(size > 0 for size in (grid(kwargs) if callable(grid) else grid)):
            raise AssertionError(f"{self.fn.__name__} launched with an empty grid {grid}")
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {k: v for k, v in kwargs.items() if k in self.arg_names and isinstance(v, int | str | bool)}
        launched[kernel.hash] = (self.fn.__name__, kernel, constants)
        return kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compiled)
        driver.set_active(_Driver(capability))  # type: ignore[arg-type]  # never unset: the process compiles, no more
        collected: list[Any] = []
        yield collected
        collected += launched.values()


def measure(scenario: str, run: Callable[[], object], capability: int) -> list[Cost]:
    """The costs of all kernels that `run` launches on a GPU of this compute capability."""
    from fourbit.kernels import dispatch

    with pytest.MonkeyPatch.context() as patch, dispatch.force_path("triton"), _compile_only(capability) as launched:
        patch.setattr(dispatch, "architecture", lambda device: f"sm_{capability}")
        run()
    return [_cost(scenario, name, kernel, constants, capability) for name, kernel, constants in launched]


def _cost(scenario: str, name: str, kernel: Any, constants: dict[str, Any], capability: int) -> Cost:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("nvdisasm", file.name)
    field = lambda key: int(re.search(rf"\b{key}:(\d+)", usage).group(1))  # type: ignore[union-attr]
    whole, loop, path = _instructions(sass)
    return Cost(
        scenario=scenario,
        kernel=name,
        capability=capability,
        registers=field("REG"),
        spill_bytes=field("STACK") + field("LOCAL"),
        shared_bytes=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        instructions=len(whole),
        loop_instructions=len(loop),
        path_instructions=path,
        proxy_fences=kernel.asm["ptx"].count("fence.proxy.async"),
        constants=constants,
    )


def _instructions(sass: str) -> tuple[list[str], list[str], int]:
    """(all instructions, those of the longest loop body or all, number of them on the shortest way through)."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(code.group(1).strip())
    while instructions and instructions[-1] == "NOP":
        instructions.pop()
    if instructions and instructions[-1].startswith("BRA"):  # the endless loop after the exit
        instructions.pop()
    bodies = [
        instructions[start : end + 1]
        for end, code in enumerate(instructions)
        if (jump := re.search(r"BRA.*?(\.L_x_\d+)", code)) and (start := labels.get(jump.group(1), end)) < end
    ]
    return instructions, max(bodies, key=len, default=instructions), _shortest(instructions, labels)


def _shortest(instructions: list[str], labels: dict[str, int]) -> int:
    """The fewest instructions from the first to an EXIT without a condition, branches taken forwards only."""
    steps = [0] * (len(instructions) + 1)  # from each instruction on
    for i in reversed(range(len(instructions))):
        code = instructions[i]
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", code)
        target = labels.get(jump.group(1), 0) if jump else 0
        after = [] if code.split()[0] in ("EXIT", "BRA") else [steps[i + 1]]
        steps[i] = 1 + min(after + ([steps[target]] if target > i else []), default=0)
    return steps[0]


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name  # ships in Triton's wheel
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _scenarios(file: str) -> dict[str, Callable[[], object]]:
    specification = importlib.util.spec_from_file_location("scenarios", file)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return dict(module.SCENARIOS)


def main() -> None:
    scenarios = _scenarios(sys.argv[1])
    capabilities = [int(c) for c in sys.argv[2:]]
    costs = [cost for name, run in scenarios.items() for c in capabilities for cost in measure(name, run, c)]
    print(json.dumps([asdict(cost) for cost in costs]))


if __name__ == "__main__":
    main()
