"""8-bit floats with scales, as DeepSeek's, Qwen's and compressed-tensors' checkpoints hold them, to dense values.

A weight is its 8-bit values times a scale: one for all, one a row, or one for each block of rows and columns
(DeepSeek-V3, arXiv 2412.19437, section 3.3: 128 x 128). It lies beside the weight as `weight_scale`, or
`weight_scale_inv`, which is multiplied all the same. Scales of activations are for products in 8 bits, and left out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError, shown

Header = tuple[Path, str, tuple[int, ...]]  # of a tensor: file, type, shape
FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale", "_scale_inv")  # after a weight's name
_BESIDE = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale")  # of activations, in its module
_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors, for weights of 8 bits


def check_quantization(config: Mapping[str, Any], where: str) -> Sequence[int]:
    """Rows and columns of a block of `config.json`'s 8-bit floats, [128, 128] where it does not say; InputError for a
    quantisation that is neither that nor bitsandbytes', by its name."""
    how = config.get("quantization_config", config.get("compression_config"))
    how = {"quant_method": "bitsandbytes"} if how is None else how
    named = ("quant_method", "format", "weight_block_size")
    method, form, block = asked = [how.get(key) if isinstance(how, dict) else None for key in named]
    known = method in ("bitsandbytes", "fp8", "fbgemm_fp8") or (method == "compressed-tensors" and form in _FORMATS)
    block = [128, 128] if block is None else block
    whole = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if not known or not whole:
        raise InputError(
            f"{where}: quantization_config must be absent, or of quant_method bitsandbytes, fp8, fbgemm_fp8 or "
            "compressed-tensors in the format float-quantized, with a weight_block_size of two whole numbers, got "
            f"{shown(asked if isinstance(how, dict) else how)}. Load the unquantised model and let fourbit quantise it."
        )
    return block


def scale_names(headers: Mapping[str, Header]) -> tuple[dict[str, str], set[str]]:
    """Each scale's name with its 8-bit weight's, and the names of all that go with 8-bit weights. InputError for such a
    weight without a scale, or with two."""
    weights = [name for name, (_, kind, _) in headers.items() if kind in FLOAT8]
    names = {name + end: name for name in weights for end in _SCALES if name + end in headers}
    counts = Counter(names.values())
    for name in weights:
        if counts[name] != 1:
            file, kind, _ = headers[name]
            raise InputError(f"{file}: tensor {name!r} is of {kind}, and needs one {name + _SCALES[0]!r}")
    homes = {name.rpartition(".")[0] for name in weights}
    homes |= {home.rpartition(".")[0] for home in homes}
    return names, {*names, *(headers.keys() & {f"{home}.{name}".strip(".") for home in homes for name in _BESIDE})}


def decoded(weight: Tensor, scale: Tensor, block: Sequence[int], what: str) -> Tensor:
    """The dense weight [..., out, in] in fp32: its 8-bit floats times one scale, [out] or [out, 1] of them, or one for
    each `block` of rows and columns. `what` is what an InputError calls scales of another shape."""
    out, scale = weight.float(), scale.float()
    rows, columns = out.shape[-2:] if out.ndim > 1 else (out.numel(), 1)
    grid = (*out.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if scale.numel() == 1:
        return out.mul_(scale.view(()))
    if scale.shape in (out.shape[:-1], (*out.shape[:-1], 1)):
        return out.mul_(scale.view(*out.shape[:-1], 1))
    if scale.shape != grid:
        raise InputError(f"{what} has scales {list(scale.shape)}, and needs 1, {[rows, 1]} or {list(grid)} of them")
    for row in range(grid[-2]):
        part = out[..., row * block[0] : (row + 1) * block[0], :]
        part *= scale[..., row, :].repeat_interleave(block[1], -1)[..., None, :columns]
    return out
