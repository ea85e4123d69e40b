"""What a GGUF's metadata say about a Llama, in the words of Hugging Face's config.json.

Sizes are checked against the tensors that are there, so that a wrong number cannot make anyone build a larger model
than the file holds; a key that changes the computation in a way we do not support is refused, never ignored.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .gguf_tensors import BLOCK_NAME, hf_name

Shapes = Mapping[str, tuple[int, ...]]

# Keys of llama.cpp that change what a llama computes, with the value that leaves it plain.
_MUST_BE_NEUTRAL = {
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "use_parallel_residual": True,
}


def hf_config(
    path: Path, metadata: Mapping[str, Any], shapes: Shapes, rope_factors: list[float] | None
) -> dict[str, Any]:
    """Hugging Face config keys of the Llama in a GGUF file.

    Args:
        path: the file, for messages.
        metadata: the file's metadata.
        shapes: tensor name -> shape in torch's order.
        rope_factors: the values of the tensor `rope_freqs` (each frequency is divided by its factor), if there.

    Raises:
        InputError: another architecture, a missing or impossible key, a size that the tensors contradict, or a
            feature that is not supported.
    """
    keys = _Keys(path, metadata)
    _check_kind(path, keys, shapes)
    hidden = keys.positive("embedding_length")
    heads = keys.positive("attention.head_count")
    kv_heads = keys.positive("attention.head_count_kv", default=heads)
    head_dim = _head_dim(keys, hidden, heads)
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": keys.positive("feed_forward_length"),
        "num_hidden_layers": keys.positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", default=10000.0),
        "max_position_embeddings": keys.positive("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
    }
    config["vocab_size"] = _check_shapes(path, config, shapes, metadata)
    config["rope_scaling"] = _rope_scaling(keys, config, rope_factors)
    return config | _special_ids(keys)


class _Keys:
    """Typed look-ups in the metadata: `llama.` is put before each name, and each failure names the key."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.path}: {problem}.")

    def get(self, name: str) -> Any:
        return self.metadata.get(f"llama.{name}")

    def positive(self, name: str, default: int | None = None) -> int:
        """A whole number from 1 to 2^31 - 1."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise self.fail(f"metadata key 'llama.{name}' is {_shown(value)}; it must be a whole number above 0")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A finite number above 0, as the shortest decimal of its fp32 value (1e-05, not 9.999999747378752e-06)."""
        value = self.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.fail(f"metadata key 'llama.{name}' is {_shown(value)}; it must be a finite number above 0")
        return float(str(np.float32(value)))


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:80]


def _check_kind(path: Path, keys: _Keys, shapes: Shapes) -> None:
    """A whole, plain, causal Llama and nothing else: to ignore a feature is to build a model that is subtly wrong."""
    architecture = keys.metadata.get("general.architecture")
    if architecture != "llama":
        raise keys.fail(f"general.architecture is {_shown(architecture)}; only 'llama' can be read from GGUF")
    kind = keys.metadata.get("general.type", "model")
    if kind != "model":
        raise keys.fail(f"general.type is {_shown(kind)}; give the file of the model itself")
    if keys.metadata.get("split.count", 1) not in (0, 1):
        raise keys.fail("the model is split over several GGUF files; join them first (llama-gguf-split --merge)")
    if keys.get("expert_count"):
        raise keys.fail(f"it is a mixture of {_shown(keys.get('expert_count'))} experts, which is not supported")
    for name, neutral in _MUST_BE_NEUTRAL.items():
        if keys.get(name) not in (None, neutral):
            raise keys.fail(f"metadata key 'llama.{name}' is {_shown(keys.get(name))}, which is not supported")
    if not any(BLOCK_NAME.fullmatch(name) for name in shapes):
        raise keys.fail("it holds no decoder layer (a vocabulary-only file?)")


