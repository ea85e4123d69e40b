"""GGUF tensors: which formats can be decoded, how, and what each tensor is called in a Hugging Face checkpoint.

Blocks are decoded by `gguf.quants` (NumPy, bit-exact with llama.cpp's own reference); the float formats need no
library. Both go by row chunks into one output tensor: decoding a 2 GB embedding at once would cost several times that.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import EnvironmentProblem, InputError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

CHUNK_ELEMENTS = 1 << 20  # 4 MB of fp32 a chunk: the decoder's temporaries stay near 30 MB


class Format(NamedTuple):
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

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.([a-z0-9_]+)")


def hf_name(path: Path, name: str) -> str:
    """A Llama tensor's name in a Hugging Face checkpoint; InputError for a tensor that a Llama does not have."""
    place, _, kind = name.rpartition(".")
    block = _BLOCK.fullmatch(place)
    part = block[2] if block else place
    whole = part in ("token_embd", "output_norm", "output")
    plain = kind == "weight" or (kind == "bias" and block and not part.endswith("_norm"))
    if part not in _NAMES or whole is bool(block) or not plain:
        raise InputError(
            f"{path}: tensor {name!r} belongs to no Llama model. The file holds a variant that is not supported; "
            "leaving the tensor out would change what the model computes."
        )
    return f"model.layers.{block[1]}.{_NAMES[part]}.{kind}" if block else f"{_NAMES[part]}.{kind}"


def decode(raw: Bytes, format: str, shape: tuple[int, ...], interleaved_heads: int | None = None) -> Tensor:
    """A tensor's bytes to a new tensor of `shape`; peak memory is the output plus some 30 MB.

    F32, F16 and BF16 stay what they are, blocks become fp32. With `interleaved_heads` = H the rows of each of H heads
    are put back from llama.cpp's rotary order (pairs side by side) to Hugging Face's (halves).
    """
    rows = raw.reshape(math.prod(shape[:-1]), -1)  # [R, bytes]
    if interleaved_heads is None:
        return _decode_rows(rows, format, 1).view(shape)
    if len(shape) == 1:  # a bias is one row of blocks
        return halves_from_pairs(_decode_rows(rows, format, 1).view(-1, 1), interleaved_heads).view(shape)
    head_dim = _head_dim(len(rows), interleaved_heads)
    return _decode_rows(rows, format, head_dim).view(shape)


def _decode_rows(rows: Bytes, format: str, head_dim: int) -> Tensor:
    """Rows of bytes [R, bytes] to values [R, in], chunk by chunk; with a `head_dim` above 1 in halves."""
    first = _values(rows[:head_dim], format)
    out = torch.empty(len(rows), first.shape[1], dtype=first.dtype)
    step = max(1, CHUNK_ELEMENTS // (first.shape[1] * head_dim)) * head_dim  # whole heads, to be put in order
    for start in range(0, len(rows), step):
        values = _values(rows[start : start + step], format)
        out[start : start + step] = values if head_dim == 1 else halves_from_pairs(values, len(values) // head_dim)
    return out


def _head_dim(rows: int, heads: int) -> int:
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows cannot be split into {heads} heads of an even size")
    return rows // heads


def halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order: [H * d, in] with rotary pairs side by side -> first halves, then second halves."""
    pairs = rows.view(heads, _head_dim(len(rows), heads) // 2, 2, -1)  # [H, d/2, 2, in]
    return pairs.transpose(1, 2).reshape(rows.shape)


def _values(rows: Bytes, format: str) -> Tensor:
    """Rows of bytes [R, bytes] to values [R, in]; always a copy, never a view of the map."""
    plain = {"F32": "<f4", "F16": "<f2", "BF16": "<i2"}.get(format)
    if plain is not None:
        values = torch.from_numpy(rows.view(plain).copy())
        return values.view(torch.bfloat16) if format == "BF16" else values
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise EnvironmentProblem(f"reading {format} tensors needs the package gguf: pip install gguf") from error
    with np.errstate(all="ignore"):  # an infinite scale gives NaN; whoever uses the weight refuses it by name
        return torch.from_numpy(dequantize(rows, GGMLQuantizationType[format]))
