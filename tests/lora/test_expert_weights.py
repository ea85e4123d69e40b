"""Fused experts of transformers in 4 bits: their modules compute as before, and keep nothing dense."""

import copy
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters
from fourbit.lora.lazy_weight import LazyWeight
from fourbit.lora.linear4bit import Module4bit
from fourbit.lora.parameter4bit import NF4Parameter
from fourbit.lora.quantize import dense_weights, quantize_
from fourbit.lora.targets import expert_parameters

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SMALL |= {"vocab_size": 40, "max_position_embeddings": 64, "moe_intermediate_size": 24, "intermediate_size": 24}
SMALL |= {"initializer_range": 0.2, "pad_token_id": 0, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoe": {"num_local_experts": 4},
}


@cache
def models(family: str) -> tuple[nn.Module, nn.Module]:
    """A tiny model in 4 bits, and its dense twin of the decoded weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | FAMILIES[family])
    dense = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in dense.named_parameters():
        if parameter.ndim < 2 or "bias" in name:
            nn.init.normal_(parameter, 0.5, 0.3)
    packed = quantize_(copy.deepcopy(dense), blocksize=32).requires_grad_(False)
    dense.requires_grad_(False)
    state = dense.state_dict()
    for path, module in packed.named_modules():
        if isinstance(module, Module4bit):
            state[path if path in state else f"{path}.weight"].copy_(module.dequantize())
    return packed, dense


def run(model: Any, implementation: str, embedded: Tensor) -> tuple[Tensor, Tensor]:
    model.config._experts_implementation = implementation
    x = embedded.clone().requires_grad_()
    logits = model(inputs_embeds=x).logits
    (grad,) = torch.autograd.grad((logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum(), x)
    return logits, grad


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_what_it_would_with_the_decoded_experts(family: str, implementation: str) -> None:
    packed, dense = models(family)
    assert all(isinstance(own, LazyWeight) for own in expert_parameters(packed).values()), "an expert stayed dense"
    embedded = torch.randn(2, 9, 32)
    (y, grad), (wanted, wanted_grad) = (run(model, implementation, embedded) for model in (packed, dense))
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-5)


def test_nothing_dense_is_kept_for_backward() -> None:
    """Neither an expert nor all of them, however the module multiplies them."""
    packed, _ = models("qwen3_moe")
    sizes = {48 * 32, 24 * 32, 4 * 48 * 32, 4 * 24 * 32}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(packed, implementation, torch.randn(1, 5, 32))
        floats = [
            t for t in kept if t.is_floating_point() and t.ndim > 1 and t.untyped_storage().nbytes() // 4 in sizes
        ]
        experts = [t for t in floats if not any(t.data_ptr() == p.data_ptr() for p in packed.parameters())]
        assert not [tuple(t.shape) for t in experts], implementation


@pytest.mark.parametrize("shape", [(5, 64, 64), (3, 8, 24), (6, 128, 256), (3, 5, 7), (1, 4, 32)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_an_expert_is_decoded_alone_to_the_same_bits(shape: tuple[int, ...], double_quant: bool) -> None:
    """Whole blocks a row, a matrix, or neither; scales' blocks that end with a matrix, or do not."""
    torch.manual_seed(0)
    weight = NF4Parameter(shape, "nf4", 32, double_quant)
    dense = torch.randn(shape)
    weight.quantize_weight_(dense)
    whole = weight.dequantize()
    twin = NF4Parameter((dense.numel(),), "nf4", 32, double_quant)
    twin.quantize_weight_(dense.flatten())
    assert torch.equal(twin.dequantize().view(shape), whole), "not the bytes of the flat tensor"
    last, some = shape[0] - 1, torch.tensor([shape[0] - 1, 0, 0])
    for index in (0, -1, last, torch.tensor(last), some, some[:0], some.view(3, 1)):
        lazy = weight.weight[index]
        assert isinstance(lazy, LazyWeight) and lazy.shape == whole[index].shape
        assert torch.equal(lazy + 0, whole[index])
        assert torch.equal(lazy.mT + 0, whole[index].mT) and torch.equal(weight.weight.mT[index] + 0, whole.mT[index])
    for other in ((0, 1), None, slice(0, 2), slice(1, None), some.bool()[: shape[0]], Ellipsis):
        if not isinstance(other, Tensor) or len(other) == shape[0]:
            assert torch.equal(weight.weight[other] + 0, whole[other])
    with pytest.raises(IndexError):
        weight.weight[shape[0]] + 0


