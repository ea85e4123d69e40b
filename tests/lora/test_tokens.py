"""Rows of tokens that train by themselves: PEFT's numbers and files, tied and untied, beside LoRA, over 4 bits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fourbit
from fourbit.errors import InputError
from fourbit.lora.active import copy_adapter, using
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters, adapters_of
from fourbit.lora.linear4bit import NF4Embedding
from fourbit.lora.peft_files import load_adapter, save_adapter
from fourbit.lora.quantize import quantize_

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LIMIT = 1e-5
TOKENS = [5, 60, 2]
IDS = torch.tensor([[5, 1, 60, 2, 9, 5], [3, 3, 2, 60, 60, 7]])
EMBED, HEAD = "model.embed_tokens", "lm_head"


def make(tied: bool, padding: int | None = None) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied, pad_token_id=padding)
    return LlamaForCausalLM(config)


def gap(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max()) / max(1.0, float(b.abs().max()))


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def config(**settings: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "target": ["q_proj"], "train_tokens": TOKENS} | settings)


CASES = {
    "tied": (True, TOKENS),
    "untied, embedding": (False, TOKENS),
    "untied, both": (False, {"embed_tokens": TOKENS, "lm_head": [1, 60]}),
    "padding": (True, TOKENS),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_gradients_a_step_and_files_are_pefts(case: str, tmp_path: Path) -> None:
    tied, wanted = CASES[case]
    padding = 2 if case == "padding" else None
    settings = LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj"], trainable_token_indices=wanted)
    ours, theirs = make(tied, padding), get_peft_model(make(tied, padding), settings)
    attach(ours, settings)
    stir(ours)
    save_adapter(ours, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(make(tied, padding), tmp_path / "ours", is_trainable=True)
    peers = {
        name.replace("base_model.model.", "").replace(".default.weight", "").replace(".token_adapter", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    peers = {name.removesuffix(".default"): parameter for name, parameter in peers.items()}
    own = adapter_parameters(ours)
    assert own.keys() == peers.keys() and len(own) == (4 if case == "untied, both" else 3)
    results = []
    for model, parameters in ((ours, own), (theirs, peers)):
        y = model(IDS).logits
        y.square().mean().backward()
        grads = [parameters[name].grad.clone() for name in own]
        torch.optim.AdamW(parameters.values(), lr=1e-2).step()
        results.append([y, *grads, *(parameters[name] for name in own), model(IDS).logits])
    for name, a, b in zip(("y", *own, *own, "after"), *results, strict=True):
        assert gap(a, b) <= LIMIT, name
    theirs.save_pretrained(tmp_path / "theirs")
    again = make(tied, padding)
    load_adapter(again, tmp_path / "theirs")
    assert gap(again(IDS).logits, ours(IDS).logits) <= LIMIT


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [16, 4])
def test_only_these_rows_change_and_they_merge(tied: bool, bits: int) -> None:
    model = make(tied)
    if bits == 4:
        quantize_(model, embeddings=True, skip=None if tied else [])
        assert isinstance(model.model.embed_tokens, NF4Embedding)
    plain = model(IDS).logits
    before = {path: model.get_submodule(path).weight.detach().float().clone() for path in (EMBED, HEAD)}
    paths = attach(model, config())
    assert paths == [EMBED, "model.layers.0.self_attn.q_proj", HEAD]
    assert gap(model(IDS).logits, plain) <= LIMIT  # rows start as they are
    rows = [name for name in adapter_parameters(model) if name.endswith("tokens_delta")]
    assert rows == [f"{EMBED}.trainable_tokens_delta", *[f"{HEAD}.trainable_tokens_delta"] * (not tied)]
    stir(model)
    for path in (EMBED, HEAD):
        changed = (model.get_submodule(path).weight.detach().float() - before[path]).abs().amax(1) > 1e-6
        assert changed.nonzero().flatten().tolist() == sorted(TOKENS)
    y = model(IDS).logits
    assert gap(y, plain) > 1e-3
    fourbit.merge(fourbit.dequantize(model) if bits == 4 else model)
    assert gap(model(IDS).logits, y) <= LIMIT


def test_round_trip_copies_and_another_dtype(tmp_path: Path) -> None:
    model = stir(attached(make(True)))
    y = model(IDS).logits
    save_adapter(model, tmp_path)
    again = make(True)
    assert load_adapter(again, tmp_path) == list(adapters_of(model))
    assert torch.equal(again(IDS).logits, y) and len(adapter_parameters(again)) == 3
    copy_adapter(model, "default", "reference")
    twin = copy.deepcopy(model)
    stir(model, 3)
    assert not torch.equal(model(IDS).logits, y) and torch.equal(twin(IDS).logits, y)
    with using(model, "reference"):
        assert torch.equal(model(IDS).logits, y)
    half = make(True).to(torch.bfloat16)
    load_adapter(half, tmp_path, name="b")
    assert half(IDS).logits.dtype == torch.bfloat16 and gap(half(IDS).logits, y) < 0.05
    with pytest.raises(InputError, match=r"has a TokenRows of \(5, 60, 2\), the file a TokenRows of \(7,"):
        other = attached(make(True), train_tokens=[7, 8, 9])
        save_adapter(other, tmp_path / "other")
        load_adapter(model, tmp_path / "other")


def attached(model: nn.Module, **settings: Any) -> nn.Module:
    attach(model, config(**settings))
    return model


def test_a_head_with_a_bias_and_a_scaled_embedding() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 8.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.embed_scale

    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": Scaled(61, 8), "q_proj": nn.Linear(8, 8), "lm_head": nn.Linear(8, 61)})
    x, ids = torch.randn(4, 8), IDS
    attach(model, config())
    stir(model)
    expected = nn.functional.linear(x, model["lm_head"].weight, model["lm_head"].base.bias)
    assert gap(model["lm_head"](x), expected) <= LIMIT
    assert gap(model["embed"](ids), nn.functional.embedding(ids, model["embed"].weight) * 8) <= LIMIT


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_tokens": [5, 5]}, r"train_tokens must be ids below 61, each once, got \[5, 5\]"),
        ({"train_tokens": [61]}, r"train_tokens must be ids below 61"),
        ({"train_tokens": [-1]}, r"train_tokens must be"),
        ({"train_tokens": {"q_proj": [1]}}, "train_tokens names 'q_proj', no embedding or head"),
        ({"train_tokens": {"embed_tokens": [1], "lm_head": [2]}}, "is tied to what train_tokens gives other ids"),
        ({"modules_to_save": ["lm_head"]}, "lm_head' is in target or modules_to_save too: train_tokens must"),
        ({"target": ["lm_head"]}, "'lm_head' is in target or modules_to_save too"),
    ],
)
def test_what_cannot_be_is_refused(settings: Any, words: str) -> None:
    model = make(tied="modules_to_save" not in settings)
    with pytest.raises(InputError, match=words):
        attach(model, config(**settings))
    assert not adapters_of(model)
