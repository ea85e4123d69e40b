"""What a process of the command line keeps of memory that was freed."""

import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fourbit.trainer.metrics import read_metrics

CHECKOUT = Path(__file__).parents[2]
HOLES = """
import sys
from fourbit.cli.main import main
from fourbit.kernels.dispatch import proc_bytes


def kept():  # of 20 blocks of 16 MiB between smaller ones that stay, when they are freed
    blocks = [bytearray(size) for _ in range(20) for size in (16 << 20, 1 << 16)]
    before = proc_bytes("/proc/self/status", "RssAnon")
    del blocks[::2]
    return before - proc_bytes("/proc/self/status", "RssAnon")


bytearray(31 << 20)  # from now on glibc puts blocks of up to 31 MiB into its heap
main(["--version"])
print(kept())
sys.argv = ["fourbit", "--version"]
main()
print(kept())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_go_back_to_the_system_where_the_process_is_the_command_lines() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", HOLES], capture_output=True, text=True, check=True)
    hosted, own = map(int, done.stdout.splitlines()[1::2])  # behind each version
    assert hosted < 64 << 20, "a library's host has its allocator changed"
    assert own == pytest.approx(320 << 20, rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_text_of_8192_tokens_trains_in_less_than_3_gib(smollm2: Path) -> None:
    """QLoRA of SmolLM2-135M, forward, backward and update, beside what imports take; measured in its own process."""
    command = [sys.executable, "-m", "benchmarks.long_context", str(smollm2), "--tokens", "8192", "--length", "0"]
    command += ["--layers", "30", "--rounds", "0"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    (step,) = json.loads(done.stdout.splitlines()[-1])["steps"]
    assert step["tokens"] == 8192 and step["peak_bytes"] < 3 << 30, step


@pytest.mark.slow
def test_a_thousand_bf16_steps_of_rows_of_all_lengths_keep_their_memory(tiny_folder: Path, tmp_path: Path) -> None:
    """RssAnon of the command line's own process, as its metrics tell it: within 3% of step 100's."""
    draw, rows, run = random.Random(0), tmp_path / "rows.jsonl", tmp_path / "run"
    text = lambda most: "".join(draw.choices("abcdefgh", k=draw.randint(1, most)))
    rows.write_text("\n".join(json.dumps({"prompt": text(150), "completion": text(60)}) for _ in range(2000)))
    command = [sys.executable, "-P", "-m", "fourbit", "sft", "--model", str(tiny_folder), "--data", str(rows)]
    command += ["--out", str(run), *["--dtype", "bfloat16", "--batch-size", "2", "--epochs", "1", "--rank", "4"]]
    subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    used = [line["rss_anon"] for line in read_metrics(run / "metrics.jsonl") if "rss_anon" in line]
    assert len(used) == 1000 and max(used[100:]) < 1.03 * max(used[:100]), [size >> 20 for size in used[::50]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_steps_of_reinforcement_keep_their_memory_and_their_files(tiny_folder: Path, tmp_path: Path) -> None:
    """RssAnon as above, of rounds that a function of a file judges; there are as many checkpoints as --keep says, and a
    file of samples for each evaluation."""
    draw, rows, run = random.Random(0), tmp_path / "rows.jsonl", tmp_path / "run"
    asked = ["".join(draw.choices("abcd", k=1 + i % 60)) for i in range(200)]
    rows.write_text("\n".join(json.dumps({"prompt": text}) for text in asked))
    (tmp_path / "score.py").write_text("def score(prompt, answer, row): return len(set(answer)) / 9")
    command = [sys.executable, "-P", "-m", "fourbit", "rl", "--model", str(tiny_folder), "--data", str(rows)]
    command += ["--out", str(run), "--reward", f"{tmp_path}/score.py:score", "--val", "5%"]
    command += shlex.split("--steps 1000 --updates 2 --rollouts-ahead 2 --batch-size 1 --group-size 4 --rank 4")
    command += shlex.split("--kl 0.1 --max-new-tokens 8 --dtype float32 --eval-every 100 --save-every 50 --keep 3")
    subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    used = [line["rss_anon"] for line in read_metrics(run / "metrics.jsonl") if "rss_anon" in line]
    assert len(used) == 1000 and max(used[100:]) < 1.03 * max(used[:100]), [size >> 20 for size in used[::50]]
    kept, shown = ([path.name for path in sorted((run / name).iterdir())] for name in ("checkpoints", "samples"))
    assert kept == ["latest", "step-000900", "step-000950", "step-001000"]
    assert shown == [f"step-{step:06d}.jsonl" for step in range(100, 1001, 100)]
    print(f"RssAnon in MiB, every 100 steps: {[size >> 20 for size in used[99::100]]}")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_trimming_gives_back_what_lies_between() -> None:
    """A block at the end of the heap keeps glibc from shrinking it."""
    code = """
import torch
from fourbit.kernels.dispatch import proc_bytes, trim_heap
here = lambda: proc_bytes("/proc/self/status", "RssAnon")
blocks = [torch.ones(8 << 10) for _ in range(2000)]  # of 32 KiB
last, full = torch.ones(8 << 10), here()
del blocks
held = here()
trim_heap()
print(held > full - (8 << 20), here() < full - (48 << 20))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
