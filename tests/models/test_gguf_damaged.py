"""A GGUF of K-quants with a SentencePiece vocabulary, damaged anywhere: read or refused in one line, and soon."""

import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from fourbit.errors import InputError
from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_tokenizer import gguf_tokenizer
from fourbit.models.load import load_decoder

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "a", "b", "ab", "▁ab", "<b>"]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]
TYPES = [2, 3, 3, *[6] * 256, *[1] * 5, 4]
TENSORS = {"attn_q": "Q4_K", "attn_k": "Q5_K", "attn_v": "Q6_K", "attn_output": "Q2_K"}
TENSORS |= {"ffn_gate": "Q3_K", "ffn_up": "Q5_1", "ffn_down": "MXFP4"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    writer, rng = GGUFWriter(path, "qwen2"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0, -1000.0])
    writer.add_token_types(TYPES)
    writer.add_add_space_prefix(True)
    one = np.ones(256, dtype=np.float32)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", one)
    for name in ("attn_q", "attn_k", "attn_v"):
        writer.add_tensor(f"blk.0.{name}.bias", one)
    kinds = {"token_embd": "IQ4_NL"} | {f"blk.0.{name}": kind for name, kind in TENSORS.items()}
    for name, kind in kinds.items():
        values, length = gguf.GGML_QUANT_SIZES[Kind[kind]]
        rows = len(TOKENS) if name == "token_embd" else 32 if name in ("blk.0.ffn_gate", "blk.0.ffn_up") else 256
        size = (32 if name == "blk.0.ffn_down" else 256) // values * length
        writer.add_tensor(f"{name}.weight", rng.integers(0, 60, (rows, size), dtype=np.uint8), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def use(path: Path) -> list[int]:
    """Everything that the file can be asked for; returns tokens."""
    tokenizer = gguf_tokenizer(GGUFFile(path).metadata)
    ids = tokenizer.encode("ab<b> é\n</s>")
    tokenizer.decode(ids)
    load_decoder(path)
    return ids


def test_the_whole_file_is_read(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert [TOKENS[index] for index in use(path)] == [
        *("▁ab", "<b>", "▁", "▁", "<0xC3>", "<0xA9>", "<0x0A>", "</s>")
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9), st.booleans()), min_size=1, max_size=4),
    st.sampled_from([0.05, 0.3, 1.0]),
)
def test_changed_bytes_are_read_or_refused(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, changes: Any, part: float
) -> None:
    """Most changes fall on the header, some anywhere."""
    raw = whole
    for place, run, insert in changes:
        at = int(place * part * len(raw))
        raw = raw[:at] + run + raw[at + (0 if insert else len(run)) :]
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(raw)
    began = time.process_time()
    try:
        use(path)
    except InputError as error:
        assert len(str(error)) < 2000 and "\n" not in str(error)
    assert time.process_time() - began < 5
