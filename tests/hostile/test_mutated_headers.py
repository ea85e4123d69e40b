"""Valid headers with something changed, 2,000 of them: read, or refused in one clear line; never another exception."""

import copy
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fourbit
from fourbit.errors import InputError
from fourbit.files import read_json
from fourbit.models import gguf_model, hf
from fourbit.models.families import read_spec
from fourbit.models.gguf import GGUFFile

EXAMPLES = 400  # of each kind
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../x", "/etc/passwd", "\0", "\ud800", "nf4", "F32", "F8_E4M3", "é" * 300, "llama", "LORA"),
    *([], [[]], {}, [0], [-1, 2], ["a"], {"a": 1}, {"rope_type": "yarn"}, [0, 4], [[1]] * 50),
]
values = st.one_of(st.sampled_from(ODD), st.integers(-3, 300), st.text(max_size=6), st.floats())


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(way for key, child in inside for way in paths(child, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> bytes:
    """The JSON text of `value` after one to three changes: values, keys, bytes of the text."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(paths(value)[1:] or [(None,)]))
        inner = value
        with suppress(KeyError, IndexError, TypeError):
            for key in way:
                inner = inner[key]
            match draw(st.sampled_from(["value", "drop", "key", "twin"])):
                case "value":
                    inner[last] = copy.deepcopy(draw(values))  # a later change goes into it
                case "drop":
                    del inner[last]
                case "key":
                    inner[draw(st.text(max_size=8))] = inner.pop(last)
                case "twin":
                    inner[f"{last}x"] = inner[last]
    with suppress(ValueError):
        text = bytearray(json.dumps(value).encode("utf-8", "surrogatepass"))
        for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
            place = draw(st.integers(0, max(0, len(text) - 1)))
            text[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        return bytes(text)
    return b"{"


def refused_or_read(read: Callable[[], object]) -> None:
    try:
        read()
    except InputError as error:
        assert 0 < len(str(error)) <= 2000 and "\n\n" not in str(error)


def mutated(kind: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on EXAMPLES changed headers, each within 5 seconds."""
    how = settings(
        max_examples=EXAMPLES, deadline=5000, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    return lambda test: how(given(data=st.data())(test))


@pytest.fixture(scope="module")
def valid(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in a folder: a small file of tensors, shards and an index, a config, a GGUF file, an adapter."""
    here = tmp_path_factory.mktemp("headers") / "in"
    here.mkdir()
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(2, 3), "b": torch.randn(4).half(), "c": torch.tensor(1.0)}
    save_file(tensors, here / "one.safetensors", {"format": "pt"})
    (here / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    from gguf_bytes import tiny_gguf

    (here / "m.gguf").write_bytes(tiny_gguf(load_file(tiny_folder / "model.safetensors"), tiny_folder))
    fourbit.attach(model := tiny(), fourbit.LoRAConfig(rank=2))
    fourbit.save_adapter(model, here / "adapter")
    return here


def tiny() -> nn.Module:
    return nn.ModuleDict({"up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4)})


@mutated("safetensors")
def test_safetensors_headers(valid: Path, data: st.DataObject) -> None:
    raw = (valid / "one.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    text = data.draw(changed(json.loads(raw[8 : 8 + size])))
    length = data.draw(st.sampled_from([len(text)] * 6 + [len(text) - 1, len(text) + 1, 2**40]))
    folder = valid / "st"
    folder.mkdir(exist_ok=True)
    (folder / hf.SINGLE).write_bytes(struct.pack("<Q", max(0, length)) + text + raw[8 + size :])
    refused_or_read(lambda: (hf.tensor_shapes(folder), list(hf.iter_tensors(folder)), hf.packed_layers(folder)))


@mutated("index")
def test_indexes(valid: Path, data: st.DataObject) -> None:
    folder = valid / "sharded"
    folder.mkdir(exist_ok=True)
    for name in "xy":
        save_file({f"{name}.{i}": torch.ones(2) for i in range(2)}, folder / f"{name}.safetensors")
    save_file({"secret": torch.ones(1)}, valid / "secret.safetensors")
    places = {f"{name}.{i}": f"{name}.safetensors" for name in "xy" for i in range(2)}
    value = {"metadata": {"total_size": 32}, "weight_map": places}
    (folder / hf.INDEX).write_bytes(data.draw(changed(value)))
    found: list[str] = []
    refused_or_read(lambda: found.extend(name for name, _ in hf.iter_tensors(folder)))
    assert set(found) <= places.keys()


@mutated("config")
def test_configs(valid: Path, data: st.DataObject) -> None:
    (valid / "changed.json").write_bytes(data.draw(changed(json.loads((valid / "config.json").read_text()))))
    refused_or_read(lambda: read_spec(read_json(valid / "changed.json", hf.CONFIG_BYTES)))


@mutated("gguf")
def test_gguf_headers(valid: Path, data: st.DataObject) -> None:
    raw = bytearray((valid / "m.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, 64), st.integers(0, 4000)))
        new = data.draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([b"\xff" * 8, bytes(8)])))
        raw[place : place + data.draw(st.sampled_from([len(new)] * 4 + [0]))] = new
    (valid / "changed.gguf").write_bytes(raw)

    def read() -> None:
        file = GGUFFile(valid / "changed.gguf")
        gguf_model.read_spec(file)
        gguf_model.tensor_shapes(file)

    refused_or_read(read)


@mutated("adapter")
def test_adapter_configs(valid: Path, data: st.DataObject) -> None:
    (valid / "changed").mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (valid / "changed" / name).write_bytes((valid / "adapter" / name).read_bytes())
    config = valid / "changed" / "adapter_config.json"
    config.write_bytes(data.draw(changed(json.loads(config.read_text()))))
    refused_or_read(lambda: fourbit.load_adapter(tiny(), valid / "changed", tell=lambda text: None))


def test_nothing_outside_was_touched(valid: Path) -> None:
    assert [path.name for path in valid.parent.iterdir()] == ["in"]
