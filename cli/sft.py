"""`fourbit sft`: fine-tune a model on chat rows, with LoRA on a 4-bit base unless told otherwise."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, get_origin

from ..errors import InputError, shown
from ..settings import setting
from ..trainer.config import SFTConfig, size_in_bytes
from ..trainer.sft import SFTTrainer
from ..trainer.sweep import grid
from .config_file import scalar
from .train import FRESH, TrainOptions
from .train import run as run

SWEPT = ["data", *FRESH, "lr", "schedule", "warmup", "decay", "lora_plus", "weight_decay", "max_grad_norm", "optimizer"]
SWEPT.remove("train_tokens")  # is of the output head too, whose adapters cannot share a pass
SWEPT += ["rounding", "seed", "epochs", "steps", "batch_size", "eval_every", "patience", "keep_best"]


@dataclass(frozen=True, kw_only=True)
class Options(SFTConfig, TrainOptions):
    """Fine-tune a model on chat rows and save a LoRA adapter (with --full: the model).

      fourbit sft --model M --data train.jsonl --val 5% --out runs/first
      fourbit sft run.yaml --lr 1e-4

    With --adapter training goes on from that adapter. --sweep rank=4,16 --sweep
    lr=1e-4,1e-3 trains four at once, each into a folder of its own in --out.
    A YAML file holds the same settings, `micro_batch: 4` for `--micro-batch 4`;
    flags win over the file. The folder --out gets the adapter, config.yaml (all
    settings and where each came from), metrics.jsonl, loss.png and checkpoints.
    """

    config_type: ClassVar = SFTConfig
    trainer_type: ClassVar = SFTTrainer
    sweep: tuple[str, ...] = setting((), "values of an option, an adapter for each; repeat it", metavar="NAME=A,B")

    def variants(self) -> dict[str, Self]:
        if not self.sweep:
            return super().variants()
        split = [one.partition("=") for one in self.sweep]
        given = {name.replace("-", "_"): values.split(",") for name, _, values in split}
        known = given.keys() <= {*SWEPT} and len(given) == len(split) and all(map(all, given.values()))
        if not known or not self.fresh or self.resume not in (None, "auto"):
            rule = f"once for each of {', '.join(SWEPT)}, without full, adapter, or a checkpoint to resume"
            raise InputError(f"sweep must be NAME=A,B, {rule}; got {shown(' '.join(self.sweep))}")
        lists = {option.name for option in fields(self) if get_origin(option.type) is tuple}
        made, of, budget = dict[str, Self](), grid(given), size_in_bytes(self.optimizer_budget)
        share = {"optimizer_budget": f"{budget // len(of) / 1024}KiB"} if budget else {}  # of what bounds all states
        for name, own in of.items():
            values: dict[str, Any] = {key: (text,) if key in lists else scalar(text) for key, text in own.items()}
            made[name] = replace(self, sweep=(), out=f"{self.out}/{name}", **share | values)
        anew = [each.start for each in made.values() if each.start not in ("default", "eva")]
        if anew and len(made) > 1 and self.quant not in (None, "none"):
            raise InputError(f"start {anew[0]} makes 4-bit codes anew, which a sweep's adapters share: take quant none")
        return made
