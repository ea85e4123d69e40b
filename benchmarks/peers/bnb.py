"""bitsandbytes: its 4-bit linear (nested and plain scales), its decoder, and its decoder followed by F.linear."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.kernels.weight4bit import Weight4bit

from . import import_problem

FUSED_TO = 1536  # rows up to which its own product kernel may run, whose roundings it does not state
NESTED, PLAIN, DECODED = "bitsandbytes nested", "bitsandbytes plain", "bitsandbytes decode + F.linear"


def optimizer_name(bits: int) -> str:
    return f"bitsandbytes {bits}-bit AdamW"


def adamw(parameters: Sequence[nn.Parameter], *, bits: int, **settings: Any) -> Any:
    """Its AdamW, which keeps tensors below 4,096 elements in 32 bits."""
    from bitsandbytes import optim

    return optim.AdamW(parameters, optim_bits=bits, **settings)


def missing() -> str | None:
    return import_problem("bitsandbytes")


def state(stored: Weight4bit, shape: tuple[int, int], dtype: torch.dtype, *, nested: bool) -> Any:
    """bitsandbytes' QuantState over our tensors: the layout is the same."""
    from bitsandbytes import functional

    code = functional.get_4bit_type("nf4", device=stored.packed.device)
    form = {"shape": torch.Size(shape), "code": code, "blocksize": 64, "quant_type": "nf4", "dtype": dtype}
    if not nested:
        return functional.QuantState(absmax=stored.scales.view(-1), **form)
    scales = functional.create_dynamic_map().to(stored.packed.device)
    inner = functional.QuantState(absmax=stored.nested_absmax, blocksize=256, code=scales, dtype=torch.float32)
    offset = None if stored.nested_offset is None else stored.nested_offset.view(())
    return functional.QuantState(absmax=stored.absmax.view(-1), offset=offset, state2=inner, **form)


def packed(stored: Weight4bit) -> Tensor:
    return stored.packed.view(-1, 1)


def linear(x: Tensor, stored: Weight4bit, quant_state: Any, bias: Tensor | None = None) -> Tensor:
    """What its Linear4bit calls; it chooses its fused kernel or its decoder itself."""
    import bitsandbytes

    y: Tensor = bitsandbytes.matmul_4bit(x, packed(stored), quant_state, bias=bias)
    return y


def dequantize(stored: Weight4bit, quant_state: Any) -> Tensor:
    from bitsandbytes import functional

    dense: Tensor = functional.dequantize_4bit(packed(stored), quant_state)
    return dense


def decode_linear(x: Tensor, stored: Weight4bit, quant_state: Any, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, dequantize(stored, quant_state), bias)


def quantize(dense: Tensor, *, nested: bool = True) -> tuple[Tensor, ...]:
    """(packed, codes, nested absmax, offset) as our own quantisers give them; not `nested`, (packed, absmax)."""
    from bitsandbytes import functional

    bytes_, quantised = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=nested)
    if not nested:
        return bytes_, quantised.absmax
    return bytes_, quantised.absmax, quantised.state2.absmax, quantised.offset


def module(stored: Weight4bit, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None = None) -> nn.Module:
    """Its Linear4bit over our tensors, nested, as peft finds it in a model."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer: nn.Module = Linear4bit(shape[1], shape[0], bias=bias is not None, compute_dtype=dtype, device="meta")
    quant_state = state(stored, shape, dtype, nested=True)
    layer.weight = Params4bit(
        packed(stored),
        requires_grad=False,
        quant_state=quant_state,
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = quant_state
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
