"""`fourbit eval`: held-out loss, perplexity and right answers of a model, without and with its adapter."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..data.encode import load_rows
from ..data.sample import Sample
from ..errors import InputError
from ..lora.active import adapters_off
from ..outputs import Output
from ..settings import setting
from ..trainer.evaluate import Answer, Match, answer_all, check_comparable, evaluate_loss, perplexity, share_right
from .load import answering, load_adapted, remark_positions
from .options import AnsweringOptions, FileOptions, RowOptions, output_of
from .parse import Sources
from .show import describe, figure, note, pairs, result, working


@dataclass(frozen=True, kw_only=True)
class Options(FileOptions, RowOptions, AnsweringOptions):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match == "none" and self.answers is not None:
            raise InputError(f"answers {self.answers} would stay empty: match none writes none; leave one of them out")
        if self.answers is None and (given := [name for name in ("resume", "overwrite") if getattr(self, name)]):
            raise InputError(f"{given[0]} is about a file of answers: give answers, or leave it out")
        if not self.base and self.adapter is None:
            raise InputError("base is off, and there is no adapter: nothing is left to measure; leave --no-base out")


def run(options: Options, sources: Sources) -> int:
    """Load, measure, print."""
    measured = ["base"] * options.base + ["adapter"] * (options.adapter is not None)
    with ExitStack() as stack:
        return _run(options, measured, _outputs(options, sources, measured, stack))


def _outputs(options: Options, sources: Sources, measured: Sequence[str], stack: ExitStack) -> dict[str, Output]:
    """Where the answers of what is measured go: `answers.jsonl`; with an adapter the base's `answers.base.jsonl`."""
    if options.answers is None:
        return {}
    path, found = Path(options.answers), dict[str, Output]()
    for name in reversed(measured):
        place = path if name == measured[-1] else path.with_suffix(f".base{path.suffix}")
        found[name] = stack.enter_context(output_of(options, sources, "answers", place))
        if not found[name].regular and len(measured) > 1:
            raise InputError(f"answers {path}: those of base and adapter are two files; give a file, or no-base")
    return found


def _run(options: Options, measured: Sequence[str], outputs: Mapping[str, Output]) -> int:
    model, tokenizer, template = load_adapted(options)
    rows = load_rows(options, tokenizer, options.data, "sft", template=template)
    describe("data", rows)
    remark_positions(model, rows.report.longest)
    asked = [] if options.match == "none" else [sample for sample in rows.samples if sample.text is None]
    if options.match != "none":
        check_comparable(asked, options.match)
        if len(asked) < len(rows):
            note("note: plain text asks for no answer; of such rows only the loss is measured")

    def measure(name: str) -> dict[str, Any]:
        with working(f"{name}: loss"):
            loss = evaluate_loss(model, rows.examples)
        metrics = {"loss": loss, "perplexity": perplexity(loss)}
        if asked and options.match != "none":
            sizes: Any = {name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "keep_dense")}
            answers = _kept(outputs[name], asked, options.match) if name in outputs else []
            left = asked[len(answers) :]
            together = min(options.batch_size, len(left))
            with answering(model, options.keep_dense, together), working(f"{name}: answers"):
                for answer in answer_all(model, tokenizer, template, left, match=options.match, **sizes):
                    answers.append(answer)
                    if name in outputs:
                        row = {"source": answer.source, "expected": answer.expected, "answer": answer.answer}
                        outputs[name].write(json.dumps(row | {options.match: answer.right}, ensure_ascii=False))
            metrics[f"{options.match}_match"] = share_right(answers)
            if name in outputs:
                note(f"answers: {outputs[name].path}")
        return metrics

    found = {}
    for name in measured:
        with adapters_off(model) if name == "base" else nullcontext():
            found[name] = measure(name)
    values = {"model": options.model, "adapter": options.adapter, "rows": len(rows), **found.get("adapter", {})}
    values |= {f"base_{name}" if "adapter" in found else name: value for name, value in found.get("base", {}).items()}
    if any(output.stdout for output in outputs.values()):
        note(_table(found, options.match))
    else:
        result(values, _table(found, options.match), as_json=options.json)
    return 0


def _kept(output: Output, asked: Sequence[Sample], match: str) -> list[Answer]:
    """The answers that stand there already."""
    output.check([{"source": sample.source} for sample in asked])
    try:
        return [Answer("", row["expected"], row["answer"], row["source"], row[match]) for row in output.rows]
    except KeyError:
        output.refuse_rows()


def _table(found: dict[str, dict[str, Any]], match: str) -> str:
    def line(texts: Iterable[str]) -> str:
        return "".join(f"{text:>12}" for text in texts)

    rows = [("", line(found))]
    for name, digits in (("loss", 4), ("perplexity", 2)):
        rows.append((name, line(figure(metrics[name], digits) for metrics in found.values())))
    if all(f"{match}_match" in metrics for metrics in found.values()):
        rows.append((f"{match} match", line(f"{metrics[f'{match}_match']:.1%}" for metrics in found.values())))
    return pairs(rows)
