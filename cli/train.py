"""`sft`, `dpo`, `reward` and `distill`: one skeleton; a command's `Options` say its rows, trainer and checks."""

import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import tokenizers
import torch

from ..data.batch import Encoded, Example
from ..data.encode import Dataset, load_rows
from ..data.order import count_overlap, split_validation
from ..data.sample import Kind
from ..data.template import ChatTemplate
from ..errors import InputError, shown
from ..lora.attach import attach
from ..lora.config import USED, LoRAConfig
from ..lora.config import Kind as AdapterKind
from ..lora.layer import DEFAULT as ADAPTER
from ..models.load import read_weights
from ..models.protocol import CausalLM
from ..models.recompute import AGAIN, keeps
from ..outputs import lock_folder
from ..settings import REQUIRED, Checked, setting
from ..text.tokenizer import Tokenizer
from ..trainer.config import DPOConfig, TrainingConfig
from ..trainer.heard import MAPPED
from ..trainer.planner import state_bytes
from ..trainer.progress import display_for
from ..trainer.resume import template_to_resume
from ..trainer.run import TrainResult
from ..trainer.sweep import SweepTrainer
from ..trainer.trainer import TOKEN_BUDGET
from . import main
from .config_file import CONFIG, config_text, read_run, write_config
from .forecast import show
from .load import (
    check_adapter,
    choose_device,
    choose_dtype,
    load_weights,
    open_tokenizer,
    planned,
    put_adapter,
    remark_positions,
    settle,
)
from .options import AdapterChoice, ModelOptions, ResultOptions, inputs_of
from .parse import DEFAULT, Sources
from .show import amount, count, describe, figure, note, pairs, result, working, wrapped

NAMES = re.compile(r"[\w.]+(,[\w.]+)*")  # else an entry of --target is a regular expression
GROUPS = ("all-linear", "attn", "mlp")
FRESH = ("kind", "rank", "alpha", "dropout", "target", "rslora", "start",
         "initial_rank", "rank_warmup", "rank_final", "feedforward", "train_tokens")  # fmt: skip  # a fresh one's
REPORTED = ("perplexity", "reward_accuracy", "reward_margin", "truncated")  # of the best evaluation; --json has all


