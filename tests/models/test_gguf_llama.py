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
from fourbit.models.families import read_spec
from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_config import llama3_scaling
from fourbit.models.load import load_model
from fourbit.models.spec import RopeScaling

Change = Callable[[GGUFWriter], None]


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_rows(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp's converter: the two rotary halves of each head interleaved."""
    count, *rest = weight.shape
    return weight.reshape(heads, 2, count // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


GGUF_NAMES = {
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


def write_llama(path: Path, model: Any, *, change: Change = lambda _: None, skip: str = "") -> None:
    """What llama.cpp's converter writes for a Llama; `change` adds to it, `skip` leaves out a key or tensor."""
    config = model.config
    writer = GGUFWriter(path, "llama")
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
    }
    for key, number in numbers.items():
        if key != skip:
            writer.add_uint32(f"llama.{key}", number)
    constants = {
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    for key, constant in constants.items():
        if key != skip:
            writer.add_float32(f"llama.{key}", constant)
    change(writer)
    for name, tensor in model.state_dict().items():
        if name == skip or (config.tie_word_embeddings and name == "lm_head.weight"):
            continue
        if "q_proj" in name:
            tensor = llama_cpp_rows(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = llama_cpp_rows(tensor, config.num_key_value_heads)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    finish(writer)


SHAPES: dict[str, dict[str, Any]] = {
    "three heads, one for keys": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 48,
        "head_dim": 16,
    },
    "five heads": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 40, "head_dim": 8},
    "tied": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "tie_word_embeddings": True},
    "biases": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_llama_written_as_llama_cpp_does_comes_back(shape: str, oracle: Callable[..., Any], tmp_path: Path) -> None:
    model = oracle(**SHAPES[shape], rms_norm_eps=1e-5)
    write_llama(tmp_path / "m.gguf", model)
    opened = GGUFFile(tmp_path / "m.gguf")
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = dict(opened.iter_tensors())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert opened.spec() == read_spec(model.config.to_dict())


# ---- what the metadata may say


def vector(name: str, values: list[float]) -> Change:
    return lambda writer: writer.add_tensor(name, np.array(values, dtype=np.float32))


ROPE = "rope_freqs.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "experts": (lambda w: w.add_uint32("llama.expert_count", 8), "llama.expert_count must be 0 "),
    "yarn": (
        lambda w: w.add_string("llama.rope.scaling.type", "yarn"),
        "rope.scaling.type must be none or linear (Llama 3's is a tensor), got 'yarn'",
    ),
    "linear, no factor": (
        lambda w: w.add_string("llama.rope.scaling.type", "linear"),
        "scaling.factor must be a number above 0, at most 1e+06, got nothing",
    ),
    "attention scale": (lambda w: w.add_float32("llama.attention.scale", 0.5), "llama.attention.scale must be 0.0 "),
    "not causal": (lambda w: w.add_bool("llama.attention.causal", False), "llama.attention.causal must be True "),
    "logit scale": (lambda w: w.add_float32("llama.logit_scale", 2.0), "model that is not supported), got 2.0"),
    "an adapter": (
        lambda w: w.add_string("general.type", "adapter"),
        "give the file of the model itself), got 'adapter'",
    ),
    "a split file": (lambda w: w.add_uint16("split.count", 3), "join the files of the model first"),
    "another vocabulary": (lambda w: w.add_array("tokenizer.ggml.tokens", ["a", "b"]), "2 tokens but"),
    "unknown rope factors": (vector(ROPE, [1, 2, 7, 1, 9, 9, 3, 2]), "follow no Llama 3 rule"),
    "too few rope factors": (vector(ROPE, [8, 8]), "follow no Llama 3 rule"),
    "rope factors NaN": (vector(ROPE, [math.nan] * 8), "follow no Llama 3 rule"),
    "rope factors as a matrix": (lambda w: w.add_tensor(ROPE, np.ones((4, 4), np.float32)), "a short vector"),
    "a tensor no Llama has": (vector("blk.0.attn_q_norm.weight", [1]), "belongs to no Llama"),
    "a norm's bias": (vector("output_norm.bias", [1]), "belongs to no Llama"),
    "a tensor of a fourth layer": (
        vector("blk.3.attn_q.weight", [1]),
        "1 unknown: model.layers.3.self_attn.q_proj.weight",
    ),
    "a misshaped tensor": (vector("blk.0.attn_q.bias", [1]), "q_proj.bias must be [48], got [1]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_model_is_refused(case: str, oracle: Callable[..., Any], tmp_path: Path) -> None:
    change, words = REFUSED[case]
    path = tmp_path / "m.gguf"
    write_llama(path, oracle(**SHAPES["three heads, one for keys"]), change=change)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


MISSING = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"]


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_size_is_named(key: str, oracle: Callable[..., Any], tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", oracle(**SHAPES["five heads"]), skip=key)
    with pytest.raises(InputError, match=rf"llama\.{key} must be a whole number .* got nothing"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight", "layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(name: str, oracle: Callable[..., Any], tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", oracle(**SHAPES["five heads"]), skip=f"model.{name}")
    with pytest.raises(InputError, match=f"1 missing: model.{name}"):
        load_model(tmp_path / "m.gguf")


SIZES: dict[str, tuple[str, Any, str]] = {
    "layers beyond the file": (
        "block_count",
        2**31 - 1,
        "block_count must be a whole number from 1 to 1024, got 2147483647",
    ),
    "more layers than tensors": (
        "block_count",
        500,
        "block_count must be at most 30, the tensors in the file, got 500",
    ),
    "layers too few": ("block_count", 2, "unknown: model.layers.2."),
    "layers 0": ("block_count", 0, "must be a whole number from 1 to 1024, got 0"),
    "layers as text": ("block_count", "3", "must be a whole number from 1 to 1024, got '3'"),
    "layers true": ("block_count", True, "must be a whole number from 1 to 1024, got True"),
    "wider than the tensors": ("embedding_length", 4096, "model.embed_tokens.weight must be [97, 4096], got [97, 40]"),
    "feed-forward of another size": ("feed_forward_length", 85, "gate_proj.weight must be [85, 40], got [84, 40]"),
    "another head count": (
        "attention.head_count",
        4,
        "head_count must be a multiple of llama.attention.head_count_kv (5)",
    ),
    "more heads": ("attention.head_count", 10, "q_proj.weight must be [80, 40], got [40, 40]"),
    "an odd head": ("rope.dimension_count", 7, "rope.dimension_count must be even"),
    "values of another size": ("attention.value_length", 4, "part of a head that is turned (8), got 4"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_must_agree_with_the_tensors(case: str, oracle: Callable[..., Any], tmp_path: Path) -> None:
    key, value, words = SIZES[case]
    add = {bool: "add_bool", int: "add_uint32", str: "add_string"}[type(value)]
    change = lambda writer: getattr(writer, add)(f"llama.{key}", value)  # noqa: E731
    write_llama(tmp_path / "m.gguf", oracle(**SHAPES["five heads"]), change=change, skip=key)
    with pytest.raises(InputError) as caught:
        load_model(tmp_path / "m.gguf")
    assert words in str(caught.value)


@pytest.mark.parametrize("key", ["rope.freq_base", "attention.layer_norm_rms_epsilon"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_constants_must_be_numbers_above_0(key: str, value: float, oracle: Callable[..., Any], tmp_path: Path) -> None:
    change: Change = lambda writer: writer.add_float32(f"llama.{key}", value)  # noqa: E731
    write_llama(tmp_path / "m.gguf", oracle(**SHAPES["five heads"]), change=change, skip=key)
    with pytest.raises(InputError, match=rf"llama\.{key} must be a number above 0"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("architecture", ["qwen2", "gemma", "Llama"])
def test_another_architecture_is_named(architecture: str, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", architecture)
    finish(writer)
    with pytest.raises(InputError, match=rf"general\.architecture must be 'llama', .* got {architecture!r}"):
        load_model(tmp_path / "m.gguf")


def test_linear_rope_scaling_is_carried_over(oracle: Callable[..., Any], tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 2.5)

    write_llama(tmp_path / "m.gguf", oracle(**SHAPES["five heads"]), change=change)
    assert GGUFFile(tmp_path / "m.gguf").spec().rope_scaling == RopeScaling("linear", 2.5)


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
def test_llama3_scaling_is_found_from_its_factors(case: str, oracle: Callable[..., Any], tmp_path: Path) -> None:
    numbers, original, theta, head_dim = ROPES[case]
    rope = {**numbers, "original_max_position_embeddings": original}
    factors = llama_cpp_factors(rope, theta, head_dim)
    assert llama3_scaling(factors, theta, head_dim) == RopeScaling("llama3", **rope)
    model = oracle(num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim, hidden_size=head_dim * 2)
    model.config.rope_parameters["rope_theta"] = theta
    write_llama(tmp_path / "m.gguf", model, change=vector(ROPE, factors))
    opened = GGUFFile(tmp_path / "m.gguf")
    assert opened.spec().rope_scaling == RopeScaling("llama3", **rope)
    assert not any("rope" in name for name, _ in opened.iter_tensors())


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


def test_factors_of_one_mean_no_scaling(oracle: Callable[..., Any], tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", oracle(**SHAPES["five heads"]), change=vector(ROPE, [1.0] * 4))
    assert GGUFFile(tmp_path / "m.gguf").spec().rope_scaling is None
