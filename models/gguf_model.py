"""The model in a GGUF file: its metadata in the words of the family's `config.json`, for the family to read, and its
tensors under their names in a Hugging Face checkpoint.

A key or tensor that changes the computation in a way we do not support is refused, never ignored. Whether the tensors
are those that the Spec asks for is checked where any checkpoint's are, in `load.py`.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from . import families
from .config import LIMITS, Settings
from .gguf import GGUFFile, TensorInfo
from .spec import Spec

# What may stand under the architecture's name in the metadata, by what is made of it; another key is refused: it may be
# of a variant that computes something else. First the numbers that are obeyed, each with its name in config.json.
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OBEYED = _REQUIRED | {
    "vocab_size": "vocab_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_WINDOW, _SCALE = "attention.sliding_window", "attention.scale"
_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_LOCAL = {"rope.freq_base_swa": "rope_local_base_freq", "attention.sliding_window_pattern": "sliding_window_pattern"}
_SCALES = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier"}
_LONG = {_WINDOW: "sliding_window", "rope.scaling.attn_factor": "attention_factor"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping"} | _CAP
_EXPERTS = ("expert_count", "expert_used_count")
_ROUTED = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
# llama.cpp's architecture -> the family, the keys that it must have too, and the other numbers that it alone obeys.
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    **{name: (name, (), {}) for name in ("llama", "smollm3", "qwen2", "qwen3", "olmo2")},
    "qwen3moe": ("qwen3_moe", _EXPERTS, {"expert_count": "num_experts"} | _ROUTED),
    "granite": ("granite", (_SCALE,), {_SCALE: "attention_multiplier", "logit_scale": "logits_scaling"} | _SCALES),
    "phi3": ("phi3", (), _LONG),
    "gemma2": ("gemma2", (_WINDOW,), {_WINDOW: "sliding_window"} | _CAPS),
    "gemma3": ("gemma3_text", (), {_WINDOW: "sliding_window"} | _CAP | _LOCAL),
}
MIXTRAL = ("mixtral", _EXPERTS, {"expert_count": "num_local_experts"} | _ROUTED)  # a llama with experts
FAMILIES = {name: (kind, own) for kind, (name, _, own) in ARCHITECTURES.items()} | {"mixtral": ("llama", MIXTRAL[2])}
FAMILIES |= dict.fromkeys(("mistral", "ministral"), ("llama", {}))  # for writing; these up to the length of a window
INTERLEAVED = ("llama", "smollm3", "granite")  # architectures whose rows of Q and K llama.cpp has in another order
_NOTHING = ("attention.clamp_kqv", "attention.max_alibi_bias", "expert_count", "nextn_predict_layers", _WINDOW, _SCALE)
_PLAIN: dict[str, tuple[Any, ...]] = {  # what would change the numbers, with the values that do not
    **dict.fromkeys((*_NOTHING, "attn_logit_softcapping", "final_logit_softcapping"), (0,)),
    **dict.fromkeys(("attention.output_scale", "embedding_scale", "logit_scale", "residual_scale"), (0, 1)),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), (1,)),
    **dict.fromkeys(("attention.causal", "use_parallel_residual"), (True,)),
    "rope.scaling.yarn_ext_factor": (0, -1, 1),
}
_OF_ROPE = ("rope.scaling.finetuned", "rope.scaling.type")  # the second: see _scaling
_WITHOUT_EFFECT = ("attention.layer_norm_epsilon", "expert_used_count", "pooling_type", "tensor_data_layout", *_OF_ROPE)
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "qkv")},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in ("q", "k")},
    "attn_output": "self_attn.o_proj",
    **dict.fromkeys(("post_attention_norm", "ffn_norm"), "post_attention_layernorm"),
    "post_ffw_norm": "post_feedforward_layernorm",
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}_exps": f"mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")},  # of each expert
}
OWN_NAMES = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    **{name: {"ffn_norm": "pre_feedforward_layernorm"} for name in ("gemma2", "gemma3", "olmo2")},
}
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # told in the Spec
_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.*)")


def tensor_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the file's order. InputError for a tensor that no family has."""
    return {hf: info.shape for hf, info in _weights(file)}


