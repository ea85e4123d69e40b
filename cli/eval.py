"""`fourbit eval`: held-out loss, perplexity and exact match of a model, without and with its adapter."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .load import load_adapted, run_settings
from .options import AdaptedModelOptions, ResultOptions, RowOptions, at_least, option
from .parse import parse
from .show import describe, figure, note, pairs, result, working

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..data.template import ChatTemplate

ABOUT = """\
Measure a model on held-out rows: loss of a trained token and its exponential
(perplexity), and how often the greedy answer is exactly the one in the data.
With --adapter all figures come twice, without and with it.

  fourbit eval --model M --adapter runs/first --data test.jsonl"""


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ResultOptions, RowOptions, AdaptedModelOptions):
    """What `fourbit eval` takes."""

    title: ClassVar[str] = "evaluation"
    exact: bool = option("write answers and compare them (the slow part)", True)
    base: bool = option("with an adapter: measure the model without it too", True)
    max_new_tokens: int = option("tokens an answer may have", 256)
    batch_size: int = option("answers written at a time", 32)
    answers: str | None = option("write expected and given answers there, one JSON object a row", None, metavar="FILE")

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens", "batch_size")
        at_least(self, 2, "max_length")


def run(args: Sequence[str]) -> int:
    """Parse, load, measure, print."""
    from ..data.dataset import load_dataset
    from ..data.template import template_for
    from ..lora.attach import adapters_off

    options = parse(EvalOptions, args, command="eval", about=ABOUT, positional="data").options
    model, tokenizer = load_adapted(options)
    template = template_for(tokenizer, chosen_template(options))
    rows = load_dataset(
        options.data,
        tokenizer,
        template=template,
        max_length=options.max_length,
        loss_on=options.loss_on,
        on_bad_row=options.on_bad_row,
    )
    describe("data", rows)
    if options.adapter is None:
        figures = {"base": _measure(model, tokenizer, template, rows, options, "base")}
    else:
        figures = {"adapter": _measure(model, tokenizer, template, rows, options, "adapter")}
        if options.base:
            with adapters_off(model):
                figures = {"base": _measure(model, tokenizer, template, rows, options, "base")} | figures
    values = {"model": options.model, "adapter": options.adapter, "rows": len(rows)}
    values |= figures.get("adapter") or figures["base"]
    if options.adapter is not None:
        values |= {f"base_{key}": value for key, value in figures.get("base", {}).items()}
    result(values, _table(figures), as_json=options.json)
    return 0


def chosen_template(options: Any) -> str | None:
    """The template asked for, else the one that the adapter (or the whole model) was trained with."""
    if options.template is not None:
        return str(options.template)
    trained = run_settings(options.adapter or options.model).get("template")
    if trained is not None:
        note(f"template: {trained}, as in training")
    return trained


def _measure(
    model: Any, tokenizer: Any, template: "ChatTemplate", rows: "Dataset", options: EvalOptions, name: str
) -> dict[str, Any]:
    from ..trainer.evaluate import answer_all, evaluate_loss, exact_match

    with working(f"{name}: loss"):
        loss = evaluate_loss(model, rows.examples, pad_id=tokenizer.pad_id or 0)
    figures: dict[str, Any] = {"loss": loss, "perplexity": perplexity(loss)}
    if options.exact:
        with working(f"{name}: answers"):
            answers = answer_all(
                model,
                tokenizer,
                template,
                rows.conversations,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
            )
        figures["exact_match"] = exact_match(answers)
        if options.answers is not None:
            _write_answers(options.answers, name, answers)
    return figures


def perplexity(loss: float | None) -> float | None:
    """exp of a loss in nats; of a hopeless one, the largest figure rather than an overflow."""
    return None if loss is None else math.exp(min(loss, 700.0))


def _write_answers(path: str, name: str, answers: Sequence[Any]) -> None:
    """`answers.jsonl` for the adapter, `answers.base.jsonl` for the base beside it."""
    file = Path(path) if name == "adapter" else Path(path).with_suffix(f".base{Path(path).suffix}")
    rows = [{"source": a.source, "expected": a.expected, "answer": a.answer, "exact": a.exact} for a in answers]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    note(f"answers: {file}")


def _table(figures: dict[str, dict[str, Any]]) -> str:
    names = list(figures)
    lines = [("", "".join(f"{name:>12}" for name in names))]
    for key, digits in (("loss", 4), ("perplexity", 2)):
        lines.append((key, "".join(f"{figure(figures[name][key], digits):>12}" for name in names)))
    if all("exact_match" in values for values in figures.values()):
        lines.append(("exact match", "".join(f"{figures[name]['exact_match']:>12.1%}" for name in names)))
    return pairs(lines)
