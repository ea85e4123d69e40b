"""What a kind of adapter is: a trained change of one layer, added to what its base computes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .config import LoRAConfig
from .lazy_weight import LazyWeight
from .linear4bit import is_conv1d


class LowRank(NamedTuple):
    """The update scale * B A dropout(x), as the op takes it that makes base and update together."""

    A: Tensor  # [rank, in]
    B: Tensor  # [out, rank]
    scale: float
    dropout: float  # in the mode the adapter is in: none outside training


class Course(Protocol):
    """What a kind of adapter does over a run, besides being moved by its gradients: AdaLoRA's `RankBudget`."""

    settled_at: int  # the update after which it changes no more what the adapter is

    def penalty(self) -> Tensor: ...  # 0-d, a term of each step's loss

    def after_step(self, step: int, skipped: Tensor) -> None: ...  # from 1; skipped: 0-d, 1 where nothing moved


class Copies(nn.Module):
    """An adapter's own copies of some of a module's parameters (masters in `dtype`) and buffers, under their names."""

    def __init__(self, base: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
        super().__init__()
        for name in names:
            tensor = getattr(base, name).detach()
            if name in base._parameters:
                self.register_parameter(name, nn.Parameter(tensor.to(dtype, copy=True)))
            else:
                self.register_buffer(name, tensor.clone())


class Adapter(nn.Module):
    """A trained change of one layer, as `attach(model, config, layer=Kind)` makes of each base and config. A kind is a
    subclass with `forward`, and `delta` if it can be merged; files keep its parameters and buffers."""

    dropout: float = 0.0
    config: LoRAConfig | None = None  # the settings of its layer that `attach` made it with
    copies: Copies | None  # of what this adapter trains in the base's place: its bias, say

    def __init__(self) -> None:
        super().__init__()
        self.copies = None

    @classmethod
    def of(cls, base: nn.Module, config: LoRAConfig) -> "Adapter":
        """The part of the layer `base` that `config` describes; by default what the class makes of the two."""
        return cast(Callable[[nn.Module, LoRAConfig], Adapter], cls)(base, config)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., out] with this adapter's part added, for the layer's input x [..., in].

        y may be written over, and so may what is returned: backward must need neither.
        """
        raise NotImplementedError

    def over(self, x: Tensor, base: nn.Module) -> Tensor:
        """base(x) [..., out] for x [..., in], with this adapter's part added.

        A kind overrides it that must know more of its base than that."""
        y = base(x)
        return cast(Tensor, self(x, y.clone() if is_hooked(base) else y))  # hooks may keep what they are shown

    @property
    def of_base(self) -> bool:
        """Whether its change depends on the base alone, and not on what other adapters have made of that."""
        return type(self).over is not Adapter.over

    def delta(self, weight: Tensor) -> Tensor:
        """The change [out, in] that this adapter makes to the dense weight [out, in], in the dtype of `weight`."""
        raise NotImplementedError(f"{type(self).__name__} has no delta, which merging and reading a weight ask for")

    def delta_bias(self, bias: Tensor) -> Tensor | None:
        """The change [out] that it makes to the base's bias [out], if it is not for the weight alone."""
        return None

    def low_rank(self, codes: bool = False) -> LowRank | None:
        """The update, if a layer may make it together with its base; `codes`: with an `NF4LowRank`'s codes alone."""
        return None

    def finish(self, y: Tensor, base: nn.Module) -> Tensor:
        """The layer's output [..., out], of what base and `low_rank` make together."""
        return y

    def plain(self) -> "Adapter":
        """What files hold: itself, or a simpler one that computes the same."""
        return self

    @classmethod
    def course(cls, parts: "Sequence[Adapter]", steps: int | None) -> Course | None:
        """What a run of `steps` does with these parts, all of this kind in one adapter, if that is anything."""
        return None

    def term(self) -> tuple[Tensor, Tensor] | None:
        """The change of a parameter as two matrices, or stacks of them, to be multiplied; of kinds for those."""
        return None

    def is_idle(self) -> bool:
        """Whether it changes nothing yet, as at the start."""
        return False

    def state(self) -> dict[str, Tensor]:
        """Its tensors under the names they have in files: the live ones, detached; loading copies into them."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("copies.")}

    def peft_fields(self) -> Mapping[str, object]:
        """Its settings under their names in an adapter_config.json."""
        own = self.config or LoRAConfig()
        return {"r": own.rank, "lora_alpha": own.alpha, "lora_dropout": own.dropout, "use_rslora": own.rslora}

    def freeze(self) -> Self:
        """Never train or drop anything from here on."""
        self.dropout = 0.0
        return self.requires_grad_(False)


class Whole(Adapter):
    """Nothing but copies: a module that is trained itself (PEFT's modules_to_save), or its bias."""


def wide(weight: Tensor, base: nn.Module) -> Tensor:
    """A weight of `base` as [out, in], in fp32, or fp64 if it is; decoded to that, where it is in 4 bits."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    found = weight.make(dtype) if isinstance(weight, LazyWeight) else weight.to(dtype)
    return found.t() if is_conv1d(base) else found


def is_hooked(module: nn.Module) -> bool:
    """Whether anything listens to the module's own call, or stands in its place, so that it must be called."""
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook())
