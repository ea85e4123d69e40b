"""A small run of `benchmarks.load_memory`: loading into 4 bits holds about one dense tensor beside the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: reads /proc/self/status")
def test_peak_is_the_model_and_about_one_tensor() -> None:
    command = [sys.executable, "-m", "benchmarks.load_memory", "--megabytes", "150"]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert 140e6 < result["checkpoint_bytes"] < 160e6
    # 40 MB for the allocator and the code tables; the whole checkpoint would be 150 MB, one fp32 copy 66
    assert result["peak_bytes"] < result["model_bytes"] + result["largest_tensor_bytes"] + 40e6, run.stdout
