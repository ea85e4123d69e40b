"""Linears of one input together: what they compute, which of them share an op, and that it compiles to one graph."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_compiler
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from fourbit.kernels import linear4bit, lora_paths
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA
from fourbit.lora.project import project

WIDE = {"rtol": 1e-5, "atol": 1e-5}


def layer(rows: int, *, quantised: bool = True, bias: bool = False, seed: int = 0, **options: object) -> AdapterLayer:
    torch.manual_seed(seed)
    dense = nn.Linear(64, rows, bias=bias)
    format_ = {name: options.pop(name) for name in ("blocksize", "double_quant") if name in options}
    base = NF4Linear.from_weight(dense.weight.detach(), dense.bias, **format_) if quantised else dense
    part = LoRA(base, 4, 8, **options)
    nn.init.normal_(part.lora_B)
    return AdapterLayer(base, default=part)


def count_ops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many linears each call of the joint forward serves."""
    served: list[int] = []
    original = linear4bit._forward

    def counted(x: Tensor, group: Any, keep: bool) -> Any:
        served.extend([len(group.A)] if group.A else [])
        return original(x, group, keep)

    monkeypatch.setattr(linear4bit, "_forward", counted)
    return served


def gradients(modules: Sequence[nn.Module], x: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(sum((y * y).sum() for y in outputs), [x, *parameters]))


def test_it_equals_calling_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any mix: adapters over 4-bit and dense bases, with and without bias, switched off, plain linears, repetition."""
    off = layer(24, seed=3)
    off.active = {}
    modules = [layer(40), layer(24, quantised=False), off, layer(16, bias=True, seed=4), nn.Linear(64, 8)]
    modules.append(modules[0])
    x = torch.randn(3, 5, 64, requires_grad=True)
    served = count_ops(monkeypatch)
    outputs = project(x, modules)
    assert served == [3]
    each = [module(x) for module in modules]
    for got, want in zip(outputs, each, strict=True):
        torch.testing.assert_close(got, want, **WIDE)
    trained = [module for module in modules[:-1] if module is not off]
    for got, want in zip(gradients(trained, x, outputs), gradients(trained, x, each), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("other", [{"blocksize": 128}, {"double_quant": False}, {"dropout": 0.5}])
def test_only_what_agrees_shares_an_op(other: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    served = count_ops(monkeypatch)
    modules = [layer(40), layer(24, seed=1, **other), layer(8, seed=2)]
    project(torch.randn(2, 64), modules)
    assert served == [2, 1]
    if "dropout" in other:  # which does not count in evaluation
        project(torch.randn(2, 64), [module.eval() for module in modules])
        assert served == [2, 1, 3]


def test_modules_with_hooks_and_subclasses_are_called() -> None:
    class Doubled(AdapterLayer):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x, hooked, on_base = torch.randn(2, 64), layer(40), layer(24)
    seen: list[str] = []
    hooked.register_forward_hook(lambda *_: seen.append("hooked"))
    on_base.base.register_forward_hook(lambda *_: seen.append("base"))
    single = layer(8)
    doubled = Doubled(single.base, default=single.adapters["default"])
    outputs = project(x, [hooked, on_base, doubled])
    assert seen == ["hooked", "base"]
    for got, module in zip(outputs, (hooked, on_base, doubled), strict=True):
        torch.testing.assert_close(got, module(x), **WIDE)


def test_a_group_shares_one_mask() -> None:
    """With A alike, the updates differ by B alone, also under dropout; called each on its own they would not."""
    one, two = layer(16, dropout=0.5), layer(16, dropout=0.5, seed=1)
    two.base = one.base
    two.load_state_dict(one.state_dict())
    x = torch.randn(7, 64)
    first, second = project(x, [one, two])
    assert torch.equal(first, second)
    assert not torch.equal(one(x), two(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_graph_without_a_break(dropout: float, autocast: bool) -> None:
    """Forward and backward are one op each under torch.compile, and the numbers are eager mode's."""
    modules = nn.ModuleList([layer(40, dropout=dropout), layer(24, bias=True, dropout=dropout)])
    x = torch.randn(3, 5, 64, requires_grad=True)
    nodes: list[str] = []

    def watch(graph: torch.fx.GraphModule, _: object) -> object:
        nodes.extend(str(node.target) for node in graph.graph.nodes if "linears4bit" in str(node.target))
        return graph

    backend = aot_autograd(fw_compiler=make_boxed_compiler(watch))
    results = []
    for run in (project, torch.compile(project, fullgraph=True, backend=backend)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = run(x, modules)
        results.append([*outputs, *gradients(modules, x, outputs)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
    assert nodes == ["fourbit.linears4bit.default", "fourbit.linears4bit_backward.default"]


@pytest.mark.parametrize("quantised", [False, True])
def test_a_single_layer_compiles_too(quantised: bool) -> None:
    made = layer(40, quantised=quantised)
    x = torch.randn(5, 64, requires_grad=True)
    results = []
    for run in (made, torch.compile(made, fullgraph=True, backend="aot_eager")):
        y = run(x)
        results.append([y, *gradients([made], x, [y])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("keep", "decoded"), [(False, 6), (True, 4)])
def test_under_checkpointing_keep_saves_the_decoding_of_backward(
    keep: bool, decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two weights, decoded by the first forward pass, by the second and, without keep, by backward."""
    made: list[int] = []
    for name in ("slabs", "dequantize"):
        original = getattr(lora_paths, name)
        monkeypatch.setattr(lora_paths, name, lambda *a, original=original: (made.append(1), original(*a))[1])
    modules = [layer(40, dropout=0.2), layer(24, seed=1, dropout=0.2)]
    x = torch.randn(5, 64, requires_grad=True)
    torch.manual_seed(0)
    want = gradients(modules, x, project(x, modules))
    made.clear()
    torch.manual_seed(0)
    outputs = checkpoint(lambda x: project(x, modules, keep=keep), x, use_reentrant=False)
    got = gradients(modules, x, outputs)
    assert len(made) == decoded
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, **WIDE)
