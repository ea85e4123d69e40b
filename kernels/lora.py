"""The LoRA update y + scale * (x A^T) B^T for dense bases, written so that autograd keeps little.

4-bit bases take `lora_linears4bit`, which makes the base's product too. Of the same line as two products and a sum
autograd keeps nothing as large as y: only x, which the layer below keeps anyway, and the narrow x A^T.
"""

import torch
from torch import Tensor

from .dispatch import product_dtype


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """y [..., out] + scale * (x [..., in] A^T) B^T, A [rank, in], B [out, rank] (LoRA, arXiv 2106.09685, eq. 3).

    Gradients flow to y, x, A and B, each in its own dtype; x and x A^T are saved. A and B may be fp32 masters under
    lower-precision x: the products run in dispatch.product_dtype(x). ValueError if the shapes do not fit.
    """
    fits = A.dim() == B.dim() == 2 and A.shape[0] == B.shape[1] and x.shape[-1:] == A.shape[1:]
    if not fits or y.shape != x.shape[:-1] + B.shape[:1]:
        raise ValueError(
            "lora_update needs y [..., out], x [..., in], A [rank, in], B [out, rank], got "
            f"y {tuple(y.shape)}, x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}"
        )
    dtype = product_dtype(x)
    s = x.to(dtype).reshape(-1, x.shape[-1]) @ A.to(dtype).T  # [N, rank]
    if y.dtype != dtype:
        return y + (scale * (s @ B.to(dtype).T)).to(y.dtype).view(y.shape)
    return torch.addmm(y.reshape(-1, y.shape[-1]), s, B.to(dtype).T, alpha=scale).view(y.shape)
