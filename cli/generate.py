"""`fourbit generate`: one answer for every row of a file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..data.encode import describe, encode_prompts
from ..data.forms import Sample, read_samples
from ..data.row import counted
from ..errors import InputError
from ..files import write_whole
from ..models.generate import generate, prompt_seeds
from ..settings import REQUIRED, setting
from .load import check_file, load_adapted
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
    batch_size: int = setting(32, "answers written at a time", least=1)


def run(options: Options, sources: Sources) -> int:
    """Load, answer, write: the whole file or none."""
    samples = _samples(options.data)
    out, chunk = Path(options.out), 8 * options.batch_size  # some batches at a time, so that long jobs show progress
    check_file(options.out, "out")
    model, tokenizer, template = load_adapted(options)
    if template.notice:
        note(f"note: {template.notice}")
    prompts = encode_prompts(samples, tokenizer, template)
    seeds = prompt_seeds(prompts, options.seed)
    how = {"stop_ids": tokenizer.stop_ids, "batch_size": options.batch_size, **options.sampling()}

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            for first in range(0, len(samples), chunk):
                new = generate(model, prompts[first : first + chunk], seed=seeds[first : first + chunk], **how)
                for sample, ids in zip(samples[first : first + chunk], new, strict=True):
                    row = {**sample.row, "answer": tokenizer.decode(ids)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                note(f"{min(first + chunk, len(samples)):,} of {len(samples):,} rows")

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
    for notice in counted(Counter(remark for sample in samples for remark in sample.notes), len(samples)):
        note(f"note: {notice}")
    return samples
