"""NF4Linear and NF4Embedding: a frozen linear layer, and a table, whose weight is kept in 4 bits; and what they share.

The quantised weight is up to four plain frozen parameters, so the module counts, shards, saves, moves, copies and
prints like any other. The price is one rule: casting the model must not cast the scales, so `_apply` keeps the dtype of
all four. Dense weights are never kept: forward and backward decode into scratch (`kernels.linear4bit.linear4bit`).

Layout and rounding are bitsandbytes' (Dettmers et al. 2023, "QLoRA", section 3).
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import InputError
from ..kernels.blockwise import NESTED_BLOCKSIZE
from ..kernels.dequantize4bit import dequantize, dequantize_rows
from ..kernels.dispatch import autocast_input
from ..kernels.linear4bit import linear4bit
from ..kernels.lora_paths import lora_update
from ..kernels.quantize4bit import quantize
from ..kernels.weight4bit import Weight4bit, check_format, stored_shapes
from ..settings import DType, floating
from .lazy_weight import LazyWeight


class Module4bit(nn.Module):
    """A module with one frozen weight in 4 bits (NF4, or FP4 with `quant_type="fp4"`), of any shape [..., columns].

    Frozen parameters of it, for n values:
        packed         uint8 [..., columns / 2]    two codes a byte, the earlier element in the high nibble
        absmax         uint8 or fp32 [..., columns / blocksize]    a block's scale; 8-bit codes if double quantised
        nested_absmax  fp32 [ceil(blocks / 256)]    scales of the absmax codes; None without double quantisation
        nested_offset  fp32 [1]    mean that was taken off absmax before coding it; None without double quantisation
    Where a row is not whole blocks, packed is flat [(n + 1) // 2] and absmax [ceil(n / blocksize)]; or both
    are [E, ...], if the shape is [E, rows, columns] and a matrix is whole blocks.

    `weight` is the dense weight, made when an operation takes it, in `dtype`: that of the weight it was
    made from, then of casts. A new module holds a zero weight; `quantize_weight_` fills it.
    Raises ValueError for a quant_type or blocksize that does not exist."""

    packed: nn.Parameter
    absmax: nn.Parameter
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None
    conv1d: bool = False  # whether it is in the place of a Conv1D, of which files have dense weights as [in, out]

    def __init__(
        self,
        shape: tuple[int, ...],
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_format(quant_type, blocksize)
        self.shape, self.quant_type, self.blocksize, self.double_quant = shape, quant_type, blocksize, double_quant
        self.dtype = torch.get_default_dtype()
        packed, absmax = stored_shapes(shape, blocksize)
        zeros = partial(torch.zeros, device=device, dtype=torch.float32)
        scales = zeros(absmax, dtype=torch.uint8 if double_quant else torch.float32)
        nested = zeros(-(-prod(absmax) // NESTED_BLOCKSIZE)) if double_quant else None
        offset = zeros(1) if double_quant else None
        self.store(Weight4bit(zeros(packed, dtype=torch.uint8), scales, nested, offset, shape))
        self.register_parameter("bias", None)

    @classmethod
    def empty(cls, shape: tuple[int, ...], quant_type: str, blocksize: int, double_quant: bool) -> Self:
        """One without values, on the meta device, and without a bias."""
        new = cls.__new__(cls)
        Module4bit.__init__(new, shape, quant_type, blocksize, double_quant, "meta")
        return new

    @classmethod
    def of(cls, stored: Weight4bit, dtype: torch.dtype) -> Self:
        """One of these tensors; they are its own, not copied."""
        packed, absmax = stored_shapes(stored.shape, stored.blocksize)
        new = cls.empty(stored.shape, stored.quant_type, stored.blocksize, stored.nested_absmax is not None)
        new.store(stored._replace(packed=stored.packed.view(packed), absmax=stored.absmax.view(absmax)))
        new.dtype = dtype
        return new

    @torch.no_grad()
    def quantize_weight_(self, weight: Tensor, *, name: str = "") -> None:
        """Replace the weight by the 4-bit form of `weight`, of its shape; nothing of the dense tensor is kept.

        It is made where `weight` lies, and goes to the module's device, or stays there if the module is on meta.
        Raises ValueError for a wrong shape and InputError, naming the tensor, for NaN or infinity."""
        label = f"'{name}'" if name else "the weight"
        if list(weight.shape) != list(self.shape):
            raise ValueError(f"{label} must have shape {list(self.shape)}, got {list(weight.shape)}")
        device = weight.device if self.packed.is_meta else self.packed.device
        try:
            fake = isinstance(weight, FakeTensor)  # it has no values
            stored = self.stored if fake else quantize(weight, self.quant_type, self.blocksize, self.double_quant)
        except ValueError as problem:
            raise InputError(f"{label} cannot be quantised to {self.quant_type}: {problem}") from problem
        self.store(stored.to(device))
        self.dtype = weight.dtype

    def store(self, stored: Weight4bit) -> None:
        """Make these tensors, of this module's format, its weight."""
        for name, tensor in zip(("packed", "absmax", "nested_absmax", "nested_offset"), stored[:4], strict=True):
            self.register_parameter(name, None if tensor is None else _frozen(tensor))

    def share(self, other: "Module4bit") -> None:
        """Hold the very parameters of another module of the same weight and form."""
        for name, parameter in other.stored_parameters().items():
            setattr(self, name, parameter)

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that make the weight, by name: all but the bias."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "bias"}

    @property
    def stored(self) -> Weight4bit:
        """The weight as the kernels take it."""
        tensors = self.packed, self.absmax, self.nested_absmax, self.nested_offset
        return Weight4bit(*tensors, self.shape, self.quant_type, self.blocksize)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made when an operation takes it: see `LazyWeight`."""
        decode, stored = lambda i, dtype: self.dequantize(dtype, i), [*self.stored_parameters().values()]
        return LazyWeight.decoded(decode, self.shape, self.dtype, self.packed, stored)

    @torch.no_grad()
    def dequantize(self, dtype: DType = torch.float32, index: int | slice | Tensor | None = None) -> Tensor:
        """The dense weight that this module computes with, rounded once to `dtype`; or what an index into its first
        dimension takes of it, decoded alone where each matrix [rows, columns] there is whole blocks."""
        if index is None:
            return dequantize(self.stored, dtype)
        chosen = torch.arange(self.shape[0], device=self.packed.device)[index]
        matrix = self.stored._replace(shape=(self.shape[0], prod(self.shape[1:])))
        return dequantize_rows(matrix, chosen.reshape(-1), floating(dtype)).view(*chosen.shape, *self.shape[1:])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves follow `fn`, casts do not: scales rounded to a lower precision would be another weight."""
        quantised = {id(parameter) for parameter in self.stored_parameters().values()}

        def move_only(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in quantised and new.dtype != tensor.dtype else new

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(move_only, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """A copy between dtypes would turn scales into codes or codes into scales, so it is an error."""
        wrong = [
            f"dtype mismatch for {prefix}{name}: the module holds {own.dtype}, the file {given.dtype}"
            for name, own in self.stored_parameters().items()
            if (given := state_dict.get(prefix + name)) is not None and given.dtype != own.dtype
        ]
        rest[-1].extend(wrong)  # torch's list of errors
        if not wrong:
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"quant_type={self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"


class NF4Linear(Module4bit):
    """y = x W^T + bias with a frozen 4-bit W [out, in], computed in the dtype of x. `from_weight` makes one.

    Raises TypeError for an input of whole numbers, and ValueError as Module4bit."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((out_features, in_features), quant_type, blocksize, double_quant, device)
        self.register_parameter("bias", _frozen(torch.zeros(out_features, device=device)) if bias else None)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,  # [out, in], floating point
        bias: Tensor | None = None,  # [out]
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        name: str = "",
    ) -> Self:
        """Quantise a dense weight [out, in]. `name` is what an error calls it; NaN or infinity raises InputError."""
        rows, columns = weight.shape
        layer = cls.empty((rows, columns), quant_type, blocksize, double_quant)
        layer.quantize_weight_(weight, name=name)
        if bias is not None:
            layer.bias = _frozen(bias.detach())
        return layer

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        if not x.is_floating_point():
            raise TypeError(f"NF4Linear takes floating-point activations, got {x.dtype}")
        if x.is_nested:
            return over_nested(self.forward, x)
        return linear4bit(autocast_input(x), self.stored, self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {super().extra_repr()}"


class NF4LowRank(NF4Linear):
    """y = x (W4 + B A)^T + bias: 4 bits and, frozen in fp32, a low-rank part of what they leave of a weight."""

    A: nn.Parameter  # [r, in]
    B: nn.Parameter  # [out, r]

    @classmethod
    def beside(cls, layer: NF4Linear, stored: Weight4bit, A: Tensor, B: Tensor) -> Self:
        """What takes the place of `layer`: of these codes and this part, else like it."""
        new = cls.of(stored, layer.dtype)
        new.A, new.B, new.bias, new.conv1d = _frozen(A.clone()), _frozen(B.clone()), layer.bias, layer.conv1d
        vars(new).update({name: held for name, held in vars(layer).items() if "hook" in name})
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = super().forward(x)
        return y if x.is_nested else lora_update(y, autocast_input(x), self.A, self.B, 1.0)

    @torch.no_grad()
    def dequantize(self, dtype: DType = torch.float32, index: int | slice | Tensor | None = None) -> Tensor:
        B = self.B if index is None else self.B[index]
        return (super().dequantize(torch.float32, index) + B @ self.A).to(floating(dtype))


class NF4Embedding(Module4bit):
    """Rows of a frozen 4-bit table [tokens, columns], in `dtype`; arguments, parameters and errors are Module4bit's.

    Only the rows that are looked up are decoded: a vocabulary of 128k tokens times 4,096 is 1 GB in bf16 and 0.27 GB
    here. Its bytes are those of an NF4Linear of the same weight, so a head that is tied to it shares them.
    Where a row is not whole blocks, the whole table is decoded for a lookup: take a blocksize that divides a row."""

    def forward(self, ids: Tensor) -> Tensor:  # int [...] -> [..., embedding_dim]
        found = dequantize_rows(self.stored, ids.reshape(-1), self.dtype)
        return found.view(*ids.shape, self.shape[1])


def is_embedding(module: nn.Module) -> bool:
    """Whether it looks rows up and no more, as such a table does. A subclass with a forward of its own may do more."""
    plain = type(module).forward is nn.Embedding.forward and getattr(module, "max_norm", None) is None
    return plain or isinstance(module, NF4Embedding)


def weight_id(held: nn.Module | Tensor) -> int:
    """The same for modules that share one weight, and for that weight if it is dense."""
    if isinstance(held, Tensor):
        return id(held)
    return id(held.packed if isinstance(held, Module4bit) else held._parameters.get("weight"))


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, GPT-2's linear layer, which keeps its weight [in, out]."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def was_conv1d(layer: nn.Module) -> bool:
    """Whether it is one, or in 4 bits in the place of one."""
    return is_conv1d(layer) or (isinstance(layer, Module4bit) and layer.conv1d)


def sizes(layer: nn.Linear | NF4Linear) -> tuple[int, int]:
    """in_features and out_features of a linear layer, Conv1D too."""
    known = layer.weight.shape if is_conv1d(layer) else (layer.in_features, layer.out_features)
    return known[0], known[1]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def over_nested(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a layer makes of a nested tensor, such as nn.TransformerEncoder makes of a batch with padding."""
    if x.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(forward(x.values()), x.offsets())  # type: ignore[attr-defined]  # no stub
    return torch.nested.as_nested_tensor([forward(part) for part in x.unbind()])
