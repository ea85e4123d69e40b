"""Every form of a data row, in one table, and the reading of rows into Samples.

A form is one entry of FORMS: the kind of training it serves, its name, how its rows are told by their keys, what reads
one, and the fields that are read. A file has one form, told from its first rows; every row is then held to it, and a
row that does not fit is a problem with its line, its field and the reason. What other tools write is in `dialects`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

from ..errors import InputError, shown
from .dialects import SAME, implied_by_messages, implied_by_strings, instruction, unanswered
from .keys import Fields, opened, present, unread
from .messages import Messages, as_context, checked_messages, core, filled, offered_tools, said, system_turn, trains
from .read import Rows, sources
from .row import UNUSED, BadRow, Problems, Row, bad, typed
from .sample import Kind, Sample

DETECT_ROWS = 200
MAX_BAD_ROWS = 20_000
OURS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
ASIDE = ("completion", "output", "answer")  # of a prompt: an answer, which is not shown to the model
_CHATS = '{"messages": [{"role": ..., "content": ...}, ...]}'
WANTED = {  # of each kind: what a row of it is, who reads it, and how one may be written
    "sft": ("a row to learn from", "`fourbit sft` reads", _CHATS + ' or {"prompt": ..., "completion": ...}'),
    "pairs": ("a preference pair", "`fourbit dpo` reads", '{"prompt": ..., "chosen": ..., "rejected": ...}'),
    "judged": (
        "an answer with a judgement",
        "losses for unpaired answers take",
        '{"prompt": ..., "completion": ..., "label": true or false}',
    ),
    "prompts": ("a prompt to answer", "`fourbit generate` reads", '{"prompt": ...} or ' + _CHATS),
}


class Form(NamedTuple):
    """One form. `read` raises BadRow for a row that breaks a rule of the form; the rules of its kind come after it."""

    kind: Kind
    name: str
    matches: Callable[[dict[str, Any]], bool]  # looks at a row's keys
    read: Callable[[Row], Sample]
    answers: tuple[str, ...] = ()  # what errors call the answers
    judgement: str = ""  # of a judged answer: the field that says whether it is a good one


def read_samples(rows: Rows, kind: Kind, name: str = "rows") -> tuple[list[Sample], Problems]:
    """The samples of files or objects (see `read.sources`), and the problems of the rows that are none, in their order.
    Raises InputError for a file that is none, and as soon as 20,000 rows are bad and most are."""
    found, problems = list[Sample](), Problems()
    for source in sources(rows, name):
        found += samples(source, kind, problems)
    return found, problems


def samples_of(rows: Rows | Sequence[Sample], kind: Kind) -> list[Sample]:
    """Samples as they are, or those of rows. Raises InputError listing the rows that are none."""
    if isinstance(rows, list | tuple) and all(isinstance(row, Sample) for row in rows):
        return [*rows]
    found, problems = read_samples(rows, kind)
    if problems:
        raise InputError(problems.describe(str(len(found) + problems.total), "mend them"))
    return found


def kind_of(paths: Rows) -> Kind:
    """What most of the first rows are: "pairs", "judged" (unless "sft" takes them: then a label is no judgement) or, of
    all others, "sft"."""
    kinds: tuple[Kind, ...] = ("pairs", "sft", "judged")
    first = _first_rows(islice(sources(paths)[0], MAX_BAD_ROWS))
    told = (next((kind for kind in kinds if recognise(row.data, kind)), None) for row in first)
    seen = Counter(kind for kind in told if kind)
    return seen.most_common(1)[0][0] if seen else "sft"


def _first_rows(items: Iterable[Row | BadRow]) -> list[Row]:
    return list(islice((item for item in items if isinstance(item, Row)), DETECT_ROWS))


def samples(items: Iterable[Row | BadRow], kind: Kind, problems: Problems) -> Iterator[Sample]:
    """Every row of one source that is a sample; the others are added to `problems`. The form is the one most of its
    first 200 rows have; prompts may mix theirs."""
    items, good = iter(items), 0
    first = list(islice(items, DETECT_ROWS))
    seen = Counter(form.name for row in _first_rows(first) if (form := recognise(row.data, kind)))
    name = seen.most_common(1)[0][0] if seen and kind != "prompts" else None
    for item in chain(first, items):
        try:
            if isinstance(item, BadRow):
                raise item
            yield sample(item, kind, name)
            good += 1
        except BadRow as error:
            problems.add(error)
        if problems.total > max(MAX_BAD_ROWS, good):
            way = "so many that the rest is not read; mend them"
            raise InputError(problems.describe(f"the first {problems.total + good}", way))


def sample(row: Row, kind: Kind, name: str | None = None) -> Sample:
    """One row as a sample. Raises BadRow when it is not of the form `name` (None: any) or breaks a rule of it."""
    form = recognise(row.data, kind)
    if form is None:
        raise _unknown(row, kind)
    if name is not None and form.name != name:
        reason = f"is of the {form.name} form, but the first rows are of the {name} form: one form a file"
        raise bad(row, "row", reason, "form")
    fields = present(row.data)
    fields.level = kind
    read = Row(fields, row.place)
    made = SETTLED[kind](read, form, _beside_messages(read, form.read(read)))
    unused, passed = unread(read, ASIDE if kind == "prompts" else ())
    notes = (*made.notes, *(UNUSED + shown(place) for place in unused))
    return replace(made, notes=notes, passed=tuple(passed), row=row.data if kind == "prompts" else {})


def _beside_messages(row: Row, made: Sample) -> Sample:
    """What any form may say beside its messages: a system text, tools, variables of the template."""
    if made.text is not None:
        return made
    system = system_turn(row, next(chain(made.context, *made.answers), None))
    tools, field = made.tools or offered_tools(row, row.data), "chat_template_kwargs"
    given = opened(row, field, row.data.get(field))
    variables = typed(row, field, {} if given is None else given, dict, "be an object, or one as JSON text")
    if ours := sorted({*OURS} & {*variables}):
        raise bad(row, field, f"may not say {ours[0]!r}, which is given from elsewhere: take it out")
    return replace(made, context=system + made.context, tools=tools, variables=variables or None)


def recognise(data: dict[str, Any], kind: Kind) -> Form | None:
    """The form of a row, told by its keys; None when they belong to none of this kind."""
    data = {key: value for key, value in data.items() if value is not None}
    if kind == "sft" and ("kto_tag" in data or ("completion" in data and isinstance(data.get("label"), bool))):
        return None  # half of the answers that are judged are not to be imitated
    return next((form for form in FORMS if form.kind == kind and form.matches(data)), None)


def _unknown(row: Row, kind: Kind) -> BadRow:
    wanted, _, use = WANTED[kind]
    others = (other for other in ("judged", "pairs", "sft") if other != kind and recognise(row.data, other))
    seen = next((f"; it looks like {WANTED[other][0]}, which {WANTED[other][1]}" for other in others), "")
    named = [repr(key) + " (null)" * (value is None) for key, value in islice(row.data.items(), 6)]
    keys = shown(", ".join(named))[1:-1]
    return bad(row, "row", f"is not {wanted}, keys are {keys or 'none'}{seen}: use {use}", "form")


# The rules of a kind.


def _learned(row: Row, form: Form, made: Sample) -> Sample:
    """A whole conversation to learn from."""
    if made.text is not None:
        return made
    messages = [*made.context, *made.answers[0]]
    if messages[-1]["role"] != "assistant":
        role = messages[-1]["role"]
        reason = f"has the role {role!r}: a conversation must end with an assistant turn, the answer to learn"
        raise bad(row, "last message", reason, "nothing to train")
    if not any(trains(message) for message in messages):
        raise bad(row, "messages", "every assistant turn has weight 0: nothing to train", "nothing to train")
    if trains(messages[0]):
        raise bad(row, "first message", "is an assistant turn: an answer needs something before it")
    return replace(made, context=[], answers=(messages,))


def _answered(row: Row, form: Form, made: Sample) -> Sample:
    """Something is asked, and an assistant answers."""
    if not made.context:
        raise bad(row, "prompt", "is empty: an answer needs something before it")
    for name, answer in zip(form.answers, made.answers, strict=True):
        for place, message in (("first", answer[0]), ("last", answer[-1])):
            if message["role"] != "assistant":
                reason = f"must be by the assistant, but its {place} message has the role {message['role']!r}"
                raise bad(row, name, reason)
        if not any(trains(message) for message in answer):
            raise bad(row, name, "every assistant turn has weight 0: nothing to train", "nothing to train")
    return replace(made, context=as_context(made.context))


def _compared(row: Row, form: Form, made: Sample) -> Sample:
    """Two answers to one prompt, of which the first is preferred."""
    made = _answered(row, form, made)
    chosen, rejected = (list(map(core, answer)) for answer in made.answers)
    if chosen == rejected:
        raise bad(row, ", ".join(form.answers), SAME, "identical")
    return made


def _judged(row: Row, form: Form, made: Sample) -> Sample:
    """One answer and whether it is a good one."""
    label = typed(row, form.judgement, row.data[form.judgement], bool, "be true (a good answer) or false")
    return replace(_answered(row, form, made), label=label)


SETTLED = {"sft": _learned, "pairs": _compared, "judged": _judged, "prompts": _answered}


# What reads a row of a form.


def _made(row: Row, context: Messages, *answers: Messages, **more: Any) -> Sample:
    return Sample(context, answers, row.place, **more)


def _fields(context: Callable[[Row], Messages], *keys: str) -> Callable[[Row], Sample]:
    """Reads what is asked, and the fields that answer it."""
    return lambda row: _made(row, context(row), *(said(row, key) for key in keys))


def _prompt(row: Row) -> Messages:
    return as_context(said(row, "prompt", "user"))


def _conversation(row: Row) -> Messages:
    key = "messages" if "messages" in row.data else "conversations"
    return checked_messages(row, key, row.data[key])


def _talk(row: Row) -> Sample:
    """The last message is the answer."""
    messages = _conversation(row)
    return _made(row, messages[:-1], messages[-1:])


def _text(row: Row) -> Sample:
    return _made(row, [], text=filled(row, "text", row.data["text"]))


def _ready(row: Row) -> Sample:
    """Tokens, and of each its label: itself where it is trained, else -100."""
    given: dict[str, Any] = {key: row.data.get(key) for key in ("input_ids", "labels", "attention_mask")}
    ids, labels, seen = given.values()
    seen = [1] * len(ids) if seen is None and isinstance(ids, list) else seen
    for key, values in zip(given, (ids, labels, seen), strict=True):
        kinds = [{int}, {bool}] if key == "attention_mask" else [{int}]
        if not isinstance(values, list) or {*map(type, values)} not in kinds:
            raise bad(row, key, f"must be a list of whole numbers, of one row, not {shown(values)}")
        if len(values) != len(ids):
            raise bad(row, key, f"has {len(values)} numbers, and input_ids {len(ids)}: one for each token")
    size = sum(seen)
    if seen != [1] * size + [0] * (len(ids) - size):
        raise bad(row, "attention_mask", "must be 1 for every token, but for padding at the end: take padding out")
    if wrong := [i for i, label in enumerate(labels) if label != -100 and (i >= size or label != ids[i])]:
        reason = "is neither -100 (not trained) nor the token itself: labels are not shifted, padding has -100"
        raise bad(row, f"labels[{wrong[0]}]", reason)
    return _made(row, [], text="", tokens=(ids[:size], [label != -100 for label in labels[:size]]))


def _openai_pair(row: Row) -> Sample:
    source = Row(typed(row, "input", row.data.get("input"), Fields, "be an object with `messages`"), row.place)
    context = checked_messages(row, "input.messages", source.data.get("messages"))
    answers = (said(row, key) for key in _OUTPUTS)
    return _made(row, context, *answers, tools=offered_tools(row, source.data, "input."))


def _trl_pair(row: Row) -> Sample:
    """TRL's `prompt`, `chosen` and `rejected`, the prompt perhaps implicit."""
    key = next((key for key in ("prompt", "question") if row.data.get(key) is not None), None)
    if key is None and isinstance(row.data.get("chosen"), str) and isinstance(row.data.get("rejected"), str):
        parts, notes = implied_by_strings(row, row.data["chosen"], row.data["rejected"])
        return _made(row, *parts, notes=notes)
    answers = said(row, "chosen"), said(row, "rejected")
    return _made(row, *(implied_by_messages(row, *answers) if key is None else _after_prompt(row, key, *answers)))


