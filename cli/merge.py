"""`fourbit merge`: adapters into the weights of a model, as a folder, and what that did to them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from ..data.batch import Example, micro_batches
from ..data.encode import load_rows
from ..data.order import split_validation
from ..data.template import ChatTemplate
from ..errors import InputError
from ..lora.active import use
from ..lora.layer import plain_modules
from ..lora.linear4bit import Module4bit, NF4LowRank
from ..lora.merge import Fidelity, fidelity, merged_state, requantize_
from ..lora.targets import base_modules
from ..models.load import load_decoder
from ..models.protocol import CausalLM, evaluating
from ..models.save import save_model
from ..outputs import lock_folder
from ..settings import REQUIRED, setting
from ..text.tokenizer import Tokenizer
from ..trainer.losses.tokens import hidden_rows, logits_of, on_device
from .config_file import CONFIG, read_run, scalar, write_config
from .load import check_adapter, load_weights, open_tokenizer, put_adapter, settle
from .options import DType, ModelOptions, Quant, ResultOptions, inputs_of
from .parse import Sources
from .show import pairs, result

LEAST = 0.9  # share of the change that is kept, or it takes --force
TOKENS = 256  # trained ones of the probe, whose logits are compared: those of two models are in memory at once


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions, ModelOptions):
    """Merge adapters into the weights of a model, and say of every layer how large the change
    is beside what is rounded away, and what share of it is kept; on validation rows how far
    the merged model is from the adapted one. The folder opens like any model's.

      fourbit merge --model M --adapter runs/first --out merged
    """

    title: ClassVar[str] = "merge"
    adapter: tuple[str, ...] = setting(REQUIRED, "folder of an adapter; repeat it for several at once", metavar="DIR")
    weights: tuple[str, ...] = setting((), "how much each adapter counts, in their order (default: 1)", metavar="X")
    out: str = setting(REQUIRED, "folder for the result", metavar="FOLDER")
    into: Literal["decoded", "base", "nf4"] = setting(
        "decoded",
        "decoded: the 4-bit weights that it was trained on, in 16 bits; base: the model's own; nf4: 4 bits again, with "
        "an adapter for what they cannot hold",
    )
    residual_bits: float = setting(0.3, "of that adapter for each weight, at most", positive=True, most=16)
    dtype: DType = setting("bfloat16", "of the result's dense weights")
    data: tuple[str, ...] = setting((), "rows to compare on (default: the run's validation rows)", metavar="FILE")
    force: bool = setting(False, "write what keeps less than 90% of the change, or is of another base, too")


def run(options: Options, sources: Sources) -> int:
    """Load, measure, write, load again and compare."""
    with lock_folder(options.out, inputs_of(options, sources)):
        out, nf4, tokenizer = Path(options.out), options.into == "nf4", open_tokenizer(options.model)
        quant, template = settle(options, tokenizer, *options.adapter)
        probe, model = _probe(options, tokenizer, template), _adapted(options, tokenizer, quant)
        before, written = _logprobs(model, probe), model
        if options.into == "base" and quant != "none":
            written = _adapted(options, tokenizer, "none")
        dtype, device, packed = model.dtype, model.device, _packed(model)
        found = requantize_(model, options.residual_bits) if nf4 else fidelity(model, merged_state(written))
        way = "take --into decoded, which keeps all, more --residual-bits, or --force"
        total = total_of(found, options.into, "" if options.force else way)
        layers = {path: str(each) for path, each in found.items()} | {"all": str(total)}
        values: dict[str, Any] = {"out": options.out, "kept": total.kept, "layers": layers}
        if nf4:
            low = [cast(NF4LowRank, plain_modules(model)[path]) for path in found]
            values["bits"] = sum(16 * (p.A.numel() + p.B.numel()) for p in low) / sum(prod(p.shape) for p in low)
            values["dense"] = [path for path in packed if path not in _packed(model)]
        save_model(written, out, tokenizer, template=template.portable(), merge=not nf4)
        settings = {"model": options.model, "adapter": options.adapter, "into": options.into, "quant": "none"}
        write_config(out / CONFIG, settings, dict.fromkeys(settings, "merge"))
        del model, written
        after = _logprobs(load_decoder(out, dtype=dtype, device=device), probe)
        if before is not None and after is not None:
            values["kl"] = (before.exp() * (before - after)).sum(-1).mean().item()
            values["agreement"] = (before.argmax(-1) == after.argmax(-1)).double().mean().item()
        said = {"bits": "of the adapter for each weight", "kl": "nats a token", "agreement": "of greedy tokens"}
        rows = [(name, f"{values[name]:.4g} {what}") for name, what in said.items() if name in values]
        if dense := values.get("dense"):
            rows.append(("dense", f"{', '.join(dense)}: in 4 bits only linear layers take a change"))
        result(values, pairs([*layers.items(), *rows]), as_json=options.json)
        return 0


def total_of(found: Mapping[str, Fidelity], into: str, otherwise: str) -> Fidelity:
    """Of all layers. InputError where too little is kept, with what to do `otherwise`; none of that, no error."""
    total = Fidelity(*map(sum, zip(*found.values(), strict=True)))
    if total.kept < LEAST and otherwise:
        raise InputError(f"{into} would keep {total.kept:.1%} of the change, below {LEAST:.0%}: {otherwise}")
    return total


def _packed(model: CausalLM) -> list[str]:
    """The layers that are in 4 bits."""
    return [path for path, layer in base_modules(model).items() if isinstance(layer, Module4bit)]


def _adapted(options: Options, tokenizer: Tokenizer, quant: Quant) -> CausalLM:
    """The model with the adapters active."""
    names = [f"merged{number}" for number in range(len(options.adapter))]
    model = load_weights(options, tokenizer, quant)
    for name, folder in zip(names, options.adapter, strict=True):
        check_adapter(folder)
        put_adapter(model, folder, options.force, name=name, trainable=False)
    use(model, *names, weights=[scalar(weight) for weight in options.weights] or None)
    return model


def _probe(options: Options, tokenizer: Tokenizer, template: ChatTemplate) -> list[Example]:
    """Rows to compare on, of TOKENS trained tokens or a few more: those given, or what the first run held out."""
    run = {} if options.data else read_run(options.adapter[0])
    val, rows = str(run.get("val") or ""), None
    files = options.data or (run.get("data", ()) if val.endswith("%") else [val] * bool(val))
    with nullcontext() if options.data else suppress(InputError):  # such rows may be of another kind, or gone
        how: Any = {"template": template, "max_length": run.get("max_length"), "on_bad_row": "skip"}  # as the run's
        rows = load_rows(options, tokenizer, files, "sft", **how) if files else None
        rows = split_validation(rows, float(val[:-1]) / 100)[1] if rows and val.endswith("%") else rows
    examples = rows.examples if rows else []
    counts = accumulate((sum(example.parts[0].trained) for example in examples), initial=0)
    return [example for example, count in zip(examples, counts, strict=False) if count < TOKENS]


def _logprobs(model: CausalLM, examples: Sequence[Example]) -> Tensor | None:
    """Log-probabilities [N, V] of what may stand where trained tokens do, fp32; None without any."""
    found = []
    with evaluating(model):
        for batch in micro_batches([*enumerate(examples)], forks_up_to=model.forks_up_to) if examples else ():
            here = on_device(model, batch)
            logits = logits_of(model.head(), hidden_rows(model, here, here.rows))
            found.append(logits.float().log_softmax(-1).cpu())
    return torch.cat(found)[:TOKENS] if found else None
