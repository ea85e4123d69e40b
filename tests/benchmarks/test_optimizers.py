"""The benchmark of optimizers: what it trains, that its gate lets the right step pass alone, and what it counts."""

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import optimizers, shapes
from benchmarks.cases import Setting
from benchmarks.optimizers import SETTINGS, Race, Trained
from benchmarks.peers import bnb

TOY = Trained("toy", "adapter", 4, torch.float32, ((4, 600), (70, 4), (3,), (1,)))
CPU = torch.device("cpu")


def test_what_is_trained() -> None:
    small, large = optimizers.adapter(shapes.LLAMA_8B, 16), optimizers.adapter(shapes.LLAMA_70B, 64)
    assert len(small.shapes) == 448 and small.size == 41_943_040
    assert large.size == 828_375_040
    assert optimizers.full(shapes.LLAMA_1B).size == 1_235_814_400  # as its model card says: 1.24 B


def gate(make: Any, trained: Trained = TOY, *, bits: int = 32, clipped: bool = False) -> float:
    variant = Race(trained, CPU, clipped, bits).variant("peer", make)
    return variant.judge(variant.make()(0))


def test_the_gate_passes_adamw_and_no_other() -> None:
    adamw = torch.optim.AdamW
    assert 0 < gate(lambda p: adamw(p, **SETTINGS)) <= 1
    assert 0 < gate(lambda p: adamw(p, **SETTINGS), clipped=True) <= 1
    assert gate(lambda p: adamw(p, **SETTINGS | {"weight_decay": 0.101})) > 1
    assert gate(lambda p: adamw(p, **SETTINGS | {"betas": (0.9, 0.9991)})) > 1
    assert gate(lambda p: adamw(p, **SETTINGS | {"eps": 1e-5})) > 1
    assert gate(lambda p: torch.optim.Adam(p, **SETTINGS)) > 1


def test_the_gate_of_8_bits_passes_no_other_either() -> None:
    adamw = torch.optim.AdamW
    assert gate(lambda p: adamw(p, **SETTINGS), bits=8) < 0.01
    assert gate(lambda p: adamw(p, **SETTINGS | {"weight_decay": 0.0}), bits=8) > 1
    assert gate(lambda p: adamw(p, **SETTINGS | {"betas": (0.5, 0.999)}), bits=8) > 1
    assert gate(lambda p: adamw(p, **SETTINGS | {"lr": 1.06e-3}), bits=8) > 1
    assert gate(lambda p: torch.optim.SGD(p, 1e-3), bits=8) > 1


def test_ours_passes_its_gates_paged_too(setting: Setting) -> None:
    trained = Trained("toy", "adapter", 16, torch.float32, ((64, 4096), (1024, 16), (5,)))
    works = [optimizers.step(op, trained, setting) for op in (optimizers.ADAMW, optimizers.EIGHT_BIT)]
    works += [optimizers.step(optimizers.ADAMW, trained, setting, clipped=True), optimizers.paged(trained, setting)]
    own = [variant for work in works for variant in work.variants if variant.own]
    assert len(own) == 4
    assert len(works[-1].variants) == 2  # ours and its copies: nobody's managed memory
    for variant in own:
        call = variant.make()
        assert variant.judge(call(0)) <= 1
        told = variant.facts(call)
        paged = variant is own[-1]
        assert (told["state_bytes_on_host"] > 0) == paged
        assert told["state_bytes"] <= 8 * trained.size * (0.25 if paged else 1) + 4 * 1024


def test_the_gate_in_bf16_allows_rounding_only() -> None:
    trained = Trained("toy", "full", 0, torch.bfloat16, TOY.shapes)
    assert 0.1 < gate(lambda p: torch.optim.AdamW(p, **SETTINGS), trained) <= 1
    assert gate(lambda p: torch.optim.SGD(p, 1e-3), trained) > 1


def test_a_weight_that_is_not_a_number_fails() -> None:
    truth = optimizers.Truth(TOY, CPU, False)
    given = [after.clone() for _, after in truth.weights()]
    given[1][3, 2] = float("nan")
    assert truth.by_element(given) == truth.by_norm(given) == float("inf")


def test_state_is_counted_once() -> None:
    parameters = TOY.parameters(CPU)
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizers.state_bytes(optimizer) == {"state_bytes": 8 * TOY.size + 4 * len(parameters)}


def test_state_of_bitsandbytes_is_counted() -> None:
    pytest.importorskip("bitsandbytes")
    parameters = [nn.Parameter(torch.ones(16, 512))]
    optimizer = bnb.adamw(parameters, bits=8)
    parameters[0].grad = torch.ones(16, 512)
    optimizer.step()
    maps = 2 * 256 * 4
    assert optimizers.state_bytes(optimizer) == {"state_bytes": 2 * (8192 + 32 * 4) + maps}


def test_calls_are_counted_where_the_work_is() -> None:
    events = [
        ("cudaLaunchKernel", 1.0, 2.0),
        ("the work", 5.0, 20.0),
        ("aten::add", 6.0, 7.0),
        ("cudaLaunchKernel", 6.5, 6.6),
        ("cuLaunchKernelEx", 8.0, 8.1),
        ("cudaStreamSynchronize", 9.0, 12.0),
        ("cudaDeviceSynchronize", 21.0, 22.0),
    ]
    assert optimizers.count_calls(events, "the work") == {"launches": 2, "waits": 1}
