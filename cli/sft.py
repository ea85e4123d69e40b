"""`fourbit sft`: fine-tune a model on chat rows, with LoRA on a 4-bit base unless told otherwise."""

import dataclasses
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import EnvironmentProblem, InputError
from ..lora.config import LoRAConfig
from ..trainer.config import SFTConfig
from .config_file import write_config
from .interrupt import stop_if_asked
from .load import CONFIG, check_model, load_weights, run_settings
from .options import AdapterOptions, ModelOptions, ResultOptions, option
from .parse import DEFAULT, Parsed, parse
from .show import amount, count, describe, figure, note, pairs, result, working, wrapped

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..trainer.sft import SFTResult, SFTTrainer

ABOUT = """\
Fine-tune a model on chat rows and save a LoRA adapter (with --full: the model).

  fourbit sft --model M --data train.jsonl --val 5% --out runs/first
  fourbit sft run.yaml --lr 1e-4

A YAML file holds the same settings, `micro_batch: 4` for `--micro-batch 4`;
flags win over the file. The folder --out gets the adapter, config.yaml (all
settings and where each came from), metrics.jsonl, loss.png and checkpoints."""
NAMES = re.compile(r"[\w.]+(,[\w.]+)*")  # else an entry of --target is a regular expression
GROUPS = ("all-linear", "attn", "mlp")
ADAPTER_ONLY = ("rank", "alpha", "dropout", "target", "rslora")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which rows train and which are held out."""

    title: ClassVar[str] = "data"
    data: tuple[str, ...] = option("JSONL file of chat rows to train on; repeat the flag for more", metavar="FILE")
    val: str | None = option(
        "validation rows: a JSONL file, or a share of the data such as 5%", None, metavar="FILE|N%"
    )

    @property
    def validation(self) -> str | float | None:
        """A path, or a fraction. Raises InputError for a share that leaves no rows on one side."""
        if self.val is None or not self.val.endswith("%"):
            return self.val
        try:
            share = float(self.val[:-1]) / 100
        except ValueError:
            raise InputError(f"--val must be a file or a share such as 5%, got {self.val!r}") from None
        if not 0 < share < 1:
            raise InputError(f"--val must be a share above 0% and below 100%, got {self.val!r}")
        return share


@dataclass(frozen=True, kw_only=True)
class SFTOptions(ResultOptions, SFTConfig, AdapterOptions, DataOptions, ModelOptions):
    """Everything `fourbit sft` takes; `SFTConfig` and `LoRAConfig` check their own parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.full:
            self.lora_config()

    def trainer_config(self) -> SFTConfig:
        return SFTConfig(**{field.name: getattr(self, field.name) for field in fields(SFTConfig)})

    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(
            rank=self.rank, alpha=self.alpha, dropout=self.dropout, target=_target(self.target), rslora=self.rslora
        )


def _target(given: Sequence[str]) -> str | list[str]:
    """LoRAConfig's target: a group or a regular expression is one string, layers' names are a list."""
    names = [name for entry in given for name in (entry.split(",") if NAMES.fullmatch(entry) else [entry])]
    if names == ["all"]:
        return "all-linear"
    one = len(names) == 1 and (names[0] in GROUPS or not NAMES.fullmatch(names[0]))
    return names[0] if one else names


def run(args: Sequence[str]) -> int:
    """Parse, load, train, report. Returns 0, or 128 + the signal that ended the run."""
    parsed = parse(SFTOptions, args, command="sft", about=ABOUT)
    options = _checked(parsed)
    trainer = _prepare(options)
    stop_if_asked()
    begun = time.monotonic()
    outcome = trainer.train(_announce(options, parsed.sources))
    return _report(options, outcome, time.monotonic() - begun)


def _checked(parsed: Parsed[SFTOptions]) -> SFTOptions:
    """Everything that can be told to be wrong before the model is read."""
    options, sources = parsed.options, parsed.sources
    given = [name for name in ADAPTER_ONLY if sources[name] != DEFAULT]
    if options.full and given:
        raise InputError(f"full training has no adapter: leave out {', '.join(given)}, or leave out full")
    if options.full and options.quant not in (None, "none"):
        raise InputError(
            f"full training needs the dense model: quant {options.quant} keeps it in 4 bits; use quant none"
        )
    if options.dtype == "float16":
        raise InputError("training in float16 loses small gradients; use dtype bfloat16 or float32")
    if options.val is None and (options.patience or options.eval_every):
        raise InputError(f"{'patience' if options.patience else 'eval_every'} needs validation rows: give val, say 5%")
    share = options.validation
    for path in [*options.data, *([share] if isinstance(share, str) else [])]:
        if not Path(path).exists():
            near = "; a share needs a percent sign, as in 5%" if path == share else ""
            raise InputError(f"data file {path} does not exist{near}")
    check_model(options.model)
    _check_out(Path(options.out))
    quant = options.quant or ("none" if options.full else "nf4")
    options = dataclasses.replace(options, quant=quant)
    if options.resume is not None:
        _check_same_adapter(options)
    return options


