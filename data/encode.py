"""Files to examples: rows in tokens, and which of these are trained (the loss mask), with a report of what was found.

The mask comes from rendered prefixes, by character position and never by token id: what a template adds between "the
assistant speaks now" and the end of its turn is the answer (see `template`). So the end-of-turn token is trained even
where the padding token has the same id, and templates need no `{% generation %}` marks. The text is tokenised once, as
a whole, so that training sees the tokens that inference sees; a prompt is never tokenised by itself.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, compress, islice
from typing import Any, Literal

from ..errors import InputError, shown
from ..settings import checked
from ..text.tokenizer_folder import as_tokenizer
from .batch import Encoded, Example
from .forms import read_samples, samples_of
from .messages import trains
from .protocol import AnyTokenizer, TokenizerLike
from .read import Rows
from .row import BadRow, Problems, bad, counted
from .said import spelled, unsaid, words_of
from .sample import Kind, Sample
from .template import ChatTemplate, TemplateChoice, Unusable, expects_bos, template_for
from .truncate import Dropped, Truncation, fit
from .turns import LEFT_OUT, NO_END, Rendered, Talk, Tokens, Turn, Unrenderable, mask

LossOn = Literal["assistant", "all", "last"]
OnBadRow = Literal["error", "skip"]

SPECIAL = "a special token, which steers a model and is never read: spell it another way; a `text` row may hold it"
LOST = "stands nowhere in what the template writes for it: the template cannot say it; name one that can (template=...)"
SPECIAL_IN_TEXT = "is plain text that holds special tokens: they are encoded as such"
WHOLE = "is plain text, which has no last answer: all of it is trained"
LABELLED = "has labels, which say what of it is trained, whatever loss_on says"


@dataclass
class Report:
    """What loading found: counts, the rows left out by kind, and notices for the user."""

    rows: int = 0  # rows that became examples
    truncated: int = 0  # token sequences that lost their tail
    tokens: int = 0
    shared: int = 0  # of these, tokens that stand a second time only because two answers begin alike
    trained: int = 0
    longest: int = 0  # tokens of the longest sequence
    duplicates: int = 0
    notices: list[str] = field(default_factory=list)
    skipped: Problems = field(default_factory=Problems)  # bad rows
    dropped: Problems = field(default_factory=Problems)  # good rows left out as asked


@dataclass
class Dataset:
    """Examples of one kind and the samples they came from, in file order."""

    kind: Kind
    examples: list[Example] = field(default_factory=list, repr=False)
    samples: list[Sample] = field(default_factory=list, repr=False)
    report: Report = field(default_factory=Report)
    template: ChatTemplate | None = None  # that rendered them

    def __len__(self) -> int:
        return len(self.examples)


def load(
    rows: Rows,
    tokenizer: AnyTokenizer,
    kind: Kind = "sft",
    *,
    template: TemplateChoice = None,
    max_length: int | None = 1024,
    loss_on: LossOn = "assistant",
    truncation: Truncation = "drop",
    on_bad_row: OnBadRow = "error",
    name: str = "rows",
) -> Dataset:
    """Read, check and encode one or several files of one kind of rows (their forms: `forms.FORMS`), or objects, which
    errors call `name` (see `read.read_rows`).

    kind: "sft" rows to learn from, "pairs" and "judged" answers, or "prompts", of which nothing is trained.
    max_length: tokens, prompt and answer together; None for no limit. What happens to longer ones, and what truncation
    says, is told by `truncate.fit`; loss_on by `encode`.
    Bad rows raise InputError, the first 20 one a line, or with `on_bad_row="skip"` are left out and counted. Raises
    InputError when no row is left, and for a template that is broken for every row."""
    checked("kind", kind, Kind)
    checked("on_bad_row", on_bad_row, OnBadRow)
    checked("truncation", truncation, Truncation)
    checked("max_length", max_length, int | None, {"least": 2})
    if kind != "sft" and loss_on != "assistant":
        raise InputError(f"loss_on {loss_on} is for rows to learn from (sft); of {kind} rows the answers are trained.")
    tokenizer = as_tokenizer(tokenizer)
    given = template_for(tokenizer, template)
    chat_template = given.dated()
    samples, problems = read_samples(rows, kind, name)
    dataset = Dataset(kind, template=chat_template)
    report, notes, words = dataset.report, Counter[str](), words_of(chat_template.source)
    for sample, parts in encode(samples, tokenizer, chat_template, loss_on=loss_on, refuse=problems.add):
        try:
            example, cut = _example(sample, parts, max_length, truncation, tokenizer.stop_ids)
        except Dropped as dropped:
            report.dropped.add(dropped)
        except BadRow as error:
            problems.add(error)
        else:
            dataset.examples.append(example)
            dataset.samples.append(sample)
            report.truncated += cut
            written = "".join(part.text for part in example.parts) if sample.passed else ""
            notes.update(sample.remarks(words, written).union(*(part.notes for part in example.parts)))
    _settle(problems, on_bad_row, dataset)
    measure(dataset)
    report.notices = _notices(dataset, given, notes)
    return dataset


def load_rows(options: object, tokenizer: AnyTokenizer, rows: Rows | Dataset, kind: Kind, **more: Any) -> Dataset:
    """`load` as a training's or a command's options say; a dataset as it is, or InputError for one of another kind."""
    if isinstance(rows, Dataset):
        if rows.kind != kind:
            raise InputError(f"this training reads rows loaded as {kind!r}, got {rows.kind!r}")
        return rows
    names = ("template", "max_length", "loss_on", "truncation", "on_bad_row")
    return load(rows, tokenizer, kind, **{n: getattr(options, n) for n in names if hasattr(options, n)} | more)


def _example(
    sample: Sample, whole: tuple[Encoded, ...], max_length: int | None, truncation: Truncation, stops: Sequence[int]
) -> tuple[Example, int]:
    """A sample's example and how many of its sequences were cut. Raises BadRow, and Dropped where it is left out."""
    if len(whole) > 1 and whole[0].ids == whole[1].ids:
        reason = "become the same tokens (the template leaves out what sets them apart)"
        raise bad(sample, "chosen, rejected", reason, "identical")
    parts = whole
    if max_length is not None and any(len(part.ids) > max_length for part in whole):
        parts = fit(sample, whole, max_length, truncation, stops)
    cut = sum(part is not before for part, before in zip(parts, whole, strict=True))
    return Example(parts, sample.label), cut


