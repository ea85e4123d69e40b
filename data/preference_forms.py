"""What the rows of each preference form hold: the prompt's messages and those of every answer.

Each function takes a row that was recognised as one form and returns its parts, or raises BadRow for the first rule the
row breaks. Rules that all forms share (who speaks, which answers differ) are checked in `preferences`.
"""

import re
from dataclasses import replace
from typing import Any, NamedTuple

from .formats import answer_messages, checked_tools, not_alike, prompt_completion
from .messages import KEY_SYNONYMS, ROLE_SYNONYMS, bad, checked_messages, filled, type_name
from .read import BadRow, Row

Messages = list[dict[str, Any]]
CUT = "the prompt was taken to be the words that chosen and rejected begin with, as the row has no `prompt`"
SAME = "are the same: a pair needs two different answers"
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


class Parts(NamedTuple):
    """A row's messages: of the prompt, and of each answer."""

    prompt: Messages
    answers: tuple[Messages, ...]
    tools: Messages | None = None
    notes: tuple[str, ...] = ()


def core(message: dict[str, Any]) -> tuple[Any, ...]:
    """What a model sees of a message: marks such as an id or a score make no other message of it."""
    return tuple(message.get(key) for key in ("role", "content", "tool_calls", "tool_call_id", "name"))


def _both(row: Row, first: str, second: str) -> tuple[Any, Any]:
    for key in (first, second):
        if key not in row.data:
            raise bad(row, key, f"is missing: the row needs both `{first}` and `{second}`")
    return row.data[first], row.data[second]


def _turn(row: Row, field: str, text: Any, role: str) -> Messages:
    """A string as one turn."""
    if not isinstance(text, str):
        raise bad(row, field, f"must be a string, not {type_name(text)}")
    return [{"role": role, "content": filled(row, field, text)}]


