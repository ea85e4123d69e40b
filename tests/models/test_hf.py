"""Reading a Hugging Face folder: what is in it comes out, and nothing a folder can hold does harm."""

import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourbit.errors import InputError
from fourbit.models.hf import INDEX, SINGLE, iter_tensors, tensor_shapes
from fourbit.models.load import load_decoder

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    return struct.pack("<Q", len(header)) + header + data


def holding(*tensors: tuple[str, list[int], int, int]) -> bytes:
    """A file of zeros up to the last end, with tensors a, b, ...: dtype, shape, start and end."""
    entries = {"ab"[i]: {"dtype": d, "shape": s, "data_offsets": [a, b]} for i, (d, s, a, b) in enumerate(tensors)}
    return safetensors_bytes(json.dumps(entries).encode(), bytes(tensors[-1][3]))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    shapes = tensor_shapes(folder)
    tensors = {name: tensor.clone() for name, tensor in iter_tensors(folder)}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).to(dtype), "b.c": torch.tensor([1.5]).to(dtype)}
    save_file(tensors, tmp_path / SINGLE)
    got = read_all(tmp_path)
    assert got.keys() == tensors.keys()
    assert all(got[name].dtype == dtype and torch.equal(got[name], tensors[name]) for name in tensors)


def test_shards_are_read_one_at_a_time(tmp_path: Path) -> None:
    places = {f"t{i}.{j}": f"model-{i}.safetensors" for i in range(3) for j in range(3)}
    for i in range(3):
        save_file({f"t{i}.{j}": torch.full((2,), 10.0 * i + j) for j in range(3)}, tmp_path / f"model-{i}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    open_files = set()
    for name, tensor in iter_tensors(tmp_path):
        assert tensor.tolist() == [10.0 * int(name[1]) + int(name[3])] * 2
        mapped = Path("/proc/self/maps").read_text()
        del tensor
        open_files.add(sum(file in mapped for file in set(places.values())))
    assert open_files == {1}
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    assert read_all(tmp_path) == {"a": torch.ones(1)}


def linked(folder: Path, real: Path, link: str) -> Path:
    """A folder whose single file is a link to `real`."""
    for path in (folder, real.parent):
        path.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(1)}, real)
    (folder / SINGLE).symlink_to(link)
    return folder


