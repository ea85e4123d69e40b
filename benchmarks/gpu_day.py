"""The first minutes on a GPU, as one script: `python -m benchmarks.gpu_day --out DIR [--parts A,B] [--seconds 555]`.

Each part is a process with a time limit of its own, and what one leaves of it the later ones may use. A part writes its
lines to DIR/results.jsonl as it finds them and what it prints to DIR/PART.txt; one that fails or runs out of time stops
no other. At the end comes a summary, also in DIR/summary.txt; docs/gpu-day.md says what to make of it. `--dry` runs the
parts in small form on the CPU. The process that starts them uses no GPU. No setting of the card is changed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import CHECKOUT

Line = dict[str, Any]
SECONDS = 555.0
PARTS = {  # seconds of each, in order
    "probe": 40.0,  # the machine, and which attention it chooses at which cost
    "tests": 150.0,
    "repeat": 25.0,  # the same bits again
    "bench": 160.0,
    "tune": 100.0,
    "profile": 45.0,  # one training step, by kernel, and its memory
    "decode": 35.0,  # tokens a second, and a token by kernel
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 if a part failed or ran out of time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, made if it is not there")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all of it (default {SECONDS:g})")
    parser.add_argument("--dry", action="store_true", help="every part in small form, on the CPU")
    options = parser.parse_args(argv)
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    out = options.out.resolve()
    linked(out)
    deadline, bad = time.monotonic() + options.seconds, 0
    for i, name in enumerate(names):
        left = deadline - time.monotonic() - 1
        limit = left * PARTS[name] / sum(PARTS[other] for other in names[i:])
        argv = command(name, out, limit, options.dry)
        ended, seconds = run(argv, environment(out, options.dry), out / f"{name}.txt", limit)
        bad += ended != "ok"
        keep(out, {"part": name, "what": "ended", "how": ended, "seconds": round(seconds, 1), "limit": round(limit, 1)})
        print(f"{name}: {ended} after {seconds:.0f} s of {limit:.0f}", flush=True)
    text = summary(read(out))
    (out / "summary.txt").write_text(text)
    print(f"\n{text}\nwrote {out}")
    return 1 if bad else 0


def linked(out: Path) -> None:
    """A folder for PYTHONPATH in which the checkout is the package fourbit, whether it is installed or not."""
    (out / "path").mkdir(parents=True, exist_ok=True)
    link = out / "path" / "fourbit"
    link.unlink(missing_ok=True)
    link.symlink_to(CHECKOUT)


def command(name: str, out: Path, limit: float, dry: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_parts", name, str(out), str(limit), *["--dry"] * dry]


def environment(out: Path, dry: bool) -> dict[str, str]:
    path = os.pathsep.join([str(out / "path"), *filter(None, [os.environ.get("PYTHONPATH")])])
    small = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | {"PYTHONPATH": path} | (small if dry else {})


def run(argv: Sequence[str], variables: Mapping[str, str], text: Path, limit: float) -> tuple[str, float]:
    """(how it ended, seconds) of a process whose output goes to `text`. Past the limit all that it started is ended."""
    start = time.monotonic()
    with text.open("a") as file:
        process = subprocess.Popen(
            argv,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            code = process.wait(max(limit, 0))
            ended = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        with suppress(ProcessLookupError):  # its children outlive one that failed, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return ended, time.monotonic() - start


def keep(out: Path, line: Line) -> None:
    with (out / "results.jsonl").open("a") as file:
        print(json.dumps(line), file=file, flush=True)


def read(out: Path) -> list[Line]:
    """The lines of a day; one that was cut off when its part was ended is left out."""
    found = []
    for line in (out / "results.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summary(lines: Sequence[Line]) -> str:
    """Every line but the kernels of profiles beyond the first ten, by part."""
    shown = []
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        ended = [line for line in own if line["what"] == "ended"]
        shown.append(f"== {part}: {', '.join(line['how'] for line in ended) or 'did not end'}")
        for what in dict.fromkeys(line["what"] for line in own if line["what"] != "ended"):
            some = [line for line in own if line["what"] == what]
            shown += [f"  {what}: {fields(line)}" for line in some[:10]]
            shown += [f"  {what}: {len(some) - 10} more in results.jsonl"] * (len(some) > 10)
    return "\n".join(shown) + "\n"


def fields(line: Line) -> str:
    texts = {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in line.items() if k not in ("part", "what")}
    return ", ".join(f"{key} {value}" for key, value in texts.items())


if __name__ == "__main__":
    sys.exit(main())
