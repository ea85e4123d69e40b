"""Several layers on one input: what one op can make together."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..kernels.dispatch import autocast_input
from .adapter import LowRank, is_hooked
from .layer import AdapterLayer, joint_forward
from .linear4bit import NF4Linear


def project_gated(gate: Tensor, up: Tensor, gelu: bool, down: nn.Module, *, keep: bool = False) -> Tensor | None:
    """down(f(gate) * up) by one op that makes the product again in backward; None where `down` must be called."""
    joint = down.joint(gate) if type(down) is AdapterLayer and not is_hooked(down) else None
    if joint is None or not all(x.requires_grad for x in (gate, up, joint[1].A)) or autocast_input(gate) is not gate:
        return None
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):  # as hooks may have made them
        return None
    return cast(AdapterLayer, down).finish(joint_forward(gate, [joint], keep, up, gelu)[0])


def project(x: Tensor, modules: Sequence[nn.Module], *, keep: bool = False) -> tuple[Tensor, ...]:
    """The output of every module on x [..., in], as if each were called: for q, k, v or gate and up.

    AdapterLayers that are one op with their LoRA run as one op together (`kernels.lora_linears4bit`) if they agree
    in 4-bit format and dropout: x is read once for all of them, forward and backward, and kept once. They also share
    dropout's mask: each update sees the same elements dropped. All other modules are called, and so are those with
    hooks. `keep`: what the op decodes is kept for backward, for use under activation checkpointing."""
    whole, parts = vars(modules[0]).get("joined", (None, ()))  # by `merging`
    if parts == tuple(modules) and not any(map(is_hooked, parts)):
        made: Tensor = whole(x)
        return made.split([part.out_features for part in parts], dim=-1)
    outputs: dict[int, Tensor] = {}
    together: dict[Any, dict[int, tuple[NF4Linear, LowRank]]] = {}
    for i, module in enumerate(modules):
        if type(module) is AdapterLayer and not is_hooked(module) and (joint := module.joint(x)) is not None:
            base, update = joint
            alike = (base.quant_type, base.blocksize, base.double_quant, update.dropout)
            together.setdefault(alike, {})[i] = joint
        else:
            outputs[i] = module(x)
    for group in together.values():
        for i, y in zip(group, joint_forward(x, list(group.values()), keep), strict=True):
            outputs[i] = cast(AdapterLayer, modules[i]).finish(y)
    return tuple(outputs[i] for i in range(len(modules)))
