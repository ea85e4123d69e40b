"""The built-in families, by `model_type`; a new one is a function from `config.json` to a Spec, and a line here."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..errors import InputError
from .config import Settings
from .float8 import check_quantization
from .gemma import gemma2, gemma3
from .llama import granite, llama, ministral, mistral, olmo2, phi3, qwen2, qwen3, smollm3
from .moe import mixtral, qwen3_moe
from .spec import Spec


class Family(NamedTuple):
    """How a family's `config.json` is read, and the class that transformers has for it."""

    read: Callable[[Settings], Spec]
    architecture: str


FAMILIES = {
    "llama": Family(llama, "LlamaForCausalLM"),
    "mistral": Family(mistral, "MistralForCausalLM"),
    "ministral": Family(ministral, "MinistralForCausalLM"),
    "smollm3": Family(smollm3, "SmolLM3ForCausalLM"),
    "qwen2": Family(qwen2, "Qwen2ForCausalLM"),
    "qwen3": Family(qwen3, "Qwen3ForCausalLM"),
    "qwen3_moe": Family(qwen3_moe, "Qwen3MoeForCausalLM"),
    "mixtral": Family(mixtral, "MixtralForCausalLM"),
    "gemma2": Family(gemma2, "Gemma2ForCausalLM"),
    "gemma3_text": Family(gemma3, "Gemma3ForCausalLM"),
    "phi3": Family(phi3, "Phi3ForCausalLM"),
    "olmo2": Family(olmo2, "Olmo2ForCausalLM"),
    "granite": Family(granite, "GraniteForCausalLM"),
}


def read_spec(data: Mapping[str, Any], where: str = "config") -> Spec:
    """What a `config.json` says a decoder shall compute, in the words of transformers 4 or 5; `where` begins messages.

    The Spec keeps the keys that it was read from. InputError names the key and value that we do not take."""
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: must be a JSON object, got {type(data).__name__}.")
    keys = Settings(data, where)
    known = ", ".join(map(repr, FAMILIES))
    kind = keys.one_of("model_type", tuple(FAMILIES), f"one of {known}, which are built in")
    check_quantization(data, where)
    spec = FAMILIES[kind].read(keys)
    return replace(spec, model_type=kind, config=keys.said | {"architectures": [FAMILIES[kind].architecture]})
