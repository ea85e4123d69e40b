"""Several processes: DDP, FSDP2 and tensor parallel with our optimizers and 4-bit layers, two processes on gloo.

The processes are started once, run all of distributed_worker.py, and write down what they found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")
BOUND = 1e-6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank: check -> what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-P", str(WORKER)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=500)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(error[-3000:] for error in errors)
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("check", ["ddp", "fsdp", "replicas"])
def test_two_processes_are_one(found: list[dict[str, Any]], check: str) -> None:
    """Weights after four clipped steps, dense and LoRA over NF4, AdamW and Lion; and the norms of gradients."""
    for rank in found:
        for name, difference in rank[check].items():
            assert difference <= BOUND, f"{check}: {name}"


def test_tensor_parallel_is_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert max(rank["tensor_parallel"].values()) <= 1e-12  # in fp64


def test_scales_stay_whole_under_mixed_precision(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["precision"]["last"] < rank["precision"]["first"]


def test_checkpoints_of_torch_hold_the_optimizer(found: list[dict[str, Any]]) -> None:
    """32 and 8 bits, dense and LoRA over NF4: resumed is uninterrupted, and a state dict goes round, to the bit."""
    for rank in found:
        for name, result in rank["checkpoint"].items():
            bound = BOUND if "one process" in name else 0.0
            assert result is True or (type(result) is float and result <= bound), name


def test_state_that_is_cut_otherwise_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for bits, message in rank["other_ranks"].items():
            assert "the saved state of parameter 0" in message and "shape (65, 64), not" in message, bits


def test_8_bit_states_of_shards(found: list[dict[str, Any]]) -> None:
    """Blocks end where a shard does, so numbers differ from one process's by the rounding of states, no more."""
    for rank in found:
        check = rank["eight_bits"]
        assert check["losses"] == pytest.approx(check["theirs"], rel=0.1)
        assert check["shapes"]["exp_avg"] == [65, 64] and check["shapes"]["exp_avg_absmax"] == [2, 9]


def test_paged_is_unpaged(found: list[dict[str, Any]]) -> None:
    assert all(rank["paged"] == {"distance": 0.0, "shards": True} for rank in found)


def test_one_ranks_bad_gradient_skips_the_step_on_all(found: list[dict[str, Any]]) -> None:
    assert all(rank["not_finite"] == {"skipped": 1.0, "same": True, "scale": 2.0**15} for rank in found)


def test_an_adapter_saved_by_all_ranks_is_one_processs(found: list[dict[str, Any]]) -> None:
    assert all(all(rank["save"].values()) for rank in found)
