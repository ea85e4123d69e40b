"""Data files and rows: of any wrong type, in every form; too many, too long, too deep."""

import gzip
import json
import pickle
from typing import Any

from harness import Case, Make
from makes import (
    DATA,
    DPO_ROWS,
    ESCAPES,
    GENERATE,
    GOOD,
    HUGE,
    LONG,
    SFT_ROWS,
    all_of,
    dumped,
    edit,
    folder,
    large_rows,
    link,
    nested,
    nothing,
    pipe,
    put,
    rows,
    sparse,
    told,
    turns,
)

LINE = json.dumps(GOOD)


def raw(content: bytes | str) -> Make:
    return put("d.jsonl", content)


FILES: dict[str, Make] = {
    "empty": raw(b""),
    "blank lines": raw("\n \n\r\n\t\n"),
    "a byte order mark alone": raw(b"\xef\xbb\xbf"),
    "two byte order marks": raw(b"\xef\xbb\xbf\xef\xbb\xbf" + LINE.encode()),
    "UTF-16": raw(LINE.encode("utf-16")),
    "UTF-16 without a mark": raw(LINE.encode("utf-16-be")),
    "UTF-32": raw(LINE.encode("utf-32")),
    "Latin-1": raw(LINE.replace("yo", "fähig").encode("latin-1") + b"\n" + '{"messages": "ä"}'.encode("latin-1")),
    "NUL bytes": raw(LINE.encode() + b"\n" + bytes(1000)),
    "random bytes": raw(bytes(range(256)) * 40),
    "gzip": raw(gzip.compress(LINE.encode())),
    "zip": raw(b"PK\x03\x04" + bytes(100)),
    "parquet": raw(b"PAR1" + bytes(100) + b"PAR1"),
    "a pickle": raw(pickle.dumps(GOOD)),
    "cut in the middle of a row": raw((LINE + "\n" + LINE)[:-20]),
    "cut in the middle of a character": raw(LINE.replace("yo", "日本").encode()[:-6]),
    "lines ended by CR alone": raw((LINE + "\r" + LINE + "\r").encode()),
    "CSV": raw("prompt,completion\nhi,yo\n"),
    "an array that does not end": raw("[" + LINE + ","),
    "an array and more": raw("[" + LINE + "] trailing"),
    "an array of numbers": raw("[1, 2, 3]"),
    "an array without commas": raw(f"[{LINE} {LINE}]"),
    "an array of 100,000 openings": raw("[" * 100_000),
    "an array nested 100,000 deep": raw(nested(100_000)),
    "an array of commas": raw("[" + "," * 100_000 + "]"),
    "a line of 17 MiB": raw(b'{"text": "' + b"a" * (17 << 20) + b'"}\n'),
    "a line of 17 MiB without an end": raw(b"{" + b" " * (17 << 20)),
    "an object of 200,000 keys": raw(json.dumps({f"k{i}": i for i in range(200_000)}) + "\n"),
    "a folder": folder("d.jsonl"),
    "a pipe": pipe("d.jsonl"),
    "a link to itself": link("d.jsonl", "d.jsonl"),
    "a link to nothing": link("d.jsonl", "nothing"),
    "a link to a pipe": all_of(pipe("p.jsonl"), link("d.jsonl", "p.jsonl")),
    "a link to /dev/zero": link("d.jsonl", "/dev/zero"),
    "a link to /dev/null": link("d.jsonl", "/dev/null"),
    "40 GB of nothing": sparse("d.jsonl", 40 << 30),
    "40 GB of nothing after a good row": sparse("d.jsonl", 40 << 30, LINE.encode() + b"\n"),
    "40 GB of nothing after half a row": sparse("d.jsonl", 40 << 30, LINE.encode()[:-9]),
    "an array with 40 GB of nothing": sparse("d.jsonl", 40 << 30, b"[" + LINE.encode()),
    "an array with 200 MB of nothing": sparse("d.jsonl", 200 << 20, b"[" + LINE.encode()),
    "3,000,000 rows that are no JSON": large_rows("{", 3_000_000),
    "1,000,000 rows of no form": large_rows('{"a": 1}', 1_000_000),
    "a million elements that are numbers": raw("[" + "1,\n" * 1_000_000 + "1]"),
    "100,000 rows with keys of their own": raw(
        "".join(f'{{"prompt": "a", "completion": 1, "k{i}": 1}}\n' for i in range(100_000))
    ),
}

