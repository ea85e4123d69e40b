"""Configs: what is read, what is refused by key and value, what is ignored and reported."""

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fourbit.errors import InputError
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.spec import Rope, Spec

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ORIGINAL = "original_max_position_embeddings"


def test_defaults_and_null_means_default() -> None:
    spec = read_spec(BASE)
    assert (spec.num_key_value_heads, spec.head_dim) == (4, 16)
    assert (spec.rms_norm_eps, spec.rope) == (1e-6, Rope())
    assert not (spec.tie_word_embeddings or spec.attention_bias or spec.mlp_bias)
    keys = ["head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "rope_theta", "attention_bias"]
    nulls = dict.fromkeys([*keys, "sliding_window", "quantization_config", "max_position_embeddings"])
    assert read_spec(BASE | nulls) == spec


BAND = Rope(5e5, 0, "llama3", 32.0)


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, Rope(5e5)),
        ({"rope_theta": 500000}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0}, Rope(5e5)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, Rope(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(1e4, 0, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2}}, Rope(1e4, 0, "linear", 2.0)),
        ({"rope_scaling": LLAMA3, "rope_theta": 5e5}, BAND),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, BAND),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "rope_scaling": LLAMA3, "rope_theta": 5e5}, BAND),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {}}, Rope(5e5)),
        ({"rope_scaling": {"type": "default", "factor": 1.0}}, Rope(1e4)),
    ],
)
def test_rope_in_the_words_of_both_versions(keys: dict[str, Any], rope: Rope) -> None:
    assert read_spec(BASE | keys).rope == rope


def test_what_stands_beside_the_tables_of_gemma3_fills_them_as_in_transformers() -> None:
    from transformers import Gemma3TextConfig

    tables = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    local, linear = {"rope_local_base_freq": 3e4}, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    own = {"rope_parameters": {kind: how | {"rope_theta": 7e4} for kind, how in tables.items()}}
    gemma3 = BASE | {"model_type": "gemma3_text", "rope_parameters": tables}
    for beside in ({}, {"rope_theta": 5e4}, local, {"rope_theta": 5e4} | local | linear, local | own | linear):
        found = Gemma3TextConfig(**copy.deepcopy(gemma3 | beside)).rope_parameters
        full, sliding = found["full_attention"], found["sliding_attention"]
        spec = read_spec(gemma3 | beside)
        assert spec.rope == Rope(full["rope_theta"], 0, full["rope_type"], full.get("factor", 1.0))
        assert spec.local_rope == Rope(sliding["rope_theta"])


