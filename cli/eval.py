"""`fourbit eval`: held-out loss, perplexity and right answers of a model, without and with its adapter."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..data.encode import load_rows
from ..files import write_text
from ..lora.adapter import adapters_off
from ..settings import setting
from ..trainer.evaluate import Answer, Match, answer_all, check_comparable, evaluate_loss, perplexity, share_right
from .load import check_file, load_adapted
from .options import AdaptedModelOptions, ResultOptions, RowOptions
from .parse import Sources
from .show import describe, figure, note, pairs, result, working


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions, RowOptions, AdaptedModelOptions):
    """Measure a model on held-out rows: loss of a trained token and its exponential
    (perplexity), and how often the greedy answer is the one in the data (--match).
    With --adapter all figures come twice, without and with it.

      fourbit eval --model M --adapter runs/first --data test.jsonl
    """

    title: ClassVar[str] = "evaluation"
    match: Match | Literal["none"] = setting(
        "exact",
        "what makes an answer right. exact: it is what the template writes for the one in the data, tool calls and "
        "special tokens included; json: it is the same JSON value; regex: the one in the data is a regular expression "
        "found in it; contains: the one in the data stands in it; none: no answers are written (the slow part)",
    )
    base: bool = setting(True, "with an adapter: measure the model without it too")
    max_new_tokens: int = setting(256, "tokens an answer may have", least=1)
    batch_size: int = setting(32, "answers written at a time", least=1)
    answers: str | None = setting(None, "write expected and given answers there, one JSON object a row", metavar="FILE")


def run(options: Options, sources: Sources) -> int:
    """Load, measure, print."""
    if options.answers is not None:
        check_file(options.answers, "answers")
    model, tokenizer, template = load_adapted(options)
    rows = load_rows(options, tokenizer, options.data, "sft", template=template)
    describe("data", rows)
    asked = [] if options.match == "none" else [sample for sample in rows.samples if sample.text is None]
    if options.match != "none":
        check_comparable(asked, options.match)
        if len(asked) < len(rows):
            note("note: plain text asks for no answer; of such rows only the loss is measured")

    def measure(name: str) -> dict[str, Any]:
        with working(f"{name}: loss"):
            loss = evaluate_loss(model, rows.examples, pad_id=tokenizer.pad_id or 0)
        metrics = {"loss": loss, "perplexity": perplexity(loss)}
        if asked and options.match != "none":
            sizes = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
            with working(f"{name}: answers"):
                answers = [*answer_all(model, tokenizer, template, asked, match=options.match, **sizes)]
            metrics[f"{options.match}_match"] = share_right(answers)
            if options.answers is not None:
                _write_answers(Path(options.answers), name, options.match, answers)
        return metrics

    found = {}
    if options.base or options.adapter is None:
        with adapters_off(model):
            found["base"] = measure("base")
    if options.adapter is not None:
        found["adapter"] = measure("adapter")
    values = {"model": options.model, "adapter": options.adapter, "rows": len(rows), **found.get("adapter", {})}
    values |= {f"base_{name}" if "adapter" in found else name: value for name, value in found.get("base", {}).items()}
    result(values, _table(found, options.match), as_json=options.json)
    return 0


def _write_answers(path: Path, name: str, match: str, answers: Sequence[Answer]) -> None:
    """`answers.jsonl` for the adapter, `answers.base.jsonl` for the base beside it."""
    file = path if name == "adapter" else path.with_suffix(f".base{path.suffix}")
    rows = [{"source": a.source, "expected": a.expected, "answer": a.answer, match: a.right} for a in answers]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    note(f"answers: {file}")


def _table(found: dict[str, dict[str, Any]], match: str) -> str:
    def line(texts: Iterable[str]) -> str:
        return "".join(f"{text:>12}" for text in texts)

    rows = [("", line(found))]
    for name, digits in (("loss", 4), ("perplexity", 2)):
        rows.append((name, line(figure(metrics[name], digits) for metrics in found.values())))
    if all(f"{match}_match" in metrics for metrics in found.values()):
        rows.append((f"{match} match", line(f"{metrics[f'{match}_match']:.1%}" for metrics in found.values())))
    return pairs(rows)
