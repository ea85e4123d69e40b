"""LoRA, the plain kind of adapter: a trainable low-rank update beside a frozen linear layer, embedding, convolution."""

import copy
import math
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import dispatch
from ..kernels.dispatch import autocast_input
from ..kernels.lora_paths import lora_update
from ..settings import checked
from .adapter import Adapter, LowRank
from .config import LoRAConfig
from .linear4bit import NF4Embedding, NF4Linear, is_conv1d, sizes
from .parameter4bit import StandIn

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
OWN = "fourbit.LoRA"  # a file's peft_type for LoRA where PEFT's is another


def scale_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


class LoRA(Adapter):
    """y + scale * B A dropout(x), training only A and B (Hu et al. 2021, "LoRA", equation 3).

    `lora_A` [r, in] starts uniform in +-1/sqrt(in), `lora_B` [out, r] at zero, so a fresh adapter changes nothing. Both
    are fp32 masters until cast; the sum is computed in the dtype of x. Of `base` only sizes and device are taken.
    Where it began at a part B0 A0 of the weight (`init`), the change is scale * (B A - B0 A0); those are buffers.
    Raises InputError for a rank below 1; one above min(in, out) is taken, as PEFT does, and wastes parameters alone."""

    peft_type = "LORA"  # of files, for what PEFT computes the same way
    keys = "lora_A.weight", "lora_B.weight"  # what files call A and B
    start: str = ""  # by which a 4-bit base was made anew around B0 A0; "" where it was not
    lora_A0: Tensor | None
    lora_B0: Tensor | None

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
        super().__init__()
        for name in ("lora_A0", "lora_B0"):
            self.register_buffer(name, None)
        checked("rank", rank, int, {"least": 1})
        self.rank, self.alpha, self.rslora, self.dropout = rank, alpha, rslora, dropout
        (A, B), device = self.shapes(base, rank), next(base.parameters()).device
        bound, drawn = 1 / math.sqrt(math.prod(A[1:])), torch.empty(A, dtype=torch.float32, device="cpu")
        self.lora_A = nn.Parameter(drawn.uniform_(-bound, bound).to(device))  # alike on each
        self.lora_B = nn.Parameter(torch.zeros(B, dtype=torch.float32, device=device))

    @classmethod
    def of(cls, base: nn.Module, config: LoRAConfig) -> "LoRA":
        """The part that `config` describes; LoRA makes the kind that the base needs."""
        kind = lora_kind(base) if cls is LoRA else cls
        return (kind or cls)(base, config.rank, config.alpha, config.dropout, config.rslora)

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for that base."""
        in_features, out_features = sizes(cast(nn.Linear, base))
        return (rank, in_features), (out_features, rank)

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale_of(self.alpha, self.rank, self.rslora)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = autocast_input(x)
        return lora_update(y, F.dropout(x, self.dropout, self.training), *self.factors(), self.scale)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The change over scale as a product: A and B, or [A; A0] and [B, -B0]."""
        if self.lora_A0 is None or self.lora_B0 is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.lora_A0]), torch.cat([self.lora_B, -self.lora_B0], 1)

    def of_factors(self, A: Tensor, B: Tensor, first: tuple[Tensor, Tensor] | None = None) -> "LoRA":
        """A copy with A [r, in], B [out, r] and this scale; `first`: A0 and B0, where these began."""
        new = copy.deepcopy(self)
        new.rank, new.alpha = len(A), self.scale / scale_of(1.0, len(A), self.rslora)
        new.lora_A, new.lora_B = (nn.Parameter(part.detach().clone().contiguous()) for part in (A, B))
        new.lora_A0, new.lora_B0 = (part.clone().contiguous() for part in first) if first else (None, None)
        return new

    def plain(self) -> "LoRA":
        return self if self.lora_A0 is None else self.of_factors(*self.factors())

    def low_rank(self, codes: bool = False) -> LowRank | None:
        if type(self).forward is not LoRA.forward or type(self).over is not Adapter.over:  # it may compute another
            return None
        dropout = self.dropout if self.training else 0.0
        if codes:  # W4 + s B0 A0 and s (B A - B0 A0) are W4 + s B A
            return LowRank(self.lora_A, self.lora_B, self.scale, 0.0) if self.start and not dropout else None
        return LowRank(*self.factors(), self.scale, dropout)

    def delta(self, weight: Tensor) -> Tensor:
        A, B = self.factors()
        return self.scale * (B.to(weight.dtype) @ A.to(weight.dtype))

    def is_idle(self) -> bool:
        if self.lora_A0 is not None and self.lora_B0 is not None:
            return torch.equal(self.lora_A, self.lora_A0) and torch.equal(self.lora_B, self.lora_B0)
        return not bool(self.lora_B.any())

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.keys, (self.lora_A.detach(), self.lora_B.detach()), strict=True))

    def peft_fields(self) -> dict[str, float]:
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "use_rslora": self.rslora}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoRAFA(LoRA):
    """LoRA of a linear layer with A frozen as it starts (Zhang et al. 2023, "LoRA-FA", arXiv 2308.03303, equation 4).

    Backward needs x A^T [..., r] and not x, so that no layer keeps its input for this. Files are plain LoRA's."""

    peft_type = "LORA"

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
        super().__init__(base, rank, alpha, dropout, rslora)
        A = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", A)


