"""`fourbit generate`: one answer for every row of a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError
from .eval import chosen_template
from .load import load_adapted
from .options import AdaptedModelOptions, ResultOptions, SamplingOptions, at_least, option
from .parse import parse
from .show import note, pairs, result

if TYPE_CHECKING:
    from ..data.formats import Conversation
    from ..data.read import Row

ABOUT = """\
Answer every row of a JSONL file. A row is {"prompt": ...} or {"messages": [...]};
an answer that stands in it already is not shown to the model. Each row is
written as it was, with the new answer under "answer".

  fourbit generate --model M --adapter DIR --data prompts.jsonl --out answers.jsonl"""
PLACEHOLDER = "?"  # stands for the answer to be written while a row is checked


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ResultOptions, SamplingOptions, AdaptedModelOptions):
    title: ClassVar[str] = "rows"
    data: tuple[str, ...] = option("JSONL file of prompts; repeat the flag for more", metavar="FILE")
    out: str = option("file for the answers, one JSON object a row", metavar="FILE")
    template: str | None = option("chat template: a built-in's name or a .jinja file", None)
    batch_size: int = option("answers written at a time", 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size")


def run(args: Sequence[str]) -> int:
    """Parse, load, answer, write."""
    options = parse(GenerateOptions, args, command="generate", about=ABOUT, positional="data").options
    rows = _rows(options.data)
    out = Path(options.out)
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise InputError(f"out {out} must be a file in a folder that exists")
    model, tokenizer = load_adapted(options)
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for done, (row, answer) in enumerate(_answers(model, tokenizer, rows, options), 1):
                file.write(json.dumps({**row.data, "answer": answer}, ensure_ascii=False) + "\n")
                if done % (8 * options.batch_size) == 0 or done == len(rows):
                    note(f"{done:,} of {len(rows):,} rows")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    result({"out": str(out), "rows": len(rows)}, pairs([("answers", str(out))]), as_json=options.json)
    return 0


def _rows(paths: Sequence[str]) -> "list[tuple[Row, Conversation]]":
    """Every row and the conversation in it. Raises InputError listing the rows that hold none."""
    from ..data.dataset import describe
    from ..data.formats import conversation
    from ..data.read import BadRow, read_rows

    good, problems, total = [], [], 0
    for path in paths:
        rows, unread = read_rows(path)
        problems += unread
        total += len(rows) + len(unread)
        for row in rows:
            try:
                good.append((row, conversation(replace(row, data=_with_answer(row.data)))))
            except BadRow as bad:
                problems.append(bad.problem)
    if problems:
        raise InputError(describe(problems, total).replace(", or leave them out with on_bad_row skip", ""))
    if any("answer" in row.data for row, _ in good):
        note('note: rows have an "answer" of their own; the new one takes its place')
    return good


def _with_answer(data: dict[str, Any]) -> dict[str, Any]:
    """The row as training data has it, ending in an assistant turn."""
    turn = {"role": "assistant", "content": PLACEHOLDER}
    messages, prompt = data.get("messages"), data.get("prompt")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        answered = messages[-1].get("role") == "assistant"
        return {**data, "messages": [*(messages[:-1] if answered else messages), turn]}
    if "prompt" in data and "messages" not in data:
        return {"prompt": prompt, "completion": [turn] if isinstance(prompt, list) else PLACEHOLDER}
    return data


def _answers(
    model: Any, tokenizer: Any, rows: "Sequence[tuple[Row, Conversation]]", options: GenerateOptions
) -> "Iterator[tuple[Row, str]]":
    """Rows with their answers, in file order; some batches at a time, so that long jobs show progress."""
    from ..data.encode import encode_prompt
    from ..data.template import template_for
    from ..models.generate import generate

    template = template_for(tokenizer, chosen_template(options))
    if template.notice:
        note(f"note: {template.notice}")
    for first in range(0, len(rows), 8 * options.batch_size):
        chunk = rows[first : first + 8 * options.batch_size]
        new = generate(
            model,
            [encode_prompt(conv, tokenizer, template)[0] for _, conv in chunk],
            max_new_tokens=options.max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed + first,
            batch_size=options.batch_size,
        )
        yield from ((row, tokenizer.decode(ids)) for (row, _), ids in zip(chunk, new, strict=True))