@pytest.mark.parametrize(
    ("beside", "length"), [({}, {"phi3": 4096}), ({ORIGINAL: 32}, {}), ({ORIGINAL: None}, {"": 16})]
)
def test_an_original_length_beside_the_table_wins_as_in_transformers(beside: Any, length: Any) -> None:
    """Phi-3 has one there by default, so that one in the table alone says nothing."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    tables = {"yarn": {"factor": 4.0}, "llama3": LLAMA3, "longrope": factors}
    for model_type, kind in (("llama", "yarn"), ("qwen3", "llama3"), ("mistral", "longrope"), ("phi3", "longrope")):
        table = tables[kind] | {"rope_type": kind, ORIGINAL: 16}
        made = read_spec(BASE | {"model_type": model_type, "rope_scaling": table, **beside}).rope
        wanted = beside.get(ORIGINAL) or length.get(model_type, 16)
        assert made.original_max_position_embeddings == wanted


def test_a_window_that_is_not_said_is_smollm3s_own() -> None:
    """None, where transformers has 4096 in other families."""
    keys = BASE | {"use_sliding_window": True, "no_rope_layers": [1, 0], "max_window_layers": 1}
    for family, windows in (("smollm3", ()), ("qwen2", (0, 4096))):
        assert read_spec(keys | {"model_type": family}).windows == windows
    assert read_spec(keys | {"model_type": "smollm3", "sliding_window": 8}).windows == (0, 8)


def test_llama3_falls_back_to_the_context_length() -> None:
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    found = read_spec(BASE | {"rope_scaling": rope, "max_position_embeddings": 4096}).rope
    assert found.original_max_position_embeddings == 4096


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": {key: value for key, value in (LLAMA3 | changes).items() if value is not ...}}


def only_full(local: Any) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": local}}


NO_SIZES = (0, -1, 1.0, "64", True, [], {}, 1 << 40)
NO_NUMBERS = (0, float("nan"), float("inf"))
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({key: ...}, f"{key} must .* got nothing") for key in BASE),
    *(({key: bad}, f"{key} must be a whole number") for key in list(BASE)[1:] for bad in NO_SIZES),
    ({"vocab_size": 10**400}, "vocab_size .* got 10{20,}.* more characters"),
    ({"num_hidden_layers": 2000}, "num_hidden_layers must be a whole number from 1 to 1024, got 2000"),
    ({"max_position_embeddings": -5}, "max_position_embeddings"),
    ({"model_type": "falcon"}, "model_type must be one of 'llama'.* got 'falcon'"),
    ({"model_type": "x" * 1000}, "model_type .* got .x{20,80} [.]{3}"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or .* got 'gelu'"),
    ({"hidden_act": ["silu"]}, "hidden_act must be 'silu'"),
    ({"sliding_window": 4096}, "sliding_window must be null .* got 4096"),
    ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be a list of 'full_attention' alone"),
    ({"layer_types": "full_attention"}, "layer_types"),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config must be absent, or of .*, got .*gptq",
    ),
    *(({"quantization_config": bad}, "quantization_config must be absent") for bad in ([], [1], [[]], 5, "fp8", True)),
    *(
        ({"model_type": "qwen3", "layer_types": bad}, "layer_types must be a list of 2")
        for bad in (5, True, 0.5, "x", [5])
    ),
    *(
        ({"model_type": "gemma3_text"} | only_full(bad), "rope_parameters must be an object for")
        for bad in (5, True, [1])
    ),
    ({"model_type": "gemma3_text", "rope_scaling": 5} | only_full(None), "rope_scaling must be null or an object"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, ORIGINAL: 16}}, "max_position_embeddings must be"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5"),
    ({"hidden_size": 66}, r"hidden_size \(66\) must be a multiple of num_attention_heads \(4\)"),
    ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
    ({"num_key_value_heads": 8}, "must be a multiple of num_key_value_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number"),
    ({"head_dim": 15}, "head_dim must be even and positive .* got 15"),
    ({"hidden_size": 4}, "head_dim must be even and positive .* got 1"),
    ({"hidden_size": 2, "num_attention_heads": 4}, "hidden_size"),
    ({"head_dim": "16"}, "head_dim must be a whole number"),
    *(({"rms_norm_eps": bad}, "rms_norm_eps must be a number above 0") for bad in (-1, "1", True, 2, *NO_NUMBERS)),
    *(({"rope_theta": bad}, "rope_theta must be a number above 0") for bad in (-1, "1e4", 10**400, *NO_NUMBERS)),
    *(({key: bad}, f"{key} must be true or false") for key in FLAGS for bad in (1, "true", [])),
    *(({"rope_scaling": bad}, "rope_scaling must be null or an object") for bad in ("linear", 2, [])),
    ({"rope_parameters": 5}, "rope_parameters must be null or an object, got 5"),
    *((rope(rope_type=bad), "rope_scaling.rope_type must be .* got ") for bad in ("xpos", "proportional", None, 3, [])),
    ({"rope_scaling": {"type": "xpos"}}, "rope_scaling.type must be .* got 'xpos'"),
    (rope(factor=...), "rope_scaling.factor must be a number above 0, .* got nothing"),
    (rope(factor=-8), "rope_scaling.factor"),
    (rope(low_freq_factor=...), "rope_scaling.low_freq_factor"),
    (rope(high_freq_factor="4"), "rope_scaling.high_freq_factor"),
    (rope(high_freq_factor=1.0), r"low_freq_factor must be below high_freq_factor \(1.0\), got 1.0"),
    (rope(original_max_position_embeddings=0), "rope_scaling.original_max_position_embeddings"),
    (rope(original_max_position_embeddings=...), "rope_scaling.original_max_position_embeddings .* got nothing"),
    (rope(partial_rotary_factor=0.25), "rope_scaling.partial_rotary_factor must be 1, got 0.25"),
    (
        {"rope_scaling": {"factor": 8.0}},
        "rope_scaling.type must be one of default, linear, .* beside a factor .8.0., got not",
    ),
    (rope(rope_type="default"), "rope_scaling.rope_type must be another kind beside a factor"),
    (rope() | {"rope_parameters": LLAMA3 | {"factor": 8.0}}, "rope_parameters must be what rope_scaling is"),
    (rope() | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, "rope_parameters must be what rope_scaling is"),
    ({"partial_rotary_factor": True}, "partial_rotary_factor must be 1, got True"),
    ({"attention_dropout": 2}, "attention_dropout must be a number above 0, at most 1, got 2"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters must be .* of plain values"),
]


@pytest.mark.parametrize(
    ("keys", "message"), REFUSED, ids=[f"{i} {next(iter(keys))}" for i, (keys, _) in enumerate(REFUSED)]
)
def test_refused_by_key_and_value(keys: dict[str, Any], message: str) -> None:
    data = {key: value for key, value in (BASE | keys).items() if value is not ...}
    with pytest.raises(InputError, match=message):
        read_spec(data)


@pytest.mark.parametrize("data", [[], "llama", 3, None])
def test_only_objects(data: Any) -> None:
    with pytest.raises(InputError, match="must be a JSON object"):
        read_spec(data)


def test_unknown_keys_are_ignored() -> None:
    unknown = {f"key_{i}": i + 1 for i in range(200)} | {"attention_dropout": 0.0, "task_specific_params": None}
    hostile = {"auto_map": {"AutoModel": "x--evil.Model"}, "_attn_implementation_internal": "x/y"}
    harmless = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "eos_token_id": [1, 2]}
    assert read_spec(BASE | unknown | hostile | harmless) == read_spec(BASE)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 2, "rope_theta": 5e5},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 20, "rms_norm_eps": 1e-5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 4096},
        {"rope_scaling": LLAMA3},
    ],
)
def test_what_is_written_is_read_again(keys: dict[str, Any]) -> None:
    spec = read_spec(BASE | keys | {"torch_dtype": "bfloat16"})
    written = Decoder(spec).settings()
    assert read_spec(json.loads(json.dumps(written))) == spec
    assert written == BASE | keys | {"architectures": ["LlamaForCausalLM"]}


def test_a_spec_made_or_changed_by_hand_has_no_config() -> None:
    with pytest.raises(InputError, match=r"made by hand, .*read_spec"):
        Decoder(Spec(97, 64, 128, 2, 4, 2, 16)).settings()
    with pytest.raises(InputError, match=r"made by hand, .*read_spec"):
        Decoder(dataclasses.replace(read_spec(BASE), num_hidden_layers=3)).settings()


# ---- what transformers makes of the same keys

TRIED: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.sampled_from([97, 96, 0, "97", 97.0]),
    "hidden_size": st.sampled_from([48, 60, 50, True]),
    "num_attention_heads": st.sampled_from([4, 3, 6, None]),
    "num_key_value_heads": st.sampled_from([None, 1, 2, 4, 3, 0]),
    "head_dim": st.sampled_from([None, 8, 12, 7, "8", 16.0]),
    "rms_norm_eps": st.sampled_from([1e-5, 0.1, 0, "1e-5", None]),
    "hidden_act": st.sampled_from(["silu", "swish", "gelu", None]),
    "attention_bias": st.sampled_from([True, False, 1, None]),
    "mlp_bias": st.sampled_from([True, False, None]),
    "tie_word_embeddings": st.sampled_from([True, False, None, "true"]),
    "rope_theta": st.sampled_from([100.0, 500, "500", 0, None]),
    "partial_rotary_factor": st.sampled_from([0.5, 1, 1.0, None]),
    "max_position_embeddings": st.sampled_from([64, 8, "64"]),
    "original_max_position_embeddings": st.sampled_from([16, 64]),
    "sliding_window": st.sampled_from([4, None]),
    "use_sliding_window": st.booleans(),
    "layer_types": st.sampled_from([["full_attention"] * 2, ["sliding_attention", "full_attention"], None]),
    "attention_dropout": st.sampled_from([0, 0.0, 0.1, None]),
    "pretraining_tp": st.sampled_from([1, 2]),
    "logit_scale": st.sampled_from([2.0]),
    "embedding_multiplier": st.sampled_from([2.0]),
    "final_logit_softcapping": st.sampled_from([1.0]),
}
TABLES = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "dynamic", None]),
        "type": st.sampled_from(["default", "linear", "llama3", "dynamic"]),
        "factor": st.sampled_from([1.0, 4.0, 8, 0.5, "8"]),
        "low_freq_factor": st.sampled_from([1.0, 2]),
        "high_freq_factor": st.sampled_from([4.0, 3]),
        "original_max_position_embeddings": st.sampled_from([16, 64]),
        "rope_theta": st.sampled_from([100.0, 500]),
        "attention_factor": st.sampled_from([2.0]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
    },
)


TRIED |= {"rope_scaling": TABLES, "rope_parameters": TABLES}
SOME = st.lists(st.sampled_from(sorted(TRIED)), max_size=5, unique=True)


@given(changes=SOME.flatmap(lambda names: st.fixed_dictionaries({name: TRIED[name] for name in names})))
@settings(max_examples=120)
def test_what_is_read_computes_what_transformers_computes(changes: dict[str, Any]) -> None:
    """Any keys: refused, or the same logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = BASE | {"hidden_size": 48, "vocab_size": 97, "max_position_embeddings": 64} | changes
    try:
        spec = read_spec(data)
    except InputError:
        return
    try:
        theirs = LlamaForCausalLM(LlamaConfig.from_dict(json.loads(json.dumps(data)))).eval()
    except Exception:  # what transformers cannot make, it cannot judge
        reject()
    ours = Decoder(spec).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        ours.load_state_dict(theirs.state_dict())
        ids = torch.arange(40)[None]
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


# ---- values of any type

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MORE = [
    "head_dim",
    "num_key_value_heads",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rms_norm_eps",
    "layer_types",
]


@given(
    changes=st.dictionaries(st.sampled_from([*BASE, *MORE]), json_values, max_size=4),
    rope=st.dictionaries(st.sampled_from([*LLAMA3, "type"]), json_values),
)
def test_any_json_is_read_or_refused(changes: dict[str, Any], rope: dict[str, Any]) -> None:
    for data in (BASE | changes, BASE | {"rope_scaling": LLAMA3 | rope}):
        try:
            config = read_spec(data)
        except InputError as error:
            assert str(error).startswith("config: ") and len(str(error)) < 400
        else:
            assert config.num_attention_heads % config.num_key_value_heads == 0 and config.head_dim % 2 == 0
            json.dumps(dataclasses.asdict(config), allow_nan=False)
