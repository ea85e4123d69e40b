"""The parts of the first minutes on a GPU, each run as a process of its own by `benchmarks.gpu_day`.

A part says what it finds as lines of the day's results; docs/gpu-day.md says which figure decides what. All sizes are
those of Llama-3-8B, of a few layers where all would take longer to make than to time; in dry form of a toy on the CPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fourbit.kernels.dispatch import force_path
from fourbit.lora.layer import adapter_parameters
from fourbit.models.generate import generate
from fourbit.trainer.config import SFTConfig
from fourbit.trainer.loop import cross_entropy
from fourbit.trainer.resume import repeating

from . import CHECKOUT, decoder, shapes, step, tune
from . import __main__ as suite
from .gpu_day import PARTS
from .gpu_probe import TOY, Day, probe
from .timing import clock_for
from .weights import Weights

REPEATING = ":4096:8"  # cuBLAS' workspace, with which its sums repeat
BENCHED = "^(dequantize|linear|qlora|lora_cost|layer|step) "
FOLDERS = ("kernels", "lora", "models", "optim")


# Tests.


def tests(day: Day) -> None:
    """Files dealt to processes by size; each process' output names every test as it ends, so none is lost to time."""
    files = sorted(
        CHECKOUT.glob(f"tests/[{''.join(f[0] for f in FOLDERS)}]*/test_*.py"), key=lambda p: -p.stat().st_size
    )
    files = [file for file in files if file.parent.name in FOLDERS]
    if day.dry:
        files = [CHECKOUT / "tests" / "kernels" / "test_codes.py"]
    workers = min(8, len(files), max(1, (os.cpu_count() or 2) // 2))
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-m", "not slow and not aot", "-W", "default"]
    command += ["-p", "no:cacheprovider", "--tb=short"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": REPEATING}
    outputs = [day.out / f"tests-{i}.txt" for i in range(workers)]
    running = []
    for i, output in enumerate(outputs):
        with output.open("w") as file:
            own = [str(path.relative_to(CHECKOUT)) for path in files[i::workers]]
            how = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": CHECKOUT, "env": environment}
            running.append(subprocess.Popen(command + own, **how))
    deadline, late = time.monotonic() + day.seconds - 4, 0
    for process in running:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    text = "\n".join(output.read_text() for output in outputs)
    ended = {
        word: re.findall(rf"^(tests/.*) {word}\b.*%\]$", text, re.M)
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    day.say("tests", **{word.lower(): len(names) for word, names in ended.items()}, processes=workers, late=late)
    for name in ended["FAILED"] + ended["ERROR"]:
        day.say("failed", test=name)
    if ended["FAILED"] or ended["ERROR"] or not ended["PASSED"]:
        raise SystemExit(1)


# The same bits again.


def repeat(day: Day) -> None:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPEATING  # here alone: timed parts have the library's own choice
    for rows in (1, 5) if day.dry else (1, 4, 8, 16, 32, 64, 300, 2048):
        repeated_linear(day, rows, times=3 if day.dry else 200)
    model = decoder.ours(day.parts())
    decoder.randomise(model)
    batch = step.random_batch(day.parts(), *((2, 16) if day.dry else (8, 512))).to(day.device)
    parameters = adapter_parameters(model)
    for deterministic in (False, True):
        runs, clock = [], time.perf_counter()
        with repeating(SFTConfig(out="none", deterministic=deterministic), day.device):
            for _ in range(2 if day.dry else 6):
                cross_entropy(model, batch).loss.backward()
                runs.append([p.grad.clone() for p in parameters.values()])
                model.zero_grad(set_to_none=True)
            day.wait()
        differ = [name for i, name in enumerate(parameters) if any(not torch.equal(r[i], runs[0][i]) for r in runs)]
        how = {"tensors": len(parameters), "differ": len(differ), "which": differ[:3]}
        day.say("training", deterministic=deterministic, runs=len(runs), seconds=time.perf_counter() - clock, **how)


def repeated_linear(day: Day, rows: int, times: int) -> None:
    """A 4-bit linear with LoRA forward and backward, `times` over the same inputs."""
    shape = day.shape.projections()[2]
    weights = Weights.random(shape.N, shape.K, day.device, 1)
    layer = decoder.fourbit.AdapterLayer(
        base := weights.layer(0), default=decoder.fourbit.lora.lora.LoRA(base, 16, alpha=32.0)
    )
    layer.to(day.device)
    torch.nn.init.normal_(layer.adapters["default"].lora_B, std=0.05)
    x = day.setting.normal(rows, shape.K, seed=1).requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    grad = day.setting.normal(rows, shape.N, seed=2)

    def results() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y, wanted, grad)]

    first = results()
    wrong = sum(any(not torch.equal(a, b) for a, b in zip(first, results(), strict=True)) for _ in range(times))
    day.say("linear", rows=rows, times=times, differ=wrong)


# Speed.


def bench(day: Day) -> None:
    grid, argv = shapes.grid_for(day.device, True), ["--quick", "--only", BENCHED]
    if day.dry:
        grid = replace(grid, projections=TOY.projections()[1:2], rows=(3,), decoder=TOY, tokens=(16,), least_rounds=1)
        grid, argv = replace(grid, case_seconds=0.0), ["--only", "^(dequantize|linear) "]
    grid = replace(grid, seconds=day.seconds - 15)
    code = suite.main([*argv, "--device", day.device.type, "--out", str(day.out / "bench")], grid)
    for path in (day.out / "bench").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kinds = [line["kind"] for line in lines]
        day.say("file", path=str(path), figures=kinds.count("figure"), refused=kinds.count("refused"))
        for line in lines:
            if line["kind"] == "check" and line["status"] != "not run":
                day.say("level", **{key: line[key] for key in ("name", "status", "worst", "where") if key in line})
    if code:
        raise SystemExit(code)


def tuned(day: Day) -> None:
    """The line that belongs into the table goes into a copy of the table; the checkout stays as it is."""
    lines, table = day.out / "tune-lines.txt", CHECKOUT / "kernels" / "border.py"
    minutes = ["--minutes", str((day.seconds - 5) / 60 if not day.dry else 0.05)]
    with lines.open("w") as file, redirect_stdout(file):
        if day.dry:
            with force_path("triton"):
                code = tune.main(minutes, replace(shapes.CPU_QUICK, projections=TOY.projections()[1:2]), day.device)
        else:
            code = tune.main(minutes)
    *points, last = lines.read_text().splitlines()
    if code == 0:
        head, opening, rest = table.read_text().partition("BORDER: dict[str, int] = {")
        (day.out / "border.py").write_text(f"{head}{opening}\n{last}\n{rest.lstrip()}")
    day.say("border", points=len(points), line=last.strip(), complete=code == 0)


# By kernel.


def profiled(day: Day) -> None:
    parts, tokens = day.parts(), 32 if day.dry else 8192
    call = step.step(parts, tokens).variants[0].make()
    seconds = [day.milliseconds(lambda: call(0)) / 1e3 for _ in range(2 if day.dry else 4)]
    found: dict[str, Any] = {"layers": parts.layers, "tokens": tokens, "tokens_per_second": tokens / min(seconds)}
    if peak := clock_for(day.device).peak_bytes(call):
        found["peak_bytes"] = peak
    day.say("step", first_seconds=seconds[0], seconds=min(seconds), **found)
    by_kernel(day, "step by kernel", lambda: call(0))


def decode(day: Day) -> None:
    model = decoder.ours(day.parts())
    new = 3 if day.dry else 64
    for rows in (1, 2) if day.dry else (1, 8, 64):
        prompts = [[1 + i % 7, 2, 3 + i % 5] for i in range(rows)]
        answer = partial(generate, model, prompts, max_new_tokens=new, batch_size=rows)
        for graphs in (True, False):
            hook = None if graphs else model.lm_head.register_forward_hook(lambda *_: None)  # no replay would call it
            first, again = (day.milliseconds(answer) / 1e3 for _ in range(2))
            rate = {"first_tokens_per_second": rows * new / first, "tokens_per_second": rows * new / again}
            day.say("generate", rows=rows, graphs=graphs, new_tokens=new, layers=day.shape.layers, **rate)
            if hook:
                hook.remove()
    by_kernel(day, "8 tokens by kernel", partial(generate, model, [[1, 2, 3]], max_new_tokens=8))


def by_kernel(day: Day, what: str, call: Callable[[], object]) -> None:
    """Time by kernel (on a CPU: by op), the longest first; and what the host did: launches, and waits for the GPU."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not day.dry)
    with profile(activities=activities, acc_events=True) as taken:
        call()
        day.wait()
    events = taken.key_averages()
    name = "self_cpu_time_total" if day.dry else "self_device_time_total"
    on_device = [e for e in events if day.dry or "CUDA" in str(e.device_type)]
    total = sum(getattr(e, name) for e in on_device) / 1e3
    counts = {key: sum(e.count for e in events if key in e.key) for key in ("LaunchKernel", "Synchronize")}
    kernels = sum(e.count for e in on_device)
    day.say(f"{what}, all", ms=total, kernels=kernels, launches=counts["LaunchKernel"], waits=counts["Synchronize"])
    for event in sorted(on_device, key=lambda e: -getattr(e, name))[: 5 if day.dry else 40]:
        ms = getattr(event, name) / 1e3
        day.say(what, ms=ms, share=ms / total, times=event.count, kernel=event.key[:120])


RUN = dict(zip(PARTS, (probe, tests, repeat, bench, tuned, profiled, decode), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_parts", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("part", choices=RUN)
    parser.add_argument("out", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(argv)
    RUN[options.part](Day(options.part, options.out, options.seconds, options.dry))


if __name__ == "__main__":
    main()
