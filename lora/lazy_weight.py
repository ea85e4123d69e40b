"""Weights that are made when they are read: decoded from 4 bits, an expert at a time, or with an adapter's change."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..kernels.dispatch import autocast_input, product_dtype
from ..kernels.experts import Decode, GroupedFrozen, grouped_product
from ..kernels.lora_paths import TimesFrozen

Terms = Sequence[tuple[Tensor, Tensor]]  # left [..., out, rank] times right [..., rank, in], each to be added


class LazyWeight(Tensor):
    """A weight that a layer computes with, for code that reads `weight`, or a parameter, of what it takes for dense.

    Sizes, dtype and device are known at once; an operation gets the values, made for it, and gradients flow to what
    made them. So nn.MultiheadAttention uses its adapted projection, and nn.TransformerEncoderLayer calls its layers:
    its fast path takes no tensor with a torch function of its own. RuntimeError for what would write into it.

    Of frozen values, what is indexed or has its last two dimensions swapped is another LazyWeight: `weight[e]` decodes
    one expert. Products decode for forward and again for backward, so none of them keeps a dense weight."""

    make: Callable[[torch.dtype], Tensor]  # the values, rounded once to that dtype
    decode: Decode | None = None  # frozen values, if these and the terms are all that there is
    terms: Terms = ()
    stored: Sequence[Tensor] = ()  # what `decode` reads, and backward again: an error if it is written into meanwhile

    @classmethod
    def of(
        cls, make: Callable[[torch.dtype], Tensor], shape: Sequence[int], dtype: torch.dtype, like: Tensor
    ) -> Tensor:
        """What `make` gives, on the device of `like`, trained as that is; made at once under torch.compile."""
        if torch.compiler.is_compiling():
            return make(dtype)
        new = cls._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device, requires_grad=like.requires_grad)
        new.make = make
        return new

    @classmethod
    def decoded(
        cls, decode: Decode, shape: Sequence[int], dtype: torch.dtype, like: Tensor, stored: Sequence[Tensor],
        terms: Terms = (),
    ) -> Tensor:  # fmt: skip
        """What `decode` gives plus each term's product; summed in fp32 and rounded once where it is made dense."""

        def make(dtype: torch.dtype) -> Tensor:
            if not terms:
                return decode(None, dtype)
            wide = torch.promote_types(dtype, torch.float32)
            return sum((left.to(wide) @ right.to(wide) for left, right in terms), decode(None, wide)).to(dtype)

        like = next((part for term in terms for part in term if part.requires_grad), like)
        new = cls.of(make, shape, dtype, like)
        if isinstance(new, cls):
            new.decode, new.stored, new.terms = decode, stored, terms
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = next(iter((*args, *kwargs.values())))
        if func == _DATA:
            return first  # so that writing into that is refused too
        if any(isinstance(part, cls) for part in tree_leaves(first)) and (
            name[-1] == "_" != name[-2] or name in ("__set__", "__setitem__")
        ):  # no TypeError: Python would take w += 1 as w = w + 1 then
            raise RuntimeError(f"{name}: the weight of such a layer is made when it is read; change what it is made of")
        if (found := _lazily(func, args, kwargs)) is not None:
            return found
        args, kwargs = tree_map_only(cls, lambda weight: weight.make(weight.dtype), (args, kwargs))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]  # one function serves both


def _lazily(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """A view as a LazyWeight, or a product without a dense weight that lasts; None for what needs the dense tensor."""
    name, (left, right, *more) = func.__name__, (*args, None, None)[: max(len(args), 2)]
    if isinstance(left, LazyWeight) and left.decode is not None:
        last = {left.ndim - 1, left.ndim - 2}
        if func in _SWAPS or (name == "transpose" and {n % left.ndim for n in args[1:]} == last):
            return _swapped(left)
        one = type(right) is int or (isinstance(right, Tensor) and right.dtype == torch.int64)
        if name == "__getitem__" and left.ndim > 2 and one:
            return _item(left, right)
        if name in ("matmul", "bmm", "mm") and type(right) is Tensor and right.ndim > 1:
            made = _times(right.mT, _swapped(left))
            return None if made is None else made.mT
    elif isinstance(right, LazyWeight) and right.decode is not None and isinstance(left, Tensor):
        if name == "linear" and right.ndim == 2:
            y, bias = _times(left, _swapped(right)), more[0] if more else kwargs.get("bias")
            return y if y is None or bias is None else y + bias.to(y.dtype)
        if name in ("matmul", "bmm", "mm"):
            return _times(left, right)
        if name in ("grouped_mm", "_grouped_mm") and left.ndim == 2 and right.ndim == 3:
            return _times(left, right, more[0] if more else kwargs["offs"])
    return None


def _swapped(weight: Any) -> Any:
    *lead, rows, columns = weight.shape
    terms, decode = [(right.mT, left.mT) for left, right in weight.terms], weight.decode
    shape = (*lead, columns, rows)
    turned: Decode = lambda index, dtype: decode(index, dtype).mT  # noqa: E731  # typed
    return LazyWeight.decoded(turned, shape, weight.dtype, weight, weight.stored, terms)


def _item(weight: Any, index: Any) -> Tensor:
    terms, decode = [(left[index], right[index]) for left, right in weight.terms], weight.decode
    shape = (*getattr(index, "shape", ()), *weight.shape[1:])
    of: Decode = lambda inner, dtype: decode(index, dtype)[... if inner is None else inner]  # noqa: E731  # typed
    return LazyWeight.decoded(of, shape, weight.dtype, weight, weight.stored, terms)


def _times(x: Tensor, weight: Any, ends: Tensor | None = None) -> Any:
    """x times the weight, or with `ends` a slice of x times each of its matrices; None where they do not fit so."""
    alike = weight.ndim == 2 or x.shape[:-2] == weight.shape[:-2] or ends is not None
    if type(x) is not Tensor or not x.is_floating_point() or not alike or x.shape[-1] != weight.shape[-2]:
        return None
    dtype, decode = (x := autocast_input(x)).dtype, weight.decode
    h = x.to(product_dtype(x))
    if ends is None:
        y, product = TimesFrozen.apply(h, partial(decode, None), False, *weight.stored), torch.matmul
    else:
        y = GroupedFrozen.apply(h, decode, weight.shape, ends, *weight.stored)
        product = partial(grouped_product, ends=ends)
    for left, right in weight.terms:
        y = y + product(product(h, left.to(h.dtype)), right.to(h.dtype))
    return y.to(dtype)


_PROPERTIES = "data shape dtype device layout ndim requires_grad grad grad_fn is_leaf is_meta is_cpu is_cuda is_nested"
_DATA, *_GETTERS = (getattr(Tensor, name).__get__ for name in _PROPERTIES.split())
_SWAPS = Tensor.mT.__get__, Tensor.T.__get__, Tensor.t  # type: ignore[attr-defined]  # a descriptor
_KNOWN = {*_GETTERS, Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point}