def trl_pair(row: Row) -> Parts:
    """TRL: `prompt`, `chosen` and `rejected`, each a string or a list of messages; the prompt may be implicit."""
    chosen, rejected = _both(row, "chosen", "rejected")
    tools = checked_tools(row, "tools", row.data.get("tools"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        made = _of_strings(row, chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        made = _of_lists(row, *(checked_messages(row, key, row.data[key]) for key in ("chosen", "rejected")))
    else:
        raise not_alike(row, "chosen", "rejected")
    return made._replace(prompt=_with_system(row, made.prompt), tools=tools)


def _prompt_key(row: Row) -> str | None:
    """The field that holds the prompt (some sets say `question`), if one does."""
    return next((key for key in ("prompt", "question") if row.data.get(key) is not None), None)


def _explicit(row: Row, key: str) -> Messages:
    prompt = row.data[key]
    return checked_messages(row, key, prompt) if isinstance(prompt, list) else _turn(row, key, prompt, "user")


def _of_strings(row: Row, chosen: str, rejected: str) -> Parts:
    key = _prompt_key(row)
    if key is None and all(TRANSCRIPT.match(text) for text in (chosen, rejected)):
        return _implicit(row, _transcript(row, "chosen", chosen), _transcript(row, "rejected", rejected))
    if key is None:
        prompt, chosen, rejected = _cut(row, filled(row, "chosen", chosen), filled(row, "rejected", rejected))
    else:
        prompt = _explicit(row, key)
    answers = _turn(row, "chosen", chosen, "assistant"), _turn(row, "rejected", rejected, "assistant")
    return Parts(prompt, answers, notes=(CUT,) if key is None else ())


def _cut(row: Row, chosen: str, rejected: str) -> tuple[Messages, str, str]:
    """Two strings into the words that both begin with, and what follows (TRL's rule, but never inside a word).

    The white space at the cut belongs to no side: the template parts the turns.
    """
    if chosen == rejected:
        raise bad(row, "chosen, rejected", SAME, "identical")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    head = chosen[:same] if same is not None else min(chosen, rejected, key=len)
    words = re.match(r"(?s).*\s", head)
    if words is None or not words.group().strip():
        reason = "is missing, and chosen and rejected share no first words that could be it: add the prompt to the row"
        raise bad(row, "prompt", reason, "prompt")
    at = words.end()
    prompt = [{"role": "user", "content": chosen[:at].strip()}]
    return prompt, chosen[at:].lstrip(), rejected[at:].lstrip()


def _transcript(row: Row, field: str, text: str) -> Messages:
    """A dialogue of "\\n\\nHuman: " and "\\n\\nAssistant: " in one string, as Anthropic's hh-rlhf writes it."""
    pieces = TRANSCRIPT.split(text)[1:]
    roles = [ROLE_SYNONYMS.get(name.lower(), name.lower()) for name in pieces[::2]]
    turns = [{"role": role, "content": said.strip()} for role, said in zip(roles, pieces[1::2], strict=True)]
    return checked_messages(row, field, turns)


def _of_lists(row: Row, chosen: Messages, rejected: Messages) -> Parts:
    key = _prompt_key(row)
    if key is None:
        return _implicit(row, chosen, rejected)
    prompt = _explicit(row, key)
    if not isinstance(row.data[key], list) and chosen[0]["role"] != "assistant":
        return _mentioned(row, key, _implicit(row, chosen, rejected), prompt[0]["content"])
    start = list(map(core, prompt))
    if all(list(map(core, answer[: len(prompt)])) == start for answer in (chosen, rejected)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise bad(row, name, "holds the prompt alone, and no answer", "empty")
    return Parts(prompt, (chosen, rejected))


def _implicit(row: Row, chosen: Messages, rejected: Messages) -> Parts:
    """Two whole conversations: the messages that both begin with are the prompt, and each keeps at least one."""
    most = min(len(chosen), len(rejected)) - 1
    pairs = zip(map(core, chosen[:most]), map(core, rejected[:most]), strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), most)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[same]["role"] != "assistant":
            role = answer[same]["role"]
            reason = f"is the first message in which the two differ, and by {role!r}: their prompts are not the same"
            raise bad(row, f"{name}[{same}]", reason, "prompt")
    return Parts(chosen[:same], (chosen[same:], rejected[same:]))


def _mentioned(row: Row, key: str, made: Parts, question: str) -> Parts:
    """For rows that have both whole conversations and the question as a string, as many public sets do."""
    if not any(question.strip() == message["content"].strip() for message in made.prompt):
        reason = "is none of the messages that chosen and rejected begin with: leave it out, or mend the row"
        raise bad(row, key, reason, "prompt")
    return made


def openai_pair(row: Row) -> Parts:
    """OpenAI: `input.messages`, `preferred_output` and `non_preferred_output`."""
    preferred, other = _both(row, "preferred_output", "non_preferred_output")
    source = row.data.get("input")
    if not isinstance(source, dict):
        raise bad(row, "input", f"must be an object with `messages`, not {type_name(source)}")
    return Parts(
        checked_messages(row, "input.messages", source.get("messages")),
        (answer_messages(row, "preferred_output", preferred), answer_messages(row, "non_preferred_output", other)),
        checked_tools(row, "input.tools", source.get("tools")),
    )


def sharegpt_pair(row: Row) -> Parts:
    """ShareGPT: `conversations`, whose messages have `from` and `value`, and each answer as one such message."""
    chosen, rejected = _both(row, "chosen", "rejected")
    answers = (
        _spoken(row, "chosen", chosen if isinstance(chosen, list) else [chosen]),
        _spoken(row, "rejected", rejected if isinstance(rejected, list) else [rejected]),
    )
    return Parts(_conversation(row, "conversations"), answers, checked_tools(row, "tools", row.data.get("tools")))


def _conversation(row: Row, key: str) -> Messages:
    """The messages of a ShareGPT row, after its `system` text if it has one."""
    return _with_system(row, _spoken(row, key, row.data[key]))


def _with_system(row: Row, messages: Messages) -> Messages:
    """The messages after the row's `system` text, unless it has none or they begin with a system message already."""
    text = row.data.get("system")
    if text in (None, "") or (messages and messages[0]["role"] in ("system", "developer")):
        return messages
    return _turn(row, "system", text, "system") + messages


def _spoken(row: Row, field: str, value: Any) -> Messages:
    """Messages in ShareGPT's words, or in ours."""
    if not isinstance(value, list):
        raise bad(row, field, f"must be a list of messages, not {type_name(value)}")
    try:
        return checked_messages(row, field, [_translated(message) for message in value])
    except BadRow as error:
        problem = error.problem
        if any(isinstance(message, dict) and "from" in message for message in value):
            named = problem.field.replace("].role", "].from").replace("].content", "].value")
            problem = replace(problem, field=named)
        raise BadRow(problem) from None


def _translated(message: Any) -> Any:
    if not isinstance(message, dict) or "role" in message:
        return message
    ours = {KEY_SYNONYMS.get(key, key) if key in ("from", "value") else key: value for key, value in message.items()}
    if isinstance(role := ours.get("role"), str):
        ours["role"] = ROLE_SYNONYMS.get(role.lower(), role)
    return ours


def alpaca_pair(row: Row) -> Parts:
    """Alpaca: `instruction`, `input`, `system`, `history` of [question, answer] pairs, and two answers."""
    chosen, rejected = _both(row, "chosen", "rejected")
    answers = _turn(row, "chosen", chosen, "assistant"), _turn(row, "rejected", rejected, "assistant")
    return Parts(_instruction(row), answers)


def _instruction(row: Row) -> Messages:
    parts = [row.data.get(key) or "" for key in ("instruction", "input")]
    for key, text in zip(("instruction", "input"), parts, strict=True):
        if not isinstance(text, str):
            raise bad(row, key, f"must be a string, not {type_name(text)}")
    asked = "\n".join(text for text in parts if text.strip())
    return _with_system(row, _history(row) + _turn(row, "instruction", asked, "user"))


def _history(row: Row) -> Messages:
    history = row.data.get("history") or []
    if not isinstance(history, list):
        raise bad(row, "history", f"must be a list of [question, answer], not {type_name(history)}")
    turns: Messages = []
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise bad(row, f"history[{i}]", "must be [question, answer]")
        turns += _turn(row, f"history[{i}][0]", pair[0], "user") + _turn(row, f"history[{i}][1]", pair[1], "assistant")
    return turns


def labelled(row: Row) -> Parts:
    """TRL's unpaired form: `prompt` and `completion`, strings or lists of messages."""
    prompt, completion = prompt_completion(row)
    return Parts(prompt, (completion,), checked_tools(row, "tools", row.data.get("tools")))


def tagged_conversation(row: Row) -> Parts:
    """ShareGPT's unpaired form: the last message is the answer."""
    key = "conversations" if "conversations" in row.data else "messages"
    messages = _conversation(row, key)
    return Parts(messages[:-1], (messages[-1:],), checked_tools(row, "tools", row.data.get("tools")))


def tagged_instruction(row: Row) -> Parts:
    """Alpaca's unpaired form: `instruction`, `input` and `output`."""
    return Parts(_instruction(row), (_turn(row, "output", row.data.get("output"), "assistant"),))