TEXTS: dict[str, str] = {  # lines
    "a string": '"hi"',
    "null": "null",
    "a list": "[1]\n{}",
    "no keys": "{}",
    "NaN": '{"messages": NaN}',
    "1e999": '{"prompt": "a", "completion": "b", "x": 1e999}',
    "a number of 5,000 digits": '{"prompt": "a", "completion": "b", "x": ' + "9" * 5000 + "}",
    "a key twice": '{"prompt": "a", "prompt": "b", "completion": "c"}',
    "half a surrogate pair": r'{"prompt": "a\ud800", "completion": "b"}',
    "half a surrogate pair in a key": r'{"prompt": "a", "completion": "b", "\udfff": 1}',
    "NUL in a text": r'{"prompt": "a\u0000", "completion": "b"}',
    "single quotes": "{'prompt': 'a', 'completion': 'b'}",
    "nested 2,000 deep": '{"prompt": "a", "completion": "b", "x": ' + nested(2000) + "}",
    "nested 990 deep": '{"prompt": "a", "completion": "b", "x": ' + nested(990) + "}",
    "nested 100,000 deep": '{"prompt": "a", "completion": "b", "x": ' + nested(100_000, '{"a":', "}") + "}",
    "control characters in a role": json.dumps({"messages": [{"role": ESCAPES, "content": "a"}]}),
    "control characters in keys": json.dumps({ESCAPES: 1, "x" + ESCAPES: 2}),
    "control characters as they are": '{"prompt": "\x1b[2J", "completion": "b"}',
    "a role of 100,000 characters": json.dumps({"messages": [{"role": LONG, "content": "a"}]}),
    "a key of 100,000 characters": json.dumps({LONG: 1}),
    "text of 100,000 characters that is no JSON": LONG,
    "a weight of 100,000 characters": json.dumps({"messages": [{"role": "assistant", "content": "a", "weight": LONG}]}),
    "a part of an unknown type": json.dumps(turns()) [:-2] + json.dumps(
        {"role": "user", "content": [{"type": LONG, "text": ESCAPES}]}
    ) + "]}",
    "twenty keys of 1,000 characters, many rows": "\n".join(
        json.dumps({f"{n}{i}" * 200: 1 for i in range(20)}) for n in range(30)
    ),
    "a preference pair": '{"prompt": "a", "chosen": "b", "rejected": "c"}',
    "a prompt alone": '{"prompt": "a"}',
    "forms mixed": '{"prompt": "a", "completion": "b"}\n' + LINE + "\n" + '{"text": "a"}',
}  # fmt: skip


def message(**changes: Any) -> dict[str, Any]:
    """A conversation whose first message is changed."""
    return {"messages": [{"role": "user", "content": "hi", **changes}, {"role": "assistant", "content": "yo"}]}


def answer(**changes: Any) -> dict[str, Any]:
    """A conversation whose answer is changed."""
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", **changes}]}


def calls(arguments: Any, **more: Any) -> dict[str, Any]:
    return answer(tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments, **more}}])


