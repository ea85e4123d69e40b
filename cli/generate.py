"""`fourbit generate`: one answer for every row of a file."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..data.dataset import describe
from ..data.encode import encode_prompt
from ..data.formats import Conversation, conversation
from ..data.read import BadRow, Row, read_rows
from ..data.template import ChatTemplate
from ..errors import InputError
from ..files import write_whole
from ..models.generate import generate
from ..models.protocol import CausalLM
from ..models.tokenizer import Tokenizer
from ..trainer.config import REQUIRED, at_least, setting
from .load import load_adapted
from .options import AdaptedModelOptions, ResultOptions, SamplingOptions
from .parse import Sources
from .show import note, pairs, result

PLACEHOLDER = "?"  # stands for the answer to be written while a row is checked


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions, SamplingOptions, AdaptedModelOptions):
    """Answer every row of a JSONL file. A row is {"prompt": ...} or {"messages": [...]};
    an answer that stands in it already is not shown to the model. Each row is
    written as it was, with the new answer under "answer".

      fourbit generate --model M --adapter DIR --data prompts.jsonl --out answers.jsonl
    """

    title: ClassVar[str] = "rows"
    positional: ClassVar[str] = "data"
    data: tuple[str, ...] = setting(REQUIRED, "JSONL file of prompts; repeat the flag for more", metavar="FILE")
    out: str = setting(REQUIRED, "file for the answers, one JSON object a row", metavar="FILE")
    batch_size: int = setting(32, "answers written at a time")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size")


def run(options: Options, sources: Sources) -> int:
    """Load, answer, write: the whole file or none."""
    rows = _rows(options.data)
    out = Path(options.out)
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise InputError(f"out {out} must be a file in a folder that exists")
    model, tokenizer, template = load_adapted(options)
    if template.notice:
        note(f"note: {template.notice}")

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            for done, (row, answer) in enumerate(_answers(model, tokenizer, template, rows, options), 1):
                file.write(json.dumps({**row.data, "answer": answer}, ensure_ascii=False) + "\n")
                if done % (8 * options.batch_size) == 0 or done == len(rows):
                    note(f"{done:,} of {len(rows):,} rows")

    write_whole(out, write)
    result({"out": str(out), "rows": len(rows)}, pairs([("answers", str(out))]), as_json=options.json)
    return 0


def _rows(paths: Sequence[str]) -> list[tuple[Row, Conversation]]:
    """Every row and the conversation in it. Raises InputError listing the rows that hold none."""
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
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rows: Sequence[tuple[Row, Conversation]],
    options: Options,
) -> Iterator[tuple[Row, str]]:
    """Rows with their answers, in file order; some batches at a time, so that long jobs show progress."""
    for first in range(0, len(rows), 8 * options.batch_size):
        chunk = rows[first : first + 8 * options.batch_size]
        prompts = [encode_prompt(conv, tokenizer, template)[0] for _, conv in chunk]
        sizes = {"seed": options.seed + first, "batch_size": options.batch_size, **options.sampling()}
        new = generate(model, prompts, stop_ids=tokenizer.stop_ids, **sizes)
        yield from ((row, tokenizer.decode(ids)) for (row, _), ids in zip(chunk, new, strict=True))
