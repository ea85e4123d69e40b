"""`fourbit data`: training data as the model will see it: what is trained, how long rows are, what is wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .load import check_model
from .options import ResultOptions, RowOptions, TokenizerOptions, at_least, option
from .parse import parse
from .show import bars, count, describe, note, result, visible

if TYPE_CHECKING:
    from rich.text import Text

    from ..data.dataset import Dataset
    from ..data.encode import Encoded

ABOUT = """\
Show rows as the model will see them: trained tokens, context and special tokens
in colour (or {+trained+} and [-cut off-] without), the lengths of all rows, the
share that is trained, and every problem. Exit code 2 if `fourbit sft` would
refuse the data.

  fourbit data train.jsonl --model M"""
STYLES = {
    "trained": "bold green",
    "trained special": "bold magenta",
    "special": "magenta",
    "context": "",
    "cut": "red strike",
}
MARKS = {"trained": ("{+", "+}"), "trained special": ("{+", "+}"), "cut": ("[-", "-]")}


@dataclass(frozen=True, kw_only=True)
class DataOptions(ResultOptions, RowOptions, TokenizerOptions):
    title: ClassVar[str] = "preview"
    rows: int = option("rows to show in full", 3)
    problems: int = option("problems to show", 20)

    def __post_init__(self) -> None:
        at_least(self, 0, "rows", "problems")
        at_least(self, 2, "max_length")


def run(args: Sequence[str]) -> int:
    """Parse, read, print. Returns 2 when rows are bad and are not to be skipped."""
    from ..data.dataset import load_dataset
    from ..data.template import template_for
    from ..models.load import load_tokenizer

    options = parse(DataOptions, args, command="data", about=ABOUT, positional="data").options
    check_model(options.model)
    tokenizer = load_tokenizer(options.model)
    rows = load_dataset(
        options.data,
        tokenizer,
        template=template_for(tokenizer, options.template),
        max_length=options.max_length,
        loss_on=options.loss_on,
        on_bad_row="skip",
    )
    if not options.json:
        for example in rows.examples[: options.rows]:
            show_example(example, tokenizer)
        print(f"tokens in a row\n{bars([len(example.ids) for example in rows.examples])}\n")
    describe(", ".join(options.data), rows)
    for problem in rows.report.problems[: options.problems]:
        note(str(problem))
    refused = len(rows.report.problems)
    if refused > options.problems:
        note(f"... and {refused - options.problems} more")
    if refused:
        note(f"{count(refused, 'bad row')}: mend them, or leave them out with --on-bad-row skip")
    if options.json:
        result(_figures(rows), "", as_json=True)
    return 2 if refused and options.on_bad_row == "error" else 0


def _figures(rows: "Dataset") -> dict[str, Any]:
    report = rows.report
    return {
        "rows": report.rows,
        "tokens": report.tokens,
        "trained": report.trained,
        "trained_share": report.trained / report.tokens,
        "longest": report.longest,
        "truncated": report.truncated,
        "duplicates": report.duplicates,
        "skipped": report.skipped,
        "notices": report.notices,
        "problems": [str(problem) for problem in report.problems],
    }


def show_example(example: "Encoded", tokenizer: Any) -> None:
    """Print one row, with colours where the terminal has them, else with marks."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    trained = sum(example.trained)
    head = f"{visible(example.source)}  {count(len(example.ids), 'token')}, {trained} trained"
    if console.is_terminal and not console.no_color:
        console.print(head, style="bold cyan", markup=False)
        console.print(coloured(example, tokenizer))
    else:
        print(f"{head}\n{marked(example, tokenizer)}", flush=True)


def pieces(example: "Encoded", tokenizer: Any) -> Iterator[tuple[str, str]]:
    """(kind, text) of every token: trained, context, special, trained special, or cut (beyond max_length)."""
    ids, offsets = tokenizer.encode_with_offsets(example.text)
    special = {token for token, added in tokenizer.backend.get_added_tokens_decoder().items() if added.special}
    shown = 0  # characters; several tokens may share one
    for k, (token, (_, end)) in enumerate(zip(ids, offsets, strict=True)):
        text, shown = example.text[shown:end], max(shown, end)
        yield _kind(example, k, token in special), text
    for k in range(len(ids), len(example.ids)):  # an end-of-text token that the template lacks
        yield _kind(example, k, True), tokenizer.decode([example.ids[k]], skip_special=False)


def _kind(example: "Encoded", k: int, special: bool) -> str:
    if k >= len(example.ids):
        return "cut"
    if example.trained[k]:
        return "trained special" if special else "trained"
    return "special" if special else "context"


def coloured(example: "Encoded", tokenizer: Any) -> "Text":
    """The row with a colour a kind; a line's end is shown too, because it may be trained."""
    from rich.text import Text

    text = Text()
    for kind, piece in pieces(example, tokenizer):
        text.append(visible(piece).replace("\n", "↵\n"), style=STYLES[kind])
    return text


def marked(example: "Encoded", tokenizer: Any) -> str:
    """The row in plain text, runs of trained tokens as {+...+} and tokens cut off as [-...-]."""
    parts: list[str] = []
    closing = ""
    for kind, piece in pieces(example, tokenizer):
        opening, end = MARKS.get(kind, ("", ""))
        if end != closing:
            parts += [closing, opening]
            closing = end
        parts.append(visible(piece))
    return "".join([*parts, closing])
