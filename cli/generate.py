"""`fourbit generate`: one answer for every row of a file."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from ..data.encode import prompt_texts
from ..data.forms import samples_of
from ..data.row import counted
from ..data.said import words_of
from ..models.generate import generate_each, prompt_seeds
from ..settings import REQUIRED, setting
from ..trainer.evaluate import check_room
from .load import answering, load_adapted, remark_positions
from .options import AnsweringOptions, FileOptions, SamplingOptions, output_of
from .parse import Sources
from .show import note, pairs, result


@dataclass(frozen=True, kw_only=True)
class Options(FileOptions, SamplingOptions, AnsweringOptions):
    """Answer every row of a JSONL file. A row is {"prompt": ...} or {"messages": [...]};
    an answer that stands in it already is not shown to the model. Each row is
    written as it was, with the new answer under "answer".

      fourbit generate --model M --adapter DIR --data prompts.jsonl --out answers.jsonl
    """

    title: ClassVar[str] = "rows"
    positional: ClassVar[str] = "data"
    data: tuple[str, ...] = setting(REQUIRED, "JSONL file of prompts; repeat the flag for more", metavar="FILE")
    out: str = setting(REQUIRED, "file for the answers, one JSON object a row; - is standard output", metavar="FILE")
    batch_size: int = setting(32, "answers written at a time", least=1)


def run(options: Options, sources: Sources) -> int:
    """Load, answer, write each row as it is answered."""
    samples = samples_of(options.data, "prompts")
    if any("answer" in sample.row for sample in samples):
        note('note: rows have an "answer" of their own; the new one takes its place')
    with output_of(options, sources, "out", options.out) as out:
        out.check([{key: value for key, value in sample.row.items() if key != "answer"} for sample in samples])
        model, tokenizer, template = load_adapted(options)
        if template.notice:
            note(f"note: {template.notice}")
        words = words_of(template.source)
        for notice in counted(Counter(remark for sample in samples for remark in sample.remarks(words)), len(samples)):
            note(f"note: {notice}")
        prompts = [tokenizer.encode(text) for text in prompt_texts(samples, tokenizer, template)]
        check_room(model, samples, prompts)
        remark_positions(model, max(map(len, prompts)), options.max_new_tokens)
        how: dict[str, Any] = {"stop_ids": tokenizer.stop_ids, "max_length": model.max_positions, **options.sampling()}
        done, seeds = len(out.rows), prompt_seeds(prompts, options.seed)
        new = generate_each(model, prompts[done:], seed=seeds[done:], batch_size=options.batch_size, **how)
        with answering(model, options.keep_dense):
            for number, (sample, ids) in enumerate(zip(samples[done:], new, strict=True), done + 1):
                row = {**sample.row, "answer": tokenizer.decode(ids, skip_special=False)}
                out.write(json.dumps(row, ensure_ascii=False))
                if number == len(samples) or (number - done) % (8 * options.batch_size) == 0:
                    note(f"{number:,} of {len(samples):,} rows")
    if out.stdout:
        note(f"answers: {len(samples):,} rows")
    else:
        result({"out": options.out, "rows": len(samples)}, pairs([("answers", options.out)]), as_json=options.json)
    return 0