def test_only_the_experts_that_are_asked_for_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourbit.kernels import dequantize4bit

    decoded: list[tuple[int, ...]] = []
    real = dequantize4bit.decode_into
    monkeypatch.setattr(dequantize4bit, "decode_into", lambda y, w: decoded.append(tuple(y.shape)) or real(y, w))
    weight = NF4Parameter((8, 16, 32), blocksize=32)
    x = torch.randn(3, 32, requires_grad=True)
    torch.nn.functional.linear(x, weight.weight[2]).sum().backward()
    assert decoded == [(1, 512)] * 2  # forward, and again backward
    decoded.clear()
    (x.detach() @ weight.weight.transpose(1, 2)[torch.tensor(3)]).sum()
    torch.bmm(torch.randn(2, 16, 32), torch.randn(2, 32, 1))
    torch.bmm(weight.weight[torch.tensor([1, 1])], x.detach()[:2, :, None])
    assert decoded == [(1, 512), (2, 512)]


def test_products_equal_those_with_the_dense_tensor() -> None:
    """Also where sizes are to be broadcast, with a bias, under autocast, in bfloat16, and of a view of a view."""
    torch.manual_seed(0)
    weight = NF4Parameter((3, 16, 32), blocksize=32)
    weight.quantize_weight_(torch.randn(3, 16, 32))
    dense, bias = weight.dequantize(), torch.randn(16)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    cases: list[Any] = [
        lambda w, x: torch.nn.functional.linear(x, w[1], bias),
        lambda w, x: torch.nn.functional.linear(x, w[1], bias=bias),
        lambda w, x: torch.nn.functional.linear(input=x, weight=w[1]),
        lambda w, x: x @ w.mT,  # x [5, 32] against three matrices
        lambda w, x: w @ x.mT,
        lambda w, x: w[0] @ x.mT,
        lambda w, x: w[0] @ x[0],
        lambda w, x: x[0] @ w[0].T,
        lambda w, x: torch.bmm(x.expand(3, 5, 32), w.transpose(-1, -2)),
        lambda w, x: torch.bmm(x.expand(3, 5, 32), w.transpose(2, 1)),
        lambda w, x: torch.bmm(w, x[:3, :, None]).squeeze(-1),
        lambda w, x: torch.cat([torch.nn.functional.grouped_mm(x, w.transpose(-2, -1), offs=offs)]),
        lambda w, x: torch._grouped_mm(x, w.transpose(-2, -1), offs),
        lambda w, x: torch.einsum("ni,eoi->neo", x, w),
        lambda w, x: x * w[2][:5],
    ]
    for i, case in enumerate(cases):
        found = []
        for w in (weight.weight, dense):
            x = torch.linspace(-1, 1, 160).view(5, 32).requires_grad_()
            y = case(w, x)
            found += [y, *torch.autograd.grad(y, x, torch.cos(torch.arange(y.numel()).view_as(y)))]
        for a, b in zip(found[:2], found[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, i=i: f"case {i}: {text}")
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.linear(torch.randn(2, 32), weight.weight[0])
    assert y.dtype == torch.bfloat16
    assert torch.nn.functional.linear(torch.randn(2, 32).double(), weight.weight[0]).dtype == torch.float64
    with pytest.raises(RuntimeError):
        weight.weight[0] @ torch.randn(3, 3)
    with pytest.raises(RuntimeError, match="made when it is read"):
        weight.weight[0].add_(1)


def test_what_is_left_dense_is_named(tmp_path: Any) -> None:
    from fourbit.models.load import load_model
    from fourbit.models.save import save_model

    whole, dense = models("qwen3_moe")
    part = quantize_(copy.deepcopy(dense), blocksize=32, skip=["layers.1.mlp.experts.down_proj", "lm_head"])
    reasons = dense_weights(part, ["layers.1.mlp.experts.down_proj", "lm_head"])
    named = {name: why for why, names in reasons.items() for name in names}
    assert named["model.layers.1.mlp.experts.down_proj"] == "named in skip"
    assert "no linear layer" in named["model.layers.0.mlp.gate.weight"]
    assert not any("gate_up_proj" in name or ".0.mlp.experts" in name for name in named)
    with pytest.raises(InputError, match="matches no linear layer"):
        quantize_(copy.deepcopy(dense), skip=["experts.w1"])
    twin = copy.deepcopy(part).to(torch.bfloat16)
    experts = twin.model.layers[0].mlp.experts
    assert experts.gate_up_proj.dtype == torch.bfloat16 and experts._modules["gate_up_proj"].absmax.dtype == torch.uint8
    save_model(part, tmp_path)
    back = load_model(copy.deepcopy(dense), tmp_path)
    x = torch.randn(1, 4, 32)
    assert torch.equal(run(back, "eager", x)[0], run(part, "eager", x)[0])
    own, its = part.state_dict(), back.state_dict()
    assert own.keys() == its.keys() and all(torch.equal(own[name], its[name]) for name in own)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(part.config, attn_implementation="eager").model.layers
    load_model(empty, _layers_alone(tmp_path)).eval()
    for name, own in part.model.layers.state_dict().items():
        assert torch.equal(empty.state_dict()[name], own), name
    packed = quantize_(copy.deepcopy(dense), blocksize=32)
    load_model(packed, tmp_path)  # into stand-ins that are there, of which the file has one dense
    torch.testing.assert_close(run(packed, "eager", x)[0], run(whole, "eager", x)[0], rtol=0, atol=1e-2)


def _layers_alone(folder: Path) -> Path:
    """The layers of a saved model, as a folder of their own."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "layers").mkdir()
    kept = {name.removeprefix("model.layers."): t for name, t in tensors.items() if name.startswith("model.layers.")}
    save_file(kept, folder / "layers" / "model.safetensors")
    return folder / "layers"


def test_an_expert_costs_4_13_bits_a_weight() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(8, 128, 256))
            self.table = nn.Parameter(torch.randn(8, 128))

    module = quantize_(nn.ModuleDict({"mlp": Experts()}))
    stored = module.mlp._modules["up"]
    assert module.mlp.up.shape == (8, 128, 256) and module.mlp.table.is_floating_point()
    assert [tuple(p.shape) for p in stored.parameters()] == [(8, 128, 128), (8, 128, 4), (16,), (1,)]
    bits = 8 * sum(p.nbytes for p in stored.parameters()) / (8 * 128 * 256)
    assert round(bits, 2) == 4.13 and not any(p.requires_grad for p in stored.parameters())


def test_a_step_of_grouped_products_equals_the_loop_over_experts_and_is_quicker() -> None:
    """At 64 tokens an expert, in 4 bits, with LoRA on all experts: small ones are decoded together, and sorted once."""
    settings = SMALL | FAMILIES["qwen3_moe"] | {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("qwen3_moe", **settings))
    quantize_(model)
    attach(model, LoRAConfig(rank=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, 0, 0.1)
    embedded = torch.randn(4, 64, 128)  # 2 of 8 experts for each token
    seconds: dict[str, list[float]] = {"eager": [], "grouped_mm": []}
    found: dict[str, list[Tensor]] = {}
    for _ in range(5):
        for implementation, times in seconds.items():
            start = time.perf_counter()
            model.config._experts_implementation = implementation
            logits = model(inputs_embeds=embedded).logits
            grads = torch.autograd.grad(logits.square().mean(), list(adapter_parameters(model).values()))
            times.append(time.perf_counter() - start)
            found[implementation] = [logits, *grads]
    for a, b in zip(*found.values(), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    assert min(seconds["grouped_mm"]) <= 0.7 * min(seconds["eager"]), seconds
