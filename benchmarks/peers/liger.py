"""Liger-Kernel: Triton RMSNorm, SwiGLU, RoPE and head + loss for a transformers model. It has no 4-bit linear."""

from typing import Any

from ..timing import Call
from . import import_problem

NAME = "bitsandbytes + peft + Liger"


def missing() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "liger_kernel: its kernels need a GPU"
    return import_problem("liger_kernel.transformers")


def apply(model: Any) -> None:
    """Its kernels in this transformers Llama and in no other: what it changes in transformers itself is put back."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    before = {name: getattr(modeling_llama, name) for name in ("LlamaRMSNorm", "LlamaMLP")}
    apply_liger_kernel_to_llama(model=model, rope=False)
    for name, value in before.items():
        setattr(modeling_llama, name, value)


def patched(call: Call) -> Call:
    """`call` with its rotary embedding in transformers, which has one function for all models, while it runs."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from transformers.models.llama import modeling_llama

    def with_rope(i: int) -> Any:
        before = modeling_llama.apply_rotary_pos_emb
        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
        try:
            return call(i)
        finally:
            modeling_llama.apply_rotary_pos_emb = before

    return with_rope
