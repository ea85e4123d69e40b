"""Graphs of LoRA over NF4: torch.export with a dynamic batch, AOTInductor, derivatives under torch.compile."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA

Batch = torch.export.Dim("batch", min=2, max=64)


def layer(n_in: int, n_out: int) -> AdapterLayer:
    linear = nn.Linear(n_in, n_out)
    base = NF4Linear.from_weight(linear.weight.detach(), linear.bias.detach())
    made = AdapterLayer(base.requires_grad_(False), default=LoRA(base, 4, 8))
    nn.init.normal_(made.adapters["default"].lora_B, std=0.3)
    return made


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer(64, 24), nn.GELU(), layer(24, 8))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("one", [True, False])
def test_export_with_a_dynamic_batch(model: nn.Sequential, one: bool, strict: bool) -> None:
    net = model[:1] if one else model
    exported = torch.export.export(net, (torch.randn(5, 64),), dynamic_shapes=({0: Batch},), strict=strict)
    for rows in (2, 7, 64):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(exported.module()(x), net(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_aot_inductor_runs_it(model: nn.Module, tmp_path: Path) -> None:
    exported = torch.export.export(model.eval(), (torch.randn(5, 64),), dynamic_shapes=({0: Batch},))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for rows in (2, 7):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(loaded(x), model(x))


def test_a_compiled_gradient(model: nn.Module) -> None:
    """torch.func.grad inside torch.compile, one graph."""
    x = torch.randn(3, 64)
    gradient = lambda x: torch.func.grad(lambda x: model(x).square().sum())(x)
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager", fullgraph=True)(x), gradient(x))


def second_order(run: nn.Module, x: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    gradients = torch.autograd.grad(run(x).square().sum(), parameters, create_graph=True)
    # what is right at first order alone would add to it in silence
    return torch.autograd.grad(sum(g.square().sum() for g in gradients) + parameters[0].sum(), parameters)


def test_no_graph_gives_first_order_in_silence(model: nn.Module) -> None:
    """Run as it was captured a graph has the right second order; one that was cut in forward and backward raises."""
    x, parameters = torch.randn(3, 64), [p for p in model.parameters() if p.requires_grad]
    want = second_order(model, x, parameters)
    got = second_order(torch.compile(model, backend="eager", fullgraph=True), x, parameters)
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second_order(torch.compile(model, backend="aot_eager"), x, parameters)