def _check_out(out: Path) -> None:
    """The folder can be made and written, found out now and not after an hour."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".fourbit-can-write"
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"out {out} is a file; give a folder") from None
    except OSError as error:
        raise EnvironmentProblem(f"out {out} cannot be written: {error.strerror}") from None


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()} == before


def _check_same_adapter(options: SFTOptions) -> None:
    """A resumed run has the model and adapter of its first part; the trainer checks the rest."""
    folder = Path(options.out) if options.resume == "auto" else Path(str(options.resume)).parent.parent
    if not any((folder / "checkpoints").glob("step-*")):
        return
    before = run_settings(str(folder))
    for name in ("model", "quant", "full", *(ADAPTER_ONLY if not options.full else ())):
        old, new = before.get(name), getattr(options, name)
        if name in before and old != (list(new) if isinstance(new, tuple) else new):
            raise InputError(f"{folder} is a run with {name} {old}, and is resumed with {new}; use the same")


def _prepare(options: SFTOptions) -> "SFTTrainer":
    """Data first: a bad row should not wait for gigabytes of weights."""
    from ..lora.attach import attach
    from ..models.load import load_tokenizer
    from ..trainer.sft import SFTTrainer

    tokenizer = load_tokenizer(options.model)
    train, val = _datasets(options, tokenizer)
    model = load_weights(options, tokenizer, str(options.quant))
    if not options.full:
        names = attach(model, options.lora_config(), seed=options.seed)
        size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        note(f"adapter: rank {options.rank}, alpha {options.alpha:g}, {len(names)} layers, {amount(size)} parameters")
    return SFTTrainer(model, tokenizer, train=train, val=val, config=options.trainer_config())


def _datasets(options: SFTOptions, tokenizer: Any) -> "tuple[Dataset, Dataset | None]":
    """Training and validation rows, read, checked and described."""
    from ..data.dataset import count_overlap, load_dataset, split_validation

    def read(paths: Sequence[str]) -> "Dataset":
        return load_dataset(
            paths,
            tokenizer,
            template=options.template,
            max_length=options.max_length,
            loss_on=options.loss_on,
            on_bad_row=options.on_bad_row,
        )

    with working("reading data"):
        train, val, share = read(options.data), None, options.validation
    describe("train", train)
    if isinstance(share, float):
        train, val = split_validation(train, share)
        note(f"validation: {count(len(val), 'row')} of these, {count(len(train), 'row')} left to train on")
    elif share is not None:
        val = read([share])
        describe("validation", val)
        if leaked := count_overlap(train, val):
            note(f"  note: {count(leaked, 'validation row')} also in the training data; the score will flatter")
    return train, val


def _announce(options: SFTOptions, sources: Mapping[str, str]) -> Any:
    """For the trainer to call once the run may begin: saves and prints the settings, then shows progress."""
    from ..trainer.progress import display_for

    def begin(total: int, start: int) -> Any:
        unsaved = {"resume", "json", *(ADAPTER_ONLY if options.full else ())}
        saved = {name: value for name, value in asdict(options).items() if name not in unsaved}
        if start == 0 or not _same(saved, run_settings(options.out)):  # a resumed run keeps its record of sources
            write_config(Path(options.out) / CONFIG, saved, sources)
        for title, names in _by_source(saved, sources).items():
            note(wrapped(f"{title}: " + " ".join(f"{name}={_plain(saved[name])}" for name in names)))
        return display_for(total, start)

    return begin


def _by_source(settings: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in settings:
        source = sources[name].rpartition(":")[0] or f"{sources[name]}s"
        groups.setdefault(source, []).append(name)
    return dict(sorted(groups.items(), key=lambda group: group[0] == f"{DEFAULT}s"))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        value = tuple(f"{name}={number:g}" for name, number in value.items())
    return ",".join(value) or "-" if isinstance(value, tuple) else "-" if value is None else str(value)


def _report(options: SFTOptions, outcome: "SFTResult", seconds: float) -> int:
    """Print the outcome; returns the exit code."""
    values = {name: value for name, value in asdict(outcome).items()}
    values |= {"out": str(outcome.out), "checkpoint": outcome.checkpoint and str(outcome.checkpoint)}
    values |= {"val_perplexity": outcome.val_perplexity, "seconds": round(seconds, 3)}
    if outcome.signal is None:
        result(values, _finished(options, outcome, seconds), as_json=options.json)
        return 0
    kept = f"saved in {outcome.checkpoint}" if outcome.checkpoint else "no step was finished, so nothing was saved"
    resume = shlex.join(["fourbit", "sft", str(Path(options.out) / CONFIG), "--resume"])
    note(f"stopped after step {outcome.steps}; {kept}. To go on:\n  {resume}")
    if options.json:
        result(values, "", as_json=True)
    return 128 + outcome.signal


def _finished(options: SFTOptions, outcome: "SFTResult", seconds: float) -> str:
    rows = [
        ("steps", f"{outcome.steps}{' (stopped early)' if outcome.stopped_early else ''} in {seconds:.0f} s"),
        ("last loss", figure(outcome.loss)),
    ]
    if outcome.val_loss is not None:
        best = (
            f"{figure(outcome.val_loss)}, perplexity {figure(outcome.val_perplexity, 2)}, at step {outcome.best_step}"
        )
        rows.append(("validation loss", best))
    if outcome.skipped_steps:
        rows.append(("skipped steps", f"{outcome.skipped_steps} (NaN or infinity in loss or gradient)"))
    rows += [("model" if options.full else "adapter", str(outcome.out)), ("metrics", f"{outcome.out}/metrics.jsonl")]
    rows.append(("loss curve", f"{outcome.out}/loss.png"))
    model = options.out if options.full else options.model
    adapter = "" if options.full else f" --adapter {shlex.quote(options.out)}"
    rows.append(("try it", f"fourbit chat --model {shlex.quote(model)}{adapter}"))
    return pairs(rows)