def _settle(problems: Problems, on_bad_row: OnBadRow, dataset: Dataset) -> None:
    """Raise for bad rows, or count them."""
    dropped = dataset.report.dropped
    rows = len(dataset.examples) + problems.total + dropped.total
    if problems and (on_bad_row == "error" or not (dataset.examples or dropped)):
        way = "mend them" + ", or leave them out with on_bad_row skip" * bool(dataset.examples)  # else none is left
        raise InputError(problems.describe(str(rows), way))
    if not dataset.examples:
        raise InputError(f"no row is left of {rows}; {dropped.total} were left out, the first: {dropped[0]}")
    dataset.report.skipped = problems


def _notices(dataset: Dataset, template: ChatTemplate, notes: Counter[str]) -> list[str]:
    rows, samples = dataset.report.rows, dataset.samples
    notices = []
    if any(sample.text is None for sample in samples):
        notices += [template.notice] if template.notice else []
        if template.undated:
            notices.append("the chat template writes today's date into every example: another day gives other tokens")
    if dataset.report.duplicates:
        notices.append(f"{dataset.report.duplicates} of {rows} rows repeat an earlier row")
    if dataset.kind == "judged" and len({sample.label for sample in samples}) == 1:
        kind = "good" if samples[0].label else "bad"
        notices.append(f"all {rows} answers are judged {kind}: there is nothing to compare with")
    return notices + counted(notes, rows)


def measure(dataset: Dataset) -> None:
    """Fill in the counts that follow from the examples alone."""
    report, parts = dataset.report, [part for example in dataset.examples for part in example.parts]
    report.rows = len(dataset.examples)
    report.tokens = sum(len(part.ids) for part in parts)
    report.shared = report.tokens - sum(example.size(packing=True) for example in dataset.examples)
    report.trained = sum(sum(part.trained) for part in parts)
    report.longest = max((len(part.ids) for part in parts), default=0)
    report.duplicates = report.rows - len({digest(sample.content()) for sample in dataset.samples})


