"""Every built-in family against transformers: logits, gradients, caches, packed rows, files both ways, faults."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_oracles import SHAPES, SIZES, ours, theirs
from torch import Tensor

import fourbit
from fourbit.models.decoder import Decoder, RMSNorm
from fourbit.models.families import FAMILIES, read_spec
from fourbit.models.load import load_decoder

IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))  # past every window and length
WEIGHT = torch.randn(2, 40, 97, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Decoder]:
    """The oracle and ours."""
    oracle = theirs(request.param)
    return oracle, ours(oracle)


def off(got: Tensor, expected: Tensor) -> float:
    """The largest difference, by the largest of what is expected."""
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_logits_and_likeliest_tokens(pair: tuple[Any, Decoder]) -> None:
    oracle, model = pair
    expected, got = oracle(IDS).logits, model(IDS)
    assert off(got, expected) < 1e-4
    best, bound = expected.topk(2, dim=-1).values, 1e-4 * expected.abs().max()
    sure = best[..., 0] - best[..., 1] > 2 * bound
    assert torch.equal(got.argmax(-1)[sure], expected.argmax(-1)[sure])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_gradients_of_an_adapter_are_those_under_peft(pair: tuple[Any, Decoder], tmp_path: Path) -> None:
    """On every linear layer, over the same weights; the adapter trained here opens there with the same logits."""
    from peft import PeftModel

    oracle, _ = pair
    model = ours(oracle)
    config = fourbit.LoRAConfig(rank=3, alpha=6, target="all-linear")
    paths = fourbit.attach(model, config, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    fourbit.save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(oracle, tmp_path, is_trainable=True)
    try:
        expected, got = peft(input_ids=IDS).logits, model(IDS)
        assert off(got.detach(), expected.detach()) < 1e-5
        (expected * WEIGHT).sum().backward()
        (got * WEIGHT).sum().backward()
        named = dict(peft.named_parameters())
        for path in paths:
            for part in ("lora_A", "lora_B"):
                mine = model.get_parameter(f"{path}.adapters.default.{part}").grad
                other = named[f"base_model.model.{path}.{part}.default.weight"].grad
                assert (mine - other).norm() <= 1e-4 * other.norm(), (path, part)
    finally:
        peft.unload()


@torch.no_grad()
def test_a_cache_goes_on_past_windows(pair: tuple[Any, Decoder]) -> None:
    """Prompts in one piece, then tokens one by one; left-padded rows too, after a prefix that all share."""
    _, model = pair
    if model.spec.rope.kind in ("dynamic", "longrope"):  # what is cached was turned as in the text it then was
        return
    whole, cache = model(IDS), model.new_cache()
    pieces = [model(part, cache=cache) for part in IDS.split([17, 1, 1, 12, *[1] * 9], dim=1)]
    assert off(torch.cat(pieces, dim=1), whole) < 1e-5
    cache, hidden = model.new_cache(), torch.ones(1, 40, dtype=torch.bool)
    hidden[:, 10:16] = False  # between the prefix and the rest
    model(IDS[:1, :10], cache=cache)
    shown = torch.cat([IDS[:1, 16:20] * 0, IDS[:1, :2] * 0, IDS[:1, 16:]], dim=1)  # six hidden ones, then the text
    got = model(shown, cache=cache, mask=hidden)[:, 6:]
    alone = model(torch.cat([IDS[:1, :10], IDS[:1, 16:]], dim=1))[:, 10:]
    assert off(got, alone) < 1e-5


@torch.no_grad()
def test_generated_tokens_are_theirs(pair: tuple[Any, Decoder]) -> None:
    oracle, model = pair
    prompt = IDS[:1, :9]
    expected = oracle.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    (got,) = fourbit.generate(model, [prompt[0].tolist()], max_new_tokens=20)  # past long RoPE's length
    assert got == expected


def test_long_rope_reads_a_text_anew_that_outgrows_its_length() -> None:
    """Texts of several lengths, a batch of which grows past 24 row by row: as one by one, and as without a cache."""
    model = ours(theirs("phi3 long"))
    prompts = [IDS[0, :length].tolist() for length in (9, 20, 23, 30)]
    plain = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(8):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        plain.append(text[len(prompt) :])
    assert fourbit.generate(model, prompts, max_new_tokens=8) == plain


def test_packed_rows_and_forks_are_alone(pair: tuple[Any, Decoder]) -> None:
    """Values, and the gradient of the embeddings, of examples side by side and of a prompt with two answers."""
    _, model = pair
    embedding = model.model.embed_tokens.weight.requires_grad_()
    row, spans = torch.cat([IDS[0, :23], IDS[1, :30]])[None], [(0, 23), (23, 36), (36, 45, 1), (45, 53, 1)]
    if model.spec.rope.kind == "dynamic":  # a fork is as long as its longest branch
        row, spans = row[:, :45], [(0, 23), (23, 45)]
    packed = model(row, spans=spans)[0]
    forks = (slice(36, 45), slice(45, row.shape[1]))[: len(spans) - 2 or 1]
    fork = [torch.cat([row[0, 23:36], row[0, part]]) for part in forks]
    alone = [model(text[None])[0] for text in (row[0, :23], *fork)]
    expected = torch.cat([alone[0], alone[1], *(branch[13:] for branch in alone[2:])])
    assert off(packed.detach(), expected.detach()) < 1e-5
    weight = WEIGHT.flatten(0, 1)[: len(packed)]
    (got,) = torch.autograd.grad((packed * weight).sum(), embedding)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), embedding)
    assert off(got, wanted) < 1e-4


@torch.no_grad()
def test_folders_go_both_ways(pair: tuple[Any, Decoder], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    oracle, model = pair
    oracle.save_pretrained(tmp_path / "theirs")
    opened = load_decoder(tmp_path / "theirs")
    assert opened.spec == model.spec and torch.equal(opened(IDS), model(IDS))
    fourbit.save_model(opened, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert off(again(IDS).logits, oracle(IDS).logits) < 1e-5


def test_every_family_is_tried() -> None:
    assert {str(shape["model_type"]) for shape in SHAPES.values()} | {"llama"} >= FAMILIES.keys()


# ---- planted faults


def norms_without_one(model: Decoder) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.plus_one = False


def attention(**changes: Any) -> Callable[[Decoder], None]:
    """Other scores in every layer; a callable is given what was there."""

    def change(model: Decoder) -> None:
        for layer in model.model.layers:
            old = layer.self_attn.scores
            new = {key: value(getattr(old, key)) if callable(value) else value for key, value in changes.items()}
            layer.self_attn.scores = old._replace(**new)
        model.spec = replace(model.spec, windows=tuple(layer.self_attn.scores.window for layer in model.model.layers))

    return change


def said(**changes: Any) -> Callable[[Decoder], None]:
    """Another Spec, of the same weights."""

    def change(model: Decoder) -> None:
        weights = model.state_dict()
        model.__init__(replace(model.spec, **changes))  # type: ignore[misc]  # made again
        model.load_state_dict(weights, strict=False)

    return change


def layers_swapped(model: Decoder) -> None:
    model.model.layers[0].self_attn.scores, model.model.layers[1].self_attn.scores = (
        model.model.layers[i].self_attn.scores for i in (1, 0)
    )


def no_bias(model: Decoder) -> None:
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.zero_()
        layer.self_attn.q_proj.bias.data.zero_()


def other_rope(**changes: Any) -> Callable[[Decoder], None]:
    return lambda model: said(rope=replace(model.spec.rope, **changes))(model)


FAULTS: list[tuple[str, Callable[[Decoder], None]]] = [
    ("gemma2", norms_without_one),
    ("gemma2", attention(softcap=4.1)),
    ("gemma2", attention(scale=12**-0.5)),
    ("gemma2", said(logit_softcap=0.0)),
    ("gemma2", said(embedding_scale=6.0)),
    ("gemma2", said(activation="silu")),
    ("gemma2", layers_swapped),
    ("gemma3", attention(window=lambda w: w and w + 1)),
    ("gemma3", said(local_rope=None)),
    ("gemma3", other_rope(theta=900.0)),
    ("gemma3", said(qk_norm="")),
    *((name, attention(window=lambda w: w and w + 1)) for name in ("mistral", "gemma2", "phi3")),
    *((name, attention(window=lambda w: w and w - 1)) for name in ("mistral", "gemma2", "phi3")),
    ("ministral", layers_swapped),
    ("smollm3", said(no_rope=(2,))),
    ("qwen2", no_bias),
    ("qwen2 windows", said(windows=(7, 7, 0, 0))),
    ("qwen3", said(qk_norm="")),
    ("olmo2", said(norms="before")),
    ("granite", said(residual_scale=1.0)),
    ("granite", said(logit_divisor=2.4)),
    ("phi3 long", other_rope(attention_factor=1.0)),
    ("phi3 long", other_rope(original_max_position_embeddings=64)),
    ("phi3 long", other_rope(dim=0, short_factor=(1.0,) * 6, long_factor=(1.0,) * 6)),
    ("llama yarn", other_rope(attention_factor=1.0)),
    ("llama yarn", other_rope(beta_fast=30.0, truncate=False)),
    ("llama dynamic", other_rope(factor=2.1)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{i} {name}" for i, (name, _) in enumerate(FAULTS)])
@torch.no_grad()
def test_a_planted_fault_is_seen(name: str, fault: Callable[[Decoder], None]) -> None:
    oracle = theirs(name)
    model = ours(oracle)
    fault(model)
    assert off(model.eval()(IDS), oracle(IDS).logits) > 2e-4


# ---- what is refused

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": -1}, "sliding_window must be a whole number from 1"),
    ("ministral", {"layer_types": ["sliding_attention"]}, "layer_types must be a list of 4 of"),
    ("ministral", {"layer_types": ["chunked_attention"] * 4}, "layer_types must be a list of 4 of"),
    ("ministral", {"sliding_window": None}, "sliding_window must be .* got nothing"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window must be true"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
    ("gemma2", {"hidden_activation": "relu"}, "hidden_activation must be"),
    ("gemma3", {"sliding_window": "7"}, "sliding_window"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be null"),
    ("phi3", {"resid_pdrop": "0.1"}, "resid_pdrop must be a number"),
    ("phi3 long", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor must be"),
    ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers must be a list of 4"),
    ("granite", {"logits_scaling": 0}, "logits_scaling must be a number above 0"),
    ("qwen3", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys", "message"), BAD)
def test_refused_by_key_and_value(name: str, keys: dict[str, Any], message: str) -> None:
    shape = {key: value for key, value in (SIZES | SHAPES[name] | keys).items() if value is not None or key in keys}
    with pytest.raises(fourbit.InputError, match=message):
        read_spec(shape)