def _after_prompt(row: Row, key: str, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Answers that may begin with the prompt once more, which the field `key` holds."""
    prompt = said(row, key, "user")
    if not isinstance(row.data[key], list) and chosen[0]["role"] != "assistant":
        parts = implied_by_messages(row, chosen, rejected)  # both whole conversations, and the question as a string
        if not any(prompt[0]["content"].strip() == message["content"].strip() for message in parts[0]):
            reason = "is none of the messages that chosen and rejected begin with: leave it out, or mend the row"
            raise bad(row, key, reason, "prompt")
        return parts
    start = list(map(core, prompt))
    if all(list(map(core, answer[: len(prompt)])) == start for answer in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise bad(row, name, "holds the prompt alone, and no answer", "empty")
    return prompt, chosen, rejected


# The table: the first entry of a kind that matches is a row's form.


def _has(*keys: str, one: Sequence[str] = (), none: Sequence[str] = ()) -> Callable[[dict[str, Any]], bool]:
    """Rows with all these fields; if some are given, with one of these; and with none of those."""
    return lambda row: row.keys() >= {*keys} and not row.keys() & {*none} and bool(not one or row.keys() & {*one})


_PAIR, _OUTPUTS = ("chosen", "rejected"), ("preferred_output", "non_preferred_output")
_RATED = (*_PAIR, *_OUTPUTS)
_OTHERS = ("conversations", "conversation", "instruction", "question", "input", *_RATED)
_LAST = ("last message",)
_ANSWER, _TASK = _fields(_prompt, "completion"), _fields(instruction, "output")
_TASKS, _TALKS = _fields(instruction, *_PAIR), _fields(_conversation, *_PAIR)

FORMS: tuple[Form, ...] = (
    Form("sft", "chat", _has("messages"), _talk),
    Form("sft", "prompt/completion", _has("completion"), _ANSWER),
    Form("sft", "prompt/completion", _has("prompt", none=("text", *_OTHERS)), _ANSWER),
    Form("sft", "conversations", _has("conversations", none=_RATED), _talk),
    Form("sft", "instruction/output", _has("instruction", none=_RATED), _TASK),
    Form("sft", "text", _has("text", none=("prompt", "input_ids", *_OTHERS)), _text),
    Form("sft", "input_ids/labels", _has("input_ids", none=("prompt", *_OTHERS)), _ready),
    Form("pairs", "/".join(_OUTPUTS), _has(one=_OUTPUTS), _openai_pair, _OUTPUTS),
    Form("pairs", "conversations/chosen/rejected", _has("conversations", one=_PAIR), _TALKS, _PAIR),
    Form("pairs", "instruction/chosen/rejected", _has("instruction", one=_PAIR), _TASKS, _PAIR),
    Form("pairs", "prompt/chosen/rejected", _has(one=_PAIR), _trl_pair, _PAIR),
    Form("judged", "conversations/kto_tag", _has("kto_tag", "conversations"), _talk, _LAST, "kto_tag"),
    Form("judged", "messages/kto_tag", _has("kto_tag", "messages"), _talk, _LAST, "kto_tag"),
    Form("judged", "instruction/kto_tag", _has("kto_tag", "instruction"), _TASK, ("output",), "kto_tag"),
    Form("judged", "prompt/completion/label", _has("completion", "label"), _ANSWER, ("completion",), "label"),
    Form("prompts", "messages", _has("messages"), _fields(unanswered)),
    Form("prompts", "conversations", _has("conversations"), _fields(unanswered)),
    Form("prompts", "instruction", _has("instruction"), _fields(instruction)),
    Form("prompts", "prompt", _has("prompt"), _fields(_prompt)),
)