def test_links_inside_a_folder_to_it_and_into_the_hugging_face_cache(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(linked(tmp_path / "m", tmp_path / "m" / "real.safetensors", "real.safetensors"))
    cache = tmp_path / "models--a--b"  # its snapshots link into the blob store beside them
    linked(cache / "snapshots" / "1234", cache / "blobs" / "0abc", "../../blobs/0abc")
    for folder in (tmp_path / "link", cache / "snapshots" / "1234"):
        assert read_all(folder)["a"].item() == 1.0


def test_a_link_out_of_a_folder_that_only_looks_like_a_cache(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a link out of its folder"):
        tensor_shapes(linked(tmp_path / "snapshots" / "1", tmp_path / "blobs" / "x", "../../blobs/x"))


NAMES: list[Any] = [
    *("../secret.safetensors", "../../etc/shadow", "sub/x.safetensors", "/etc/shadow", "/dev/zero", "./x.safetensors"),
    *("..", "", ".safetensors", "C:\\x.safetensors", "..\\x.safetensors", "c:x.safetensors", "x\0.safetensors"),
    *("x\n.safetensors", "x.bin", "x.safetensors.bin", "x.SAFETENSORS", "é" * 200 + ".safetensors"),
    *("\ud800.safetensors", "absent.safetensors", 7, None, ["x.safetensors"]),
]


@pytest.mark.parametrize("name", NAMES)
def test_shard_names_cannot_lead_elsewhere(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub", tmp_path):
        save_file({"a": torch.ones(1)}, place / "x.safetensors")
        save_file({"a": torch.ones(1)}, place / "secret.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    for read in (tensor_shapes, lambda folder: list(iter_tensors(folder))):
        with pytest.raises(InputError, match=r"weight_map|weight file|holds no (absent|.ud800)|cannot be read"):
            read(folder)


def link_out(path: Path) -> None:
    outside = path.parent.parent / "outside.safetensors"
    save_file({"a": torch.ones(1)}, outside)
    path.symlink_to(outside)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # absolute ones may be too long


IRREGULAR: dict[str, Callable[[Path], None]] = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "link out": link_out,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "socket": unix_socket,
}


@pytest.mark.parametrize("make", IRREGULAR.values(), ids=IRREGULAR)
@pytest.mark.parametrize("name", [SINGLE, "shard.safetensors"])
def test_only_regular_files_inside_are_opened(
    tmp_path: Path, make: Callable[[Path], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make(folder / name)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    with pytest.raises(InputError, match=r"holds no shard|link out|must be a regular file"):
        tensor_shapes(folder)


def test_an_index_of_a_million_shards_ends_at_the_first_missing_one(tmp_path: Path) -> None:
    index = {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(1_000_000)}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"holds no 0\.safetensors"):
        tensor_shapes(tmp_path)


def test_one_key_that_stands_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    """Counting each key among all of them took minutes."""
    keys = [*range(200_000), 199_999]
    (tmp_path / "config.json").write_text("{" + ", ".join(f'"{key}": 0' for key in keys) + "}")
    began = time.process_time()
    with pytest.raises(InputError, match="the key '199999' stands there twice"):
        load_decoder(tmp_path)
    assert time.process_time() - began < 20


def test_a_tensor_that_a_header_names_twice_is_refused(tmp_path: Path) -> None:
    """safetensors' own reader takes the last of them."""
    one = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    (tmp_path / SINGLE).write_bytes(safetensors_bytes(b"{" + one + b", " + one + b"}", bytes(4)))
    assert load_file(tmp_path / SINGLE).keys() == {"a"}
    with pytest.raises(InputError, match="no valid safetensors file: the key 'a' stands there twice"):
        tensor_shapes(tmp_path)


@pytest.mark.parametrize(
    ("shards", "weight_map", "message"),
    [
        ({"x": "a", "y": "a"}, {"a": "x", "b": "y"}, "1 missing: b"),
        ({"x": "a", "y": "ab"}, {"a": "x", "b": "y"}, "1 unknown: a"),
        ({"x": "ab"}, {"a": "x"}, "1 unknown: b"),
        ({"x": "a"}, {"a": "x", "b": "x"}, "1 missing: b"),
    ],
)
def test_shards_must_hold_what_the_index_says(
    tmp_path: Path, shards: dict[str, str], weight_map: dict[str, str], message: str
) -> None:
    for file, names in shards.items():
        save_file({name: torch.ones(1) for name in names}, tmp_path / f"{file}.safetensors")
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in weight_map.items()}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    for read in (tensor_shapes, lambda folder: list(iter_tensors(folder))):
        with pytest.raises(InputError, match=message):
            read(tmp_path)


GOOD = holding(("F32", [2], 0, 8))
BROKEN = {
    **{f"cut after {n}": GOOD[:n] for n in range(0, len(GOOD), 4)},
    "header length 2^62": struct.pack("<Q", 1 << 62) + b"{}",
    "header length 2^64 - 1": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "header above 100 MB": struct.pack("<Q", 100_000_001) + b"{}",
    "no JSON": safetensors_bytes(b"hello"),
    "an array": safetensors_bytes(b"[]"),
    "not UTF-8": safetensors_bytes(b'{"\xff":1}'),
    "deep nesting": safetensors_bytes(b'{"a":' * 20000),
    "overlap": holding(("F32", [2], 0, 8), ("F32", [2], 4, 12)),
    "hole": holding(("F32", [1], 0, 4), ("F32", [1], 8, 12)),
    "trailing bytes": GOOD + b"x",
    "negative dimension": holding(("F32", [-2], 0, 8)),
    "overflowing shape": holding(("F32", [1 << 33, 1 << 33], 0, 8)),
    "shape and bytes differ": holding(("F32", [3], 0, 8)),
    "end before start": safetensors_bytes(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', bytes(8)),
    "past the end": holding(("F32", [2], 8, 16))[:-8],
    "unknown dtype": holding(("F33", [2], 0, 8)),
    "8-bit floats": holding(("F8_E4M3", [8], 0, 8)),
    "4-bit floats": holding(("F4", [16], 0, 8)),
    "integers": holding(("I32", [2], 0, 8)),
    "booleans": holding(("BOOL", [8], 0, 8)),
    "complex numbers": holding(("C64", [1], 0, 8)),
    "twice the same name": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    (tmp_path / SINGLE).write_bytes(GOOD)
    assert tensor_shapes(tmp_path) == {"a": (2,)}
    (tmp_path / SINGLE).write_bytes(BROKEN[case])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        tensor_shapes(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.pkl", "w.npy"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)  # opening it would hang
    with pytest.raises(InputError, match=f"{name} but no safetensors.*can run code.*save_pretrained"):
        tensor_shapes(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe{}", "must be UTF-8"),
        (b"[1]", "JSON object, got list"),
        (b"7", "JSON object, got int"),
        (b'{"a":' * 20000, "must be JSON"),
        (b"[" * 100000, "must be JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "must be JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands there twice"),
        (b" " * (5 << 20) + b"{}", "at most 4,194,304 bytes, got 5,242,882"),
        (b'\xef\xbb\xbf{"model_type": "llama"}', "hidden_size must be"),  # a byte-order mark
    ],
)
def test_a_config_that_is_no_small_json_object(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(InputError, match=message):
        load_decoder(tmp_path)


@pytest.mark.parametrize("make", [lambda path: None, os.mkfifo, os.mkdir])
def test_a_missing_config(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"needs the file config\.json"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, r"needs model\.safetensors, or shards with model\.safetensors\.index\.json; found neither"),
        *(({"weight_map": bad}, "weight_map must be a non-empty object") for bad in (None, [], {}, "x", 3)),
        ({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(1_000_000)}}, r"holds no 0\.safetensors"),
    ],
)
def test_a_folder_without_weights_or_with_an_index_that_leads_to_none(tmp_path: Path, index: Any, message: str) -> None:
    if index is not None:
        (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        tensor_shapes(tmp_path)
