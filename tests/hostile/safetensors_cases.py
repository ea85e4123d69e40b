"""safetensors: headers that lie, tensors that do not fit, shards and an index that contradict each other."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Case, Make
from makes import (
    CHAT,
    ESCAPES,
    GENERATE,
    GOOD,
    LONG,
    SFT_ROWS,
    all_of,
    edit,
    folder,
    gone,
    link,
    nested,
    pipe,
    put,
    put_json,
    rows,
    sparse,
)
from safetensors.torch import load_file, save_file

FILE, INDEX = "m/model.safetensors", "m/model.safetensors.index.json"
NORM, EMBED, QUERY = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = FILE) -> Make:
    """The model's tensors, changed."""

    def make(here: Path) -> None:
        held = load_file(here / FILE)
        change(held)
        save_file(held, here / file, metadata={"format": "pt"})

    return make


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    return tensors(lambda held: held.update({name: change(held[name]).contiguous()}))


def eight_bits(*scales: torch.Tensor) -> Make:
    """A weight of 8-bit floats, with these scales under their usual names."""

    def change(held: dict[str, torch.Tensor]) -> None:
        held[QUERY] = held[QUERY].to(torch.float8_e4m3fn)
        held.update({QUERY + name: scale for name, scale in zip(("_scale", "_scale_inv"), scales, strict=False)})

    return tensors(change)


def header(change: Callable[[dict[str, Any]], object]) -> Make:
    """The header changed; the bytes stay where they are."""

    def make(here: Path) -> None:
        raw = (here / FILE).read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        table = json.loads(raw[8 : 8 + size])
        change(table)
        text = json.dumps(table).encode()
        (here / FILE).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])

    return make


def field(name: str, key: str, value: Any) -> Make:
    return header(lambda table: table[name].update({key: value}))


def raw(text: bytes, size: int | None = None, data: bytes = b"") -> Make:
    return put(FILE, struct.pack("<Q", len(text) if size is None else size) + text + data)


def cut(share: float) -> Make:
    return edit(FILE, lambda held: held[: int(len(held) * share)])


def shards(weight_map: Any, **more: Any) -> Make:
    """The one file as a shard, and an index."""

    def make(here: Path) -> None:
        (here / FILE).rename(here / "m" / "a.safetensors")
        held = load_file(here / "m" / "a.safetensors")
        value = weight_map(dict.fromkeys(held, "a.safetensors")) if callable(weight_map) else weight_map
        (here / INDEX).write_text(json.dumps({"weight_map": value, **more}))

    return make


def two_shards(here: Path) -> None:
    held = load_file(here / FILE)
    (here / FILE).unlink()
    for name in ("a", "b"):
        save_file(held, here / "m" / f"{name}.safetensors")
    half = {key: f"{'ab'[i % 2]}.safetensors" for i, key in enumerate(held)}
    (here / INDEX).write_text(json.dumps({"weight_map": half}))


