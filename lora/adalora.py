"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): ranks move, over a run, to the layers whose singular values matter.

What is trained is W + s P diag(lambda) Q. After each step every entry's sensitivity |w gradient| is averaged, with its
uncertainty, and as many triplets (a column of P, a lambda, a row of Q) as the budget allows keep their lambda: the
budget falls by a cube from all to `rank` a layer. Files hold what is left as plain LoRA, each layer with its own rank.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..settings import checked
from .adapter import Adapter, Whole
from .config import LoRAConfig
from .lora import LoRA

ENTRIES = "lora_A", "lora_E", "lora_B"
ONLY_PEFTS = {  # of its run, and no part of what it became
    "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "use_rslora",
}  # fmt: skip
DECAY = 0.85  # of both averages, as in the paper's experiments (beta 1 and beta 2)
ORTHOGONALITY = 0.1  # weight of the penalty: the paper's most frequent


class AdaLoRA(LoRA):
    """y + scale * P (lambda * (Q dropout(x))): `lora_B` is P [out, r], `lora_E` lambda [r, 1], `lora_A` Q [r, in].

    r is the initial rank, and scale as LoRA's for it. P and Q start normal (std 0.02), lambda at zero, so that a fresh
    adapter changes nothing. `kept` [r] says which triplets the budget keeps; a mean and a spread of each parameter's
    sensitivities are buffers too, so that checkpoints have them."""

    kept: Tensor
    state = Adapter.state  # all of it, under its own names

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__(base, config.first_rank, config.alpha, config.dropout, config.rslora)
        for matrix in (self.lora_A, self.lora_B):
            drawn = torch.randn(matrix.shape, dtype=torch.float32, device="cpu")  # alike on each
            matrix.data = (0.02 * drawn).to(matrix.device)
        self.lora_E = nn.Parameter(self.lora_A.detach().new_zeros(self.rank, 1))
        self.final_rank, self.config = config.rank, config
        self.register_buffer("kept", torch.ones(self.rank, dtype=torch.bool, device=self.lora_A.device))
        for name in (f"{entry}_{average}" for entry in ENTRIES for average in ("mean", "spread")):
            self.register_buffer(name, torch.zeros_like(getattr(self, name[:6]), requires_grad=False))

    @classmethod
    def of(cls, base: nn.Module, config: LoRAConfig) -> Self:
        return cls(base, config)

    @classmethod
    def course(cls, parts: Sequence[Any], steps: int | None) -> "RankBudget":
        return RankBudget(parts, steps)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_E * self.lora_A, self.lora_B

    def is_idle(self) -> bool:
        return not bool(self.lora_E.any())

    def peft_fields(self) -> dict[str, Any]:
        own = self.config or LoRAConfig()
        shares = {"tinit": own.rank_warmup, "tfinal": own.rank_final}
        return super().peft_fields() | {"target_r": self.final_rank} | shares

    def plain(self) -> Any:
        """The LoRA of the triplets that are kept, with scale and lambda in B; nothing where there are none."""
        kept = self.kept.nonzero().flatten()
        new: Any = Whole()
        if len(kept) or self.copies is not None:
            base = nn.Linear(self.lora_A.shape[1], len(self.lora_B), device="meta")
            new = LoRA(base, max(len(kept), 1), max(len(kept), 1), self.dropout)  # of zeros if it is for copies alone
            A, B = self.lora_A.detach(), self.lora_B.detach() * (self.scale * self.lora_E.detach().flatten())
            kept = kept if len(kept) else kept.new_zeros(1)
            new.lora_A, new.lora_B = nn.Parameter(A[kept]), nn.Parameter(B[:, kept])
        new.config, new.copies = self.config, self.copies
        return new

    def scores(self) -> Tensor:
        """How much each triplet matters, [r]: its lambda's score, and its vectors' entries' means (equation 7)."""
        A, E, B = (getattr(self, f"{name}_mean") * getattr(self, f"{name}_spread") for name in ENTRIES)
        return A.mean(1) + E.flatten() + B.mean(0)


