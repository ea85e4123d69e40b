"""How other tools write what a row says: ShareGPT's messages, Alpaca's instructions, prompts a pair only implies."""

import re

from .keys import present, whole
from .messages import CALLING, ROLE_SYNONYMS, Messages, as_context, checked_messages, core, filled, turn
from .row import Row, bad, typed

Parts = tuple[Messages, Messages, Messages]  # prompt, chosen, rejected

SAME = "are the same: a pair needs two different answers"
CUT = "the prompt was taken to be the words that chosen and rejected begin with, as the row has no `prompt`"
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


def unanswered(row: Row) -> Messages:
    """The messages of a row without the answer that they may end with."""
    key = "messages" if "messages" in row.data else "conversations"
    given = row.data[key]
    if isinstance(given, list) and given and isinstance(given[-1], dict):
        speaker = str(given[-1].get("role", given[-1].get("from"))).lower()
        if answered := ROLE_SYNONYMS.get(speaker, speaker) in ("assistant", *CALLING):
            whole(given[-1])
        given = given[:-1] if answered else given
    return checked_messages(row, key, given) if given != [] else []


def instruction(row: Row) -> Messages:
    """What an Alpaca row asks: `instruction` and `input`, after the pairs of `history`: all context."""
    parts = [typed(row, key, row.data.get(key) or "", str) for key in ("instruction", "input")]
    asked = "\n".join(text for text in parts if text.strip())
    history = typed(row, "history", row.data.get("history") or [], list, "be a list of [question, answer]")
    turns: Messages = []
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise bad(row, f"history[{i}]", "must be [question, answer]")
        turns += turn(row, f"history[{i}][0]", pair[0], "user") + turn(row, f"history[{i}][1]", pair[1])
    return as_context(turns + turn(row, "instruction", asked, "user"))


def implied_by_strings(row: Row, chosen: str, rejected: str) -> tuple[Parts, tuple[str, ...]]:
    """Two strings without a prompt: two transcripts, or two texts that begin with the same words. And what to note."""
    if all(TRANSCRIPT.match(text) for text in (chosen, rejected)):
        talks = _transcript(row, "chosen", chosen), _transcript(row, "rejected", rejected)
        return implied_by_messages(row, *talks), ()
    prompt, chosen, rejected = _cut(row, filled(row, "chosen", chosen), filled(row, "rejected", rejected))
    return (prompt, turn(row, "chosen", chosen), turn(row, "rejected", rejected)), (CUT,)


def _cut(row: Row, chosen: str, rejected: str) -> tuple[Messages, str, str]:
    """Two strings into the words that both begin with, and what follows (TRL's rule, but never inside a word).
    The white space at the cut belongs to no side: the template parts the turns."""
    if chosen == rejected:
        raise bad(row, "chosen, rejected", SAME, "identical")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    words = re.match(r"(?s).*\s", chosen[:same])
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
    return checked_messages(row, field, present(turns))


def implied_by_messages(row: Row, chosen: Messages, rejected: Messages) -> Parts:
    """Two whole conversations: the messages that both begin with are the prompt, and each keeps at least one."""
    most = min(len(chosen), len(rejected)) - 1
    pairs = zip(map(core, chosen[:most]), map(core, rejected[:most]), strict=True)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), most)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[same]["role"] != "assistant":
            role = answer[same]["role"]
            reason = f"is the first message in which the two differ, and by {role!r}: their prompts are not the same"
            raise bad(row, f"{name}[{same}]", reason, "prompt")
    return chosen[:same], chosen[same:], rejected[same:]
