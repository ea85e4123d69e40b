"""Functional ops on tensors and plain numbers; the reference that defines an op stands beside it, in its own file."""

from .attention import causal_attention
from .linear4bit import lora_linears4bit
from .lora_paths import lora_update

__all__ = ["causal_attention", "lora_linears4bit", "lora_update"]
