"""8-bit blockwise quantisation with a 256-entry table, and its use on NF4's own scales (double quantisation)."""

import torch
from torch import Tensor

from .codes import dynamic_code
from .dispatch import path_for

NESTED_BLOCKSIZE = 256


def quantize_blockwise(values: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The nearest entry of code * absmax for every value, exactly: (codes uint8 like values, absmax fp32 [blocks]).

    `code` is ascending fp32; exactly between two entries the lower one wins. The comparison runs in float64, where the
    quotient of two fp32 numbers cannot round onto a midpoint of the table, so no value takes the farther code.
    """
    flat = values.detach().reshape(-1).float()
    blocks = -(-flat.numel() // blocksize)
    padded = torch.nn.functional.pad(flat, (0, blocks * blocksize - flat.numel())).view(blocks, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = padded.double() / torch.where(absmax > 0, absmax, 1).double().unsqueeze(1)
    codes = torch.bucketize(scaled, _midpoints(code)).to(torch.uint8)
    return codes.view(-1)[: flat.numel()].view(values.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """code[codes] * absmax of the block, fp32, in the shape of codes. ValueError if the scales are not one a block."""
    if absmax.numel() != -(-codes.numel() // blocksize):
        raise ValueError(
            f"{codes.numel()} codes in blocks of {blocksize} need {-(-codes.numel() // blocksize)} scales, "
            f"got {absmax.numel()}"
        )
    values = torch.index_select(code, 0, codes.reshape(-1).int())
    whole = values.numel() - values.numel() % blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize].unsqueeze(1))
    if whole < values.numel():
        values[whole:].mul_(absmax[-1])
    return values.view(codes.shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation (QLoRA, arXiv 2305.14314, section 3): fp32 scales [b] -> 8 bits each and fewer scales.

    Returns (codes uint8 [b], nested_absmax fp32 [ceil(b / 256)], offset fp32 0-d). The offset is the mean, taken off
    because scales are all positive and would waste half the codes of the signed map. It is summed in float64.
    """
    offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    code = dynamic_code(True, absmax.device)
    if path_for(absmax) == "triton" and absmax.dtype == torch.float32:
        from .blockwise_triton import quantize_shifted  # only here: Triton exists for Linux only and is slow to import

        codes = torch.empty_like(absmax, dtype=torch.uint8, memory_format=torch.contiguous_format)
        nested = torch.empty(-(-absmax.numel() // NESTED_BLOCKSIZE), dtype=torch.float32, device=absmax.device)
        quantize_shifted(absmax.contiguous(), offset, _midpoints(code), NESTED_BLOCKSIZE, codes, nested)
    else:
        codes, nested = quantize_blockwise(absmax - offset, code, NESTED_BLOCKSIZE)
    return codes, nested, offset


def _midpoints(code: Tensor) -> Tensor:
    """float64 [255], exact."""
    return (code[:-1].double() + code[1:].double()) / 2


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """The scales back, fp32 [b]: map[code] * nested_absmax + offset, each step rounded to fp32."""
    return dequantize_blockwise(codes, nested_absmax, dynamic_code(True, codes.device), NESTED_BLOCKSIZE).add_(offset)
