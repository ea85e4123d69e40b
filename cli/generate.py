"""`fourbit generate`: one answer for every row of a file."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

from ..data.encode import prompt_texts
from ..data.forms import samples_of
from ..data.row import counted
from ..data.said import spelled, words_of
from ..data.sample import Sample
from ..data.turns import Talk
from ..errors import InputError
from ..models.generate import prompt_seeds, sample_each
from ..settings import REQUIRED, setting
from ..trainer.evaluate import check_room
from ..trainer.rewards import Answered, Rewards, answered
from .load import answering, load_adapted, remark_positions, rewards_for
from .options import AnsweringOptions, FileOptions, RewardOptions, SamplingOptions, output_of
from .parse import Sources
from .show import note, pairs, result


@dataclass(frozen=True, kw_only=True)
class Options(FileOptions, RewardOptions, SamplingOptions, AnsweringOptions):
    """Answer every row of a JSONL file. A row is {"prompt": ...} or {"messages": [...]};
    an answer that stands in it already is not shown to the model. Each row is
    written as it was, with the new answer under "answer".

      fourbit generate --model M --adapter DIR --data prompts.jsonl --out answers.jsonl
      fourbit generate --model M --data prompts.jsonl --n 8 --temperature 1 --reward number --keep best --out sft.jsonl

    With --n each prompt is answered several times. --keep best writes the answer of
    the highest reward as a row that fourbit sft reads, --keep pairs the best and the
    worst as one that fourbit dpo reads, of prompts whose answers differ in reward.
    """

    title: ClassVar[str] = "rows"
    positional: ClassVar[str] = "data"
    data: tuple[str, ...] = setting(REQUIRED, "JSONL file of prompts; repeat the flag for more", metavar="FILE")
    out: str = setting(REQUIRED, "file for the answers, one JSON object a row; - is standard output", metavar="FILE")
    batch_size: int = setting(32, "answers written at a time", least=1)
    n: int = setting(1, "answers to each prompt", least=1)
    keep: Literal["all", "best", "pairs"] = setting("all", "which of them are written: see above; needs rewards")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n > 1 and not self.temperature:
            raise InputError("n answers to a prompt are drawn, and temperature 0 gives equal ones: give a temperature")
        if self.keep != "all" and (self.n < 2 or not self.reward):
            raise InputError(f"keep {self.keep} compares answers by their rewards: give n of 2 or more, and a reward")
        if self.resume and self.n > 1:
            raise InputError("resume goes on after rows with one answer each: with n, write to another file")


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
        asked = prompt_texts(samples, tokenizer, template)
        prompts = [tokenizer.encode(text) for text in asked]
        check_room(model, samples, prompts)
        remark_positions(model, max(map(len, prompts)), options.max_new_tokens)
        how: dict[str, Any] = {"stop_ids": tokenizer.stop_ids, "max_length": model.max_positions, **options.sampling()}
        rewards = rewards_for(options, model)
        done, prompts = len(out.rows), [prompt for prompt in prompts for _ in range(options.n)]
        how |= {"seed": prompt_seeds(prompts, options.seed)[done:], "batch_size": options.batch_size}
        new = sample_each(model, prompts[done:], keep_dense=options.keep_dense, **how)
        # Merged weights are held over all answers, but where rewards are asked between them, perhaps of an adapter.
        rows, unfit = min(options.batch_size, len(prompts) - done), 0
        with nullcontext() if options.reward else answering(model, options.keep_dense, rows):
            for number, sample in enumerate(samples[done:], done + 1):
                what = sample.row, asked[number - 1], prompts[(number - 1) * options.n]
                made = [*islice(new, options.n)]
                answers = [answered(tokenizer, *what, each) for each in made]
                if options.keep != "all":
                    both, special = zip(answers, made, strict=True), tokenizer.special_tokens
                    answers = [one for one, each in both if each.ended and _trains(one.answer, special)]
                    unfit += len(made) - len(answers)
                for row in written(sample, answers, rewards, options.keep):
                    out.write(json.dumps(row, ensure_ascii=False))
                if number == len(samples) or (number - done) % (8 * options.batch_size) == 0:
                    note(f"{number:,} of {len(samples):,} rows")
    if unfit:
        why = "cut off at max_new_tokens, empty, or they spell a special token; none of these may be a training row's"
        note(f"note: {unfit:,} answers are left out: {why}")
    for failure, times in rewards.failures.items():
        note(f"note: {times:,} times {failure}; these answers have no reward from it")
    if out.stdout:
        note(f"answers: {len(samples):,} rows")
    else:
        result({"out": options.out, "rows": len(samples)}, pairs([("answers", options.out)]), as_json=options.json)
    return 0


def _trains(answer: str, special: Sequence[str]) -> bool:
    """Whether a training row may hold this answer."""
    talk = Talk([{"role": "assistant", "content": answer}])
    return bool(answer.strip()) and "\0" not in answer and spelled(talk, special) is None


def written(sample: Sample, answers: Sequence[Answered], rewards: Rewards, keep: str) -> list[dict[str, Any]]:
    """The rows that answers to one prompt become."""
    if not rewards.given:
        return [{**sample.row, "answer": one.answer} for one in answers]
    earned = [one["reward"] for one in rewards(answers)]
    if keep == "all":
        known = [reward if reward == reward else None for reward in earned]  # JSON has no NaN
        return [{**sample.row, "answer": a.answer, "reward": r} for a, r in zip(answers, known, strict=True)]
    order = sorted((r, -i) for i, r in enumerate(earned) if r == r)  # the first of equal ones; none that failed
    if not order or (keep == "pairs" and order[0][0] == order[-1][0]):
        return []
    said = [[{"role": "assistant", "content": answers[-i].answer}] for _, i in (order[-1], order[0])]
    if keep == "pairs" and said[0] == said[1]:  # of a reward that is not of the answer alone
        return []
    more = {key: sample.row[key] for key in ("tools", "chat_template_kwargs") if sample.row.get(key) is not None}
    if keep == "best":
        return [{"messages": sample.context + said[0], **more, "reward": order[-1][0]}]
    return [{"prompt": sample.context, "chosen": said[0], "rejected": said[1], **more}]
