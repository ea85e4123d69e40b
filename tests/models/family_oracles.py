"""Tiny random models of every built-in family, made by transformers: the oracle of the families' tests."""

import warnings
from typing import Any

import torch

from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec

SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 4, "head_dim": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"},
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
CAPPED = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 20}


def rope(kind: str, **how: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **how}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0], "partial_rotary_factor": 0.5}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# Every family, every feature of it at least once.
SHAPES: dict[str, dict[str, Any]] = {
    "llama yarn": {"model_type": "llama", **rope("yarn", **YARN)},
    "llama yarn scaled": {
        "model_type": "llama",
        **rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.4, beta_fast=16, beta_slow=2, truncate=False),
    },
    "llama dynamic": {"model_type": "llama", "max_position_embeddings": 16, **rope("dynamic", factor=2.0)},
    "llama dynamic original": {
        **{"model_type": "llama", "max_position_embeddings": 16},
        **rope("dynamic", factor=2.0, original_max_position_embeddings=4),
    },
    "smollm3": {"model_type": "smollm3"},
    "smollm3 marked": {"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral whole": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "ministral": {"model_type": "ministral", "sliding_window": 7, "layer_types": MIXED},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen2 windows": {
        **{"model_type": "qwen2", "head_dim": None, "use_sliding_window": True},
        **{"sliding_window": 7, "max_window_layers": 2},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "tie_word_embeddings": True},
    "qwen3 bias": {"model_type": "qwen3", "attention_bias": True, **rope("yarn", **YARN)},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 9, "moe_intermediate_size": 28},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 7},
    "gemma2": {"model_type": "gemma2", "sliding_window": 7, **CAPPED},
    "gemma2 uncapped": {
        **{"model_type": "gemma2", "sliding_window": 9},
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 7, "layer_types": MIXED, "rope_parameters": GEMMA3},
    "gemma3 capped": {
        **{"model_type": "gemma3_text", "sliding_window": 7, "num_hidden_layers": 6},
        **{"final_logit_softcapping": 5.0},
    },
    "phi3": {"model_type": "phi3", "head_dim": None, "sliding_window": 7},
    "phi3 long": {
        "model_type": "phi3", "head_dim": None, "original_max_position_embeddings": 24, **rope("longrope", **LONG),
    },
    "olmo2": {"model_type": "olmo2", "head_dim": None},
    "olmo2 bias": {
        **{"model_type": "olmo2", "head_dim": None, "attention_bias": True},
        **{"num_attention_heads": 6, "num_key_value_heads": 3},
    },
    "granite": {
        **{"model_type": "granite", "head_dim": None, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
        **{"residual_multiplier": 0.4, "logits_scaling": 2.5},
    },
    "granite bias": {"model_type": "granite", "head_dim": None, "attention_bias": True, "mlp_bias": True},
}  # fmt: skip


def theirs(name: str, seed: int = 0) -> Any:
    """The oracle in fp32, every parameter drawn: a fresh norm or bias would hide faults."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in (SIZES | SHAPES[name]).items() if value is not None or key not in SIZES}
    kind = shape.pop("model_type")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_("norm" in own and "gemma" not in kind)
    return model


def ours(oracle: Any) -> Decoder:
    """Our decoder with the oracle's weights."""
    model = Decoder(read_spec(oracle.config.to_dict()))
    model.load_state_dict(oracle.state_dict())
    return model.eval()
