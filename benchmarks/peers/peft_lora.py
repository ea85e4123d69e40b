"""peft's LoRA over bitsandbytes' 4-bit linear, and over a dense one.

At its best: adapters in the activations' dtype (its default keeps fp32 adapters and then multiplies in fp32, which
costs more), no autocast.
"""

from torch import Tensor, nn

from . import import_problem

QLORA, DENSE = "bitsandbytes + peft", "dense + peft"


def missing() -> str | None:
    return import_problem("peft")


def attach(module: nn.Module, rank: int, alpha: float, dropout: float, names: list[str]) -> nn.Module:
    """`module` with adapters on the layers called `names`, everything else frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    module.requires_grad_(False)
    module.is_loaded_in_4bit = True  # what makes peft take its bitsandbytes layer where there is one
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    with_adapters: nn.Module = inject_adapter_in_model(config, module)
    return with_adapters


def linear(base: nn.Module, A: Tensor, B: Tensor, alpha: float, dropout: float) -> nn.Module:
    """One layer with the adapter A [r, in], B [out, r], in A's dtype."""
    holder = attach(nn.ModuleDict({"linear": base}), A.shape[0], alpha, dropout, ["linear"])
    layer = holder["linear"]
    set_adapter(layer, A, B)
    return layer


def set_adapter(layer: nn.Module, A: Tensor, B: Tensor) -> None:
    layer.lora_A["default"].weight = nn.Parameter(A.clone())
    layer.lora_B["default"].weight = nn.Parameter(B.clone())


def adapter(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Its A and B parameters."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
