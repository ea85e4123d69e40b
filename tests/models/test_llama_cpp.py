"""llama.cpp itself, where llama-cpp-python is installed, runs what we write: a model, and a LoRA on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fourbit
from fourbit.lora.layer import adapters_of
from fourbit.lora.merge import merged_state
from fourbit.models.gguf_tokenizer import tokenizer_metadata
from fourbit.models.gguf_write import write_lora, write_model

PROMPTS = ("<|im_start|>user\nHello, who are you?<|im_end|>\n<|im_start|>assistant\n", "The capital of France is")
TOKENS = 64


@pytest.fixture(scope="module")
def base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    model, tokenizer = fourbit.load(smollm2)
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    keys = tokenizer_metadata(tokenizer, model.vocab_size)
    write_model(file, model, merged_state(model, torch.float32), keys, "F32")  # type: ignore[arg-type]
    return model, tokenizer, file


@pytest.fixture
def greedy(base: tuple[Any, Any, Path]) -> Callable[..., None]:
    """Asserts that llama.cpp cuts the prompts as we do, and goes on as we do."""

    def check(lora: Path | None = None) -> None:
        import llama_cpp

        model, tokenizer, file = base
        theirs = llama_cpp.Llama(str(file), n_ctx=512, verbose=False, lora_path=lora and str(lora))
        for prompt in PROMPTS:
            ids = theirs.tokenize(prompt.encode(), add_bos=False, special=True)
            assert ids == tokenizer.encode(prompt)
            (ours,) = fourbit.generate(model, [ids], max_new_tokens=TOKENS, stop_ids=tokenizer.stop_ids)
            made = list[int]()
            for token in theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
                if token in tokenizer.stop_ids or len(made) == TOKENS:
                    break
                made.append(token)
            assert made == [token for token in ours if token not in tokenizer.stop_ids]
            theirs.reset()

    return check


@pytest.mark.slow
def test_greedy_tokens_of_the_model_are_ours(greedy: Callable[..., None]) -> None:
    greedy()


@pytest.mark.slow
def test_greedy_tokens_with_a_lora_of_many_scales_are_ours(
    base: tuple[Any, Any, Path], greedy: Callable[..., None], tmp_path: Path
) -> None:
    """rsLoRA, and patterns of rank and alpha, of which llama.cpp's own converter takes one alpha as it stands."""
    model = base[0]
    patterns: dict[str, Any] = {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 5.0}}
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8, rslora=True, **patterns), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    write_lora(tmp_path / "lora.gguf", model, adapters_of(model))
    greedy(tmp_path / "lora.gguf")
