"""Tiny tokenizers that satisfy `TokenizerLike`, and a writer of data files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "You are a helpful assistant. The user asks a question and the assistant answers it.",
    "the quick brown fox jumps over the lazy dog, and what is the capital of France?",
    "Paris is the capital of France. Hello, how can I help you today? Thank you!\n\nYes, no, maybe.",
]


class TinyTokenizer:
    """A byte-level BPE trained on three lines, with the special tokens a test wants."""

    def __init__(
        self,
        specials: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos: str | None = None,
        eos: str | None = "<|im_end|>",
        stops: Sequence[str] = (),
        chat_template: str | None = None,
        pieces: Sequence[str] = (),
    ) -> None:
        self.backend = Tokenizer(models.BPE())
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
        self.backend.train_from_iterator(CORPUS, trainer)
        self.backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
        self.backend.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
        self.chat_template, self.bos_token, self.eos_token = chat_template, bos, eos
        self.named_tokens = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text is not None}
        self.special_tokens = tuple(specials)
        self.bos_id, self.eos_id = self.id(bos), self.id(eos)
        self.vocab_size = self.backend.get_vocab_size()
        self.stop_ids = tuple(
            self.backend.token_to_id(token) for token in dict.fromkeys([*stops, *([eos] if eos else [])])
        )

    def id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., TinyTokenizer]:
    return TinyTokenizer


@pytest.fixture(scope="session")
def tokenizer() -> TinyTokenizer:
    return TinyTokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or text taken as it is) to a .jsonl file."""

    def write_rows(rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write_rows
