"""What distillation can be told, on top of what fine-tuning can be."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import InputError
from .config import SFTConfig, at_least, one_of, setting

DivergenceKind = Literal["forward-kl", "reverse-kl", "jsd"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig(SFTConfig):
    """Options of distillation. Raises InputError for a value that cannot work, naming it."""

    divergence: DivergenceKind = setting(
        "forward-kl",
        "between teacher and student at each trained token: forward-kl covers all that the teacher says, reverse-kl "
        "keeps to what it finds likely, jsd lies between",
    )
    jsd_beta: float | None = setting(
        None, "jsd: how much of the teacher is in the mixture that both are compared with, between 0 and 1; default 0.5"
    )
    temperature: float = setting(
        1.0, "both sides' logits are divided by it; the loss is the divergence itself, not multiplied by its square"
    )
    top_k: int | None = setting(
        None, "compare the teacher's k likeliest tokens only, both sides renormalised; default: the whole vocabulary"
    )
    sft_weight: float = setting(0.0, "weight of the cross-entropy on the data's own tokens, added to the divergence")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "divergence", *get_args(DivergenceKind))
        at_least(self, 1, "top_k")
        at_least(self, 0, "sft_weight")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0 and finite, got {self.temperature}")
        if self.jsd_beta is None:
            return
        if self.divergence != "jsd":
            raise InputError(
                f"jsd_beta belongs to divergence jsd, got {self.jsd_beta} with {self.divergence}: leave it out"
            )
        if not 0 < self.jsd_beta < 1:
            raise InputError(
                f"jsd_beta must lie between 0 and 1, got {self.jsd_beta}; its ends are divergence forward-kl (0) and "
                "reverse-kl (1)"
            )
