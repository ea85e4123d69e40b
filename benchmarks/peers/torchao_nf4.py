"""torchao's NF4: a tensor subclass whose linear decodes with plain PyTorch ops.

Its decoder makes many passes when it runs op by op, so its best setting is compiled. Every shape is compiled by itself,
for seconds, so it is measured on SHAPES alone. It quantises the scales its own way, so it is judged against its own
decoded weight.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import import_problem

NAME = "torchao NF4, compiled"
SHAPES = ((4096, 4096), (14336, 4096))


def missing() -> str | None:
    places = ("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor")
    problems = [import_problem(place) for place in places]
    return None if None in problems else problems[0]


def quantized(dense: Tensor) -> Any:
    """NF4 in blocks of 64, scales in blocks of 256; decodes to the dtype of `dense`."""
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor
    except ImportError:  # before 0.17
        from torchao.dtypes.nf4tensor import NF4Tensor
    return NF4Tensor.from_tensor(dense, 64, 256)


def decoded(weight: Any) -> Tensor:
    """Its own dense weight, op by op."""
    dense: Tensor = weight.get_original_weight()
    return dense


@cache
def decoder() -> Callable[[Any], Tensor]:
    return torch.compile(lambda weight: weight.get_original_weight(), dynamic=False)


def linear(x: Tensor, weight: Any) -> Tensor:
    return F.linear(x, decoder()(weight))
