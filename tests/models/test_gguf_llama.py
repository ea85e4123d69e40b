"""A Llama in GGUF: names, rotary order and config against transformers, and what the metadata may not say."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, Keys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourbit.errors import InputError
from fourbit.models.families import read_spec as read_config
from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_model import iter_tensors, read_spec, rope_freqs_scaling
from fourbit.models.load import load_decoder
from fourbit.models.spec import Rope

Change = Callable[[GGUFWriter], Any]
SHAPES: dict[str, dict[str, Any]] = {
    "one key head": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "head_dim": 16},
    "five heads": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 40, "head_dim": 8},
    "tied": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "tie_word_embeddings": True},
    "biases": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "attention_bias": True}
    | {"mlp_bias": True},
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def llama_cpp_rows(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's converter: the two rotary halves of each head interleaved."""
    count, *rest = weight.shape
    return weight.reshape(heads, 2, count // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def says(key: str, value: Any) -> Change:
    """Metadata of the type that fits the value."""
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    return lambda writer: getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def vector(name: str, values: list[float]) -> Change:
    return lambda writer: writer.add_tensor(name, np.array(values, dtype=np.float32))


@pytest.fixture
def write_llama(oracle: Callable[..., Any], write_gguf: Callable[..., Path]) -> Callable[..., Path]:
    """What llama.cpp's converter writes for a Llama; `change` adds to it, `skip` leaves out a key or tensor."""

    def write(model: Any = None, *, change: Change = lambda _: None, skip: str = "") -> Path:
        model = model or oracle(**SHAPES["five heads"])
        config = model.config

        def fill(writer: GGUFWriter) -> None:
            numbers = {
                "block_count": config.num_hidden_layers,
                "context_length": config.max_position_embeddings,
                "embedding_length": config.hidden_size,
                "feed_forward_length": config.intermediate_size,
                "attention.head_count": config.num_attention_heads,
                "attention.head_count_kv": config.num_key_value_heads,
                "rope.dimension_count": config.head_dim,
                "attention.key_length": config.head_dim,
                "attention.value_length": config.head_dim,
                "rope.freq_base": float(config.rope_parameters["rope_theta"]),
                "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            }
            for key in numbers.keys() - {skip}:
                says(f"llama.{key}", numbers[key])(writer)
            change(writer)
            for name, tensor in model.state_dict().items():
                if name == skip or (config.tie_word_embeddings and name == "lm_head.weight"):
                    continue
                heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
                if (part := name.split(".")[-2]) in heads:
                    tensor = llama_cpp_rows(tensor, heads[part])
                for ours, theirs in NAMES.items():
                    name = name.replace(ours, theirs)
                writer.add_tensor(name, tensor.contiguous().numpy())

        return write_gguf(fill)

    return write


@pytest.mark.parametrize("shape", SHAPES)
def test_a_llama_written_as_llama_cpp_does_comes_back(
    shape: str, oracle: Callable[..., Any], write_llama: Callable[..., Path]
) -> None:
    model = oracle(**SHAPES[shape], rms_norm_eps=1e-5)
    opened = GGUFFile(write_llama(model))
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert read_spec(opened) == read_config(model.config.to_dict())
    found = dict(iter_tensors(opened, read_spec(opened)))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# ---- what the file may say: the key or tensor (without "llama."), what stands there, words of the refusal

ROPE = "rope_freqs.weight"
PLAIN = "(anything else is a model that is not supported), got"
ADDED: list[tuple[str, Change, str]] = [
    *(
        (key, says(key, value), f"{key} must be {words}")
        for key, value, words in (
            ("llama.expert_count", [8, 8], f"0 {PLAIN} array([8, 8]"),
            ("llama.rope.scaling.type", "su", "none, linear, yarn or longrope (Llama 3's is a tensor), got 'su'"),
            ("llama.attention.scale", 0.5, f"0 {PLAIN} 0.5"),
            ("llama.attention.causal", False, f"True {PLAIN} False"),
            ("llama.attention.causal", 1, f"True {PLAIN} 1"),
            ("llama.attention.sliding_window", 4096, f"0 {PLAIN} 4096"),
            ("llama.attention.sliding_window", [0, 4096], f"0 {PLAIN} array([   0, 4096]"),
            ("llama.attn_logit_softcapping", 50.0, f"0 {PLAIN} 50.0"),
            ("llama.rope.scaling.attn_factor", 1.5, f"1 {PLAIN} 1.5"),
            ("llama.rope.freq_base_swa", 1e4, "absent: no plain llama has it, and it may change what"),
            ("llama.rope.dimension_sections", [4, 4], "absent: no plain llama has it, and it may change what"),
            ("llama.rope.scaling.factor", [8], "a number above 0, at most 1e+06, got array([8]"),
            ("llama.rope.scale_linear", 0.0, "a number above 0, at most 1e+06, got 0.0"),
            ("llama.logit_scale", 2.0, f"0 or 1 {PLAIN} 2.0"),
            ("general.type", "adapter", "'model' (give the file of the model itself), got 'adapter'"),
            ("split.count", 3, "1 (join the files of the model first: llama-gguf-split --merge), got 3"),
        )
    ),
    (
        "no factor",
        says("llama.rope.scaling.type", "linear"),
        "factor must be a number above 0 beside rope.scaling.type linear, got no",
    ),
    ("another vocabulary", says("tokenizer.ggml.tokens", ["a", "b"]), "2 tokens but 'token_embd.weight' has 97 rows"),
    ("rope factors of zero", vector(ROPE, [1, 2, 0, 1]), "short_factor must be a list of 4 numbers above 0"),
    ("rope factors NaN", vector(ROPE, [math.nan] * 4), "short_factor must be a list of 4 numbers above 0"),
    (
        "rope factors beside another kind",
        lambda w: [vector(ROPE, [8] * 4)(w), says("llama.rope.scaling.factor", 2.0)(w)],
        "rope.scaling.type must be none beside tensor 'rope_freqs'",
    ),
    ("another vocabulary size", says("llama.vocab_size", 96), "embed_tokens.weight must be [96, 40], got [97, 40]"),
    (
        "too few rope factors",
        vector(ROPE, [8, 8]),
        "must have shape [4], one factor a pair of a head, got [2]",
    ),
    ("a matrix of them", lambda w: w.add_tensor(ROPE, np.ones((4, 4), np.float32)), "must have shape [4]"),
    (
        "a tensor no Llama has",
        vector("blk.0.attn_q_norm.weight", [1]),
        "unknown: model.layers.0.self_attn.q_norm.weight",
    ),
    ("a norm's bias", vector("output_norm.bias", [1]), "belongs to no model of the families"),
    ("a layer N", vector("blk.N.attn_q.weight", [1]), "belongs to no model of the families"),
    ("a layer 00", vector("blk.00.attn_q.weight", [1]), "belongs to no model of the families"),
    ("a fourth layer", vector("blk.3.attn_q.weight", [1]), "1 unknown: model.layers.3.self_attn.q_proj.weight"),
    ("a misshaped tensor", vector("blk.0.attn_q.bias", [1]), "q_proj.bias must be [40], got [1]"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in ADDED], ids=[case[0] for case in ADDED])
def test_what_would_change_the_model_is_refused(change: Change, words: str, write_llama: Callable[..., Path]) -> None:
    path = write_llama(change=change)
    with pytest.raises(InputError) as caught:
        load_decoder(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


COUNT, ABOVE = "must be a whole number from 1 to", "must be a number above 0"
SIZES = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
CHANGED: list[tuple[str, Any, str]] = [
    *((key, None, f"llama.{key} {COUNT}") for key in SIZES),
    *((f"model.{n}.weight", None, f"1 missing: model.{n}") for n in ("norm", "embed_tokens", "layers.1.mlp.up_proj")),
    ("block_count", 2**31 - 1, f"block_count {COUNT} 1024, got 2147483647"),
    ("block_count", 500, "4473 missing: model.layers."),
    ("block_count", 2, "unknown: model.layers.2."),
    *(("block_count", value, f"{COUNT} 1024, got {value!r}") for value in (0, "3", True)),
    ("embedding_length", 4096, "model.embed_tokens.weight must be [97, 4096], got [97, 40]"),
    ("feed_forward_length", 85, "gate_proj.weight must be [85, 40], got [84, 40]"),
    ("attention.head_count", 4, "head_count must be a multiple of llama.attention.head_count_kv (5)"),
    ("attention.head_count", 10, "q_proj.weight must be [80, 40], got [40, 40]"),
    ("rope.dimension_count", 7, "rope.dimension_count must be even"),
    ("attention.value_length", 4, "part of a head that is turned (8), got 4"),
    *(
        (key, value, f"llama.{key} {ABOVE}")
        for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon")
        for value in (0.0, -1.0, math.nan, math.inf)
    ),
]


@pytest.mark.parametrize(("key", "value", "words"), CHANGED)
def test_sizes_and_tensors_must_be_there_and_agree(
    key: str, value: Any, words: str, write_llama: Callable[..., Path]
) -> None:
    change: Change = (lambda _: None) if value is None else says(f"llama.{key}", value)
    with pytest.raises(InputError) as caught:
        load_decoder(write_llama(change=change, skip=key))
    assert words in str(caught.value)


@pytest.mark.parametrize("architecture", ["qwen2moe", "gemma", "Llama"])
def test_another_architecture_is_named(architecture: str, write_gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=rf"general\.architecture must be one of llama, .* got {architecture!r}"):
        load_decoder(write_gguf(architecture=architecture))


LINEAR = "llama.rope.scaling.type"
SCALED: dict[str, tuple[dict[str, Any], float | None]] = {  # what llama.cpp makes of it: a factor, or none
    "type and factor": ({LINEAR: "linear", "llama.rope.scaling.factor": 2.5}, 2.5),
    "a factor alone": ({"llama.rope.scaling.factor": 8.0}, 8.0),
    "the key of old": ({"llama.rope.scale_linear": 4.0}, 4.0),
    "both: the new one": ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 2.0}, 2.0),
    "linear, and the key of old": ({LINEAR: "linear", "llama.rope.scale_linear": 4.0}, 4.0),
    "none, and a factor": ({LINEAR: "none", "llama.rope.scaling.factor": 8.0}, None),
    "a factor of one": ({"llama.rope.scaling.factor": 1.0}, None),
    "a whole factor": ({"llama.rope.scaling.factor": 4}, 4.0),
    "without effect": ({"llama.rope.scaling.finetuned": True, "llama.rope.scaling.original_context_length": 64}, None),
}


@pytest.mark.parametrize("case", SCALED)
def test_a_factor_scales_as_in_llama_cpp_with_a_type_or_without(
    case: str, oracle: Callable[..., Any], write_llama: Callable[..., Path]
) -> None:
    keys, factor = SCALED[case]
    rope = {} if factor is None else {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": factor}}
    model = oracle(**SHAPES["five heads"], **rope)
    path = write_llama(model, change=lambda writer: [says(*entry)(writer) for entry in keys.items()])
    ours = load_decoder(path)
    assert ours.spec.rope == (Rope() if factor is None else Rope(kind="linear", factor=factor))
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=0)


def test_factors_of_one_are_none(write_llama: Callable[..., Path]) -> None:
    assert read_spec(GGUFFile(write_llama(change=vector(ROPE, [1.0] * 4)))).rope.kind == "default"


def test_keys_that_leave_a_llama_plain_are_read_over(write_llama: Callable[..., Path]) -> None:
    plain: dict[str, Any] = {"expert_count": 0, "attention.causal": True, "logit_scale": 1.0, "vocab_size": 97}
    plain |= {"attention.sliding_window": 0, "attention.scale": 0.0, "tensor_data_layout": "Meta AI original pth"}
    path = write_llama(change=lambda writer: [says(f"llama.{key}", value)(writer) for key, value in plain.items()])
    assert read_spec(GGUFFile(path)) == read_spec(GGUFFile(write_llama()))


def test_a_head_of_its_own_size_needs_no_rotary_size(
    oracle: Callable[..., Any], write_llama: Callable[..., Path]
) -> None:
    model = oracle(**SHAPES["one key head"] | {"head_dim": 8})  # a share would be 16
    assert load_decoder(write_llama(model, skip="rope.dimension_count")).spec.head_dim == 8


KEYS = [v for kind in (Keys.Rope, Keys.Attention, Keys.LLM) for v in vars(kind).values() if str(v)[:6] == "{arch}"]
SAID_TO_NOBODY = {"attention.layer_norm_epsilon", "expert_used_count", "pooling_type", "tensor_data_layout"}
SAID_TO_NOBODY |= {"rope.scaling.finetuned", "rope.scaling.original_context_length"}
metadata = st.one_of(
    st.integers(-(2**63), 2**64 - 1) | st.integers(-1, 9) | st.floats() | st.booleans() | st.text(max_size=5),
    st.sampled_from(["linear", "none", "yarn", 0.0, 1.0]),
    st.lists(st.text(max_size=3), max_size=3),
    st.lists(st.integers(0, 9), max_size=3).map(np.array),
    st.lists(st.floats(), max_size=3).map(np.array),
)


@given(changes=st.dictionaries(st.sampled_from(KEYS).map(lambda key: key[7:]), metadata, min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_value_of_any_key_is_obeyed_refused_or_plain(
    changes: dict[str, Any], write_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """The keys are all that gguf-py knows of ropes, attention and models."""
    file = GGUFFile(tmp_path / "m.gguf" if (tmp_path / "m.gguf").exists() else write_llama())
    plain = read_spec(file)
    file.metadata |= {f"llama.{key}": value for key, value in changes.items()}
    try:
        spec = read_spec(file)
    except InputError as error:
        assert any(key in str(error) for key in changes) and len(str(error)) < 400
        return
    for key, value in changes.items():
        if key not in SAID_TO_NOBODY:
            assert isinstance(value, str if key == "rope.scaling.type" else int | float), (key, value)
    obeyed = {"context_length": "max_position_embeddings", "rope.freq_base": "rope_theta"}
    obeyed |= {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "block_count": "num_hidden_layers"}
    obeyed |= {"embedding_length": "hidden_size", "feed_forward_length": "intermediate_size"}
    obeyed |= {"attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads"}
    said = {field: float(np.float32(changes[key])) for key, field in obeyed.items() if key in changes}
    said["rope"] = replace(plain.rope, theta=pytest.approx(said.pop("rope_theta", plain.rope.theta)))
    if (factor := float(np.float32(changes.get("rope.scaling.factor", 1)))) != 1 and (
        changes.get("rope.scaling.type") != "none"
    ):
        said["rope"] = replace(said["rope"], kind="linear", factor=pytest.approx(factor))
    for field, value in vars(spec).items():
        expected = said.get(field, getattr(plain, field))
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected) or field == "config"


# ---- Llama 3's rope factors


def llama_cpp_factors(rope: Mapping[str, float], theta: float, head_dim: int) -> list[float]:
    """llama.cpp's converter, in fp32 as there: what each rotary frequency is divided by."""
    factors = []
    for freq in 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)):
        wavelen = 2 * math.pi / freq
        low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old / low:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelen - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    return torch.tensor(factors, dtype=torch.float32).tolist()


ROPES = {
    "llama 3.1": ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 8192, 500000.0, 128),
    "llama 3.2": ({"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 8192, 500000.0, 64),
    "another band": ({"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 6.5}, 1000, 10000.0, 128),
    "small heads": ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 8192, 500000.0, 8),
}


@pytest.mark.parametrize("case", ROPES)
@torch.no_grad()
def test_rope_factors_turn_as_the_llama_3_rule_that_they_came_from(
    case: str, oracle: Callable[..., Any], write_llama: Callable[..., Path]
) -> None:
    """Llama 3's own band is named in the Spec; another keeps its divisors, and computes the same."""
    numbers, original, theta, head_dim = ROPES[case]
    rope = {**numbers, "original_max_position_embeddings": original}
    factors = llama_cpp_factors(rope, theta, head_dim)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head_dim, "hidden_size": head_dim * 2}
    model = oracle(**sizes, rope_parameters={"rope_type": "llama3", "rope_theta": theta, **rope})
    ours = load_decoder(write_llama(model, change=vector(ROPE, factors)))
    if case == "another band":
        assert ours.spec.rope.kind == "longrope" and ours.spec.rope.short_factor == ours.spec.rope.long_factor
    else:
        assert ours.spec.rope == Rope(theta, kind="llama3", **rope)
    ids = torch.arange(400).view(1, 400) % 97
    expected = model(ids).logits
    assert (ours(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_band_scaled_as_a_whole_is_llama_3s() -> None:
    """(low 2, high 8, 16384) blends as (1, 4, 8192) does; the answer is the form with low = 1."""
    rope = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 16384}
    found = rope_freqs_scaling(llama_cpp_factors(rope, 500000.0, 128), 500000.0, 4096)
    own = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert found == own | {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize("spoil", [0, 20, 33, 63])
def test_one_other_rope_factor_is_kept(spoil: int) -> None:
    numbers, original, theta, head_dim = ROPES["llama 3.1"]
    factors = llama_cpp_factors({**numbers, "original_max_position_embeddings": original}, theta, head_dim)
    factors[spoil] *= 1.01
    found = rope_freqs_scaling(factors, theta, 4096)
    assert (found["rope_type"], found["short_factor"], found["long_factor"]) == ("longrope", factors, factors)