def iter_tensors(file: GGUFFile, spec: Spec) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, decoded one at a time in the file's order, of stacked experts one by one.

    Block formats decode to fp32; F32, F16 and BF16 keep their dtype. Rows of Q and K come back in Hugging Face's order
    (of some families llama.cpp interleaves the rotary halves), and norms that multiply by 1 + weight without the 1."""
    heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}
    heads = heads if file.metadata["general.architecture"] in INTERLEAVED else {}
    for hf, info in _weights(file):
        tensor, count = file.tensor(info), heads.get(hf.split(".")[-2])
        if count is not None:  # pairs side by side to two halves, in each head
            tensor = tensor.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        yield hf, tensor - 1 if spec.norm_plus_one and hf.endswith("norm.weight") else tensor


def _weights(file: GGUFFile) -> Iterator[tuple[str, TensorInfo]]:
    """A weight's name in a Hugging Face checkpoint, and its place in the file."""
    inside = IN_LAYER | OWN_NAMES.get(str(file.metadata.get("general.architecture")), {})
    for name, info in file.tensors.items():
        part, _, kind = name.rpartition(".")
        layer = _LAYER.fullmatch(part)
        found = inside.get(layer[2]) if layer else WHOLE.get(part)
        biased = layer is not None and not part.endswith("_norm")
        if name in ROPE_FACTORS:
            continue
        if found is None or not (kind == "weight" or (kind == "bias" and biased)):
            raise InputError(
                f"{file.path}: tensor {name!r} belongs to no model of the families that are read. The file holds a "
                "variant that is not supported; leaving the tensor out would change what the model computes."
            )
        hf = f"{f'model.layers.{layer[1]}.' if layer else ''}{found}.{kind}"
        if "*" not in hf:
            yield hf, info
            continue
        count, *shape = info.shape
        if len(shape) != 2 or count > LIMITS["num_experts"]:
            rule = f"[experts, out, in], of at most {LIMITS['num_experts']} experts"
            raise InputError(f"{file.path}: tensor {name!r} must be {rule}, got {list(info.shape)}.")
        size = info.nbytes // count
        for expert in range(count):
            one = info._replace(shape=tuple(shape), start=info.start + expert * size, nbytes=size)
            yield hf.replace("*", str(expert)), one


def read_spec(file: GGUFFile) -> Spec:
    """InputError for another architecture, a missing or impossible key, or a feature that is not supported."""
    shapes, where = tensor_shapes(file), str(file.path)
    whole = Settings(file.metadata, where)
    known = f"one of {', '.join(ARCHITECTURES)}, which can be read from GGUF"
    kind = whole.one_of("general.architecture", tuple(ARCHITECTURES), known)
    keys = Settings(file.metadata, where, prefix=f"{kind}.")
    numbers = {"rope.freq_base": 10000.0} | _numbers(whole, keys, kind)  # where it is silent, as llama.cpp
    rows = shapes.get("model.embed_tokens.weight", (1,))[0]  # where it is missing, that will be said
    if not any(name.startswith("model.layers.") for name in shapes):
        raise InputError(f"{where}: it holds no decoder layer (a vocabulary-only file?).")
    if numbers["attention.head_count"] % (kv_heads := numbers.get("attention.head_count_kv", 1)):
        raise keys.refusal("attention.head_count", f"a multiple of {kind}.attention.head_count_kv ({kv_heads})")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        what = f"tokenizer.ggml.tokens holds {len(tokens)} tokens but 'token_embd.weight' has {rows} rows"
        raise InputError(f"{where}: {what}. The file is damaged or was put together by hand: get it again.")
    share = numbers["embedding_length"] // numbers["attention.head_count"]
    size, turned = _head_dim(keys, numbers, share, partial=kind == "phi3")
    model_type, _, own = _family(keys, kind)
    named = {_WINDOW: "sliding_window"} | OBEYED | own  # null but for caps, which the family has then, in llama.cpp too
    config = {name: numbers.get(key) for key, name in named.items() if key in numbers or key not in _CAPS} | {
        "model_type": model_type,
        "vocab_size": numbers.get("vocab_size", rows),
        "head_dim": size,
        "partial_rotary_factor": turned / size,
        # llama.cpp knows the two models whose scale is another by their number of layers.
        "query_pre_attn_scalar": share if (kind, numbers["block_count"]) in (("gemma2", 46), ("gemma3", 62)) else size,
        "norm_topk_prob": True,  # llama.cpp's routing, whatever the model's config says
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
        "rope_scaling": _scaling(file, keys, numbers, turned),
    }
    return families.read_spec(config, where)


def _family(keys: Settings, kind: str) -> tuple[str, tuple[str, ...], dict[str, str]]:
    experts = keys.get("expert_count")
    return MIXTRAL if kind == "llama" and isinstance(experts, int) and experts else ARCHITECTURES[kind]


def _numbers(whole: Settings, keys: Settings, kind: str) -> dict[str, Any]:
    """The numbers that say a whole, plain, causal model; InputError for what says more than that, or less."""
    whole.one_of("general.type", (None, "model"), "'model' (give the file of the model itself)")
    whole.one_of("split.count", (None, 0, 1), "1 (join the files of the model first: llama-gguf-split --merge)")
    _, needed, own = _family(keys, kind)
    obeyed = OBEYED | {"rope.scale_linear": "factor"} | own  # the name of old for the same
    for name in whole.data:
        key = name.removeprefix(keys.prefix)
        if key == name or key in obeyed or key in _WITHOUT_EFFECT:
            continue
        if key not in _PLAIN:
            raise keys.refusal(key, f"absent: no plain {kind} has it, and it may change what the model computes")
        allowed = " or ".join(map(str, _PLAIN[key]))
        keys.one_of(key, _PLAIN[key], f"{allowed} (anything else is a model that is not supported)")
    no_window = type(keys.get(_WINDOW)) is int and keys.get(_WINDOW) == 0 and _WINDOW not in needed
    there = [key for key in obeyed if key in _REQUIRED or key in needed or keys.get(key) is not None]
    found = {key: keys.number(key, like=obeyed[key]) for key in there if key != _WINDOW or not no_window}
    return {key: decimal(value) if isinstance(value, float) else value for key, value in found.items()}


