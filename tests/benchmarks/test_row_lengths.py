"""Memory does not grow with the number of different row lengths, and would without the buckets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def growth(*flags: str) -> float:
    """MiB from step 30 to step 60."""
    command = [sys.executable, "-m", "benchmarks.row_lengths", "--simulate", "--steps", "60", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    course = json.loads(done.stdout.splitlines()[-1])["mib"]
    return float(course["60"] - course["30"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat() -> None:
    assert growth() < 10 < growth("--as-they-are")
