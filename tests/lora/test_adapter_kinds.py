"""The kinds of adapter beside LoRA, each against PEFT's on the same state and against its paper's formula."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fourbit.errors import InputError
from fourbit.lora.active import adapters_off, copy_adapter, using
from fourbit.lora.adapter import Adapter
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.convert import dequantize
from fourbit.lora.layer import adapter_parameters, adapters_of, delta
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.merge import merge
from fourbit.lora.peft_files import load_adapter, save_adapter
from fourbit.lora.quantize import quantize_

# peft 0.21 asks transformers 5.23 a question under an old name
pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]

LIMIT = 1e-5
IDS = torch.arange(24).view(2, 12) % 61
CONFIGS = {
    "vera": LoRAConfig(kind="vera", rank=5, projection_seed=3),
    "lora-fa": LoRAConfig(kind="lora-fa", rank=4, alpha=6),
    "ia3": LoRAConfig(kind="ia3", target=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
}
KEYS = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
Settings = Any


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """A two-layer Llama with biases, every parameter random."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(params=CONFIGS, ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> LoRAConfig:
    return CONFIGS[request.param]


def with_adapter(base: nn.Module, config: LoRAConfig, **how: Any) -> nn.Module:
    """A copy of `base` with a random adapter."""
    model = copy.deepcopy(base)
    attach(model, config, seed=0, **how)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def assert_close(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= LIMIT * max(1.0, float(theirs.abs().max())), what


def pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Each trained parameter of ours and the same one of PEFT's."""
    named = dict(theirs.named_parameters())
    for name, parameter in adapter_parameters(ours).items():
        path, _, own = name.rpartition(".")
        yield name, parameter, named[f"base_model.model.{path}.{KEYS.get(own, f'{own}.default')}"]


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_peft_computes_and_trains_the_same(
    base: LlamaForCausalLM, config: LoRAConfig, quantised: bool, tmp_path: Path
) -> None:
    """Forward, every gradient, one optimizer step; PEFT has our file on a dense base of the same weights."""
    start, dense = copy.deepcopy(base), copy.deepcopy(base)
    if quantised:
        start = quantize_(start)
        dense = dequantize(copy.deepcopy(start))
    ours = with_adapter(start, config)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path, is_trainable=True).eval()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not (config.kind == "lora-fa" and "lora_A" in name))
    assert float((logits(ours) - logits(base)).detach().abs().max()) > 100 * LIMIT
    assert_close(logits(ours), logits(theirs))
    models = (ours, theirs)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    same = list(pairs(ours, theirs))
    assert len(same) == sum(p.requires_grad for p in theirs.parameters()) > 0
    for name, mine, reference in same:
        assert mine.grad is not None and reference.grad is not None
        assert float((mine.grad - reference.grad).norm()) <= LIMIT * float(reference.grad.norm()), name
        assert_close(mine, reference, name)
    assert_close(logits(ours), logits(theirs))