HEADERS: dict[str, Make] = {
    "empty": put(FILE, b""),
    "7 bytes": put(FILE, bytes(7)),
    "8 bytes": put(FILE, bytes(8)),
    "a header of 2^62 bytes": raw(b"{}", 1 << 62),
    "a header of 2^64 - 1 bytes": raw(b"{}", (1 << 64) - 1),
    "a header of 101 MB": raw(b"{}" + b" " * 101_000_000),
    "a header of 90 MB": raw(b"{" + b" " * 90_000_000 + b"}"),
    "a header beyond the end": raw(b"{}", 3),
    "a header that is a list": raw(b"[]"),
    "a header that is null": raw(b"null"),
    "a header that is not UTF-8": raw(b'{"\xff": 1}'),
    "a header nested 20,000 deep": raw(b'{"a": ' + nested(20_000).encode() + b"}"),
    "a header that does not end": raw(b'{"a": {'),
    "a header that says a tensor twice": raw(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        data=bytes(4),
    ),
    "a header with no tensor": raw(b"{}"),
    "metadata of numbers": header(lambda table: table.update(__metadata__={"format": 1})),
    "metadata a list": header(lambda table: table.update(__metadata__=[])),
    "an unknown dtype": field(NORM, "dtype", "F31"),
    "a dtype of another size": field(NORM, "dtype", "F64"),
    "dtype null": field(NORM, "dtype", None),
    "a shape that is negative": field(NORM, "shape", [-32]),
    "a shape that is a number": field(NORM, "shape", 32),
    "a shape of floats": field(NORM, "shape", [32.0]),
    "a shape of 2^63 squared": field(NORM, "shape", [1 << 63, 1 << 63]),
    "a shape of 2^32 thrice, 0 in 64 bits": field(NORM, "shape", [1 << 32, 1 << 32, 1 << 32]),
    "a shape of 10,000 ones": field(NORM, "shape", [1] * 10_000 + [32]),
    "offsets that overlap": field(NORM, "data_offsets", [0, 128]),
    "offsets turned round": header(lambda table: table[NORM]["data_offsets"].reverse()),
    "offsets beyond the end": field(NORM, "data_offsets", [1 << 40, (1 << 40) + 128]),
    "offsets that are one number": field(NORM, "data_offsets", [0]),
    "offsets of texts": field(NORM, "data_offsets", ["0", "128"]),
    "a tensor that is a text": header(lambda table: table.update({NORM: "x"})),
    "a hole": edit(FILE, lambda held: held + bytes(100)),
    "cut in the header": cut(0.01),
    "cut in the tensors": cut(0.7),
    "without its last byte": edit(FILE, lambda held: held[:-1]),
    "40 GB of nothing": sparse(FILE, 40 << 30),
    "40 GB after a header": sparse(FILE, 40 << 30, struct.pack("<Q", 2) + b"{}"),
    "a folder": folder(FILE),
    "a pipe": pipe(FILE),
    "a link to itself": link(FILE, "model.safetensors"),
    "a link to nothing": link(FILE, "nothing"),
    "a link out of the folder": all_of(edit(FILE, lambda held: held), link("m/model.safetensors", "../m.gguf")),
    "a link to /dev/zero": link(FILE, "/dev/zero"),
    "not there": gone(FILE),
    "a pickle instead": all_of(gone(FILE), put("m/pytorch_model.bin", b"\x80\x04.")),
    "pickles of many names instead": all_of(gone(FILE), put(f"m/{ESCAPES.replace('/', '')}.bin", b"\x80\x04.")),
}
TENSORS: dict[str, Make] = {
    "NaN": one(NORM, lambda t: t * float("nan")),
    "infinity in one place": one(
        QUERY, lambda t: t.masked_fill(torch.arange(t.numel()).view(t.shape) == 7, float("inf"))
    ),
    "too large for the dtype": one(NORM, lambda t: t.double() * 1e300),
    "whole numbers": one(QUERY, lambda t: t.to(torch.int64)),
    "booleans": one(QUERY, lambda t: t > 0),
    "8-bit floats": one(QUERY, lambda t: t.to(torch.float8_e4m3fn)),
    "8-bit floats with scales of another shape": eight_bits(torch.ones(3)),
    "8-bit floats with a scale that is NaN": eight_bits(torch.tensor(float("nan"))),
    "8-bit floats with two scales": eight_bits(torch.ones(1), torch.ones(1)),
    "complex numbers": one(QUERY, lambda t: t.to(torch.complex64)),
    "turned round": one("model.layers.0.mlp.up_proj.weight", lambda t: t.T),
    "flat": one(QUERY, lambda t: t.flatten()),
    "a scalar": one(NORM, lambda t: t[0].clone()),
    "with no element": one(NORM, lambda t: t[:0].clone()),
    "one row more": one(EMBED, lambda t: torch.cat([t, t[:1]])),
    "missing": tensors(lambda held: held.pop(QUERY)),
    "missing: all of them": tensors(lambda held: held.clear()),
    "an extra layer": tensors(lambda held: held.update({QUERY.replace("0", "2"): held[QUERY].clone()})),
    "an unknown one": tensors(lambda held: held.update({"extra": held[QUERY].clone()})),
    "an unknown one of escapes": tensors(lambda held: held.update({ESCAPES: held[QUERY].clone()})),
    "an unknown one of 100,000 characters": tensors(lambda held: held.update({LONG: held[QUERY].clone()})),
    "whole numbers under 100,000 characters": tensors(lambda held: held.update({LONG: torch.zeros(1).long()})),
    "20,000 unknown ones": tensors(lambda held: held.update({f"t{i}": torch.zeros(1) for i in range(20_000)})),
    "a head of another size than the tied embedding": tensors(
        lambda held: held.update({"lm_head.weight": torch.randn(258, 32)})
    ),
    "names of a model that was compiled": tensors(
        lambda held: [held.update({f"_orig_mod.{name}": held.pop(name)}) for name in list(held)]
    ),
}
INDEXES: dict[str, Make] = {
    "no map": shards(None),
    "a list": shards(["a.safetensors"]),
    "an empty map": shards({}),
    "numbers": shards({NORM: 1}),
    "lists": shards({NORM: ["a.safetensors"]}),
    "a shard that is missing": shards({NORM: "b.safetensors"}),
    "a shard above": shards({NORM: "../m/a.safetensors"}),
    "a shard of an absolute path": shards({NORM: "/etc/passwd.safetensors"}),
    "a shard of another kind": shards({NORM: "config.json"}),
    "a shard of escapes": shards({NORM: ESCAPES + ".safetensors"}),
    "a shard of 100,000 characters": shards({NORM: LONG + ".safetensors"}),
    "a shard with half a surrogate pair": shards({NORM: "\ud800.safetensors"}),
    "a tensor that the shard lacks": shards(lambda held: {**held, "x": "a.safetensors"}),
    "a tensor of 100,000 characters that the shard lacks": shards(lambda held: {**held, LONG: "a.safetensors"}),
    "a tensor of escapes that the shard lacks": shards(lambda held: {**held, ESCAPES: "a.safetensors"}),
    "a tensor left out": shards(lambda held: {name: held[name] for name in held if name != NORM}),
    "each tensor in both shards": two_shards,
    "nested 2,000 deep": all_of(shards({}), put(INDEX, '{"weight_map": ' + nested(2000) + "}")),
    "no JSON": all_of(shards({}), put(INDEX, "{")),
    "a pipe": all_of(shards({}), pipe(INDEX)),
    "a folder": all_of(shards({}), folder(INDEX)),
    "300,000 entries": all_of(
        shards({}), put_json(INDEX, {"weight_map": {f"t{i}": "a.safetensors" for i in range(300_000)}})
    ),
    "200,000 shards": all_of(
        shards({}), put_json(INDEX, {"weight_map": {f"t{i}": f"a{i}.safetensors" for i in range(200_000)}})
    ),
}