def as_lora(raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What files of PEFT's AdaLoRA hold, config and tensors by key, as a plain LoRA's: scale and lambda in B, a rank of
    its own for each layer. As there the scale is alpha / (init_r + 1e-5), alpha 0 counting as the layer's rank."""
    left, ranks = dict(tensors), dict[str, int]()
    first, alpha = (checked(key, raw.get(key), float) for key in ("init_r", "lora_alpha"))
    for path in [key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]:
        A, E, B = (left.pop(f"{path}.{name}", torch.empty(0)) for name in ENTRIES)
        if not (A.ndim == B.ndim == 2 and E.shape == (len(A), 1) and B.shape[1] == len(A)):
            shapes = ", ".join(str([*matrix.shape]) for matrix in (A, E, B))
            raise InputError(f"{path}: lora_A [r, in], lora_E [r, 1] and lora_B [out, r] must fit, got {shapes}")
        scale = (alpha if alpha > 0 else len(A)) / (first + 1e-5)
        A, B = (A, scale * E.T * B) if len(A) else (A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1))
        left |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
        ranks[f"^{re.escape(path.removeprefix('base_model.model.'))}"] = len(A)
    config = {key: value for key, value in raw.items() if key not in ONLY_PEFTS}
    rank = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
    return config | rank, left


class RankBudget:
    """What AdaLoRA is over a run of `steps`, given all parts of one adapter. InputError where steps are not known."""

    def __init__(self, parts: Sequence[AdaLoRA], steps: int | None) -> None:
        if not steps:
            raise InputError("AdaLoRA's ranks go by the length of the run: give Run its number of steps, total=")
        config = parts[0].config or LoRAConfig()
        self.parts, self.begin, self.settled_at = parts, round(config.rank_warmup * steps), steps
        self.settled_at -= round(config.rank_final * steps)  # from that step on ranks stand
        self.steps = steps

    def __str__(self) -> str:  # what a saved run is known by
        return f"AdaLoRA over {self.steps} steps"

    def penalty(self) -> Tensor:
        """0.1 times the mean over all P and Q of |P^T P - 1|_F and |Q Q^T - 1|_F: 0-d, for a step's loss.

        So in the authors' code and in PEFT, whose figures are the paper's; its equation 4 has the sum of their squares.
        """
        matrices = [matrix for part in self.parts for matrix in (part.lora_A, part.lora_B.mT)]
        off = [m @ m.mT - torch.eye(len(m), dtype=m.dtype, device=m.device) for m in matrices]
        return ORTHOGONALITY * torch.stack([torch.linalg.matrix_norm(each) for each in off]).mean()

    @torch.no_grad()
    def after_step(self, step: int, skipped: Tensor) -> None:
        """Average what the gradients of update `step` (from 1) say of each entry (equations 8 to 10), unless it was
        skipped (0-d, not 0); then keep as many triplets as the budget has, those with the highest scores."""
        for part in self.parts if step < self.settled_at else ():
            for name in ENTRIES:
                weight, mean, spread = (getattr(part, f"{name}{more}") for more in ("", "_mean", "_spread"))
                if weight.grad is not None:
                    now = torch.where(skipped > 0, mean, (weight * weight.grad).abs().to(mean.dtype))
                    mean.lerp_(now, 1 - DECAY)
                    spread.lerp_(torch.where(skipped > 0, spread, (now - mean).abs()), 1 - DECAY)
        if step <= self.settled_at:
            scores = torch.cat([part.scores() for part in self.parts])
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[scores.argsort(descending=True, stable=True)[: self.budget(step)]] = True  # so many, ties or not
            for part, own in zip(self.parts, kept.split([part.rank for part in self.parts]), strict=True):
                part.kept.copy_(own)
        for part in self.parts:
            part.lora_E.masked_fill_(~part.kept[:, None], 0)

    def budget(self, step: int) -> int:
        """How many triplets are left after a step, from 1 (appendix A): all up to `begin`, the final ones from
        `settled_at` on, and between final + (all - final) c^3, rounded down, where c falls from 1 to 0."""
        first, last = sum(part.rank for part in self.parts), sum(part.final_rank for part in self.parts)
        if step >= self.settled_at:
            return last
        left = 1 - max(step - self.begin, 0) / max(self.settled_at - self.begin, 1)
        return int((first - last) * left**3 + last)