def decimal(value: float) -> float:
    """The shortest decimal of an fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _head_dim(keys: Settings, numbers: dict[str, Any], share: int, partial: bool) -> tuple[int, int]:
    """The size of a head, the same for keys and values, and what of it turns: all, or with `partial` a share; even."""
    said = numbers.get("rope.dimension_count")
    size = int(numbers.get("attention.key_length", share if partial or said is None else said))
    turned = size if said is None else said
    for name, right in {
        "attention.key_length": size > 0 and size % 2 == 0,
        "attention.value_length": numbers.get("attention.value_length", size) == size,
        "rope.dimension_count": turned % 2 == 0 and (turned == size or (partial and turned < size)),
    }.items():
        if not right:
            raise keys.refusal(name, f"even, and as attention.key_length the part of a head that is turned ({size})")
    return size, turned


def _scaling(file: GGUFFile, keys: Settings, numbers: dict[str, Any], turned: int) -> dict[str, Any] | None:
    """`rope_scaling` in config.json's words, from the metadata or from tensors of what each frequency is divided by.

    As in llama.cpp a factor scales linearly unless the type says "none"."""
    kinds = (None, "none", "linear", "yarn", "longrope")
    kind = keys.one_of("rope.scaling.type", kinds, "none, linear, yarn or longrope (Llama 3's is a tensor)")
    factor = numbers.get("rope.scaling.factor", numbers.get("rope.scale_linear"))
    if factor is None and kind in ("linear", "yarn"):
        raise keys.refusal("rope.scaling.factor", f"a number above 0 beside rope.scaling.type {kind}")
    own, short, long = (_factors(file, name, turned // 2) for name in ROPE_FACTORS)
    if bool(short) != bool(long) or (kind == "longrope" and not short):
        raise InputError(f"{file.path}: scaling longrope needs tensors {ROPE_FACTORS[1]!r} and {ROPE_FACTORS[2]!r}.")
    said: dict[str, Any] | None = None
    original = "rope.scaling.original_context_length"
    beside = {OBEYED[original]: numbers.get(original, numbers["context_length"])}
    if kind == "yarn":
        betas = {name: numbers.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        said = {"rope_type": kind, "factor": factor} | beside | betas
    elif factor not in (None, 1) and kind in (None, "linear"):
        said = {"rope_type": "linear", "factor": factor}
    if not (own or short):
        return said
    if said or (own and short):
        raise keys.refusal("rope.scaling.type", f"none beside tensor {'rope_freqs' if own else 'rope_factors_short'!r}")
    if short:
        attention = {"attention_factor": numbers.get("rope.scaling.attn_factor")}
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long} | beside | attention
    return rope_freqs_scaling(own, numbers["rope.freq_base"], numbers["context_length"])


def _factors(file: GGUFFile, name: str, count: int) -> list[float]:
    """A tensor of what each frequency is divided by; empty where it is not there, or of ones alone."""
    if name not in file.tensors:
        return []
    if file.tensors[name].shape != (count,):
        raise InputError(
            f"{file.path}: tensor {name!r} must have shape [{count}], one factor a pair of a head, got "
            f"{list(file.tensors[name].shape)}."
        )
    factors = [decimal(factor) for factor in file.tensor(name).tolist()]
    return [] if name == ROPE_FACTORS[0] and all(factor == 1.0 for factor in factors) else factors


def rope_freqs_scaling(factors: list[float], theta: float, context: int) -> dict[str, Any]:
    """Llama 3's parameters where they give these frequency divisors, [head_dim / 2], to 1e-4; llama.cpp stores only the
    divisors. Any others are said as they are, as a LongRoPE of one length."""
    stored, dim, original = np.asarray(factors), 2 * len(factors), 8192
    turns = theta ** (-np.arange(0, dim, 2) / dim) / (2 * math.pi)  # full turns a token
    blend, factor = np.clip((original * turns - 1) / 3, 0, 1), decimal(stored.max())
    if factor > 1 and np.allclose(1 / ((1 - blend) / factor + blend), stored, rtol=1e-4, atol=0):
        band = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": original}
        return {"rope_type": "llama3", "factor": factor} | band
    both = {"short_factor": factors, "long_factor": factors, "original_max_position_embeddings": context}
    return {"rope_type": "longrope", "attention_factor": 1.0} | both
