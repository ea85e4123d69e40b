"""The Llama in a GGUF file: its metadata as a `Spec`, its tensors under their names in a Hugging Face checkpoint.

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
from .config import Settings
from .families import read_spec as read_config
from .gguf import GGUFFile
from .spec import Spec

_PREFIX = "llama."
ROPE_FACTORS = "rope_freqs.weight"  # no weight: what it says is in the Spec

# What may stand under "llama." in the metadata, by what is made of it; another key is refused: it may be of a variant
# that computes something else. First the numbers that are obeyed, each with its name in config.json.
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OBEYED = _REQUIRED | {
    "vocab_size": "vocab_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "factor",
    "rope.scale_linear": "factor",  # the name of old for the same
}
_PLAIN = {  # what would change the numbers, with the values that do not
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (0, -1),
    "use_parallel_residual": (True,),
}
_WITHOUT_EFFECT = {  # on a plain llama: what only other kinds of norm, experts, scaling and storage ask for
    *("attention.layer_norm_epsilon", "expert_used_count", "pooling_type", "tensor_data_layout"),
    *("rope.scaling.finetuned", "rope.scaling.original_context_length", "rope.scaling.type"),  # see _rope_scaling
}
_NAMES = {  # of layer 0 for all layers
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}
_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)")


def tensor_shapes(file: GGUFFile) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the file's order. InputError for a tensor that a Llama does not have."""
    return {hf: file.tensors[name].shape for hf, name in _weights(file)}


def iter_tensors(file: GGUFFile, spec: Spec) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight, decoded one at a time in the file's order.

    Block formats decode to fp32; F32, F16 and BF16 keep their dtype. Rows of Q and K come back in Hugging Face's order
    (llama.cpp interleaves the rotary halves).
    """
    heads = {"q_proj": spec.num_attention_heads, "k_proj": spec.num_key_value_heads}
    for hf, name in _weights(file):
        yield hf, file.tensor(name, heads.get(hf.split(".")[-2]))


def _weights(file: GGUFFile) -> Iterator[tuple[str, str]]:
    """A weight's name in a Hugging Face checkpoint and in the file."""
    for name in file.tensors:
        if name == ROPE_FACTORS:
            continue
        part, _, kind = name.rpartition(".")
        number = _NUMBER.search(part)
        found = _NAMES.get(part if number is None else _NUMBER.sub("0", part, 1))
        biased = number is not None and not part.endswith("_norm")
        if found is None or not (kind == "weight" or (kind == "bias" and biased)):
            raise InputError(
                f"{file.path}: tensor {name!r} belongs to no Llama model. The file holds a variant that is not "
                "supported; leaving the tensor out would change what the model computes."
            )
        yield f"{found.replace('0', number[0]) if number else found}.{kind}", name


