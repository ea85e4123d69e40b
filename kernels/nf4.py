"""4-bit weights on one page: quantise, decode, double quantisation of the scales, and the linear layer made of them.

The name is the usual type's; FP4 goes the same ways with quant_type="fp4". A quantised weight is one `Weight4bit`:
plain tensors (packed codes, scales), laid out as bitsandbytes lays them out, with its shape, quant_type and blocksize.
"""

from .blockwise import dequantize_absmax as dequantize_absmax
from .blockwise import quantize_absmax as quantize_absmax
from .dequantize4bit import dequantize as dequantize
from .linear4bit import linear4bit as linear4bit
from .quantize4bit import quantize as quantize
from .weight4bit import Weight4bit as Weight4bit