ROWS: dict[str, Any] = {  # one row each
    "no messages": {"messages": []},
    "messages of numbers": {"messages": [1, 2]},
    "messages of lists": {"messages": [[], []]},
    "no role": {"messages": [{"content": "a"}]},
    "a role that is a list": message(role=["user"]),
    "a role of a capital": message(role="User"),
    "content null": message(content=None),
    "content a list of texts": message(content=["a"]),
    "content with an image": message(content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    "content of blanks": message(content=" \n"),
    "an empty answer": answer(content=""),
    "weight 0.5": answer(weight=0.5),
    "weight true": answer(weight=True),
    "weight huge": answer(weight=HUGE),
    "weight a list": answer(weight=[1]),
    "weight on a user": message(weight=1),
    "weight 0 everywhere": answer(weight=0),
    "tool_calls a text": answer(tool_calls="f()"),
    "tool_calls of numbers": answer(tool_calls=[1]),
    "tool_calls without a name": answer(tool_calls=[{"function": {"arguments": {}}}]),
    "arguments that are a list": calls([1]),
    "arguments that are no JSON": calls("{"),
    "arguments that are a number": calls(1e308),
    "arguments nested 980 deep": calls('{"a":' + nested(980) + "}"),
    "arguments nested 100,000 deep": calls('{"a":' + nested(100_000) + "}"),
    "arguments of 5,000 digits": calls('{"a":' + "9" * 5000 + "}"),
    "arguments with half a surrogate pair": calls(r'{"a": "\ud800"}'),
    "arguments with NaN": calls('{"a": NaN}'),
    "a tool's answer that is an object": message(role="tool", content={"a": 1}),
    "tools a text": {**GOOD, "tools": "[f]"},
    "tools of numbers": {**GOOD, "tools": [1]},
    "the user last": {"messages": [{"role": "user", "content": "a"}]},
    "the assistant alone": {"messages": [{"role": "assistant", "content": "a"}]},
    "prompt a number": {"prompt": 1, "completion": "b"},
    "prompt a list, completion a text": {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
    "completion by the user": {"prompt": [message()["messages"][0]], "completion": [message()["messages"][0]]},
    "ShareGPT with a number": {"conversations": [{"from": 1, "value": "a"}, {"from": "gpt", "value": "b"}]},
    "ShareGPT with both names": {"conversations": [{"from": "human", "value": "a", "content": "b"}]},
    "ShareGPT an object": {"conversations": {"from": "human", "value": "a"}},
    "Alpaca with a number": {"instruction": 5, "input": "", "output": "b"},
    "Alpaca with a history of texts": {"instruction": "a", "output": "b", "history": ["c"]},
    "Alpaca with a history of numbers": {"instruction": "a", "output": "b", "history": [[1, 2]]},
    "text a number": {"text": 1},
    "text empty": {"text": ""},
    "text of 5 MB": {"text": "a b " * 1_250_000},
    "an answer of 5 MB": turns("hi", "yo " * 1_700_000),
    "a system text that is a number": {"conversations": GOOD["messages"], "system": 1},
    "a system text of a number beside messages": {**GOOD, "system": 1},
    "messages beside a completion": {**GOOD, "prompt": 1, "completion": []},
    "chat_template_kwargs a list": {**GOOD, "chat_template_kwargs": [1]},
    "chat_template_kwargs that say the messages": {**GOOD, "chat_template_kwargs": {"messages": []}},
    "chat_template_kwargs nested 990 deep, as text": {**GOOD, "chat_template_kwargs": '{"a":' + nested(990) + "}"},
    "tools with NaN, as text": {**GOOD, "tools": '[{"a": NaN}]'},
    "images": {**GOOD, "images": ["file:///etc/passwd"]},
    "a loss mark of another tool": answer(loss=False),
    "a call of another's keys": answer(tool_calls=[{"name": "f", "parameters": {"a": 1}}]),
    "a function_call of a number": answer(function_call=5),
    "a turn of calls that are no JSON": message(role="tool_call", content="f(1)"),
    "ShareGPT's function_call nested 100,000 deep": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": nested(100_000)}]
    },
}
PAIRS: dict[str, Any] = {
    "chosen a number": {"prompt": "a", "chosen": 1, "rejected": "c"},
    "chosen null": {"prompt": "a", "chosen": None, "rejected": "c"},
    "chosen a text, rejected a list": {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant"}]},
    "both the same": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "no prompt and nothing in common": {"chosen": "b", "rejected": "c"},
    "prompt an object": {"prompt": {}, "chosen": "b", "rejected": "c"},
    "chosen without an answer": {"chosen": [{"role": "user", "content": "a"}], "rejected": "c"},
    "a transcript that nobody answers": {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
    "OpenAI's form with numbers": {"input": 1, "preferred_output": 2, "non_preferred_output": 3},
    "OpenAI's form without messages": {"input": {}, "preferred_output": [], "non_preferred_output": []},
    "a judgement that is a text": {"prompt": "a", "completion": "b", "label": "yes"},
    "answers of 5 MB": {"prompt": "a", "chosen": "b" * 5_000_000, "rejected": "c" * 5_000_000},
}
LONG_TALK = turns(*["hi", "yo"] * 10_000)

CASES = [
    *[Case(f"data file: {name}", make, SFT_ROWS) for name, make in FILES.items()],
    *[Case(f"data row: {name}", raw(text + "\n"), SFT_ROWS) for name, text in TEXTS.items()],
    *[Case(f"data row: {name}", raw(dumped(row) + "\n"), SFT_ROWS) for name, row in ROWS.items()],
    *[Case(f"data pair: {name}", raw(dumped(row) + "\n"), DPO_ROWS) for name, row in PAIRS.items()],
    *[
        Case(f"data row: messages = {told(value)}", raw(dumped({"messages": value})), SFT_ROWS)
        for value in (None, True, 5, 1e308, "x", {})
    ],
    *[
        Case(f"data preview: {name}", FILES[name], DATA)
        for name in ("a pipe", "an array nested 100,000 deep", "random bytes")
    ],
    Case("data preview: control characters in keys", raw(TEXTS["control characters in keys"]), DATA),
    Case("data preview: 20,000 turns", rows(LONG_TALK), DATA, ends="either"),
    Case("data row: 20,000 turns", rows(LONG_TALK), SFT_ROWS, ends="either"),
    Case("data row: 20,000 turns, the last one trained", rows(LONG_TALK), (*SFT_ROWS, "--loss-on", "last"), "either"),
    Case("data pair: 20,000 turns", rows({"prompt": LONG_TALK["messages"], "chosen": "a", "rejected": "b"}), DPO_ROWS),
    Case("data prompts: 20,000 turns", rows(LONG_TALK), GENERATE, ends="either"),
    Case("data prompts: no text", rows({"prompt": 5}), GENERATE),
    Case("data prompts: plain text", rows({"text": "a"}), GENERATE),
    Case("data prompts: 1,000,000 rows of no form", large_rows('{"a": 1}', 1_000_000), GENERATE),
    *[
        Case(f"data file: called d{suffix}", put(f"d{suffix}", LINE), (*SFT_ROWS[:4], f"d{suffix}", *SFT_ROWS[5:]))
        for suffix in ("", ".csv", ".parquet", ".jsonl.gz", "." + "x" * 200)
    ],
    *[
        Case(f"data: {data} for {command}", nothing, (command, "--model", "m", "--data", data, *more))
        for command, data, more in (
            ("dpo", "good.jsonl", ("--out", "o")),
            ("reward", "good.jsonl", ("--out", "o")),
            ("sft", "pairs.jsonl", ("--out", "o")),
            ("distill", "pairs.jsonl", ("--out", "o", "--teacher", "m", "--sft-weight", "1")),
            ("eval", "pairs.jsonl", ()),
        )
    ],
    Case(
        "data: pairs for a loss on judged answers",
        nothing,
        (*DPO_ROWS[:4], "pairs.jsonl", "--out", "o", "--loss", "kto"),
    ),
    Case("data: rows of which all are left out", rows({"a": 1}, {"b": 2}), (*SFT_ROWS, "--on-bad-row", "skip")),
    Case(
        "data: 1,000,000 rows left out beside a good one",
        all_of(large_rows('{"a": 1}', 1_000_000), edit("d.jsonl", lambda text: LINE.encode() + b"\n" + text)),
        (*SFT_ROWS, "--on-bad-row", "skip"),
        ends="either",
    ),
    Case(
        "data: validation rows that are none",
        put("v.jsonl", "{"),
        (*SFT_ROWS[:4], "good.jsonl", "--out", "o", "--val", "v.jsonl"),
    ),
    Case("data: a share of one row", rows(GOOD), (*SFT_ROWS, "--val", "50%")),
]
