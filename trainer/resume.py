"""Whether a run may go on from a checkpoint: what must be the same, what may differ and is told, how a run gets longer.

The rule for its length and schedule: they may change as long as each step that is done had the learning rate that the
new course gives it. Then the run goes on as if it had been meant so from the beginning. So a constant rate may go on
for ever and may be led down at last (wsd), and a cosine, whose every rate depends on the end, may not.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..data.protocol import AnyTokenizer
from ..data.template import TemplateChoice, template_for
from ..errors import InputError, shown
from ..files import read_json
from ..lora.identity import hashed
from ..lora.layer import DEFAULT, adapter_layers, adapter_parameters, adapters_of, plain_name
from ..lora.peft_files import adapter_state
from ..models.protocol import CausalLM
from ..settings import read_fields
from .checkpoint import STATE, newest_checkpoint
from .config import COURSE, PAGED, TrainingConfig
from .loop import name_of
from .run import RunState, active_adapters

HARMLESS = {"out", "resume", "log", "keep", "save_every", "checkpointing", "optimizer_budget", "micro_batch", "packing"}
STATE_BYTES = 1 << 30
SAME = {"foreach", "fused", "capturable", "differentiable"}  # of torch's optimizers: how a step is computed
HARMLESS |= {"template", "deterministic"}  # the name of a file, whose content is compared; part of `layout`


@dataclass(frozen=True)
class SavedState:
    """What `state.json` of a checkpoint holds."""

    run: RunState
    config: dict[str, Any]  # the options, as JSON gives them back
    data: str  # fingerprint of the rows
    depends: dict[str, str]  # `Trainer.depends`
    layout: dict[str, str]  # `layout`
    loop: dict[str, Any]  # what `Run.state` holds beside tensors
    date: str | None = None  # that the chat template writes


def template_to_resume(config: TrainingConfig, tokenizer: AnyTokenizer, template: TemplateChoice) -> TemplateChoice:
    """The template, which where the run goes on writes the date that it wrote when the run began."""
    if config.resume is None or not (made := template_for(tokenizer, template)).undated:
        return template
    auto = config.resume == "auto"
    path = newest_checkpoint(Path(config.out) / "checkpoints")[0] if auto else Path(config.resume)
    if path is None or not (file := path / STATE).is_file():
        return made
    return made.dated(read_fields(SavedState, read_json(file, STATE_BYTES), str(file)).date)


def check_resumed(path: Path, saved: SavedState, now: SavedState, config: TrainingConfig, rows: int) -> list[str]:
    """What to tell about going on from the checkpoint at `path`, which says `saved`, as `now`. InputError where that
    would be another training."""
    if other := _differences(saved.depends, now.depends):
        raise InputError(
            f"{path} was written by a run with another {'; another '.join(other)}. Go on with what it began with, or "
            "begin a new run in another folder (out)"
        )
    if changes := changed_options(saved.config, config):
        raise InputError(f"{path} was written by a run with other options ({'; '.join(changes)}); use the same ones")
    if saved.data != now.data:
        dated = f", read with template=ChatTemplate(..., date={saved.date!r}), which writes the date"
        way = "resume with the same data files" + dated * bool(saved.date and saved.date != now.date)
        raise InputError(f"{path} was written by a run on other training data; {way}")
    notes = []
    old = replace(config, **{name: saved.config[name] for name in COURSE if name in saved.config})
    before, total = old.total_steps(rows), config.total_steps(rows)
    if (before, old.course()) != (total, config.course()):
        _check_course(old, config, before, total, saved.run, own="scheduler" in now.depends)
        way = "its scheduler" if "scheduler" in now.depends else f"schedule {config.schedule}"
        notes.append(f"goes on to step {total:,} by {way}; it was to end at step {before:,}")
        if saved.run.best_metrics and saved.run.evaluated % (config.eval_every or config.epoch_steps(rows)):
            notes.append(
                f"the evaluation after step {saved.run.evaluated:,}, its end then, counts for the best step too"
            )
    elif saved.run.done >= total:
        notes.append(f"all {total:,} steps of this run were done: to go on from it, see the README ('Going on')")
    if other := _differences(saved.layout, now.layout):
        notes.append(f"resumed with another {', another '.join(other)}: the same training, not bit for bit the same")
    elif now.layout["kernels"] == "any":
        notes.append("a GPU repeats its sums to the bit only with deterministic on: goes on, not bit for bit the same")
    return notes


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return [f"{name} ({shown(before.get(name))}, now {shown(now.get(name))})" for name in names]


def _check_course(
    old: TrainingConfig, new: TrainingConfig, before: int, total: int, run: RunState, *, own: bool
) -> None:
    """InputError unless all steps that are done had the rates of the new course, and it has steps left. own: rates are
    those of a scheduler, whose state the checkpoint has."""
    anew = "begin a new run from what this one saved, with another out (an adapter as adapter=, a model as model=)"
    if total < run.done:
        raise InputError(f"{run.done:,} steps of this run are done, more than the {total:,} asked for; {anew}")
    if run.stopped_early:
        raise InputError(f"this run stopped early, after step {run.done:,}, and more steps change nothing; {anew}")
    for step in range(0 if own else run.done):
        was, would = old.lr * old.rate_factor(step, before), new.lr * new.rate_factor(step, total)
        if was != would:
            raise InputError(
                f"a run of {total:,} steps by schedule {new.schedule} has the learning rate {would:.4g} in step "
                f"{step + 1}, and this one ({before:,} steps, {old.schedule}) had {was:.4g} there: it cannot become "
                "that run. A constant or inverse-sqrt one (or wsd before its decay), its warmup given in steps, can be "
                f"made longer; else {anew}"
            )


def changed_options(old: Mapping[str, Any], config: TrainingConfig) -> list[str]:
    """Options, but for those of the course, that differ from an older run's (as JSON) and would make a resumed run
    another, as `name: old -> new`."""
    new, defaults = as_json(config), as_json(type(config)(out="o"))
    old = defaults | dict(old)  # what is newer than the run had its default
    changed = {name for name, value in new.items() if name not in HARMLESS | COURSE and old[name] != value}
    if "optimizer" in changed and str(old["optimizer"]).removeprefix(PAGED) == new["optimizer"].removeprefix(PAGED):
        changed.remove("optimizer")  # paging is about where state lies; it computes the same
    return [f"{name}: {shown(old[name])} -> {shown(new[name])}" for name in new if name in changed]


def as_json(config: TrainingConfig) -> dict[str, Any]:
    """The options as JSON gives them back: lists for tuples."""
    return dict(json.loads(json.dumps(asdict(config))))


def layout(config: TrainingConfig, device: torch.device) -> dict[str, str]:
    """What decides in which order numbers are added up: another gives the same training, not the same bits."""
    on_gpu = device.type == "cuda"
    return {
        "packing": str(config.packing),
        "micro_batch": str(config.micro_batch),
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "number of threads": "any" if on_gpu else str(torch.get_num_threads()),
        "torch": torch.__version__,
        "kernels": "any" if on_gpu and not config.deterministic else "deterministic",
    }


@contextmanager
def repeating(config: TrainingConfig, device: torch.device) -> Iterator[None]:
    """torch as a run has it: generators of its own; if `deterministic`, only kernels whose sums repeat, or an error."""
    mode, given = torch.get_deterministic_debug_mode(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if config.deterministic and device.type == "cuda" and given not in (":4096:8", ":16:8"):
        raise InputError(f"deterministic: a GPU needs CUBLAS_WORKSPACE_CONFIG=:4096:8 set from the start, not {given}")
    with torch.random.fork_rng(), ExitStack() as after:
        after.callback(torch.set_deterministic_debug_mode, mode)
        torch.set_deterministic_debug_mode("error" if config.deterministic else mode)
        yield


def basis(model: CausalLM, adapter: str, trained: Collection[Tensor]) -> dict[str, str]:
    """What a training of these tensors stands on, by name."""
    dtypes = {str(model.dtype), *(str(tensor.dtype) for tensor in trained)}
    return {
        "dtype": ", ".join(sorted(dtypes)),
        "base": base_hash(model, trained),
        "form of its adapter": adapter_form(model, adapter),
        "adapter beside it, or frozen part of its own": beside_hash(model, adapter),
    }


def base_hash(model: CausalLM, trained: Collection[Tensor] = ()) -> str:
    """SHA-256 over a model's settings, and its weights but for adapters and `trained`. It is exact, where the identity
    in an adapter's file forgives another dtype."""
    adapters = [layer.adapters for layer in adapter_layers(model).values()]
    left_out = {id(t) for own in adapters for t in (*own.parameters(), *own.buffers())} | {*map(id, trained)}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # A layer's weights are the same ones whether an adapter or one of torch's wrappers sits on it or not.
    base = {plain_name(name).replace(".base.", "."): tensor for name, tensor in tensors if id(tensor) not in left_out}
    return hashlib.sha256((hashed(base) + json.dumps(model.settings())).encode()).hexdigest()


