"""config.json and its neighbours: each key with values of any type, tables within, files that are no JSON."""

import json
from typing import Any

from harness import Case, Make
from makes import (
    CHAT,
    DROPPED,
    ESCAPES,
    HUGE,
    LONG,
    all_of,
    folder,
    gone,
    keys,
    link,
    nested,
    pipe,
    put,
    put_json,
    sparse,
    told,
)

FILE, GENERATION = "m/config.json", "m/generation_config.json"
WRONG = {  # of each key the values that are a kind of their own
    "vocab_size": [True, -1, 1e308, HUGE, "x", [1], 258],
    "hidden_size": [0, 1e308, HUGE, [], {}, 48],
    "intermediate_size": [None, 2**40, "64"],
    "num_hidden_layers": [True, 0, 1.5, HUGE, [2], 1000],
    "num_attention_heads": [None, 0, 5, HUGE, {}],
    "num_key_value_heads": [0, 3, -1, "2"],
    "head_dim": [7, 0, 1e308, 10**6],
    "max_position_embeddings": [0, HUGE, "x"],
    "rms_norm_eps": [0, -1, "1e-5", HUGE, [1e-5], 5],
    "rope_theta": [0, -1, HUGE, {}],
    "tie_word_embeddings": [1, "true", [], {}],
    "attention_bias": [1, "no", {}],
    "hidden_act": [None, 1, "gelu", ["silu"], ESCAPES],
    "model_type": [None, 1, [], "gpt_neox", ESCAPES, LONG],
    "eos_token_id": [-1, True, 1e308, HUGE, "2", {}, [[1]], [10**6]],
    "sliding_window": [4, "x"],
    "quantization_config": [{}, {"quant_method": LONG}, 1],
    "layer_types": [[1], "full_attention", {"a": 1}, [ESCAPES] * 1000],
    "rope_scaling": [1, "linear", [], {"rope_type": 1}, {"rope_type": ["linear"]}, {"type": "yarn", "factor": 2.0}],
    "rope_parameters": [{"full_attention": {"rope_type": "default"}}, {"rope_type": "linear", "factor": HUGE}, []],
    "partial_rotary_factor": [0.5, "x", [1]],
}
ROPE: dict[str, Any] = {  # tables that are of the right type
    "linear without a factor": {"rope_type": "linear"},
    "linear by 0": {"rope_type": "linear", "factor": 0},
    "linear by NaN": {"rope_type": "linear", "factor": float("nan")},
    "llama3 without its numbers": {"rope_type": "llama3"},
    "llama3 of texts": {"rope_type": "llama3", "factor": "8", "low_freq_factor": "1", "high_freq_factor": "4"},
    "llama3 with its band turned round": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 1.0,
    },
    "llama3 of a huge context": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": HUGE,
    },
    "a type that is null": {"rope_type": None, "factor": 8.0},
    "a type of 100,000 characters": {"rope_type": LONG},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}
FILES: dict[str, Make] = {
    "empty": put(FILE, b""),
    "a list": put(FILE, "[]"),
    "a text": put(FILE, '"llama"'),
    "UTF-16": put(FILE, '{"model_type": "llama"}'.encode("utf-16")),
    "not UTF-8": put(FILE, b'{"model_type": "\xff"}'),
    "cut off": put(FILE, '{"model_type": "llama", "vocab_si'),
    "a key twice": put(FILE, '{"model_type": "llama", "model_type": "llama"}'),
    "a key of escapes twice": put(FILE, json.dumps({ESCAPES: 1})[:-1] + "," + json.dumps({ESCAPES: 1})[1:]),
    "a key of 100,000 characters twice": put(FILE, json.dumps({LONG: 1})[:-1] + "," + json.dumps({LONG: 1})[1:]),
    "a number of 5,000 digits": put(FILE, '{"vocab_size": ' + "9" * 5000 + "}"),
    "NaN and infinity": keys(FILE, rms_norm_eps=float("nan"), rope_theta=float("inf")),
    "nested 2,000 deep": put(FILE, '{"x": ' + nested(2000) + "}"),
    "nested 990 deep": put(FILE, '{"model_type": ' + nested(990) + "}"),
    "nested 100,000 deep": put(FILE, '{"x": ' + nested(100_000) + "}"),
    "5 MB": put(FILE, '{"model_type": "llama"' + " " * 5_000_000 + "}"),
    "40 GB of nothing": sparse(FILE, 40 << 30),
    "no keys": put(FILE, "{}"),
    "the model type alone": put_json(FILE, {"model_type": "llama"}),
    "a folder": folder(FILE),
    "a pipe": pipe(FILE),
    "a link to a pipe": all_of(pipe("p"), link(FILE, "../p")),
    "a link to itself": link(FILE, "config.json"),
    "a link to /dev/zero": link(FILE, "/dev/zero"),
    "not there": gone(FILE),
    "a config that names code": keys(FILE, auto_map={"AutoModelForCausalLM": "evil.Model"}, model_type="evil"),
}
ANOTHERS: dict[str, Make] = {  # a config.yaml of another tool beside the model: no run of ours, so nobody reads it
    "the config of a run of another tool": put("m/config.yaml", "- not\n- a run\n"),
    "the config of another tool with its own quant": put("m/config.yaml", "quant: gptq\ntemplate: 5\n"),
    "the config of another tool with lists": put("m/config.yaml", "quant: [nf4]\ntemplate: {a: b}\n"),
}
EOS: dict[str, Any] = {
    "a text": {"eos_token_id": "2"},
    "a list of texts": {"eos_token_id": ["2"]},
    "-1": {"eos_token_id": -1},
    "beyond the vocabulary": {"eos_token_id": 10**6},
    "true": {"eos_token_id": True},
    "huge": {"eos_token_id": HUGE},
    "1,000,000 of them": {"eos_token_id": [1] * 999_999 + [10**9]},
}

CASES = [
    *[
        Case(f"config: {name} = {told(value)}", keys(FILE, **{name: value}), CHAT)
        for name, values in WRONG.items()
        for value in values
    ],
    *[
        Case(f"config: without {name}", keys(FILE, **{name: DROPPED}), CHAT)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
    ],
    *[Case(f"config rope: {name}", keys(FILE, rope_scaling=table), CHAT) for name, table in ROPE.items()],
    *[Case(f"config file: {name}", make, CHAT) for name, make in FILES.items()],
    *[Case(f"config file: {name}", make, CHAT, ends="done") for name, make in ANOTHERS.items()],
    *[Case(f"generation config: eos {name}", put_json(GENERATION, table), CHAT) for name, table in EOS.items()],
    *[
        Case(f"generation config: {name}", make, CHAT)
        for name, make in {
            "a list": put(GENERATION, "[]"),
            "nested 2,000 deep": put(GENERATION, nested(2000)),
            "a pipe": pipe(GENERATION),
            "a folder": folder(GENERATION),
        }.items()
    ],
    Case("config: 200,000 unknown keys", keys(FILE, **{f"k{i}": i for i in range(200_000)}), CHAT, ends="done"),
    Case("config file: the config of a run as a pipe", pipe("m/config.yaml"), CHAT, ends="either"),
    Case("config: tied weights without an embedding", keys(FILE, vocab_size=4_000_000), CHAT),
]
