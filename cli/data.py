"""`fourbit data`: training data as the model will see it: what is trained, how long rows are, what is wrong."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from ..data.batch import Encoded
from ..data.encode import load_rows
from ..data.forms import kind_of
from ..errors import visible
from ..settings import setting
from ..text.tokenizer import Tokenizer
from .load import open_tokenizer
from .options import ResultOptions, RowOptions, TokenizerOptions
from .parse import Sources
from .show import bars, count, describe, note, result

KINDS = {  # of tokens: their colour, and the marks around them without one
    "trained": ("bold green", "{++}"),
    "trained special": ("bold magenta", "{++}"),
    "context special": ("magenta", ""),
    "context": ("", ""),
    "cut": ("red strike", "[--]"),
}
REPORTED = ["rows", "tokens", "trained", "longest", "truncated", "duplicates", "notices"]


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions, RowOptions, TokenizerOptions):
    """Show rows as the model will see them: trained tokens, context and special tokens
    in colour (or {+trained+} and [-cut off-] without), the lengths of all rows, the
    share that is trained, and every problem; of preferences every answer. Exit code 2
    if training would refuse the data.

      fourbit data train.jsonl --model M
    """

    title: ClassVar[str] = "preview"
    rows: int = setting(3, "rows to show in full", least=0)
    problems: int = setting(20, "problems to show", least=0)


def run(options: Options, sources: Sources) -> int:
    """Read, print. Returns 2 when rows are bad and are not to be skipped."""
    tokenizer = open_tokenizer(options.model)
    rows = load_rows(options, tokenizer, options.data, kind_of(options.data), on_bad_row="skip")
    report = rows.report
    if not options.json:
        for example in rows.examples[: options.rows]:
            for part in example.parts:
                show_example(part, tokenizer)
        print(f"tokens in a row\n{bars([len(part.ids) for example in rows.examples for part in example.parts])}\n")
    describe(", ".join(options.data), rows)
    for line in report.skipped.lines(options.problems):
        note(line)
    if report.skipped:
        way = "left out" if options.on_bad_row == "skip" else "mend them, or leave them out with --on-bad-row skip"
        note(f"{count(report.skipped.total, 'bad row')}: {way}")
    if options.json:
        metrics = {name: getattr(report, name) for name in REPORTED} | {
            "skipped": report.skipped.kinds,
            "dropped": report.dropped.kinds,
            "problems": list(map(str, report.skipped)),
        }
        result(metrics | {"trained_share": report.trained / report.tokens}, "", as_json=True)
    return 2 if report.skipped and options.on_bad_row == "error" else 0


def show_example(example: Encoded, tokenizer: Tokenizer) -> None:
    """Print one row, with colours where the terminal has them, else with marks."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    head = f"{visible(example.source)}  {count(len(example.ids), 'token')}, {sum(example.trained)} trained"
    if console.is_terminal and not console.no_color:
        console.print(head, style="bold cyan", markup=False)
        shown = ((visible(text).replace("\n", "↵\n"), KINDS[kind][0]) for kind, text in pieces(example, tokenizer))
        console.print(Text.assemble(*shown))  # a line's end is shown too, because it may be trained
    else:
        print(f"{head}\n{marked(example, tokenizer)}", flush=True)


def pieces(example: Encoded, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(kind, text) of every token; one that is beyond max_length is cut."""

    def kind(k: int, special: bool) -> str:
        if k >= len(example.ids):
            return "cut"
        return ("trained" if example.trained[k] else "context") + " special" * special

    ids, offsets = tokenizer.encode_with_offsets(example.text)
    special = {token for token, added in tokenizer.backend.get_added_tokens_decoder().items() if added.special}
    shown = 0  # characters; several tokens may share one
    for k, (token, (_, end)) in enumerate(zip(ids, offsets, strict=True)):
        text, shown = example.text[shown:end], max(shown, end)
        yield kind(k, token in special), text
    for k in range(len(ids), len(example.ids)):  # an end-of-text token that the template lacks, or ready tokens
        yield kind(k, example.ids[k] in special), tokenizer.decode([example.ids[k]], skip_special=False)


def marked(example: Encoded, tokenizer: Tokenizer) -> str:
    """The row in plain text, runs of trained tokens as {+...+} and tokens cut off as [-...-]."""
    parts = []
    for mark, run in groupby(pieces(example, tokenizer), key=lambda piece: KINDS[piece[0]][1]):
        parts += [mark[:2], *(visible(text) for _, text in run), mark[2:]]
    return "".join(parts)