def _head_dim(keys: _Keys, hidden: int, heads: int) -> int:
    """The size of a head: rotary over all of it, the same for keys and values, even."""
    rotary = keys.positive("rope.dimension_count", default=hidden // heads)
    sizes = [keys.positive(f"attention.{which}_length", default=rotary) for which in ("key", "value")]
    if sizes != [rotary, rotary] or rotary % 2:
        raise keys.fail(
            f"heads of {sizes[0]} (keys) and {sizes[1]} (values) with rotary embedding over {rotary}; "
            "the three must be equal and even"
        )
    return rotary


def _check_shapes(path: Path, config: Mapping[str, Any], shapes: Shapes, metadata: Mapping[str, Any]) -> int:
    """Every tensor a Llama needs is there in the right shape, and no other; returns the vocabulary's size."""
    layers = config["num_hidden_layers"]
    if layers > len(shapes):
        raise InputError(f"{path}: llama.block_count is {layers} but the file holds {len(shapes)} tensors in all.")
    vocab = shapes.get("token_embd.weight", (0,))[0]
    needed = _needed_shapes(config, vocab)
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} tensors are missing, the first is {missing[0]!r}. Get the file again."
        )
    for name, shape in shapes.items():
        if name == "rope_freqs.weight":
            continue
        hf_name(path, name)
        expected = (needed[f"{name[:-5]}.weight"][0],) if name.endswith(".bias") else needed.get(name)
        if expected != shape:
            raise InputError(
                f"{path}: tensor {name!r} has shape {list(shape)}; the metadata ask for {_listed(expected)}."
            )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != vocab:
        raise InputError(f"{path}: the vocabulary has {len(tokens)} tokens but 'token_embd.weight' has {vocab} rows.")
    return vocab


def _listed(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(list(shape))


def _needed_shapes(config: Mapping[str, Any], vocab: int) -> dict[str, tuple[int, ...]]:
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    needed: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        needed["output.weight"] = (vocab, hidden)
    block = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    for layer in range(config["num_hidden_layers"]):
        needed |= {f"blk.{layer}.{part}.weight": shape for part, shape in block.items()}
    return needed


def _rope_scaling(keys: _Keys, config: Mapping[str, Any], factors: list[float] | None) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type") or "none"
    if kind not in ("none", "linear"):
        raise keys.fail(f"rope scaling {_shown(kind)} is not supported; none, linear and Llama 3's are")
    linear = {"rope_type": "linear", "factor": keys.real("rope.scaling.factor")} if kind == "linear" else None
    if factors is None or all(factor == 1.0 for factor in factors):
        return linear
    if linear:
        raise keys.fail("it has both linear rope scaling and a tensor 'rope_freqs', which no Llama has")
    scaling = llama3_scaling(factors, config["rope_theta"], config["head_dim"])
    if scaling is None:
        raise keys.fail("the factors in tensor 'rope_freqs' follow no Llama 3 rule, and no other kind is supported")
    return scaling


def llama3_scaling(factors: list[float], theta: float, head_dim: int) -> dict[str, Any] | None:
    """The Llama 3 parameters that give these frequency divisors, as config.json writes them; None if none do.

    llama.cpp stores only the divisors f. Between the two ends of the band 1/f is linear in the frequency, which gives
    back the band up to a common scale (fixed by low_freq_factor = 1). Llama 3's own numbers are tried first, since a
    small head may have too few frequencies in the band. Whatever comes out must reproduce every divisor to 1e-4.
    """
    stored = np.asarray(factors, dtype=np.float64)
    if len(stored) != head_dim // 2 or not np.isfinite(stored).all() or stored.max() <= 1.0 or stored.min() < 1.0:
        return None
    factor = float(str(np.float32(stored.max())))
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # full turns a token
    bands = [(4.0, 8192)]
    inside = (stored > 1.0) & (stored < stored.max())
    if inside.sum() >= 2:
        share = (1 / stored[inside] - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(turns[inside], share, 1)
        if slope > 0 and intercept < 0:
            high = round(1 - 1 / intercept, 3)
            bands.append((high, max(1, round(slope * (high - 1)))))
    for high, original in bands:
        blend = np.clip((original * turns - 1) / (high - 1), 0, 1)
        if np.allclose(1 / ((1 - blend) / factor + blend), stored, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _special_ids(keys: _Keys) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {hf: keys.metadata.get(f"tokenizer.ggml.{ggml}_token_id") for ggml, hf in names.items()}
    return {name: value for name, value in found.items() if isinstance(value, int) and not isinstance(value, bool)}
