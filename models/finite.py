"""Where a model's numbers went bad: the layer that first gave NaN or infinity, found by a second pass with hooks.

The passes that matter look at logits and losses alone, which costs them nothing; only one that failed is run again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NumericError
from ..lora.layer import adapter_layers
from .foreign import as_causal_lm
from .protocol import CausalLM


@torch.no_grad()
def first_nonfinite(model: CausalLM, *inputs: Any) -> str | None:
    """Name of the module whose output first holds NaN or infinity on these arguments of `CausalLM.hidden`; None if all
    outputs are finite."""
    model, found = as_causal_lm(model), list[str]()

    def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
            found.append(name)

    handles = [m.register_forward_hook(partial(look, name)) for name, m in model.named_modules() if name]
    try:
        for hidden in model.hidden(*inputs).flatten(0, 1).split(256):  # logits are large
            if not found:
                model.head()(hidden)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def explain_nonfinite(model: CausalLM, what: str, layer: str | None) -> NumericError:
    """The error for `what`, which hold NaN or infinity: the layer that `first_nonfinite` found, and what to do."""
    where = f"first in the output of {layer}" if layer else "which a second pass over the same tokens did not show"
    way = "the model's weights are damaged, or come from a training that diverged: take others"
    if adapter_layers(model):
        way = "see whether the model alone works (without adapter); then the adapter's training diverged: take another"
    if model.dtype == torch.float16:
        way = "float16 ends at 65,504: load the model in bfloat16 or float32 (dtype=...)"
    return NumericError(f"{what} hold NaN or infinity, {where}, in {str(model.dtype).removeprefix('torch.')}; {way}.")