def test_files_go_both_ways(base: LlamaForCausalLM, config: LoRAConfig, tmp_path: Path) -> None:
    ours = with_adapter(base, config)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert_close(logits(ours), logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = copy.deepcopy(base)
        assert load_adapter(again, tmp_path / folder) == list(adapters_of(ours))
        assert torch.equal(logits(again), logits(ours))
        save_adapter(again, tmp_path / "again")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def formula(part: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """What the paper says, for one row x [in], in plain sums."""
    bias = torch.zeros(len(weight)).to(x) if bias is None else bias
    if kind == "vera":
        A, B = part.projections.vera_A[:, : len(x)], part.projections.vera_B[: len(weight)]
        d, b = torch.diag(part.vera_lambda_d), torch.diag(part.vera_lambda_b)
        return weight @ x + bias + b @ B @ d @ A @ x
    if kind == "ia3":
        scale = part.ia3_l.flatten()
        return weight @ (scale * x) + bias if part.on_input else scale * (weight @ x + bias)
    return weight @ x + bias + part.alpha / part.rank * (part.lora_B @ (part.lora_A @ x))


def test_the_papers_formula_in_float64(base: LlamaForCausalLM, config: LoRAConfig) -> None:
    model = with_adapter(copy.deepcopy(base).double(), config, dtype=torch.float64)
    for path, part in adapters_of(model).items():
        layer = model.get_submodule(path)
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        want = torch.stack([formula(part, row, layer.base.weight, layer.base.bias, config.kind) for row in x])
        torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-10)
        with adapters_off(model):
            assert torch.equal(layer(x), layer.base(x))
        with using(model, "default", weights=[0.3]):
            torch.testing.assert_close(layer(x), 0.7 * layer.base(x) + 0.3 * want, rtol=0, atol=1e-10)
    kept = logits(model)
    copy_adapter(model, "default", "copy")
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(1)
    with using(model, "copy"):
        assert torch.equal(logits(model), kept)


def test_delta_is_the_change_of_the_weight(base: LlamaForCausalLM, config: LoRAConfig) -> None:
    model = with_adapter(base, config)
    for path, change in delta(model):
        layer = model.get_submodule(path)
        x = torch.randn(3, layer.in_features)
        layer.base.bias.data.zero_()
        assert_close(x @ (layer.base.weight + change).T, layer(x))
        assert_close(layer.weight, layer.base.weight + change)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_merged_it_computes_the_same(base: LlamaForCausalLM, config: LoRAConfig, quantised: bool) -> None:
    """Biases too, which IA3 scales with the output; and who reads weight and bias of a layer gets both."""
    model = with_adapter(quantize_(copy.deepcopy(base)) if quantised else base, config)
    want, layer = logits(model), model.get_submodule(next(iter(adapters_of(model))))
    x = torch.randn(3, layer.in_features)
    assert_close(x @ layer.weight.T + layer.bias, layer(x))
    assert_close(logits(merge(model)), want)
    assert not adapters_of(model)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_bfloat16_trains(base: LlamaForCausalLM, config: LoRAConfig, quantised: bool) -> None:
    """Activations in bf16 under fp32 masters: the output's dtype stays, and every trained tensor gets a gradient."""
    start = copy.deepcopy(base).bfloat16()
    model = with_adapter(quantize_(start) if quantised else start, config).train()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    output = logits(model)
    assert output.dtype == torch.bfloat16
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapter_parameters(model).values())
    assert float((output - logits(with_adapter(base, config))).detach().abs().max()) < (0.5 if quantised else 0.2)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_lora_fa_keeps_no_input(quantised: bool, dropout: float) -> None:
    """Kept for backward: x A^T and what dropout drops, and not x, which LoRA keeps."""
    kept = {}
    for kind in ("lora", "lora-fa"):
        torch.manual_seed(0)
        linear = nn.Linear(64, 32)
        model = nn.Sequential(NF4Linear.from_weight(linear.weight.detach()) if quantised else linear)
        attach(model, LoRAConfig(kind=kind, rank=2, dropout=dropout), seed=0)
        x, saved = torch.randn(128, 64, requires_grad=True), list[int]()

        def pack(tensor: Tensor, sizes: list[int] = saved) -> Tensor:
            sizes.append(tensor.numel() if tensor.is_floating_point() else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        kept[kind] = sum(size == x.numel() for size in saved)
        y.sum().backward()
        assert x.grad is not None and float(x.grad.abs().sum()) > 0
    mask = int(dropout > 0 and not quantised)  # torch's own dropout keeps one
    assert kept == {"lora": 1 + mask, "lora-fa": mask}


def test_lora_fa_gradients_are_loras(base: LlamaForCausalLM) -> None:
    """With dropout's mask in place: those of B and of the input are LoRA's; A has none, and does not move."""
    found = {}
    for kind in ("lora", "lora-fa"):
        torch.manual_seed(0)
        model = nn.Sequential(NF4Linear.from_weight(torch.randn(32, 64)))
        attach(model, LoRAConfig(kind=kind, rank=2, dropout=0.5), seed=0)
        part: Any = adapters_of(model)["0"]
        with torch.no_grad():
            part.lora_B.normal_()
        x = torch.randn(128, 64, requires_grad=True)
        model.train()(x).square().sum().backward()
        found[kind] = part.lora_B.grad, x.grad
        assert (kind == "lora") == (part.lora_A.grad is not None)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_need_a_trained_A() -> None:
    for kind in ("lora-fa", "lora"):
        model = nn.Sequential(NF4Linear.from_weight(torch.randn(8, 64)))
        attach(model, LoRAConfig(kind=kind, rank=2), seed=0)
        x = torch.randn(3, 64, requires_grad=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        if kind == "lora":
            assert torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
            continue
        with pytest.raises(RuntimeError, match="is not kept where A is frozen: train A too"):
            torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ia3", "rank": 4}, "rank has no part in an adapter of the kind 'ia3': leave it out"),
        ({"kind": "ia3", "rank_pattern": {"q_proj": 2}}, "rank_pattern has no part in an adapter of the kind 'ia3'"),
        ({"kind": "ia3", "target": ["embed_tokens"]}, "kind='ia3' changes linear layers, and target names a Embedding"),
        ({"rank_final": 0.3}, "rank_final has no part in an adapter of the kind 'lora': leave it out"),
        ({"kind": "lora-fa", "feedforward": ["q_proj"]}, "feedforward has no part in an adapter of the kind 'lora-fa'"),
        ({"kind": "lora-fa", "target": ["embed_tokens"]}, "kind='lora-fa' changes linear layers"),
        ({"kind": "dora", "start": "pissa"}, "start has no part in an adapter of the kind 'dora': leave it out"),
        ({"kind": "adalora", "start": "eva"}, "start has no part in an adapter of the kind 'adalora': leave it out"),
        ({"kind": "ia3", "target": ["q_proj"], "feedforward": ["down_proj"]}, "'down_proj' matches none of the 2 targ"),
        (
            {"kind": "ia3", "feedforward": "down_projj"},
            r"matches none of .* of which it scales the input. Nearest: down",
        ),
    ],
)
def test_what_a_kind_does_not_take(base: LlamaForCausalLM, settings: Settings, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(copy.deepcopy(base), LoRAConfig(**settings))
    if "leave it out" in message:
        attach(copy.deepcopy(base), LoRAConfig(kind=settings.get("kind", "lora")))


def test_ia3_input_layers_are_told_apart_where_names_end_alike(
    tree: Callable[[list[str]], nn.Module], tmp_path: Path
) -> None:
    """PEFT compares ends of feedforward_modules without a dot: `proj` would be `up_proj` too."""
    model = tree(["a.proj", "a.up_proj", "b.proj"])
    untouched = copy.deepcopy(model)
    attach(model, LoRAConfig(kind="ia3", target=["proj", "up_proj"], feedforward=["a.proj"]))
    parts: dict[str, Any] = adapters_of(model)  # type: ignore[assignment]
    assert [part.on_input for part in parts.values()] == [True, False, False]
    with torch.no_grad():
        for part in parts.values():
            part.ia3_l.copy_(torch.rand(part.ia3_l.shape))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path)
    again = copy.deepcopy(untouched)
    load_adapter(again, tmp_path)
    x = torch.randn(2, 3)
    for path in parts:
        want = model.get_submodule(path)(x)
        assert torch.equal(again.get_submodule(path)(x), want)
        assert_close(theirs.get_submodule(f"base_model.model.{path}")(x), want)


def test_a_hostile_feedforward_expression_is_refused(base: LlamaForCausalLM, tmp_path: Path) -> None:
    save_adapter(with_adapter(base, CONFIGS["ia3"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"feedforward_modules": "(a+)+$"}))
    with pytest.raises(InputError, match="feedforward_modules may take very long to match"):
        load_adapter(copy.deepcopy(base), tmp_path)


def test_parts_say_whether_they_change_anything(base: LlamaForCausalLM, config: LoRAConfig) -> None:
    model = copy.deepcopy(base)
    attach(model, config)
    fresh: list[Adapter] = list(adapters_of(model).values())
    assert torch.equal(logits(model), logits(base)) and all(part.is_idle() for part in fresh)
    assert not any(part.is_idle() for part in adapters_of(with_adapter(base, config)).values())
