"""DoRA: weight-decomposed low-rank adaptation, a trained magnitude for each row beside LoRA's change of direction.

The row norms of V = W + s B A take no dense V: |V|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, row by row, exact.
|W|^2 is kept while the base's weight is what it was, and the norms while A and B are too: until the next step.
"""

import weakref
from collections.abc import Callable
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dispatch import autocast_input
from ..kernels.lora_paths import lora_update
from .adapter import Adapter, LowRank, wide
from .linear4bit import Module4bit, is_conv1d
from .lora import LoRA

MAGNITUDE = "lora_magnitude_vector"  # as files call it


class DoRA(LoRA):
    """y = m / ||V|| * V x + bias with V = W + scale * B A (Liu et al. 2024, arXiv 2402.09353, equation 5).

    ||V|| is the norm of each row, a constant to autograd as in section 4.3; m [out] starts at W's. m is fp32 or wider
    whatever the model or the adapter is cast to, so that its small steps are not rounded away.
    With dropout it is W x + (c V - W) dropout(x) + bias, c = m / ||V||, as of the authors and PEFT: two base products.
    """

    peft_type = "LORA"
    forward = Adapter.forward  # it must know its base: `over`

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
        super().__init__(base, rank, alpha, dropout, rslora)
        self.kept: dict[str, tuple[Any, Any, Any]] = {}  # what was made of which tensors
        self.lora_magnitude_vector = nn.Parameter(self._squares(base).sqrt())

    def over(self, x: Tensor, base: nn.Module) -> Tensor:
        x = autocast_input(x)
        h = F.dropout(x, self.dropout) if self.training and self.dropout else x
        plain = base(h)
        y = self.finish(lora_update(plain, h, *self.factors(), self.scale), base)
        return y if h is x else base(x) - plain + y

    def low_rank(self, codes: bool = False) -> LowRank | None:
        apart = codes or (self.training and self.dropout)
        return None if apart else LowRank(*self.factors(), self.scale, 0.0)

    def finish(self, y: Tensor, base: nn.Module) -> Tensor:
        c = self.lora_magnitude_vector / self.norms(base)
        bias = cast(Tensor | None, base.bias)
        return (y * c if bias is None else torch.addcmul((1 - c) * bias, y, c)).to(y.dtype)  # c is not for the bias

    def norms(self, base: nn.Module) -> Tensor:
        """||W + scale * B A|| [out], a norm for each row, fp32 or wider; of zeros the smallest number there is."""
        return self._keep("norms", base, self._norms, self.lora_A, self.lora_B)

    def _norms(self, base: nn.Module) -> Tensor:
        weight, squares = cast(Tensor, base.weight), self._keep("squares", base, self._squares)
        A, B = (factor.to(squares.dtype) for factor in self.factors())
        cross = F.linear(A.to(weight.dtype), weight.mT if is_conv1d(base) else weight)  # A W^T, decoded once
        added = (2 * self.scale) * cross.mT.to(B.dtype) + self.scale**2 * (B @ (A @ A.mT))
        return (squares + (added * B).sum(1)).clamp(min=torch.finfo(squares.dtype).tiny).sqrt()

    @torch.no_grad()
    def _squares(self, base: nn.Module) -> Tensor:
        return wide(cast(Tensor, base.weight), base).square().sum(1)

    def _keep(self, name: str, base: nn.Module, make: Callable[[nn.Module], Tensor], *others: Tensor) -> Tensor:
        """make(base), without autograd and autocast; made anew if the base's weight or `others` are not as they were.

        In compiled code, of tensors that stand in for parameters, as in transforms, and of weights that were made in
        inference mode, which count no changes, it is made each time.
        """
        tensors = cast(Tensor, base.packed if isinstance(base, Module4bit) else base._parameters.get("weight")), *others
        with torch.no_grad(), torch.autocast(self.lora_A.device.type.replace("meta", "cpu"), enabled=False):
            if torch.compiler.is_compiling() or any(type(t) is not nn.Parameter or t.is_inference() for t in tensors):
                return make(base)
            marks = [(getattr(base, "dtype", None), t._version, t.data_ptr(), t.device, t.dtype) for t in tensors]
            refs, known, made = self.kept.get(name, ((), None, None))
            if known != marks or any(ref() is not t for ref, t in zip(refs, tensors, strict=True)):
                with torch.inference_mode(False), torch.no_grad():  # what inference made, training could not use
                    made = make(base)
                self.kept[name] = [weakref.ref(t) for t in tensors], marks, made
            return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        m = self.lora_magnitude_vector

        def held(tensor: Tensor) -> Tensor:  # moves follow `fn`, casts to less than fp32 do not
            new, own = fn(tensor), tensor is m or tensor is m.grad
            return tensor.to(new.device, torch.promote_types(new.dtype, torch.float32)) if own else new

        self.kept.clear()
        return super()._apply(held, recurse)

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles
        return self.__dict__ | {"kept": {}}

    def delta(self, weight: Tensor) -> Tensor:
        V = weight + super().delta(weight)
        norms = V.detach().norm(dim=1).clamp(min=torch.finfo(V.dtype).tiny ** 0.5)
        return (self.lora_magnitude_vector.to(V.dtype) / norms)[:, None] * V - weight

    def is_idle(self) -> bool:
        return False  # whether the magnitudes are the norms, only the base could tell

    def state(self) -> dict[str, Tensor]:
        return super().state() | {MAGNITUDE: self.lora_magnitude_vector.detach()}