def adapter_form(model: CausalLM, name: str = DEFAULT) -> str:
    """What an adapter's tensors do not say: on which layers it is, and kind, scale and dropout of each part."""
    parts = sorted(adapters_of(model, name).items())
    return json.dumps([[path, type(part).__name__, part.peft_fields()] for path, part in parts])


def adapters_hash(model: CausalLM, active: Mapping[str, float]) -> str:
    """SHA-256, in hex, of adapters of these names and weights: tensors and what their files would say of their form."""
    tensors = {f"{i}.{key}": t for i, name in enumerate(active) for key, t in adapter_state(model, name).items()}
    forms = [[adapter_form(model, name), weight] for name, weight in active.items()]
    return hashlib.sha256((hashed(tensors) + json.dumps(forms)).encode()).hexdigest()


def beside_hash(model: CausalLM, name: str) -> str:
    """SHA-256, in hex, of what an adapter trains beside: tensors of its own that do not train, others that are active;
    "none" without any."""
    frozen = {own: p for own, p in adapter_parameters(model, name).items() if not p.requires_grad}
    others = {other: weight for other, weight in active_adapters(model).items() if other != name}
    return hashed(frozen) + adapters_hash(model, others) if frozen or others else "none"


def described(given: object) -> str:
    """A function, a class or an optimizer, as far as it can be known in another process: its name, and the numbers of
    an optimizer, or the arguments of a function with some filled in, but for those that change no result."""
    numbers = given.defaults.items() if isinstance(given, Optimizer) else ()
    settings = {name: value for name, value in numbers if not isinstance(value, bool | str | None)}
    while isinstance(given, partial):
        settings = {**{str(i): value for i, value in enumerate(given.args)}, **given.keywords, **settings}
        given = given.func
    told = [f", {name} {_plain(value)}" for name, value in sorted(settings.items()) if name not in SAME]
    return name_of(given) + "".join(told)


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return repr(value) if value is None or isinstance(value, int | float | str) else name_of(value)
