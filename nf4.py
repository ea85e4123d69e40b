"""4-bit weights on one page: quantise, decode, double quantisation of the scales, and the linear layer made of them.

The name is the usual type's; FP4 goes the same ways with quant_type="fp4". A quantised weight is one `Weight4bit`:
plain tensors (packed codes, scales), laid out as bitsandbytes lays them out, with its shape, quant_type and blocksize.
"""

from .kernels.blockwise import dequantize_absmax, quantize_absmax
from .kernels.dequantize4bit import dequantize
from .kernels.linear4bit import linear4bit
from .kernels.quantize4bit import quantize
from .kernels.weight4bit import Weight4bit

__all__ = ["Weight4bit", "dequantize", "dequantize_absmax", "linear4bit", "quantize", "quantize_absmax"]
