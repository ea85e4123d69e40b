"""The image of a rented GPU lacks packages that tests import: those tests are skipped, with the reason; others run."""

import subprocess
import sys
from pathlib import Path

TESTS = (
    "tests/models/test_gguf.py",  # gguf at the top of the file
    "tests/optim/test_schedule.py",  # hypothesis for some of its tests
    "tests/kernels/test_linear_divergence.py",  # trl inside a test
    "tests/lora/test_sharding.py",  # a time limit of its own
)
FEW = "not torchs and not transformers and (test_schedule or gkd_loss)"


def test_what_is_not_there_skips_and_everything_else_runs() -> None:
    command = [sys.executable, "-P", "tests/gpu_image.py", "-q", "-p", "no:cacheprovider", "-k", FEW, *TESTS]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert {"needs gguf", "needs hypothesis", "needs trl"} <= set(done.stdout.replace(": ", "\n").splitlines())
    assert " passed" in done.stdout
