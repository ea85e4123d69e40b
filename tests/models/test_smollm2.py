"""SmolLM2-135M-Instruct from its GGUF: the same 64 greedy tokens as transformers, for five prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fourbit.models.decoder import Decoder
from fourbit.models.generate import generate
from fourbit.models.load import load
from fourbit.text.tokenizer import Tokenizer

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    CHAT.format("What is the capital of France, and what is it known for?"),
    CHAT.format("Write a short poem about the sea."),
    CHAT.format("List three uses for 2 litres of vinegar."),
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village far from the river,",
]


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> tuple[Decoder, Tokenizer]:
    return load(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids(ours: tuple[Decoder, Tokenizer]) -> list[list[int]]:
    return [ours[1].encode(prompt) for prompt in PROMPTS]


@torch.no_grad()
def test_logits(ours: tuple[Decoder, Tokenizer], theirs: Any, ids: list[list[int]]) -> None:
    for row in ids:
        text = torch.tensor([row])
        expected = theirs(text).logits
        assert (ours[0](text) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_greedy_tokens(ours: tuple[Decoder, Tokenizer], theirs: Any, ids: list[list[int]]) -> None:
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        expected = [theirs.generate(torch.tensor([row]), **options)[0, len(row) :].tolist() for row in ids]
    assert generate(ours[0], ids, max_new_tokens=64) == expected
