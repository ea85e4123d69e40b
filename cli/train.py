"""What the commands that train share: their options, the checks before a model is read, the report at the end."""

import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..errors import EnvironmentProblem, InputError
from ..lora.config import LoRAConfig
from ..trainer.config import TrainingConfig
from .config_file import write_config
from .interrupt import stop_if_asked
from .load import CONFIG, check_model, is_reward_model, run_settings
from .options import AdapterOptions, ModelOptions, ResultOptions, option
from .parse import DEFAULT, Parsed
from .show import amount, count, describe, figure, note, pairs, result, working, wrapped

if TYPE_CHECKING:
    from ..trainer.trainer import Trainer, TrainResult

NAMES = re.compile(r"[\w.]+(,[\w.]+)*")  # else an entry of --target is a regular expression
GROUPS = ("all-linear", "attn", "mlp")
ADAPTER_ONLY = ("rank", "alpha", "dropout", "target", "rslora")
REPORTED = ("perplexity", "reward_accuracy", "reward_margin")  # of the best evaluation; --json has all figures
C = TypeVar("C", bound=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which rows train and which are held out."""

    title: ClassVar[str] = "data"
    data: tuple[str, ...] = option("JSONL file of rows to train on; repeat the flag for more", metavar="FILE")
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
class TrainOptions(ResultOptions, TrainingConfig, AdapterOptions, DataOptions, ModelOptions):
    """Everything that every training command takes; the configs check their own parts."""

    def config(self, kind: type[C]) -> C:
        """The part of the options that is this config."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

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


def check(options: TrainOptions) -> None:
    """Everything that can be told to be wrong before the data and the model are read."""
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


def check_resumed(options: TrainOptions, names: Sequence[str]) -> None:
    """A resumed run has the model and adapter of its first part; the trainer checks the rest."""
    if options.resume is None:
        return
    folder = Path(options.out) if options.resume == "auto" else Path(str(options.resume)).parent.parent
    if not any((folder / "checkpoints").glob("step-*")):
        return
    before = run_settings(str(folder))
    for name in names:
        old, new = before.get(name), getattr(options, name)
        if name in before and old != (list(new) if isinstance(new, tuple) else new):
            raise InputError(f"{folder} is a run with {name} {old}, and is resumed with {new}; use the same")


def attach_adapter(model: Any, options: TrainOptions) -> None:
    """A fresh adapter on the model, and a line about it."""
    from ..lora.attach import attach

    names = attach(model, options.lora_config(), seed=options.seed)
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    note(f"adapter: rank {options.rank}, alpha {options.alpha:g}, {len(names)} layers, {amount(size)} parameters")


def datasets(options: TrainOptions, read: Callable[[Sequence[str]], Any]) -> tuple[Any, Any]:
    """Training and validation rows (None without), read by `read`, checked and described."""
    from ..data.dataset import count_overlap, split_validation

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


def train(command: str, parsed: Parsed[Any], trainer: "Trainer", *, unsaved: Sequence[str] = ()) -> int:
    """Run the trainer and report. Returns the exit code: 0, or 128 + the signal that ended the run."""
    stop_if_asked()
    begun = time.monotonic()
    outcome = trainer.train(_announce(parsed.options, parsed.sources, unsaved))
    return _report(command, parsed.options, outcome, time.monotonic() - begun)


def _announce(options: TrainOptions, sources: Mapping[str, str], unsaved: Sequence[str]) -> Any:
    """For the trainer to call once the run may begin: saves and prints the settings, then shows progress."""
    from ..trainer.progress import display_for

    def begin(total: int, start: int) -> Any:
        left_out = {"resume", "json", *unsaved}
        saved = {name: value for name, value in asdict(options).items() if name not in left_out}
        if start == 0 or not _same(saved, run_settings(options.out)):  # a resumed run keeps its record of sources
            write_config(Path(options.out) / CONFIG, saved, sources)
        for title, names in _by_source(saved, sources).items():
            note(wrapped(f"{title}: " + " ".join(f"{name}={_plain(saved[name])}" for name in names)))
        return display_for(total, start)

    return begin


def _same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()} == before


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


def _report(command: str, options: TrainOptions, outcome: "TrainResult", seconds: float) -> int:
    """Print the outcome; returns the exit code."""
    values = {name: value for name, value in asdict(outcome).items() if name != "val"}
    values |= {"out": str(outcome.out), "checkpoint": outcome.checkpoint and str(outcome.checkpoint)}
    values |= {"val_loss": outcome.val_loss} | {f"val_{name}": value for name, value in outcome.val.items()}
    values["seconds"] = round(seconds, 3)
    if outcome.signal is None:
        result(values, _finished(options, outcome, seconds), as_json=options.json)
        return 0
    kept = f"saved in {outcome.checkpoint}" if outcome.checkpoint else "no step was finished, so nothing was saved"
    resume = shlex.join(["fourbit", command, str(Path(options.out) / CONFIG), "--resume"])
    note(f"stopped after step {outcome.steps}; {kept}. To go on:\n  {resume}")
    if options.json:
        result(values, "", as_json=True)
    return 128 + outcome.signal


def _finished(options: TrainOptions, outcome: "TrainResult", seconds: float) -> str:
    rows = [
        ("steps", f"{outcome.steps}{' (stopped early)' if outcome.stopped_early else ''} in {seconds:.0f} s"),
        ("last loss", figure(outcome.loss)),
    ]
    if outcome.val:
        more = [f"{name.replace('_', ' ')} {figure(outcome.val[name])}" for name in REPORTED if name in outcome.val]
        rows.append(("validation loss", ", ".join([figure(outcome.val_loss), *more, f"at step {outcome.best_step}"])))
    if outcome.skipped_steps:
        rows.append(("skipped steps", f"{outcome.skipped_steps} (NaN or infinity in loss or gradient)"))
    whole = bool(getattr(options, "full", False))
    rows += [("model" if whole else "adapter", str(outcome.out)), ("metrics", f"{outcome.out}/metrics.jsonl")]
    rows.append(("curves", f"{outcome.out}/loss.png"))
    rows.append(("try it", _try_it(options, whole)))
    return pairs(rows)


def _try_it(options: TrainOptions, whole: bool) -> str:
    if is_reward_model(options.out):
        return f"fourbit.RewardModel.load(model, {options.out!r}).score(tokenizer, rows), in Python"
    model = options.out if whole else options.model
    adapter = "" if whole else f" --adapter {shlex.quote(options.out)}"
    return f"fourbit chat --model {shlex.quote(model)}{adapter}"