class LoRAParameter(LoRA):
    """scale * B_e A_e on matrix e of a parameter [E, out, in] ([E, in, out] where a module `is_transposed`), or 2-D.

    As in PEFT (target_parameters) `lora_A` is [E r, in], expert after expert, and `lora_B` [out, r E], rank after rank.
    Raises InputError for dropout: what the module multiplies with the weight is not seen here."""

    peft_type = "LORA"

    def __init__(self, base: StandIn, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
        if dropout:
            raise InputError(f"target_parameters take no dropout, as the module makes its own product; got {dropout}")
        super().__init__(base, rank, alpha, 0.0, rslora)
        self.place, self.transposed, self.ndim = base.place, base.transposed, cast(Tensor, base.weight).ndim

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        weight = cast(Tensor, base.weight)
        *experts, out, within = (weight.mT if base.transposed else weight).shape
        return (math.prod(experts) * rank, within), (out, rank * math.prod(experts))

    def low_rank(self, codes: bool = False) -> None:
        return None

    def term(self) -> tuple[Tensor, Tensor]:
        A = self.lora_A.unflatten(0, (-1, self.rank))  # [E, r, in]
        B = self.scale * self.lora_B.unflatten(1, (self.rank, -1)).permute(2, 0, 1)  # [E, out, r]
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return (left, right) if self.ndim > 2 else (left[0], right[0])

    def delta(self, weight: Tensor) -> Tensor:
        return torch.matmul(*(part.to(weight.dtype) for part in self.term()))


class LoRAEmbedding(LoRA):
    """y + scale * B A[:, x] for an embedding's ids x [...] and rows y [..., dim], times its embed_scale if it has one.

    As in PEFT `lora_A` [r, vocabulary] starts at zero and `lora_B` [dim, r] normal, nothing is dropped, and the column
    of padding_idx gets no gradient. Raises InputError for max_norm."""

    peft_type = "LORA"
    keys = "lora_embedding_A", "lora_embedding_B"

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
        if (max_norm := getattr(base, "max_norm", None)) is not None:
            raise InputError(f"an embedding with max_norm={max_norm} rewrites its own weight, and takes no LoRA")
        super().__init__(base, rank, alpha, 0.0, rslora)
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.copy_(torch.randn(self.lora_B.shape, dtype=torch.float32, device="cpu"))
        self.padding_idx = getattr(base, "padding_idx", None)
        self.embed_scale = float(getattr(base, "scalar_embed_scale", getattr(base, "embed_scale", 1.0)))

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rows, columns = cast(Tensor, base.weight).shape
        return (rank, rows), (columns, rank)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = dispatch.product_dtype(y)
        s = F.embedding(x, self.lora_A.t(), self.padding_idx).to(dtype)  # [..., r]
        return y + (self.scale * self.embed_scale * (s @ self.lora_B.to(dtype).t())).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        return super().delta(weight).t()

    def is_idle(self) -> bool:
        return not bool(self.lora_A.any())


class LoRAConv(LoRA):
    """LoRA of a convolution's weight: A [r, in / groups, kernel...] in its place, then B [out, r / groups, 1...].

    A is applied with stride, padding, dilation and groups of the base, so that the update is a change of its weight.
    PEFT's ignores groups in A, dilation and padding modes: files for such bases are not its own.
    Raises InputError for a rank that the groups do not divide."""

    def __init__(self, base: Conv, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
        if rank % base.groups:
            raise InputError(f"a convolution of {base.groups} groups needs a rank that they divide, got {rank}")
        super().__init__(base, rank, alpha, dropout, rslora)
        kind: Any = conv_kind(base)
        settings = base.kernel_size, base.stride, base.padding, base.dilation
        more = {"groups": base.groups, "bias": False, "device": "meta"}
        self.down = kind(base.in_channels, rank, *settings, padding_mode=base.padding_mode, **more)
        self.up = kind(rank, base.out_channels, 1, **more)
        del self.down.weight, self.up.weight  # how to convolve, and nothing else
        pefts = base.groups == 1 and base.padding_mode == "zeros" and set(base.dilation) == {1}
        self.peft_type = "LORA" if pefts else OWN

    @classmethod
    def shapes(cls, base: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        (out, within, *kernel), groups = cast(Tensor, base.weight).shape, cast(Conv, base).groups
        return (rank, within, *kernel), (out, rank // groups, *(1 for _ in kernel))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = autocast_input(x)
        s = self.down._conv_forward(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype), None)
        return y + (self.scale * self.up._conv_forward(s, self.lora_B.to(x.dtype), None)).to(y.dtype)

    def delta(self, weight: Tensor) -> Tensor:
        A, B = (part.to(weight.dtype).flatten(1) for part in (self.lora_A, self.lora_B))
        within = A.unflatten(0, (self.up.groups, -1))  # [groups, r / groups, in / groups * kernel]
        return self.scale * (B.unflatten(0, (self.up.groups, -1)) @ within).reshape(weight.shape)


def conv_kind(layer: nn.Module) -> type[Any] | None:
    """nn.Conv1d, 2d or 3d, if the layer computes what that does."""
    return next((kind for kind in get_args(Conv) if type(layer).forward is kind.forward), None)


def lora_kind(layer: nn.Module) -> type[LoRA] | None:
    """Which LoRA fits a layer, by what it computes: a subclass with a forward of its own may compute anything.

    An embedding that multiplies its rows by `embed_scale`, and holds nothing else, is known (Gemma's, BART's)."""
    if isinstance(layer, StandIn):
        return LoRAParameter
    if is_linear(layer):
        return LoRA
    if conv_kind(layer):
        return LoRAConv
    alone = isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale") and layer._parameters.keys() == {"weight"}
    plain = type(layer).forward is nn.Embedding.forward or isinstance(layer, NF4Embedding)
    return LoRAEmbedding if plain or alone else None


def is_linear(layer: nn.Module) -> bool:
    """Whether it computes x W^T + bias. A subclass of nn.Linear that has a forward of its own may compute anything."""
    return type(layer).forward is nn.Linear.forward or isinstance(layer, NF4Linear) or is_conv1d(layer)
