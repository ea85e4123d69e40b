"""GGUF tensors: which formats can be decoded, how, and what each tensor is called in a Hugging Face checkpoint.

Blocks are decoded by `gguf.quants` (NumPy, bit-exact with llama.cpp's own reference); the float formats need no
library. Both go by row chunks into one output tensor: decoding a 2 GB embedding at once would cost several times that.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import EnvironmentProblem, InputError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK_ELEMENTS = 1 << 20  # 4 MB of fp32 a chunk: the decoder's temporaries stay near 30 MB


@dataclass(frozen=True)
class Format:
    """A tensor format: `block_size` elements of a row are stored in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


FORMATS = {
    0: Format("F32", 1, 4),
    1: Format("F16", 1, 2),
    2: Format("Q4_0", 32, 18),
    3: Format("Q4_1", 32, 20),
    8: Format("Q8_0", 32, 34),
    30: Format("BF16", 1, 2),
}
OTHER_FORMATS = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4",
}  # fmt: skip

_WHOLE_MODEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
BLOCK_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.([a-z0-9_]+)\.(weight|bias)")


def hf_name(path: Path, name: str) -> str:
    """A Llama tensor's name in a Hugging Face checkpoint; InputError for a tensor that a Llama does not have."""
    if name in _WHOLE_MODEL:
        return _WHOLE_MODEL[name]
    if match := BLOCK_NAME.fullmatch(name):
        layer, part, kind = match.groups()
        if part in _LINEARS:
            return f"model.layers.{layer}.{_LINEARS[part]}.{kind}"
        if part in _NORMS and kind == "weight":
            return f"model.layers.{layer}.{_NORMS[part]}.weight"
    raise InputError(
        f"{path}: tensor {name!r} belongs to no Llama model. The file holds a variant that is not supported; "
        "leaving the tensor out would change what the model computes."
    )


def decode(
    raw: Bytes,
    format: str,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    interleaved_heads: int | None = None,
) -> torch.Tensor:
    """A tensor's bytes to a new tensor of `shape`; peak memory is the output plus some 30 MB.

    `dtype` None keeps F32, F16 and BF16 as they are and gives fp32 for blocks. With `interleaved_heads` = H the rows
    of each of H heads are put back from llama.cpp's rotary order (pairs side by side) to Hugging Face's (halves).
    """
    to_rows = _row_decoder(format)
    if len(shape) == 1:  # a vector is one row of blocks
        values = to_rows(raw.reshape(1, -1)).view(-1, 1)
        if interleaved_heads is not None:
            values = halves_from_pairs(values, interleaved_heads)
        return values.view(shape).to(dtype or values.dtype)
    rows = raw.reshape(math.prod(shape[:-1]), -1)  # [R, bytes]
    head_dim = _head_dim(len(rows), interleaved_heads) if interleaved_heads is not None else 1
    step = max(1, CHUNK_ELEMENTS // (shape[-1] * head_dim)) * head_dim  # whole heads, so that a chunk can be reordered
    out: torch.Tensor | None = None
    for first in range(0, len(rows), step):
        values = to_rows(rows[first : first + step])  # [<= step, in]
        if interleaved_heads is not None:
            values = halves_from_pairs(values, len(values) // head_dim)
        if out is None:
            out = torch.empty(len(rows), shape[-1], dtype=dtype or values.dtype)
        out[first : first + step] = values
    assert out is not None  # a tensor has at least one row
    return out.view(shape)


def _head_dim(rows: int, heads: int) -> int:
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows cannot be split into {heads} heads of an even size")
    return rows // heads


def halves_from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order: [H * d, in] with rotary pairs side by side -> first halves, then second halves."""
    pairs = rows.view(heads, _head_dim(len(rows), heads) // 2, 2, -1)  # [H, d/2, 2, in]
    return pairs.transpose(1, 2).reshape(rows.shape)


def _row_decoder(format: str) -> Callable[[Bytes], torch.Tensor]:
    """The function that turns rows of bytes [R, bytes] into values [R, in]; always a copy, never a view of the map."""
    if format == "F32":
        return lambda rows: torch.from_numpy(rows.view("<f4").copy())
    if format == "F16":
        return lambda rows: torch.from_numpy(rows.view("<f2").copy())
    if format == "BF16":
        return lambda rows: torch.from_numpy(rows.view("<i2").copy()).view(torch.bfloat16)
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise EnvironmentProblem(f"reading {format} tensors needs the package gguf: pip install gguf") from error
    kind = GGMLQuantizationType[format]

    def blocks(rows: Bytes) -> torch.Tensor:
        with np.errstate(all="ignore"):  # an infinite scale gives NaN; whoever uses the weight refuses it by name
            return torch.from_numpy(dequantize(rows, kind))

    return blocks