@dataclass(frozen=True, kw_only=True)
class DataOptions(Checked):
    """Which rows train and which are held out."""

    title: ClassVar[str] = "data"
    data: tuple[str, ...] = setting(REQUIRED, "JSONL file to train on; repeat the flag for more", metavar="FILE")
    val: str | None = setting(None, "validation rows: a JSONL file, or a share of data such as 5%", metavar="FILE|N%")

    @property
    def share(self) -> float | None:
        """The share of the data that validates; None: val is a file, or there is none. Raises InputError."""
        if self.val is None or not self.val.endswith("%"):
            return None
        share = float(self.val[:-1]) / 100 if re.fullmatch(r"\d+(\.\d+)?%", self.val) else 0
        if not 0 < share < 1:
            raise InputError(f"--val must be a file, or a share above 0% and below 100%, got {self.val!r}")
        return share


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(AdapterChoice):
    """The adapter that a run trains."""

    title: ClassVar[str] = "adapter"
    kind: AdapterKind = setting("lora", "kind of adapter")
    rank: int = setting(16, "rank of the adapter's matrices")
    alpha: float = setting(32, "the update is scaled by alpha / rank")
    dropout: float = setting(0.0, "dropout on the adapter's input")
    target: tuple[str, ...] = setting(
        ("all-linear",),
        "layers that get an adapter: all-linear, attn, mlp, names such as q_proj,v_proj, or a regular expression that "
        "matches full names",
        metavar="NAME",
    )
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    initial_rank: int | None = setting(None, "AdaLoRA's rank at the start (default: 1.5 times rank)")
    rank_warmup: float = setting(0.1, "share of the run before AdaLoRA's ranks fall")
    rank_final: float = setting(0.5, "share of the run after they have fallen")
    feedforward: tuple[str, ...] = setting((), "layers of which IA3 scales the input, not the output", metavar="NAME")
    start: str = setting("default", "where it begins: pissa, pissa-8, olora, loftq, loftq-5 or eva", metavar="WORD")
    train_tokens: tuple[str, ...] = setting((), "tokens whose rows of embedding and head train too", metavar="TOKEN")

    def lora_config(self, tokenizer: Tokenizer | None = None) -> LoRAConfig:
        """The checked settings, with tokens if it is given; a group or a pattern is one text, layers' names a list."""
        names = [name for given in self.target for name in (given.split(",") if NAMES.fullmatch(given) else [given])]
        if names == ["all"]:
            names = ["all-linear"]
        one = len(names) == 1 and (names[0] in GROUPS or not NAMES.fullmatch(names[0]))
        ids = {text: tokenizer.backend.token_to_id(text) for text in self.train_tokens} if tokenizer else {}
        if unknown := [text for text, found in ids.items() if found is None]:
            raise InputError(f"train_tokens {shown(unknown[0])} is no token of this model: give some that it has")
        own = {field: getattr(self, field) for field in FRESH} | {"train_tokens": [*ids.values()]}
        return LoRAConfig(**own | {"target": names[0] if one else names})


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ResultOptions, TrainingConfig, AdapterOptions, DataOptions, ModelOptions):
    """Everything that every training command takes. The configs check their own parts."""

    dry_run: bool = setting(False, "print what the run takes (a sweep: with one adapter); no weights, nothing written")
    config_type: ClassVar[type[TrainingConfig]]
    trainer_type: ClassVar[Any]
    writes: ClassVar[bool] = True  # the model gives text, and not a score

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fresh:
            self.lora_config()

    @property
    def whole(self) -> bool:
        """Whether all weights are trained."""
        return bool(getattr(self, "full", False))

    @property
    def fresh(self) -> bool:
        """Whether training makes an adapter."""
        return not self.whole and self.adapter is None

    # What a command may say.

    def adapters(self) -> dict[str, str | None]:
        """Those it reads, by the option that names them; the first one's quant and template stand in for the run's."""
        return {"adapter": self.adapter}

    def settled(self, tokenizer: Tokenizer) -> Self:
        """Options with nothing left open. Raises InputError for what only this command can get wrong."""
        return self

    def kind_of_rows(self) -> Kind:
        return "sft"

    def extras(self, model: CausalLM, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the trainer is given besides model, rows and settings."""
        return {}

    def variants(self) -> dict[str, Self]:
        """The options of every adapter that is trained, by its name."""
        return {ADAPTER: self}


def run(options: TrainOptions, sources: Sources) -> int:
    """Check, load, train, report. Returns 0, or 128 + the signal that ended the run.
    Data comes before the model: a bad row should not wait for gigabytes of weights."""
    options = _checked(options, sources)
    read = bool(options.data or options.train_tokens or options.template)  # else nothing asks for a token
    tokenizer = open_tokenizer(options.model) if read else Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))
    outs = options.out, *(each.out for each in options.variants().values())
    for out in outs[: 0 if options.dry_run else None]:  # found out now, not after an hour
        config_text(Path(out) / CONFIG, asdict(options), sources)
        with lock_folder(out, inputs_of(options, sources), options.resume):
            pass
    quant, template = settle(options, tokenizer, *options.adapters().values())
    options = replace(options, quant="none" if options.whole else quant).settled(tokenizer)
    variants, trainers, sets = options.variants(), dict[str, Any](), dict[Any, tuple[Any, Any]]()
    for each in variants.values():
        rows, val = sets[each.data] = sets.get(each.data) or _datasets(each, tokenizer, template)
        each.check_rows(len(rows), None if val is None else len(val))
        each.lora_config(tokenizer)
    model = load_weights(options, tokenizer, str(options.quant))
    asked = options.max_length if sources["max_length"] != DEFAULT else 0
    longest = max(asked, *(each.report.longest for both in sets.values() for each in both if each is not None))
    remark_positions(model, longest)
    for name, each in variants.items():
        rows, val = sets[each.data]
        if not each.whole:
            _put_adapter(model, each, rows, name, each.lora_config(tokenizer))
        config = each.config_type(**{field.name: getattr(each, field.name) for field in fields(each.config_type)})
        compares = config.objective().needs_reference if isinstance(config, DPOConfig) else getattr(config, "kl", 0) > 0
        if options.dry_run and compares:
            start: Any = "base" if each.fresh else "start"  # no number is there that says whether an adapter is fresh
            config = replace(config, **{"reference": start} if getattr(config, "reference", "") == "auto" else {})
        extras = each.extras(model, tokenizer) | {"train": rows, "val": val, "config": config, "adapter": name}
        if isinstance(teacher := extras.get("teacher"), CausalLM):
            remark_positions(teacher, longest, whose="teacher")
        trainers[name] = each.trainer_type(model, tokenizer, **extras)
    if options.dry_run:
        trainer, (device, _) = trainers[next(iter(variants))], planned(options)
        trainer.token_budget = TOKEN_BUDGET[device]
        return show(options, replace(trainer.case(), device=device), trainer.tokens_a_step() * trainer.total)
    begun = time.monotonic()
    if options.out not in {each.out for each in variants.values()}:
        return _sweep(options, sources, variants, SweepTrainer([*trainers.values()]))
    outcome = trainers[ADAPTER].train(_announcing(options, trainers[ADAPTER], sources))
    kept = f"saved in {outcome.checkpoint}" if outcome.checkpoint else "no step was finished, so nothing was saved"
    values = {name: value for name, value in asdict(outcome).items() if name != "val"}
    values |= {"val_loss": outcome.val_loss} | {f"val_{name}": value for name, value in outcome.val.items()}
    values["seconds"] = round(seconds := time.monotonic() - begun, 3)
    values["foreseen_bytes"] = foreseen = trainers[ADAPTER].foreseen_bytes()
    text = f"after step {outcome.steps}; {kept}" if outcome.signal else _finished(options, outcome, seconds, foreseen)
    return _report(options, values, text, outcome.signal)


def _sweep(options: TrainOptions, sources: Sources, variants: Mapping[str, TrainOptions], sweep: SweepTrainer) -> int:
    """Train several adapters, each into a folder in that of the sweep; returns the exit code."""
    every = [(t.config, [*t.parameters.values()]) for t in sweep.trainers.values()]
    weights, state = (sum(p.nbytes for _, ps in every for p in ps), sum(state_bytes(*each) for each in every))
    note(f"sweep: {count(len(every), 'adapter')} of {amount(weights)}B, gradients as much, state {amount(state)}B")
    _announcing(options, None, sources)(0, int(options.resume is not None))
    pairs_of, base = [pair for each in variants.values() for pair in vars(each).items()], vars(options)
    said = {**sources, **{name: sources["sweep"] for name, value in pairs_of if value != base[name]}}
    outcome = sweep.train(lambda total, start, name: _announcing(variants[name], None, said)(total, start, name))
    signal = next((each.signal for each in outcome.results.values() if each.signal), None)
    best = variants[outcome.best or next(iter(outcome.results))]
    text = "each adapter's checkpoint is in its folder" if signal else f"{outcome.table()}\n\ntry it  {_try_it(best)}"
    return _report(options, asdict(outcome), text, signal)


def _checked(options: TrainOptions, sources: Sources) -> TrainOptions:
    """The options with `dtype` settled. Raises InputError for what is wrong at first sight."""
    given = [name for name in FRESH if sources[name] != DEFAULT]
    if options.whole and (given := [*["adapter"] * (options.adapter is not None), *given]):
        raise InputError(f"full training has no adapter: leave out {', '.join(given)}, or leave out full")
    if options.whole and options.quant not in (None, "none"):
        kept = f"quant {options.quant} keeps it in 4 bits"
        raise InputError(f"full training needs the dense model: {kept}; use quant none")
    if options.adapter is not None and given:
        raise InputError(f"the adapter {options.adapter} brings its own {', '.join(given)}: leave them out")
    if options.dtype == "float16":
        raise InputError("training in float16 loses small gradients; use dtype bfloat16 or float32")
    if options.share is None and options.val is not None and not Path(options.val).exists():
        raise InputError(f"data file {options.val} does not exist; a share needs a percent sign, as in 5%")
    for name, folder in options.adapters().items():
        if folder is not None:
            check_adapter(folder, name, writes=options.writes)
    resumed = options.out if options.resume is not None else None
    runs = resumed, *options.adapters().values(), options.model
    if options.dry_run:
        return replace(options, dtype=planned(options)[1])  # type: ignore[arg-type]
    dtype: Any = choose_dtype(options.dtype, choose_device(options.device), *runs)
    return replace(options, dtype=dtype)


def _datasets(options: TrainOptions, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[Any, Any]:
    """Training and validation rows (None without), checked and described."""
    kind = options.kind_of_rows()
    if not options.data:  # of fourbit plan: the second half of each row is an answer
        lengths: list[int] = options.tokens()  # type: ignore[attr-defined]  # fourbit plan's, which alone needs no data
        each = enumerate(lengths * options.batch_size)  # other tokens in each: a common beginning would run once
        rows = [Example((Encoded([number] * n, [2 * i >= n for i in range(n)]),)) for number, n in each]
        return Dataset("sft", rows), None
    begun = template_to_resume(options, tokenizer, template)
    with working("reading data"):
        train, val = load_rows(options, tokenizer, options.data, kind, template=begun), None
    describe("train", train)
    if options.share is not None:
        train, val = split_validation(train, options.share)
        note(f"validation: {count(len(val), 'row')} of these, {count(len(train), 'row')} left to train on")
    elif options.val is not None:
        val = load_rows(options, tokenizer, [options.val], kind, template=begun)
        describe("validation", val)
        if leaked := count_overlap(train, val):
            note(f"  note: {count(leaked, 'validation row')} also in the training data; the score will flatter")
    return train, val


def _put_adapter(model: CausalLM, options: TrainOptions, rows: Dataset, name: str, wanted: LoRAConfig) -> None:
    """The adapter that training starts from, and a line about it."""
    if options.adapter is not None:
        layers = put_adapter(model, options.adapter, options.force, name=name)
        note(f"adapter: goes on from {options.adapter}, on {layers} layers")
        return
    parts = [part for example in rows.examples[:: -(-len(rows) // 64)] for part in example.parts]  # of at most 64 rows
    how: dict[str, Any] = {"data": (torch.tensor([part.ids], device=model.device) for part in parts)}
    how["tell"] = lambda path, error, was: note(f"start: {path}  error {error:.4f}, was {was:.4f}")
    wanted = replace(wanted, start="default") if options.dry_run else wanted
    names = attach(model, wanted, name, seed=options.seed, dense=read_weights(options.model), **how)
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    said = {"rank": options.rank, "alpha": options.alpha}
    own: list[str] = [options.kind] * (options.kind != "lora")
    own += [f"{name} {value:g}" for name, value in said.items() if name in USED.get(options.kind, said)]
    note(f"adapter: {', '.join(own)}, {len(names)} layers, {amount(size)} parameters")


def _announcing(options: TrainOptions, trainer: Any, sources: Sources) -> Callable[..., Any]:
    """For the trainer to call once the run may begin: saves and prints the settings, then shows progress."""
    left_out = {"resume", "json", "dry_run", *(() if options.fresh else FRESH)}
    if options.whole and options.dtype != "float32":
        kept = "on average none is lost" if options.rounding == "stochastic" else "those below their precision are lost"
        note(f"updates: of weights in {options.dtype}, rounding {options.rounding}: {kept}")
    settings = {name: value for name, value in asdict(options).items() if name not in left_out}
    before = read_run(options.out)  # now, as a spoilt file ends a run before it changes anything
    if "reference" in settings:
        settings["reference"] = trainer.config.reference  # its choice
        if trainer.compares:
            base = trainer.config.reference == "base"
            note(f"reference: {'the base, adapter off' if base else 'the adapter as it is at the start'}")

    def begin(total: int, start: int, run: str = "") -> Any:
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        if start == 0 or plain != before:  # a resumed run keeps its record of sources
            write_config(Path(options.out) / CONFIG, settings, sources)
        if main.OURS and trainer is not None and {*keeps(trainer.recompute)} & {*AGAIN}:  # memory is what it lacks:
            main.give_memory_back(MAPPED[1])  # up to a fourth less of it for a twentieth more time
        groups: dict[str, list[str]] = {}
        for name, value in () if run else settings.items():  # a sweep has told them for all
            source = sources[name].rpartition(":")[0] or f"{sources[name]}s"
            groups.setdefault(source, []).append(f"{name}={_short(value)}")
        for source in sorted(groups, key=lambda source: source == f"{DEFAULT}s"):
            note(wrapped(f"{source}: {' '.join(groups[source])}"))
        return display_for(total, start, run)

    return begin


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = tuple(f"{name}={number:g}" for name, number in value.items())
    return ",".join(value) or "-" if isinstance(value, tuple) else "-" if value is None else str(value)


def _report(options: TrainOptions, values: Mapping[str, Any], text: str, signal: int | None) -> int:
    """Print the outcome, as text or JSON, or where a signal ended the run how to go on; returns the exit code."""
    if signal is None:
        result(values, text, as_json=options.json)
        return 0
    command = type(options).__module__.rpartition(".")[2]
    resume = shlex.join(["fourbit", command, str(Path(options.out) / CONFIG), "--resume"])
    note(f"stopped {text}. To go on:\n  {resume}")
    if options.json:
        result(values, "", as_json=True)
    return 128 + signal


def _finished(options: TrainOptions, outcome: TrainResult, seconds: float, foreseen: int) -> str:
    early = " (stopped early)" if outcome.stopped_early else ""
    rows = [("steps", f"{outcome.steps}{early} in {seconds:.0f} s"), ("last loss", figure(outcome.loss))]
    if outcome.val:
        more = [f"{name.replace('_', ' ')} {figure(outcome.val[name])}" for name in REPORTED if name in outcome.val]
        what = "loss" if "loss" in outcome.val else "reward"
        found = [figure(outcome.val[what]), *more, f"at step {outcome.best_step}"]
        rows.append((f"validation {what}", ", ".join(found)))
    if outcome.skipped_steps:
        rows.append(("skipped steps", f"{outcome.skipped_steps} (NaN or infinity in loss or gradient)"))
    memory = f"{outcome.peak_bytes / 2**30:.2f} GiB beside the weights at the peak"
    memory += f", {foreseen / 2**30:.2f} foreseen" * bool(foreseen)
    rows += [("memory", memory)] * bool(outcome.peak_bytes)
    rows += [("model" if options.whole else "adapter", str(outcome.out)), ("metrics", f"{outcome.out}/metrics.jsonl")]
    rows += [("curves", f"{outcome.out}/loss.png"), ("try it", _try_it(options))]
    return pairs(rows)


def _try_it(options: TrainOptions) -> str:
    if not options.writes:
        started = options.fresh and options.start != "default" and options.quant != "none"
        dense = f", dense=fourbit.read_weights({options.model!r})" * started
        return f"fourbit.RewardModel.load(model, {options.out!r}{dense}).score(tokenizer, rows), in Python"
    if options.whole:
        return f"fourbit chat --model {shlex.quote(options.out)}"
    return f"fourbit chat --model {shlex.quote(options.model)} --adapter {shlex.quote(options.out)}"