def digest(content: list[Any]) -> bytes:
    """SHA-256 of JSON values: equal for equal ones, whatever the order of keys."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


# The mask.


def encode(
    samples: Sequence[Sample],
    tokenizer: TokenizerLike,
    template: ChatTemplate,
    *,
    loss_on: LossOn = "assistant",
    refuse: Callable[[BadRow], object] | None = None,
) -> Iterator[tuple[Sample, tuple[Encoded, ...]]]:
    """Samples with their tokens and loss masks, one conversation an answer. Raises BadRow for a bad row, or calls
    `refuse` with it and goes on.

    `loss_on`: "assistant" trains every assistant turn whose weight is not 0, "last" only the one that ends the
    conversation, "all" every token but the first, whatever the weights of a row (which holds an answer to learn). Plain
    text has no turns and is trained whole. A sample without an answer becomes its prompt, of which nothing is trained.
    Where the template changes earlier answers once another turn follows, these are not trained, with a note. A row is
    bad when the template refuses it, leaves out something that it says (see `said`) or is not prefix-stable on its last
    answer, when a message spells a special token, when the tokenizer refuses the text, when it begins with two BOS
    tokens, and when nothing would be trained.
    """
    checked("loss_on", loss_on, LossOn)
    groups = [_talks(sample, loss_on) for sample in samples]
    rendered = template.render_all(chain.from_iterable(groups))
    for sample, group in zip(samples, groups, strict=True):
        try:
            texts = [*islice(rendered, len(group))]
        except InputError as error:
            if not isinstance(error, Unusable):
                error.add_note(f"it was to write {sample.place}")
            raise
        try:
            with _problem_of(sample):
                parts = [_plain(sample, sample.text, tokenizer, loss_on)] if sample.text is not None else []
            for name, talk, text in zip(sample.names, group, texts, strict=False):
                with _problem_of(sample, name):
                    parts.append(_encode(talk, text, tokenizer, loss_on, sample.source))
        except BadRow as error:
            if refuse is None:
                raise
            refuse(error)
        else:
            yield sample, tuple(parts)


def encode_chat(
    messages: Sequence[Mapping[str, object]],
    tokenizer: AnyTokenizer,
    *,
    template: TemplateChoice = None,
    tools: Sequence[Mapping[str, object]] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation that ends with an answer, and of each whether the loss counts it, as in training.
    Raises InputError where training would."""
    samples, tokenizer = samples_of([{"messages": messages, "tools": tools}], "sft"), as_tokenizer(tokenizer)
    ((_, (made,)),) = encode(samples, tokenizer, template_for(tokenizer, template))
    return made.ids, made.trained


def encode_questions(
    samples: Sequence[Sample], tokenizer: TokenizerLike, template: ChatTemplate
) -> tuple[list[list[int]], list[str]]:
    """Of samples that end with an answer the tokens a model is given so that it answers, and the answer as the template
    writes it, calls and special tokens included, up to the token that ends it. Raises BadRow as `encode` gives it."""
    prompts, answers = prompt_texts(samples, tokenizer, template), list[str]()
    weighed = []
    for sample in samples:  # its last turn is one to learn: what is asked for is not always trained
        *before, last_turn = sample.answers[0]
        learnt = {key: value for key, value in last_turn.items() if key != "weight"}
        weighed.append(replace(sample, answers=([*before, learnt],)))
    for prompt, (_, (answer,)) in zip(prompts, encode(weighed, tokenizer, template, loss_on="last"), strict=True):
        text, trained = answer.text, answer.trained
        ids, offsets = tokenizer.encode_with_offsets(text)
        learned = list(compress(range(len(ids)), trained))
        first, last = (learned[0], learned[-1]) if learned else (-1, -1)  # -1: only the end of the text is trained
        ends = last >= 0 and ids[last] in tokenizer.stop_ids
        begin = min(len(prompt), offsets[first][0])  # the earlier one where the text lacks what ends the prompt
        answers.append(text[begin : offsets[last][0 if ends else 1]])
    return [tokenizer.encode(prompt) for prompt in prompts], answers


def prompt_texts(samples: Sequence[Sample], tokenizer: TokenizerLike, template: ChatTemplate) -> list[str]:
    """The text of each sample up to where its last answer begins, or the next one would. Raises BadRow for the first
    one that the template refuses, or that holds no messages."""
    talks, texts = list[Talk](), list[str]()
    for sample in samples:
        if sample.text is not None:
            raise bad(sample, "text", "has no messages, so it asks for no answer", "form")
        messages = sample.context + (sample.answers[0] if sample.answers else [])
        messages = messages[: len(messages) - (messages[-1]["role"] == "assistant")]
        talks.append(Talk(messages, sample.tools, prompt=True, variables=sample.variables))
    for sample, talk, rendered in zip(samples, talks, template.render_all(talks), strict=True):
        with _problem_of(sample):
            texts.append(_said(talk, rendered, tokenizer, "last")[0])
    return texts


@contextmanager
def _problem_of(sample: Sample, name: str = "") -> Iterator[None]:
    """What is wrong with a conversation as the problem of its row; `name`: of the answer, where there are several."""
    try:
        yield
    except Unrenderable as error:
        raise bad(sample, f"{name}: {error.field}" if name else error.field, str(error), error.kind) from None


def _talks(sample: Sample, loss_on: LossOn) -> list[Talk]:
    """The conversations of a sample to be rendered, and the turns whose place is needed: for "all" that which ends."""
    talks = []
    for answer in () if sample.text is not None else sample.answers or ([],):
        messages = sample.context + answer
        turns, last = [i for i, message in enumerate(messages) if trains(message)], len(messages) - 1
        if loss_on != "assistant" and answer:
            turns = [last] if loss_on == "all" or last in turns else []
        talks.append(Talk(messages, sample.tools, turns, not answer, sample.variables))
    return talks


