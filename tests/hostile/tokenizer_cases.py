"""Tokenizer files: what the tokenizers library panics at, what multiplies text, what is of another type."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Case, Make
from makes import (
    CHAT,
    DATA,
    DROPPED,
    ESCAPES,
    GOOD,
    HUGE,
    LONG,
    all_of,
    folder,
    gone,
    keys,
    link,
    nested,
    pipe,
    put,
    put_json,
    rows,
    sparse,
    told,
    turns,
)

FILE, CONFIG, OLDER = "m/tokenizer.json", "m/tokenizer_config.json", "m/special_tokens_map.json"


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Make:
    """tokenizer.json changed, and a row with blanks, repeated letters and a letter that NFKD makes 18 of."""

    def make(here: Path) -> None:
        value = json.loads((here / FILE).read_text())
        change(value)
        (here / FILE).write_text(json.dumps(value))
        rows(turns("aaaa bb " + "a" * 200 + " \ufdfa" * 20, "yo " * 20 + "\U0001f600"))(here)

    return make


def part(name: str, value: Any) -> Make:
    return tokenizer(lambda held: held.update({name: value}))


def model(**changes: Any) -> Make:
    """The model's own fields, those of BPE."""
    return tokenizer(lambda held: held["model"].update(changes))


def other(**fields: Any) -> Make:
    """Another model, without the added tokens that its vocabulary lacks."""
    return all_of(
        tokenizer(lambda held: held.update(model=fields, added_tokens=[])),
        put_json(CONFIG, {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"}),
    )


def added(**changes: Any) -> Make:
    return tokenizer(lambda held: held["added_tokens"][0].update(changes))


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(pattern: dict[str, str], behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def deep(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        inner = sequence(inner)
    return inner


TIMES_1000 = [replace({"String": letter}, letter * 1000) for letter in "a"]
FILES: dict[str, Make] = {
    "empty": put(FILE, b""),
    "a list": put(FILE, "[]"),
    "a text": put(FILE, '"BPE"'),
    "no keys": put(FILE, "{}"),
    "UTF-16": put(FILE, "{}".encode("utf-16")),
    "not UTF-8": put(FILE, b'{"version": "\xff"}'),
    "cut off": lambda here: (here / FILE).write_bytes((here / FILE).read_bytes()[:3000]),
    "nested 100,000 deep": put(FILE, '{"model": ' + nested(100_000) + "}"),
    "nested 120 deep": put(FILE, '{"model": ' + nested(120) + "}"),
    "40 GB of nothing": sparse(FILE, 40 << 30),
    "300 MB of nothing": sparse(FILE, 300 << 20),
    "a pipe": pipe(FILE),
    "a folder": folder(FILE),
    "a link to itself": link(FILE, "tokenizer.json"),
    "a link to /dev/zero": link(FILE, "/dev/zero"),
    "not there": gone(FILE),
    "a sentencepiece model instead": all_of(gone(FILE), put("m/tokenizer.model", b"\n\x0b")),
}
PARTS: dict[str, Make] = {
    "no model": tokenizer(lambda held: held.pop("model")),
    "a model that is null": part("model", None),
    "a model of an unknown type": part("model", {"type": "Evil"}),
    "a model of 100,000 characters": part("model", {"type": LONG}),
    "another version": part("version", "9.0"),
    "merges of one word": model(merges=["ab"]),
    "merges of three words": model(merges=["a b c"]),
    "merges of unknown tokens": model(merges=["zz qq"]),
    "merges of escapes": model(merges=[[ESCAPES, ESCAPES]]),
    "merges whose join is no token": model(merges=["a b"]),
    "merges of numbers": model(merges=[[1, 2]]),
    "merges of empty texts": model(merges=[["", ""]]),
    "merges a text": model(merges="a b"),
    "merges of 100,000 characters": model(merges=[[LONG, LONG]]),
    "merges shorter than the prefix of what goes on": model(
        continuing_subword_prefix="##########", merges=["a b"], vocab={"a": 0, "b": 1, "ab": 2}
    ),
    "a vocabulary that is a list": model(vocab=["a", "b"]),
    "a vocabulary that is empty": model(vocab={}, merges=[]),
    "ids that are texts": model(vocab={"a": "0"}),
    "ids that are negative": model(vocab={"a": -1}),
    "ids of 2^32": model(vocab={"a": 1 << 32}),
    "an unknown token that is missing, and letters too": model(unk_token="<unk>", vocab={"a": 0}),
    "an unknown token that is a number": model(unk_token=5),
    "bytes that are missing": model(byte_fallback=True, vocab={"a": 0}),
    "dropout of 2": model(dropout=2.0),
    "dropout a text": model(dropout="x"),
    "a word level without an unknown token": other(type="WordLevel", vocab={"a": 0}, unk_token="<unk>"),
    "a word piece without an unknown token": other(
        type="WordPiece", vocab={"a": 0}, unk_token="<unk>", continuing_subword_prefix="##", max_input_chars_per_word=9
    ),
    "a word piece of words of 2^63": other(
        type="WordPiece", vocab={"a": 0}, unk_token="a", continuing_subword_prefix="", max_input_chars_per_word=2**63
    ),
    "a word piece of an empty word": other(
        type="WordPiece", vocab={"": 0, "[UNK]": 1}, unk_token="[UNK]", continuing_subword_prefix="",
        max_input_chars_per_word=100,
    ),
    "a unigram without an unknown token": other(type="Unigram", vocab=[["a", -1.0]], unk_id=None),
    "a unigram with its unknown token outside": other(type="Unigram", vocab=[["a", -1.0]], unk_id=7),
    "a unigram without words": other(type="Unigram", vocab=[], unk_id=0),
    "a unigram without words or unknown token": other(type="Unigram", vocab=[], unk_id=None),
    "a unigram of an empty word": other(type="Unigram", vocab=[["", 0.0], ["a", -1.0]], unk_id=0),
    "a unigram of texts for scores": other(type="Unigram", vocab=[["a", "x"]], unk_id=0),
    "a unigram of infinite scores": other(type="Unigram", vocab=[["<unk>", -1e308], ["a", 1e308]], unk_id=0),
    "a normalizer that is a text": part("normalizer", "NFC"),
    "a normalizer of an unknown type": part("normalizer", {"type": "Evil"}),
    "a charsmap that is no base64": part("normalizer", {"type": "Precompiled", "precompiled_charsmap": "***"}),
    "a charsmap that is empty": part("normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}),
    "a charsmap of zeros": part(
        "normalizer", {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes(400)).decode()}
    ),
    "a charsmap whose trie is longer than it": part(
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff\xff\xff\x7f" + bytes(64)).decode()},
    ),
    "a charsmap of ones": part(
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\x40\0\0\0" + b"\xff" * 100).decode()},
    ),
    "a normalizer that multiplies by 10^12": part("normalizer", sequence(*TIMES_1000 * 4)),
    "a normalizer that replaces nothing": part("normalizer", replace({"String": ""}, "x" * 1000)),
    "a normalizer that replaces a pattern of nothing": part("normalizer", replace({"Regex": ""}, "x" * 1000)),
    "a normalizer that prepends 50 MB": part("normalizer", {"type": "Prepend", "prepend": "a" * 50_000_000}),
    "a normalizer with a pattern that is none": part("normalizer", replace({"Regex": "("}, "x")),
    "a normalizer with a pattern that goes back": part("normalizer", replace({"Regex": "(a+)+$"}, "x")),
    "a normalizer nested 200 deep": part("normalizer", deep(200)),
    "words by a pattern that is none": part("pre_tokenizer", split({"Regex": "["})),
    "words by a pattern that goes back": part("pre_tokenizer", split({"Regex": r"(a|aa)+\b\B"})),
    "words by a pattern of 100,000 characters": part("pre_tokenizer", split({"Regex": "(" * 100_000})),
    "words by an unknown behaviour": part("pre_tokenizer", split({"String": "a"}, "Evil")),
    "words by a metaspace of nothing": part(
        "pre_tokenizer", {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True}
    ),
    "words by a metaspace of two letters": part(
        "pre_tokenizer", {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always", "split": True}
    ),
    "a decoder of an unknown type": part("decoder", {"type": "Evil"}),
    "an added token that is a number": added(content=5),
    "an added token of id -1": added(id=-1),
    "an added token of another's id": added(id=0),
    "added tokens that are texts": part("added_tokens", ["<|im_end|>"]),
    "an added token of 100,000 characters of id -1": added(content=LONG, id=-1),
}  # fmt: skip
IDS: dict[str, Make] = {  # that a model has no embedding for, or that two tokens share
    "ids of 2^32 - 1": model(vocab={"a": (1 << 32) - 1}),
    "ids of 2^31": tokenizer(lambda held: held["model"]["vocab"].update(zz=1 << 31)),
    "ids twice the same": tokenizer(lambda held: held["model"]["vocab"].update(zz=0)),
    "an added token of id 10^9": added(id=10**9),
}
HARMLESS: dict[str, Make] = {  # the tokenizer is strange, but does what it says; or is refused
    "an unknown token that is missing": model(unk_token="<unk>"),
    "an unknown token that is missing, fused": model(unk_token="<unk>", fuse_unk=True),
    "a suffix of 100,000 characters": model(end_of_word_suffix=LONG),
    "a normalizer that goes back over any text": part("normalizer", replace({"Regex": r"(.*)*(.*)*\x00"}, "x")),
    "a normalizer nested 60 deep": part("normalizer", deep(60)),
    "a normalizer of 400,000 steps": part("normalizer", sequence(*[{"type": "NFKD"}] * 400_000)),
    "words by a pattern that goes back over any text": part("pre_tokenizer", split({"Regex": r"(\w|\W)*(.*)*\x00"})),
    "words by a pattern of a huge repetition": part("pre_tokenizer", split({"Regex": "((a{1000}){1000}){1000}"})),
    "a post-processor without its tokens": part(
        "post_processor",
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [],
         "special_tokens": {}},
    ),
    "a truncation whose stride is too long": part(
        "truncation", {"max_length": 1, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}
    ),
    "an added token of nothing": added(content=""),
    "added tokens in no order": tokenizer(lambda held: held["added_tokens"].reverse()),
    "padding to a multiple of 0": part(
        "padding",
        {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0,
         "pad_token": "x"},
    ),
    "50,000 added tokens": tokenizer(
        lambda held: held["added_tokens"].extend(
            {"id": 259 + i, "content": f"<{i}>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i in range(50_000)
        )
    ),
}  # fmt: skip
CONFIGS: dict[str, Make] = {
    "a list": put(CONFIG, "[]"),
    "empty": put(CONFIG, ""),
    "a pipe": pipe(CONFIG),
    "a folder": folder(CONFIG),
    "nested 2,000 deep": put(CONFIG, nested(2000)),
    "a key of 100,000 characters twice": put(CONFIG, json.dumps({LONG: 1})[:-1] + "," + json.dumps({LONG: 1})[1:]),
    **{
        f"{name} = {told(value)}": keys(CONFIG, **{name: value})
        for name in ("eos_token", "pad_token")
        for value in (5, HUGE, ["x"], {"content": 5}, "none such")
    },
    "bos_token of escapes": keys(CONFIG, bos_token=ESCAPES),
    "bos_token of 100,000 characters": keys(CONFIG, bos_token=LONG),
    "bos_token of half a surrogate pair": keys(CONFIG, bos_token="\ud800"),
    "added_tokens_decoder a list": keys(CONFIG, added_tokens_decoder=[1]),
    "added_tokens_decoder of numbers": keys(CONFIG, added_tokens_decoder={"1": 5}),
    "added_tokens_decoder of escapes": keys(CONFIG, added_tokens_decoder={ESCAPES: {"content": ESCAPES}}),
    "added_tokens_decoder of 100,000 characters": keys(CONFIG, added_tokens_decoder={"1": {"content": LONG}}),
    "chat_template a number": keys(CONFIG, chat_template=5),
    "chat_template an object": keys(CONFIG, chat_template={"default": "x"}),
    "chat_template a list of numbers": keys(CONFIG, chat_template=[1, 2]),
    "chat_template a list with unhashable names": keys(CONFIG, chat_template=[{"name": [1], "template": "x"}]),
    "chat_template a list with no default": keys(CONFIG, chat_template=[{"name": ESCAPES, "template": "x"}] * 1000),
    "chat_template a default that is a number": keys(CONFIG, chat_template=[{"name": "default", "template": 5}]),
    "chat_template null and no built-in given": keys(CONFIG, chat_template=DROPPED),
    "the older map a list": put(OLDER, "[]"),
    "the older map of numbers": all_of(keys(CONFIG, eos_token=DROPPED), put_json(OLDER, {"eos_token": 5})),
    "a template file that is a pipe": pipe("m/chat_template.jinja"),
    "a template file that is not UTF-8": put("m/chat_template.jinja", b"\xff\xfe{{"),
    "a template file of 2 MB": put("m/chat_template.jinja", "{# " + "a" * 2_000_000 + " #}"),
    "a template file of 40 GB": sparse("m/chat_template.jinja", 40 << 30),
}
MAYBE = ("chat_template null and no built-in given", "a template file that is a pipe", "added_tokens_decoder a list")


def teacher(change: Make) -> Make:
    """A second model `t` to learn from, changed while it is called `m`."""

    def make(here: Path) -> None:
        shutil.copytree(here / "m", here / "student")
        change(here)
        (here / "m").rename(here / "t")
        (here / "student").rename(here / "m")

    return make


DISTILL = ("distill", "--model", "m", "--teacher", "t", "--data", "good.jsonl", "--out", "o", "--steps", "1")
TEACHERS = {
    "of other tokens": tokenizer(lambda held: held["model"]["vocab"].update(zz=999)),
    "of the same tokens in another order": tokenizer(lambda held: swap(held["model"]["vocab"])),
    "without a tokenizer": gone(FILE),
    "without weights": gone("m/model.safetensors"),
    "of another size than its weights": keys("m/config.json", hidden_size=64),
}


def swap(vocabulary: dict[str, int]) -> None:
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


CASES = [
    *[Case(f"teacher: {name}", teacher(change), DISTILL) for name, change in TEACHERS.items()],
    *[Case(f"tokenizer file: {name}", make, CHAT) for name, make in FILES.items()],
    *[Case(f"tokenizer: {name}", make, DATA) for name, make in PARTS.items()],
    *[Case(f"tokenizer: {name}", make, CHAT) for name, make in IDS.items()],
    *[Case(f"tokenizer: {name}", make, DATA, ends="either") for name, make in HARMLESS.items()],
    *[
        Case(
            f"tokenizer config: {name}",
            all_of(rows(GOOD), make),
            DATA,
            ends="either" if name in MAYBE else "refused",
        )
        for name, make in CONFIGS.items()
    ],
]
