"""What the keys of a row mean: one that a reader reads is used, one of ELSEWHERE is refused, any other is told of.

Rows are read through `Fields`, which remember what was read. What was not is found afterwards, at every level of the
row, so that no reader can drop a key in silence; and whoever reads another key has nothing to enter anywhere. Null is
absent: no reader and no template sees a key that holds it. (JSON in a text is taken as it stands.)
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from .read import Refused, parse
from .row import Row, bad

MOST_TEXTS = 50  # of a key in a row: each is looked for in all that the template writes
TURN, CALL, WHOLE = "turn", "tool call", "whole"  # levels of a row; that of the row itself is the kind of rows

_ALONE = "which a model of text would not see: take the key out where the text stands without it, or such rows"
_MASKED = "which are not used here (`weight` 0 on a turn keeps it from being trained): take the key out"
_MEDIA = {key: f"holds {key}, {_ALONE}" for key in ("image", "images", "video", "videos", "audio", "audios")}
_IDS = ("input_ids", "position_ids", "prompt_ids", "completion_ids", "completion_mask", "assistant_masks", "loss_mask")
_ROW = {
    **_MEDIA,
    **dict.fromkeys(_IDS, f"holds tokens or a loss mask of another tool, {_MASKED}"),
    **dict.fromkeys(
        ("weight", "weights", "sample_weight", "loss_weight", "loss_scale"),
        "would weigh the row, and all rows count the same here: take the key out, or the row",
    ),
    "functions": "is an older name of `tools`: keep one of the two",
    "system_prompt": "is `system` here: rename the key, or take it out where the messages hold that text",
    "rejected_response": "makes this a preference pair: write it as prompt, chosen and rejected, or take the key out",
}
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
_TRAINED = ("train", "training", "train_detail", "loss", "loss_scale", "mask", "masked")
# Of each level the keys that other tools give a meaning that changes training, and what to do about them.
ELSEWHERE: dict[str, dict[str, str]] = {
    "sft": {**_ROW, "completion": "stands beside `messages`: keep one of the two forms"},
    "judged": _ROW,
    "pairs": {
        **_ROW,
        "margin": "would ask for a margin of its own, which no loss here takes: take the key out",
        **dict.fromkeys(_REFERENCE, "holds what a reference model says, which is computed here: take the key out"),
    },
    "prompts": _MEDIA,
    TURN: {
        **_MEDIA,
        **dict.fromkeys(_TRAINED, "says what is trained: write `weight` 0 (not) or 1 on the assistant's turn instead"),
        "function_call": "is an older form of `tool_calls`: keep one of the two",
        "refusal": "is text of the answer: write it as `content`",
    },
    CALL: dict.fromkeys(("parameters", "args", "kwargs", "input"), "is `arguments` here: rename the key"),
}


class Passed(NamedTuple):
    """A key that only the template can use: where, what, and some of the texts that it holds in a row."""

    place: str
    key: str
    texts: tuple[str, ...]


class Fields(dict[str, Any]):
    """An object of a row that remembers which of its keys were read. `level`: what it is (see ELSEWHERE)."""

    __slots__ = ("level", "read")

    def __init__(self) -> None:
        self.level, self.read = "", set[str]()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read."""
        self.read.add(key)
        return super().get(key, default)


def present(value: Any, *, null: bool = False) -> Any:
    """A JSON value as it is read: objects as Fields, without the keys that hold null unless these are wanted."""
    if isinstance(value, dict):
        made = Fields()
        for key, inner in value.items():
            if null or inner is not None:
                made[key] = inner if isinstance(inner, str) else present(inner, null=null)
        return made
    return [present(inner, null=null) for inner in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """The same in dicts of their own."""
    if isinstance(value, dict):
        return {key: inner if isinstance(inner, str) else plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def whole(value: Any) -> Any:
    """The same for who uses the value as it is, with every key that it holds."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, Fields):
            item.level = WHOLE
    return plain(value)


def parsed(row: Row, field: str, text: str) -> Any:
    """The JSON that a text holds. Raises BadRow."""
    try:
        return parse(text)
    except Refused as error:
        raise bad(row, field, f"is text that must be JSON, and {error}") from None


def opened(row: Row, field: str, value: Any) -> Any:
    """A value that may stand as JSON text, as it is used, `whole`; None for a blank text. Raises BadRow."""
    if not isinstance(value, str):
        return whole(value)
    return parsed(row, field, value) if value.strip() else None


def unread(row: Row, aside: Collection[str] = ()) -> tuple[list[str], list[Passed]]:
    """The keys of a row that nobody read, but for those set `aside`: the places of what is not used at all, and what
    is given to the template, which alone knows. Raises BadRow for one of ELSEWHERE that is not empty."""
    unused, passed = dict[str, None](), dict[tuple[str, str], list[str]]()
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), row.data)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, list):
            stack += [((*path, i), inner) for i, inner in enumerate(value) if isinstance(inner, (dict, list))]
        if not isinstance(value, Fields) or value.level == WHOLE:
            continue
        for key, inner in value.items():
            if key in value.read:
                if isinstance(inner, (dict, list)):
                    stack.append(((*path, key), inner))
            elif path or key not in aside:
                if (why := ELSEWHERE.get(value.level, {}).get(key)) and inner not in ([], {}, ""):
                    raise bad(row, _place((*path, key), "[{}]"), why, "key")
                place = _place((*path, key), "[]")
                if value.level in (TURN, CALL):
                    texts = passed.setdefault((place, key), [])
                    texts += [inner] * (isinstance(inner, str) and len(texts) < MOST_TEXTS)
                else:
                    unused[place] = None
    return [*unused], [Passed(place, key, tuple(texts)) for (place, key), texts in passed.items()]


def _place(steps: tuple[str | int, ...], index: str) -> str:
    """Where a key stands, in words: `index` formats a place in a list."""
    return "".join(f".{s}" if isinstance(s, str) else index.format(s) for s in steps).removeprefix(".")
