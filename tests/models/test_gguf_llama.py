"""A Llama in GGUF: names, rotary order and config against transformers, and what the metadata may not say."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from torch import Tensor

from fourbit.errors import InputError
from fourbit.models.families import read_spec as read_config
from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_model import iter_tensors, llama3_scaling, read_spec
from fourbit.models.load import load_model
from fourbit.models.spec import RopeScaling

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
            ("llama.expert_count", 8, f"0 {PLAIN} 8"),
            ("llama.expert_count", [8, 8], f"0 {PLAIN} array([8, 8]"),
            ("llama.rope.scaling.type", "yarn", "none or linear (Llama 3's is a tensor), got 'yarn'"),
            ("llama.attention.scale", 0.5, f"0.0 {PLAIN} 0.5"),
            ("llama.attention.causal", False, f"True {PLAIN} False"),
            ("llama.logit_scale", 2.0, f"0.0 {PLAIN} 2.0"),
            ("general.type", "adapter", "'model' (give the file of the model itself), got 'adapter'"),
            ("split.count", 3, "1 (join the files of the model first: llama-gguf-split --merge), got 3"),
        )
    ),
    ("no factor", says("llama.rope.scaling.type", "linear"), "factor must be a number above 0, at most 1e+06, got no"),
    ("another vocabulary", says("tokenizer.ggml.tokens", ["a", "b"]), "2 tokens but 'token_embd.weight' has 97 rows"),
    ("unknown rope factors", vector(ROPE, [1, 2, 7, 1]), "follow no Llama 3 rule"),
    ("rope factors NaN", vector(ROPE, [math.nan] * 4), "follow no Llama 3 rule"),
    (
        "too few rope factors",
        vector(ROPE, [8, 8]),
        "must have shape [4], one factor a pair of a head, got [2]",
    ),
    ("a matrix of them", lambda w: w.add_tensor(ROPE, np.ones((4, 4), np.float32)), "must have shape [4]"),
    ("a tensor no Llama has", vector("blk.0.attn_q_norm.weight", [1]), "belongs to no Llama"),
    ("a norm's bias", vector("output_norm.bias", [1]), "belongs to no Llama"),
    ("a layer N", vector("blk.N.attn_q.weight", [1]), "belongs to no Llama"),
    ("a layer 00", vector("blk.00.attn_q.weight", [1]), "belongs to no Llama"),
    ("a fourth layer", vector("blk.3.attn_q.weight", [1]), "1 unknown: model.layers.3.self_attn.q_proj.weight"),
    ("a misshaped tensor", vector("blk.0.attn_q.bias", [1]), "q_proj.bias must be [40], got [1]"),
]


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in ADDED], ids=[case[0] for case in ADDED])
def test_what_would_change_the_model_is_refused(change: Change, words: str, write_llama: Callable[..., Path]) -> None:
    path = write_llama(change=change)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


COUNT, ABOVE = "must be a whole number from 1 to", "must be a number above 0"
SIZES = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]
CHANGED: list[tuple[str, Any, str]] = [
    *((key, None, f"llama.{key} {COUNT}") for key in SIZES),
    *((f"model.{n}.weight", None, f"1 missing: model.{n}") for n in ("norm", "embed_tokens", "layers.1.mlp.up_proj")),
    ("block_count", 2**31 - 1, f"block_count {COUNT} 1024, got 2147483647"),
    ("block_count", 500, "block_count must be at most 30, the tensors in the file, got 500"),
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
        load_model(write_llama(change=change, skip=key))
    assert words in str(caught.value)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma", "Llama"])
def test_another_architecture_is_named(architecture: str, write_gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=rf"general\.architecture must be 'llama', .* got {architecture!r}"):
        load_model(write_gguf(architecture=architecture))


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        (
            lambda w: [says("llama.rope.scaling.type", "linear")(w), says("llama.rope.scaling.factor", 2.5)(w)],
            RopeScaling("linear", 2.5),
        ),
        (vector(ROPE, [1.0] * 4), None),
    ],
)
def test_linear_scaling_is_carried_over_and_factors_of_one_are_none(
    change: Change, scaling: RopeScaling | None, write_llama: Callable[..., Path]
) -> None:
    assert read_spec(GGUFFile(write_llama(change=change))).rope_scaling == scaling


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
def test_llama3_scaling_is_found_from_its_factors(
    case: str, oracle: Callable[..., Any], write_llama: Callable[..., Path]
) -> None:
    numbers, original, theta, head_dim = ROPES[case]
    rope = {**numbers, "original_max_position_embeddings": original}
    factors = llama_cpp_factors(rope, theta, head_dim)
    assert llama3_scaling(factors, theta, head_dim) == RopeScaling("llama3", **rope)
    model = oracle(num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim, hidden_size=head_dim * 2)
    model.config.rope_parameters["rope_theta"] = theta
    opened = GGUFFile(write_llama(model, change=vector(ROPE, factors)))
    assert read_spec(opened).rope_scaling == RopeScaling("llama3", **rope)
    assert not any("rope" in name for name, _ in iter_tensors(opened, read_spec(opened)))


def test_a_band_scaled_as_a_whole_is_the_same_function() -> None:
    """(low 2, high 8, 16384) blends as (1, 4, 8192) does; the answer is the form with low = 1."""
    rope = {"factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 16384}
    found = llama3_scaling(llama_cpp_factors(rope, 500000.0, 128), 500000.0, 128)
    assert found is not None
    assert llama_cpp_factors(asdict(found), 500000.0, 128) == pytest.approx(
        llama_cpp_factors(rope, 500000.0, 128), rel=1e-5
    )


@pytest.mark.parametrize("spoil", [0, 20, 33, 63])
def test_one_wrong_rope_factor_is_not_taken_for_llama3(spoil: int) -> None:
    numbers, original, theta, head_dim = ROPES["llama 3.1"]
    factors = llama_cpp_factors({**numbers, "original_max_position_embeddings": original}, theta, head_dim)
    factors[spoil] *= 1.01
    assert llama3_scaling(factors, theta, head_dim) is None
