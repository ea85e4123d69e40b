"""What only a GPU can show: CUDA graphs, side streams, second devices, deterministic mode, memory, no synchronisation.

The numbers of every kernel are tested elsewhere, on the CPU in Triton's interpreter or compiled where there is a GPU.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn

import fourbit
from fourbit.kernels.attention import causal_attention
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA
from fourbit.trainer.config import SFTConfig
from fourbit.trainer.resume import repeating

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROWS = (1, 16, 300, 2048)


def layer(rank: int = 16, *, dropout: float = 0.0, device: str = "cuda") -> AdapterLayer:
    """1024 -> 1536 outputs, 4-bit with double quantisation, B not zero."""
    torch.manual_seed(0)
    base = NF4Linear.from_weight(torch.randn(1536, 1024) / 32, torch.randn(1536))
    made = AdapterLayer(base, default=LoRA(base, rank, alpha=2.0 * rank, dropout=dropout))
    nn.init.normal_(made.adapters["default"].lora_B, std=0.02)
    return made.to(device)


def step(made: AdapterLayer, x: Tensor) -> Tensor:
    """One forward and backward; the gradients land in x, lora_A and lora_B."""
    y: Tensor = made(x)
    y.square().mean().backward()
    return y.detach()


def gradients(made: AdapterLayer, x: Tensor) -> dict[str, Tensor]:
    part = made.adapters["default"]
    return {"x": x.grad, "A": part.lora_A.grad, "B": part.lora_B.grad}


def example(rows: int, device: str = "cuda") -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 1024, generator=generator).to(device, torch.bfloat16).requires_grad_()


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """torch raises where an operation would make the CPU wait for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it a prototype, once
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rows", ROWS)
def test_a_training_step_never_waits_for_the_gpu(rows: int, dropout: float) -> None:
    made, x = layer(dropout=dropout), example(rows)
    step(made, x)  # kernels compile and tables are made
    with no_synchronisation():
        step(made, x)


@pytest.mark.parametrize("rows", ROWS)
def test_a_training_step_is_captured_in_a_cuda_graph(rows: int) -> None:
    made, x = layer(), example(rows)
    want = step(made, x)
    expected = {name: grad.clone() for name, grad in gradients(made, x).items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(made, x)
    torch.cuda.current_stream().wait_stream(side)
    made.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(made, x)
    for _ in range(3):  # counters must be left as they were found
        for grad in gradients(made, x).values():
            grad.zero_()
        graph.replay()
        assert torch.equal(y, want)
        for name, grad in gradients(made, x).items():
            assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("rows", ROWS)
def test_two_runs_give_the_same_bits_also_in_deterministic_mode(rows: int) -> None:
    results = []
    for deterministic in (False, False, True):
        made, x = layer(dropout=0.1), example(rows)
        torch.use_deterministic_algorithms(deterministic)
        try:
            torch.manual_seed(1)
            results.append((step(made, x), *gradients(made, x).values()))
        finally:
            torch.use_deterministic_algorithms(False)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("lengths", [(512,), (7, 130, 64, 311)], ids=["one row", "packed"])
def test_training_with_attention_repeats_in_deterministic_mode(lengths: tuple[int, ...]) -> None:
    """Which cuDNN and the backward of flash attention by default do not promise."""
    shapes = [(1, sum(lengths), heads, 64) for heads in (8, 2, 2, 8)]
    ends = list(accumulate(lengths))
    spans = list(zip([0, *ends], ends, strict=False)) if len(lengths) > 1 else None
    results = []
    with repeating(SFTConfig(out="o", deterministic=True), torch.device("cuda")):
        for _ in range(5):
            generator = torch.Generator().manual_seed(0)
            q, k, v, grad = (torch.randn(shape, generator=generator).cuda().bfloat16() for shape in shapes)
            inputs = [x.requires_grad_() for x in (q, k, v)]
            y = causal_attention(*inputs, spans=spans)
            results.append((y, *torch.autograd.grad(y, inputs, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rows", [1, 9, 32])
def test_the_product_for_few_rows_repeats(rows: int) -> None:
    """Two hundred times: a fence that is missing between copies and matrix units would show now and then."""
    base, x = layer().base, example(rows).detach()
    want = base(x)
    assert all(torch.equal(base(x), want) for _ in range(200))


@pytest.mark.parametrize("rows", ROWS)
def test_streams_side_by_side_do_not_disturb_each_other(rows: int) -> None:
    made = [layer(), layer()]
    inputs = [example(rows), example(rows)]
    want = step(copy.deepcopy(made[0]), example(rows))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results: list[Tensor] = []
    for _ in range(20):
        for stream, m, x in zip(streams, made, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(m, x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, want) for y in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("rows", ROWS)
def test_a_device_that_is_not_the_current_one(rows: int) -> None:
    here, there = layer(), layer(device="cuda:1")
    assert torch.equal(step(here, example(rows)).cpu(), step(there, example(rows, "cuda:1")).cpu())


def peak_above(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def test_frozen_forward_needs_one_workspace_and_nothing_else() -> None:
    """Beyond y: the decoded weight, or less."""
    base, x = layer().base, example(2048).detach()
    base(x)
    assert peak_above(lambda: base(x)) <= 2 * 1536 * 1024 + 2 * 2048 * 1536 + (1 << 20)


def test_a_whole_model_trains_as_on_the_cpu() -> None:
    """A tiny transformer of plain linears: losses of five steps agree with the CPU's in fp32."""
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        fourbit.quantize_(model)
        fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8, target="all-linear"))
        model.to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(device)
        losses[device] = []
        for _ in range(5):
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[device].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)
