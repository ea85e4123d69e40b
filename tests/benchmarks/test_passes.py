"""What a step moves beside its products: the counter itself, and what an 8B layer is held to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.passes import Count, Moved, counting
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.launch import launch
from fourbit.kernels.swiglu import swiglu

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def counted() -> dict[str, Count]:
    """As the command prints it, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.passes", "--json"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert "passes, both ways" in done.stdout
    counts = dict[str, Count]()
    for name, ways in json.loads(done.stdout.splitlines()[-1]).items():
        counts[name] = Count({(way, op): Moved(**m) for way, ops in ways.items() for op, m in ops.items()})
    return counts


def test_an_8b_layer_stays_within_its_launches_and_bytes(counted: dict[str, Count]) -> None:
    total = counted["layer"].total()
    assert total.launches <= 82 and total.bytes <= 7.14e9, total


def test_products_and_attention_are_counted_apart(counted: dict[str, Count]) -> None:
    """Seven frozen products each way, of known sizes, and attention's queries, keys, values and output."""
    ops, wide, inner, keys = counted["layer"].ops, 8192 * 4096 * 2, 8192 * 14336 * 2, 8192 * 1024 * 2
    weights = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    read, written = 4 * wide + 2 * wide + inner, 2 * wide + 2 * keys + 2 * inner + wide
    for way, added in (("forward", written), ("backward", 6 * wide)):  # the sums that products add to
        products = ops[way, "products"]
        assert products.launches == 7
        assert products.bytes == pytest.approx(weights + read + written + added, rel=0.05), way
    assert ops["forward", "attention"].bytes == pytest.approx(2 * wide + 2 * keys, rel=0.01)
    assert counted["layer"].total().bytes < counted["layer"].total(passes=False).bytes - 4e9


def test_a_step_is_its_layers_the_head_and_what_happens_once(counted: dict[str, Count]) -> None:
    step, layer, head = (counted[name].total().bytes for name in ("step", "layer", "head"))
    assert 32 * layer + head == pytest.approx(step, rel=0.01)


def test_the_loss_reads_its_logits_twice_and_writes_them_once(counted: dict[str, Count]) -> None:
    """Not more than one launch a chunk, and little else beside."""
    kernel, logits = counted["head"].ops["forward", "token_scores"], 8192 * 128256 * 2
    assert kernel.launches == 8 and kernel.bytes == pytest.approx(2 * logits, rel=0.01)  # the second read is in cache
    assert counted["head"].total().bytes < 2.4 * logits


def test_a_launch_on_fake_tensors_is_heard_with_what_it_reads_and_writes() -> None:
    with counting(16, 64) as counter:
        gate, up = (torch.empty(64, 32, device="meta", requires_grad=True) for _ in range(2))
        y = swiglu(gate, up)
        counter.way = "backward"
        y.backward(torch.empty_like(y))
    ops, one = counter.count.ops, 64 * 32 * 4
    assert (ops["forward", "swiglu_forward"].launches, ops["forward", "swiglu_forward"].bytes) == (1, 3 * one)
    assert (ops["backward", "swiglu_backward"].launches, ops["backward", "swiglu_backward"].bytes) == (1, 5 * one)
    assert sum(moved.launches for moved in ops.values()) == 2  # views and fresh memory are none


def test_torchs_ops_count_what_they_overwrite_twice_and_views_not_at_all() -> None:
    with counting(16, 64) as counter:
        x, y = torch.empty(8, 8, device="meta"), torch.empty(8, 8, device="meta")
        x.T[:4].view(2, 2, 8)
        x.mul_(y)
        torch.mm(x, y, out=y)
        x.copy_(y)
        (x + y).zero_()
    bytes_ = {op: moved.bytes // 256 for (_, op), moved in counter.count.ops.items()}
    assert bytes_ == {"mul": 3, "lora: s B, grad_s A": 3, "copy": 2, "add": 3, "zero": 1}


def test_a_graph_traced_with_fake_tensors_does_not_run_without_the_kernel() -> None:
    with pytest.raises(NotImplementedError):
        torch.ops.fourbit.launched("swiglu_forward_kernel", [torch.ones(3)])


def test_real_tensors_are_launched_with() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]):  # type: ignore[no-untyped-def]
            return lambda *args, **options: seen.append((grid, args, options))

    seen = list[object]()
    x = torch.ones(3)
    with force_path("triton"):
        launch(Kernel(), (2,))(None, x, 5, num_warps=4)
    assert seen == [((2,), (None, x, 5), {"num_warps": 4})] and isinstance(x, Tensor)
