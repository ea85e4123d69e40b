"""What is written into between forward and backward is an error; never the gradient of other numbers in silence."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import fourbit
from fourbit.lora.layer import AdapterLayer, adapter_parameters
from fourbit.lora.linear4bit import NF4Linear, NF4LowRank
from fourbit.lora.lora import LoRA, LoRAParameter
from fourbit.lora.parameter4bit import NF4Parameter
from fourbit.lora.project import project, project_gated

WRITTEN = "modified (by an inplace operation|inplace)"
STORED = ("packed", "absmax", "nested_absmax", "nested_offset")
Draw = Callable[..., Tensor]  # an input of this shape
Op = tuple[nn.Module, Callable[[Draw], Tensor], str]  # what holds weights; a pass; what backward does without


def base(rows: int = 64, columns: int = 128) -> NF4Linear:
    return NF4Linear.from_weight(torch.randn(rows, columns), torch.randn(rows))


def adapted(*shape: int, dropout: float = 0.0) -> AdapterLayer:
    layer = AdapterLayer(base(*shape), default=LoRA(base(*shape), 4, 8, dropout=dropout))
    nn.init.normal_(layer.adapters["default"].lora_B)
    return layer


def several(keep: bool) -> Op:
    layers = nn.ModuleList(adapted(rows) for rows in (64, 32, 32))
    return layers, lambda draw: torch.cat(project(draw(6, 128), [*layers], keep=keep), -1), "bias"


def low_rank() -> Op:
    layer = base()
    whole = NF4LowRank.beside(layer, layer.stored, torch.randn(4, 128), torch.randn(64, 4))
    return whole, lambda draw: whole(draw(6, 128)), "bias"


def read(run: Callable[[Tensor, Draw], Tensor], layer: nn.Module | None = None, free: str = "bias") -> Op:
    """What computes with a weight as a tensor."""
    layer = layer or base()
    return layer, lambda draw: run(layer.weight, draw), free


def experts(run: Callable[[Tensor, Draw], Tensor], adapt: bool = False) -> Op:
    held = NF4Parameter((4, 64, 128))
    held.quantize_weight_(torch.randn(4, 64, 128))
    if adapt:
        held = AdapterLayer(held, default=LoRAParameter(held, 4, 8))
        nn.init.normal_(held.adapters["default"].lora_B)
    return read(run, held, "lora_B")  # which is scaled first, and kept so


def gated() -> Op:
    down = adapted()
    return down, lambda draw: project_gated(draw(6, 128), draw(6, 128), False, down), "bias"


def compiled() -> Op:
    layer = adapted()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    return layer, lambda draw: run(draw(6, 128)), "bias"


def again() -> Op:
    """What the graph of a first gradient keeps for a second one."""
    layer = adapted()

    def first(draw: Draw) -> Tensor:
        x = draw(6, 128)
        return torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]

    return layer, first, "bias"


def called(layer: nn.Module) -> Op:
    return layer, lambda draw: layer(draw(6, 128)), "bias"


def grouped(weight: Tensor, draw: Draw) -> Tensor:
    return torch._grouped_mm(draw(8, 64), weight, offs=ENDS)


ENDS = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
OPS: dict[str, Callable[[], Op]] = {
    "linear": lambda: called(base()),
    "low rank": low_rank,
    "LoRA": lambda: called(adapted()),
    "LoRA, dropped": lambda: called(adapted(dropout=0.5)),
    "several": lambda: several(False),
    "several, kept": lambda: several(True),
    "gated": gated,
    "weight read": lambda: read(lambda weight, draw: linear(draw(6, 128), weight)),
    "weight turned": lambda: read(lambda weight, draw: draw(6, 64) @ weight.mT.mT),
    "adapted weight read": lambda: read(  # made dense at once, which is what backward reads
        lambda weight, draw: linear(draw(6, 128), weight), adapted(), " ".join(("bias", *STORED))
    ),
    "an expert": lambda: experts(lambda weight, draw: draw(6, 128) @ weight[2].mT),
    "batched experts": lambda: experts(lambda weight, draw: torch.bmm(draw(4, 6, 64), weight)),
    "grouped experts": lambda: experts(grouped),
    "adapted experts": lambda: experts(grouped, adapt=True),
    "second derivative": again,
    "compiled": compiled,
}


def gradients(run: Callable[[Draw], Tensor], parameters: dict[str, nn.Parameter], written: str = "") -> list[Tensor]:
    """Of inputs and what trains, where that parameter is doubled behind the forward pass."""
    torch.manual_seed(1)
    inputs: list[Tensor] = []
    y = run(lambda *shape: inputs.append(torch.randn(shape, requires_grad=True)) or inputs[-1])
    own = parameters.get(written, torch.zeros(1))
    before = own.detach().clone()
    with torch.no_grad():
        own.mul_(2)
    try:
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        return [*torch.autograd.grad(y.square().sum(), [*inputs, *trained])]
    finally:
        own.data = before


@pytest.mark.parametrize("name", [*[*OPS][:-1], pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_write_between_forward_and_backward_is_seen(name: str) -> None:
    """Packed bytes, scales of both levels, LoRA's factors; what backward does without changes no gradient."""
    torch.manual_seed(0)
    holder, run, free = OPS[name]()
    parameters = dict(holder.named_parameters())

    plain = gradients(run, parameters)
    assert {path.rpartition(".")[2] for path in parameters} >= set(STORED)
    for path in parameters:
        if path.rpartition(".")[2] in free.split():
            assert all(map(torch.equal, gradients(run, parameters, path), plain)), path
        else:
            with pytest.raises(RuntimeError, match=WRITTEN):
                gradients(run, parameters, path)
                pytest.fail(path)
    assert all(map(torch.equal, gradients(run, parameters), plain))


@pytest.mark.parametrize("keep", ["all", "products"])
@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora-fa", "dora", "vera", "ia3"))]
)
def test_of_a_model_every_write_is_seen_or_changes_nothing(tiny_folder: Path, keep: str, kind: str) -> None:
    """Where a layer makes cheap things again the hooks of saved tensors hide what is written from autograd."""
    model, _ = fourbit.load(tiny_folder, quant_type="nf4")
    sizes = {"target": ["v_proj", "down_proj"]} if kind == "ia3" else {"rank": 4}
    fourbit.attach(model, fourbit.LoRAConfig(kind=kind, **sizes), seed=0)
    model.train().checkpointing = keep
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, 0.5, 0.1)
    ids, parameters = torch.arange(12).view(2, 6), dict(model.named_parameters())
    run = lambda draw: model(ids)
    plain, seen = gradients(run, parameters), list[str]()
    first = [path for path in parameters if "layers.0" in path and ("q_proj" in path or "norm" in path)]
    last = [path for path in parameters if "layers.1" in path]
    for path in (*first, *last):
        try:
            assert all(map(torch.equal, gradients(run, parameters, path), plain)), path
        except RuntimeError as problem:
            assert re.search(WRITTEN, str(problem))
            seen.append(path)
    assert {path for path in last if any(word in path for word in (*STORED, "norm"))} <= {*seen}


def test_a_gate_that_a_hook_has_cast_is_not_taken_together() -> None:
    """Then `down` is called, which takes what the product of both is."""
    x, down = torch.randn(6, 128, requires_grad=True), adapted()
    assert project_gated(x, x, False, down) is not None
    assert project_gated(x.double(), x, False, down) is None
