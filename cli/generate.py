"""`fourbit generate`: one answer for every row of a file."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..data.encode import describe, encode_prompts
from ..data.forms import Sample, read_samples
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
    samples = _samples(options.data)
    out = Path(options.out)
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise InputError(f"out {out} must be a file in a folder that exists")
    model, tokenizer, template = load_adapted(options)
    if template.notice:
        note(f"note: {template.notice}")

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            for done, (sample, answer) in enumerate(_answers(model, tokenizer, template, samples, options), 1):
                file.write(json.dumps({**sample.row, "answer": answer}, ensure_ascii=False) + "\n")
                if done % (8 * options.batch_size) == 0 or done == len(samples):
                    note(f"{done:,} of {len(samples):,} rows")

    write_whole(out, write)
    result({"out": str(out), "rows": len(samples)}, pairs([("answers", str(out))]), as_json=options.json)
    return 0


def _samples(paths: Sequence[str]) -> list[Sample]:
    """The prompt of every row. Raises InputError listing the rows that hold none."""
    samples, problems = read_samples(paths, "prompts")
    if problems:
        raise InputError(describe(problems, len(samples) + len(problems), skippable=False))
    if any("answer" in sample.row for sample in samples):
        note('note: rows have an "answer" of their own; the new one takes its place')
    for remark, times in sorted(Counter(remark for sample in samples for remark in sample.notes).items()):
        note(f"note: {times} of {len(samples)} rows: {remark}")
    return samples


def _answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    samples: Sequence[Sample],
    options: Options,
) -> Iterator[tuple[Sample, str]]:
    """Rows with their answers, in file order; some batches at a time, so that long jobs show progress."""
    for first in range(0, len(samples), 8 * options.batch_size):
        chunk = samples[first : first + 8 * options.batch_size]
        prompts = [ids for ids, _ in encode_prompts(chunk, tokenizer, template)]
        sizes = {"seed": options.seed + first, "batch_size": options.batch_size, **options.sampling()}
        new = generate(model, prompts, stop_ids=tokenizer.stop_ids, **sizes)
        yield from ((sample, tokenizer.decode(ids)) for sample, ids in zip(chunk, new, strict=True))
