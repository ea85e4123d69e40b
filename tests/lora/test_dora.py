"""DoRA: the paper's formula and PEFT's numbers, forward and every gradient; a magnitude that stays fp32 and trains."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from fourbit.errors import InputError
from fourbit.lora import project as project_file
from fourbit.lora.active import copy_adapter, use, using
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.convert import dequantize
from fourbit.lora.dora import DoRA
from fourbit.lora.layer import AdapterLayer, adapter_layers, adapter_parameters, adapters_of, delta
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.merge import merge
from fourbit.lora.peft_files import load_adapter, save_adapter
from fourbit.lora.quantize import quantize_

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
LIMIT = 1e-5
NAMES = "lora_A", "lora_B", "lora_magnitude_vector"
CONFIG = LoRAConfig(rank=4, alpha=6, target=["0", "2"], kind="dora")


def make(seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 48, bias=bias), nn.Tanh(), nn.Linear(48, 64, bias=bias))


@torch.no_grad()
def stir(model: nn.Module, seed: int = 1, name: str = "default") -> nn.Module:
    """The adapter away from its start: B as large as A, magnitudes up to 30% off the norms."""
    generator = torch.Generator().manual_seed(seed)
    for part in adapters_of(model, name).values():
        part.lora_B.copy_(torch.randn(part.lora_B.shape, generator=generator) * 0.2)
        part.lora_magnitude_vector.mul_(1 + 0.3 * torch.rand(part.lora_B.shape[0], generator=generator).to(part.lora_B))
    return model


def stirred(seed: int = 0, bias: bool = True, bits: int = 16, config: LoRAConfig = CONFIG, **how: Any) -> nn.Module:
    model = make(seed, bias)
    if bits == 4:
        quantize_(model)
    attach(model, config, seed=seed, **how)
    return stir(model)


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, over the larger of 1 and the largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max()) / max(1.0, float(b.abs().max()))


def paper(layer: AdapterLayer, x: Tensor) -> Tensor:
    """Equation 5 with the norm detached (section 4.3), dense and in float64."""
    part = layer.adapters["default"]
    weight = layer.base.weight.detach().double()
    if isinstance(layer.base, Conv1D):
        weight = weight.T
    V = weight + part.scale * part.lora_B.double() @ part.lora_A.double()
    W = part.lora_magnitude_vector.double()[:, None] * V / V.detach().norm(dim=1, keepdim=True)
    return F.linear(x.double(), W, None if layer.base.bias is None else layer.base.bias.double())


@pytest.mark.parametrize("kind", ["dense", "no bias", "conv1d", "4-bit"])
def test_forward_and_every_gradient_are_the_papers(kind: str) -> None:
    torch.manual_seed(0)
    base = Conv1D(48, 64) if kind == "conv1d" else nn.Linear(64, 48, bias=kind != "no bias")
    nn.init.normal_(base.weight)  # Conv1D's are small
    model = nn.ModuleDict({"layer": base}).double()
    if kind == "4-bit":
        quantize_(model)
    attach(model, LoRAConfig(rank=4, alpha=6, target=["layer"], kind="dora", rslora=True), dtype=torch.float64)
    stir(model)
    layer: Any = model.layer
    x, g = torch.randn(3, 5, 64, dtype=torch.float64), torch.randn(3, 5, 48, dtype=torch.float64)
    found = {}
    for name, run in (("ours", layer), ("paper", lambda x: paper(layer, x))):
        inputs = [x.clone().requires_grad_(), *layer.adapters["default"].parameters()]
        y = run(inputs[0])
        found[name] = [y, *torch.autograd.grad((y * g).sum(), inputs)]
    for name, ours, theirs in zip(("y", "x", *NAMES), found["ours"], found["paper"], strict=True):
        assert gap(ours, theirs) <= 1e-10, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_gradients_and_a_step_are_pefts(bias: bool, dropout: float) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], use_dora=True, lora_dropout=dropout)
    ours, theirs = make(bias=bias), get_peft_model(make(bias=bias), config)
    attach(ours, config)
    stir(ours)
    peers = {
        f"{path}.{name}": getattr(module, name)["default"].weight
        for path in ("0", "2")
        for module in [theirs.base_model.model.get_submodule(path)]
        for name in NAMES
    }
    own = adapter_parameters(ours)
    assert own.keys() == peers.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            peers[name].copy_(parameter)
    x = torch.randn(6, 64)
    results = []
    for model, parameters in ((ours, own), (theirs, peers)):
        torch.manual_seed(3)  # of dropout
        given = x.clone().requires_grad_()
        y = model.train()(given)
        y.square().mean().backward()
        grads = [given.grad, *(parameters[name].grad.clone() for name in own)]
        torch.optim.AdamW(parameters.values(), lr=1e-2).step()
        results.append([y, *grads, *(parameters[name] for name in own)])
    for name, a, b in zip(("y", "x", *own, *own), *results, strict=True):
        assert gap(a, b) <= LIMIT, name


def test_files_go_to_peft_and_come_back(tmp_path: Path) -> None:
    ours, x = stirred(), torch.randn(6, 64)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    assert gap(theirs(x), ours(x)) <= LIMIT
    theirs.save_pretrained(tmp_path / "theirs")
    again = make()
    assert load_adapter(again, tmp_path / "theirs") == ["0", "2"]
    assert all(isinstance(part, DoRA) for part in adapters_of(again).values())
    assert torch.equal(again(x), ours(x))
    save_adapter(make_lora(), tmp_path / "lora")
    assert "use_dora" not in (tmp_path / "lora" / "adapter_config.json").read_text()  # older PEFT stops at the word


def make_lora() -> nn.Module:
    model = make()
    attach(model, LoRAConfig(rank=4, alpha=6, target=["0", "2"]))
    return model


@pytest.mark.parametrize("bits", [16, 4])
def test_a_fresh_one_changes_nothing_and_does_once_it_is_merged(bits: int) -> None:
    model, x = make(), torch.randn(6, 64)
    if bits == 4:
        quantize_(model)
    plain = model(x)
    attach(model, CONFIG)
    assert torch.allclose(model(x), plain, rtol=1e-6, atol=1e-6)
    stir(model)
    y = model(x)
    assert gap(y, plain) > 0.05
    dense = {path: layer.base.weight + change for (path, change), layer in zip(delta(model), model[::2], strict=True)}
    by_hand = F.linear(torch.tanh(F.linear(x, dense["0"], model[0].bias)), dense["2"], model[2].bias)
    assert gap(y, by_hand) <= LIMIT
    merge(dequantize(model) if bits == 4 else model)
    assert type(model[0]) is nn.Linear and gap(model(x), y) <= LIMIT


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half().bfloat16(), lambda m: m])
def test_the_magnitude_stays_fp32_and_moves_in_bf16(cast: Any) -> None:
    model = make()
    attach(model.to(torch.bfloat16), CONFIG, dtype=torch.bfloat16)
    model, x = cast(model), torch.randn(8, 64, dtype=torch.bfloat16)
    model(x).float().square().mean().backward()
    model = cast(model)  # with gradients
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-4, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    optimizer.step()
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("vector"):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            moved = (parameter - before[name]).abs()
            assert bool((moved > 0.9e-4).all())  # by AdamW's step, each of them: bf16 near 0.6 holds steps of 4e-3
        else:
            assert parameter.dtype == torch.bfloat16
    assert model(x).dtype == torch.bfloat16


def test_bf16_adapter_files_keep_the_magnitude(tmp_path: Path) -> None:
    model = stirred(dtype=torch.bfloat16)
    save_adapter(model, tmp_path)
    for dtype in (None, torch.bfloat16):
        again = make()
        load_adapter(again, tmp_path, dtype=dtype)
        for path, part in adapters_of(again).items():
            assert torch.equal(part.lora_magnitude_vector, adapters_of(model)[path].lora_magnitude_vector)
            assert part.lora_A.dtype == torch.bfloat16


@torch.no_grad()
def change_base(model: Any, way: str) -> None:
    weight = model[0].base.weight
    if way == "replaced":
        model[0].base.weight = nn.Parameter(weight * 2)
    elif way == "written into":
        weight.mul_(2)
    elif way == "loaded":
        model[0].base.load_state_dict({"weight": weight * 2, "bias": model[0].base.bias})
    elif way == "data":
        weight.data = weight.data * 2
    elif way == "cast and back":
        model.to(torch.bfloat16).to(torch.float32)
    elif way == "quantised":
        quantize_(model)
    elif way == "merged into":
        attach(model, LoRAConfig(rank=4, target=["0"]), "other")
        adapters_of(model, "other")["0"].lora_B.normal_()
        merge(model, "other")
        use(model, "default")
    elif way == "adapter written into":
        adapters_of(model)["0"].lora_B.mul_(2)
    elif way == "adapter loaded":
        part = adapters_of(model)["0"]
        part.load_state_dict({name: tensor * 2 for name, tensor in part.state_dict().items()})
    else:
        raise AssertionError(way)


WAYS = [
    "replaced", "written into", "loaded", "data", "cast and back", "quantised", "merged into", "adapter written into",
    "adapter loaded",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_norms_that_are_kept_follow_every_change(way: str) -> None:
    model: Any = stirred()
    part, x = adapters_of(model)["0"], torch.randn(6, 64)
    for _ in range(1 if way in ("cast and back", "quantised") else 3):  # again: freed memory is used anew
        model(x)
        kept = part.norms(model[0].base)
        change_base(model, way)
        assert torch.allclose(model[0](x).double(), paper(model[0], x), rtol=1e-5, atol=1e-5)
        again = part.norms(model[0].base)
        assert again.data_ptr() == part.norms(model[0].base).data_ptr()  # kept
        assert not torch.equal(kept, again)


def test_norms_made_in_inference_mode_train() -> None:
    model, x = stirred(), torch.randn(6, 64)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())


@pytest.mark.parametrize("bits", [16, 4])
def test_a_model_made_in_inference_mode_computes(bits: int) -> None:
    """Its weights count no changes, so its norms are made anew each time."""
    with torch.inference_mode():
        model, x = stirred(bits=bits), torch.randn(6, 64)
        first = model(x)
        assert gap(first, stirred(bits=bits)(x)) < 1e-6
        model[0].adapters["default"].lora_B.mul_(2)
        assert not torch.equal(model(x), first)


def test_a_row_of_zeros_stays_finite() -> None:
    model = make(bias=False)
    with torch.no_grad():
        model[0].weight[3] = 0
    attach(model, CONFIG)
    model(torch.randn(6, 64)).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in adapter_parameters(model).values())
    assert bool(model(torch.randn(6, 64)).isfinite().all())


@pytest.mark.parametrize("bits", [16, 4])
def test_checkpointing_autocast_and_compiling(bits: int) -> None:
    model, x = stirred(bits=bits), torch.randn(6, 64, requires_grad=True)

    def run(forward: Any) -> list[Tensor]:
        y = forward(x)
        return [y, *torch.autograd.grad(y.square().mean(), [x, *adapter_parameters(model).values()])]

    eager = run(model)
    for kind, forward in (
        ("checkpointing", lambda x: checkpoint(model, x, use_reentrant=False)),
        ("compiling", torch.compile(model, backend="aot_eager" if bits == 4 else "eager", fullgraph=True)),
    ):
        for a, b in zip(run(forward), eager, strict=True):
            assert gap(a, b) <= LIMIT, kind
    with torch.autocast("cpu", torch.bfloat16):
        y, *grads = run(model)
    assert y.dtype == torch.bfloat16 and gap(y, eager[0]) < 0.05
    assert [g.dtype for g in grads] == [torch.float32] * 7


def test_hooks_on_the_base_see_the_input() -> None:
    for bits in (16, 4):
        model, x, seen = stirred(bits=bits), torch.randn(6, 64), list[Tensor]()
        y = model(x)
        model[0].base.register_forward_hook(lambda module, args, out, seen=seen: seen.append(args[0]))
        assert torch.allclose(model(x), y, rtol=1e-5, atol=1e-5) and torch.equal(seen[0], x)


def test_copies_are_references_that_stay() -> None:
    model, x = stirred(), torch.randn(6, 64)
    y = model(x)
    copy_adapter(model, "default", "reference")
    twin = copy.deepcopy(model)
    assert pickle.dumps(model)
    stir(model, seed=2)
    assert not torch.allclose(model(x), y)
    with using(model, "reference"):
        assert torch.equal(model(x), y)
    assert torch.equal(twin(x), y)
    assert not any(p.requires_grad for p in adapters_of(model, "reference")["0"].parameters())


def test_layers_on_one_input_are_one_op_with_what_makes_them_dora(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = [stirred(seed, bits=4)[0] for seed in (0, 1, 2)], torch.randn(6, 64, requires_grad=True)
    parameters = [x, *(p for layer in layers for p in layer.adapters.parameters())]
    apart = [layer(x) for layer in layers]
    joint, groups = project_file.joint_forward, list[int]()
    seen = lambda x, group, keep: (groups.append(len(group)), joint(x, group))[1]  # a spy
    monkeypatch.setattr(project_file, "joint_forward", seen)
    together = project_file.project(x, layers)
    assert groups == [3]
    grads = [torch.autograd.grad(sum(y.square().mean() for y in ys), parameters) for ys in (apart, together)]
    for a, b in zip((*apart, *grads[0]), (*together, *grads[1]), strict=True):
        assert gap(a, b) <= LIMIT


def test_a_step_takes_hardly_more_products_than_loras() -> None:
    """What its time follows from, counted: a clock says other things on a busy machine."""
    counts = []
    for kind in ("lora", "dora"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 192, bias=False))
        attach(model, LoRAConfig(rank=8, target=["0"], kind=kind))
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(256, 128, requires_grad=True)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] > 4 * 256 * 128 * 192 and counts[1] <= 1.05 * counts[0]  # norms made anew, once a step


def test_several_are_the_sum_of_their_changes() -> None:
    model, x = stirred(), torch.randn(6, 64)
    attach(model, CONFIG, "b")
    stir(model, 5, "b")
    attach(model, LoRAConfig(rank=2, target=["0"]), "c")
    nn.init.normal_(adapters_of(model, "c")["0"].lora_B)
    layer: Any = model[0]
    weight = layer.base.weight
    changes = [layer.adapters[name].delta(weight) for name in ("default", "b", "c")]
    shares = (0.7, 0.3, -1.5)
    use(model, "default", "b", "c", weights=shares)
    expected = F.linear(x, weight + sum(w * d for w, d in zip(shares, changes, strict=True)), layer.base.bias)
    assert gap(layer(x), expected) <= LIMIT
    assert gap(F.linear(x, layer.weight, layer.base.bias), expected) <= LIMIT


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(2, 8, 8))


def test_what_it_cannot_be_put_on_is_refused() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 8), "conv": nn.Conv1d(8, 8, 3), "linear": nn.Linear(8, 8)})
    for name, kind in (("table", "Embedding"), ("conv", "Conv1d")):
        with pytest.raises(InputError, match=f"kind='dora' changes linear layers, and target names a {kind} too"):
            attach(model, LoRAConfig(target=[name, "linear"], kind="dora"))
        assert not adapter_layers(model)
        attach(copy.deepcopy(model), LoRAConfig(target=[name, "linear"]))  # as is advised
    attach(copy.deepcopy(model), LoRAConfig(target=["linear"], kind="dora"))
    model["experts"] = Experts()
    for target in (["linear"], None):
        with pytest.raises(
            InputError, match="kind='dora' changes linear layers, and target names a DenseParameter too"
        ):
            attach(model, LoRAConfig(target=target, target_parameters=["experts.gate"], kind="dora"))


def test_norms_are_made_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = stirred(bits=4), torch.randn(6, 64)
    assert isinstance(model[0].base, NF4Linear)
    model(x)
    made = list[str]()
    norms = DoRA._norms
    monkeypatch.setattr(DoRA, "_norms", lambda self, base: made.append("norms") or norms(self, base))
    for _ in range(3):  # micro-batches of one step
        model(x).sum().backward()
    assert made == []
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(1e-3)
    model(x)
    assert made == ["norms"] * 2