def read_spec(file: GGUFFile) -> Spec:
    """InputError for another architecture, a missing or impossible key, or a feature that is not supported."""
    shapes, where = tensor_shapes(file), str(file.path)
    whole, keys = Settings(file.metadata, where), Settings(file.metadata, where, prefix=_PREFIX)
    numbers = _numbers(whole, keys)
    if not any(name.startswith("model.layers.") for name in shapes):
        raise InputError(f"{where}: it holds no decoder layer (a vocabulary-only file?).")
    rows = shapes.get("model.embed_tokens.weight", (1,))[0]  # where it is missing, that will be said
    if numbers.get("vocab_size", rows) != rows:
        raise keys.refusal("vocab_size", f"{rows}, the rows of 'token_embd.weight'")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != rows:
        raise InputError(
            f"{where}: tokenizer.ggml.tokens holds {len(tokens)} tokens but 'token_embd.weight' has {rows} rows."
        )
    if numbers["block_count"] > len(shapes):
        raise keys.refusal("block_count", f"at most {len(shapes)}, the tensors in the file")
    hidden, heads = numbers["embedding_length"], numbers["attention.head_count"]
    kv_heads = numbers.get("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise keys.refusal("attention.head_count", f"a multiple of llama.attention.head_count_kv ({kv_heads})")
    size = _head_dim(keys, numbers, hidden // heads)
    config = {_OBEYED[key]: value for key, value in numbers.items() if _OBEYED[key] != "factor"} | {
        "model_type": "llama",
        "vocab_size": rows,
        "head_dim": size,
        "rope_scaling": _rope_scaling(file, keys, numbers, size),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
    }
    return read_config(config, where)


def _numbers(whole: Settings, keys: Settings) -> dict[str, Any]:
    """The numbers that say a whole, plain, causal Llama; InputError for what says more than that, or less."""
    whole.one_of("general.architecture", ("llama",), "'llama', the one that can be read from GGUF")
    whole.one_of("general.type", (None, "model"), "'model' (give the file of the model itself)")
    whole.one_of("split.count", (None, 0, 1), "1 (join the files of the model first: llama-gguf-split --merge)")
    for name in whole.data:
        key = name.removeprefix(_PREFIX)
        if key in _PLAIN:
            allowed = " or ".join(map(str, _PLAIN[key]))
            keys.one_of(key, _PLAIN[key], f"{allowed} (anything else is a model that is not supported)")
        elif key != name and key not in _OBEYED and key not in _WITHOUT_EFFECT:
            raise keys.refusal(key, "absent: no plain Llama has it, and it may change what the model computes")
    there = [key for key in _OBEYED if key in _REQUIRED or keys.get(key) is not None]
    found = {key: keys.number(key, like=_OBEYED[key]) for key in there}
    return {key: _decimal(value) if isinstance(value, float) else value for key, value in found.items()}


def _decimal(value: float) -> float:
    """The shortest decimal of an fp32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _head_dim(keys: Settings, numbers: dict[str, Any], share: int) -> int:
    """The size of a head: rotary over all of it, the same for keys and values, even."""
    size = int(numbers.get("attention.key_length", numbers.get("rope.dimension_count", share)))
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if numbers.get(name, size) != size or size % 2 or not size:
            raise keys.refusal(name, f"even, and as attention.key_length the part of a head that is turned ({size})")
    return size


def _rope_scaling(file: GGUFFile, keys: Settings, numbers: dict[str, Any], head_dim: int) -> dict[str, Any] | None:
    """From the metadata, or from a tensor of what each frequency is divided by.

    As in llama.cpp a factor scales linearly unless the type says "none".
    """
    kind = keys.one_of("rope.scaling.type", (None, "none", "linear"), "none or linear (Llama 3's is a tensor)")
    factor = numbers.get("rope.scaling.factor", numbers.get("rope.scale_linear"))
    if factor is None and kind == "linear":
        raise keys.refusal("rope.scaling.factor", "a number above 0 beside rope.scaling.type linear")
    scaling = None if factor in (None, 1) or kind == "none" else {"rope_type": "linear", "factor": factor}
    if ROPE_FACTORS not in file.tensors:
        return scaling
    shape = file.tensors[ROPE_FACTORS].shape
    if shape != (head_dim // 2,):
        raise InputError(
            f"{file.path}: tensor {ROPE_FACTORS!r} must have shape [{head_dim // 2}], one factor a pair of a head, "
            f"got {list(shape)}."
        )
    factors = file.tensor(ROPE_FACTORS).tolist()
    if all(factor == 1.0 for factor in factors):
        return scaling
    if scaling:
        raise keys.refusal("rope.scaling.type", "none beside a tensor 'rope_freqs'")
    scaling = llama3_scaling(factors, numbers.get("rope.freq_base", 10000.0), head_dim)
    if scaling is None:
        raise InputError(
            f"{file.path}: the factors in tensor 'rope_freqs' follow no Llama 3 rule, and no other kind is supported."
        )
    return scaling


def llama3_scaling(factors: list[float], theta: float, head_dim: int) -> dict[str, Any] | None:
    """The Llama 3 parameters that give these frequency divisors, [head_dim / 2]; None if none do.

    llama.cpp stores only the divisors f. Between the two ends of the band 1/f is linear in the frequency, which gives
    back the band up to a common scale (fixed by low_freq_factor = 1). Llama 3's own numbers are tried first, since a
    small head may have too few frequencies in the band. Whatever comes out must reproduce every divisor to 1e-4.
    """
    stored = np.asarray(factors, dtype=np.float64)
    if not np.isfinite(stored).all() or stored.max() <= 1.0 or stored.min() < 1.0:
        return None
    factor = _decimal(stored.max())
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # full turns a token
    bands = [(4.0, 8192)]
    inside = (stored > 1.0) & (stored < stored.max())
    if inside.sum() >= 2:
        share = (1 / stored[inside] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(turns[inside], share, 1)
        if slope > 0 and intercept < 0:
            high = max(1.001, round(1 - 1 / intercept, 3))
            bands.append((high, max(1, round(slope * (high - 1)))))
    for high, original in bands:
        blend = np.clip((original * turns - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - blend) / factor + blend), stored, rtol=1e-4, atol=0):
            band = {"low_freq_factor": 1.0, "high_freq_factor": high, "original_max_position_embeddings": original}
            return {"rope_type": "llama3", "factor": factor} | band
    return None