def _said(
    talk: Talk, rendered: Rendered | Unrenderable, tokenizer: TokenizerLike, loss_on: LossOn
) -> tuple[str, dict[int, Turn]]:
    """The text of a conversation, and the turns that have a place in it. Raises Unrenderable where the template refused
    or left something out, a special token is spelled, or the place of the last answer cannot be told."""
    if isinstance(rendered, Unrenderable):
        raise rendered
    if special := spelled(talk, tokenizer.special_tokens):
        field, token = special
        raise Unrenderable(f"spells {shown(token)}, {SPECIAL}", field, "special token")
    turns = {i: turn for i, turn in rendered.turns.items() if isinstance(turn, Turn)}
    if rendered.turns and loss_on != "all":
        last = rendered.turns[max(rendered.turns)]
        if isinstance(last, Unrenderable):
            raise last
    if lost := unsaid(talk, rendered.text, turns):
        field, text = lost
        raise Unrenderable(f"{shown(text)} {LOST}", field)
    return rendered.text, turns


def _encode(
    talk: Talk, rendered: Rendered | Unrenderable, tokenizer: TokenizerLike, loss_on: LossOn, source: str
) -> Encoded:
    """Tokens and mask of one conversation. Raises Unrenderable."""
    text, turns = _said(talk, rendered, tokenizer, loss_on)
    notes = {LEFT_OUT} if len(turns) < len(talk.turns) and loss_on != "all" else set()
    last = turns.get(len(talk.messages) - 1)
    end = last.content_end if last else None
    if last and end is not None and tokenizer.eos_id is not None and not text[end : last.region].strip():
        text = text[:end]  # the template leaves the last answer unended
        notes.add(NO_END)
    tokens = _tokens(tokenizer, text)
    ids, trained = tokens.ids, [loss_on == "all" and i > 0 for i in range(len(tokens.ids))]
    if talk.prompt:
        return Encoded(ids, [False] * len(ids), text, source)
    if loss_on != "all":
        trained, more = mask(tokens, turns, tokenizer.stop_ids)
        notes |= more
    if NO_END in notes:
        ids, trained = [*ids, int(tokenizer.eos_id or 0)], [*trained, True]
    return _checked(Encoded(ids, trained, text, source, tuple(sorted(notes))), tokenizer)


def _plain(sample: Sample, text: str, tokenizer: TokenizerLike, loss_on: LossOn) -> Encoded:
    """Plain text between this model's first and last token, all trained but the first; or ready tokens as they are."""
    if sample.tokens is not None:
        ids, trained = sample.tokens
        if outside := [token for token in ids if not 0 <= token < tokenizer.vocab_size]:
            what = f"holds {outside[0]}, and the tokenizer has the tokens 0 to {tokenizer.vocab_size - 1}"
            raise Unrenderable(what, "input_ids")
        notes = (LABELLED,) * (loss_on != "assistant")
        return _checked(Encoded(ids, [False, *trained[1:]], "", sample.source, notes), tokenizer)
    begin, end = (tokenizer.bos_token or "") if expects_bos(tokenizer) else "", tokenizer.eos_token or ""
    inside = text.removeprefix(begin).removesuffix(end)
    tokens = _tokens(tokenizer, f"{begin}{inside}{end}")
    trained = [i > 0 for i in range(len(tokens.ids))]
    special = spelled(Talk([{"content": inside}]), tokenizer.special_tokens)
    notes = tuple(note for note, so in ((WHOLE, loss_on == "last"), (SPECIAL_IN_TEXT, special)) if so)
    return _checked(Encoded(tokens.ids, trained, tokens.text, sample.source, notes), tokenizer)


def _tokens(tokenizer: TokenizerLike, text: str) -> Tokens:
    try:
        return Tokens(text, *tokenizer.encode_with_offsets(text))
    except InputError as error:
        raise Unrenderable(str(error), kind="text") from None


def _checked(example: Encoded, tokenizer: TokenizerLike) -> Encoded:
    """The example. Raises Unrenderable where it begins with two BOS tokens, or nothing of it is trained."""
    if tokenizer.bos_id is not None and example.ids[:2] == [tokenizer.bos_id] * 2:
        reason = f"begins with two BOS tokens ({tokenizer.bos_token!r}): the row must not hold one that is added"
        raise Unrenderable(reason, "text")
    if not any(example.trained[1:]):
        raise Unrenderable("nothing to train: no token of an answer is left", kind="nothing to train")
    return example