def overflowing(here: Path) -> None:
    """Finite weights whose products are not."""
    tensors(lambda held: [held[name].mul_(1e30) for name in held if "mlp" in name])(here)


CASES = [
    *[Case(f"safetensors: {name}", make, CHAT) for name, make in HEADERS.items()],
    *[Case(f"safetensors tensor: {name}", make, CHAT) for name, make in TENSORS.items()],
    Case(
        "safetensors tensor: a head that differs from the tied embedding",
        tensors(lambda held: held.update({"lm_head.weight": torch.randn(259, 32)})),
        CHAT,
        ends="done",
    ),
    Case(
        "safetensors tensor: the head alone of a tied model",
        tensors(lambda held: held.update({"lm_head.weight": held.pop(EMBED)})),
        CHAT,
        ends="done",
    ),
    *[Case(f"safetensors index: {name}", make, CHAT) for name, make in INDEXES.items()],
    *[
        Case(f"safetensors: activations that overflow, {name}", all_of(rows(GOOD), overflowing), argv, stdin="hi\n")
        for name, argv in {
            "greedy": GENERATE,
            "sampled": (*GENERATE, "--temperature", "1"),
            "top-p": (*GENERATE, "--temperature", "1", "--top-p", "0.5"),
            "in chat": (*CHAT, "--max-new-tokens", "2"),
            "evaluated": ("eval", "--model", "m", "--data", "d.jsonl", "--max-new-tokens", "2"),
            "trained": SFT_ROWS,
        }.items()
    ],
    Case("safetensors: too large for float16", one(NORM, lambda t: t * 1e6), (*CHAT, "--dtype", "float16")),
]
