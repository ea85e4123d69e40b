"""A researcher's script under mypy --strict: what the library gives has types, and wrong use is seen."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
from collections.abc import Iterator
from typing import assert_type

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

import fourbit
from fourbit import losses, nf4

model, tokenizer = fourbit.load("model", quant_type="nf4", dtype="bfloat16")
assert_type(tokenizer, fourbit.Tokenizer)
language_model: fourbit.CausalLM = model
assert_type(fourbit.attach(model, fourbit.LoRAConfig(rank=8, target=["q_proj", "v_proj"]), seed=1), list[str])
config = fourbit.SFTConfig(out="run", epochs=1)
trainer = fourbit.SFTTrainer(model, tokenizer, train="train.jsonl", val=0.1, config=config)
assert_type(trainer.train(), fourbit.TrainResult)


class Numbered(Dataset[dict[str, str]]):
    def __getitem__(self, index: int) -> dict[str, str]:
        return {"prompt": "a", "completion": str(index)}


def with_rows(theirs: PreTrainedTokenizerFast, rows: list[dict[str, str]], own: fourbit.data.TokenizerLike) -> None:
    fourbit.SFTTrainer(model, theirs, train=rows, val=Numbered(), config=config)
    fourbit.DistillTrainer(model, own, train=fourbit.data.load(rows, own), config=teach, teacher=None)
    run = fourbit.Run(model, theirs)
    assert_type(run.optim_step(1e-3), fourbit.StepResult)


teach = fourbit.DistillConfig(out="run")
ids: list[int] = tokenizer.encode("Hello")
assert_type(fourbit.generate(model, [ids], max_new_tokens=8, temperature=0.7, seed=None), list[list[int]])


def loop(batches: Iterator[Tensor]) -> None:
    optimizer = fourbit.optim.AdamW(model.parameters(), lr=1e-4, bits=8, fused=None)
    schedule = fourbit.optim.scheduler(optimizer, total=100, warmup=10)
    for input_ids in batches:
        hidden = model.hidden(input_ids)[:, :-1].flatten(0, 1)
        scores = losses.token_scores(model.lm_head, hidden, input_ids[:, 1:].flatten())
        assert_type(scores, losses.TokenScores)
        (-scores.logps.mean()).backward()
        optimizer.step()
        schedule.step()


def preference(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    return losses.ipo(losses.scores(policy, reference, tokens), beta=0.3).mean()


weight = nf4.quantize(torch.randn(64, 64))
assert_type(nf4.dequantize(weight, "float32"), Tensor)
layer: nn.Module = fourbit.quantize_(nn.Sequential(nn.Linear(64, 64)), skip=())
fourbit.save_adapter(model, "adapter")
"""
WRONG = """
import fourbit

model, tokenizer = fourbit.load("model")
fourbit.generate(model, "text", temperature="hot")
fourbit.LoRAConfig(r=8)
tokenizer.encode(3)
fourbit.internal
fourbit.SFTTrainer(model, None, train="train.jsonl", config=fourbit.SFTConfig(out="run"))
fourbit.SFTTrainer(model, tokenizer, train=3, config=fourbit.SFTConfig(out="run"))
fourbit.optim.rate_factor(0, total=1, warmup=0, schedule="cosin")
"""


def errors(folder: Path, script: str) -> list[str]:
    """What mypy --strict says of the script; the package is a link to this checkout, as a user's is a folder."""
    (folder / "script.py").write_text(script)
    (folder / "fourbit").symlink_to(ROOT)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--allow-untyped-calls",  # torch's own `Tensor.backward` has no types
        "--follow-imports=silent",
        "--config-file",
        ROOT / "pyproject.toml",
    ]
    cache = ["--cache-dir", ROOT / "build" / "types" / ".mypy_cache_scripts"]
    done = subprocess.run([*command, *cache, "script.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if "error:" in line]


@pytest.mark.slow  # mypy reads torch's types first
def test_a_script_of_a_researcher_has_types(tmp_path: Path) -> None:
    assert errors(tmp_path, SCRIPT) == []


@pytest.mark.slow
def test_wrong_use_is_seen(tmp_path: Path) -> None:
    codes = [line.rpartition("[")[2].rstrip("]") for line in errors(tmp_path, WRONG)]
    assert sorted(codes) == [*["arg-type"] * 6, "attr-defined", "call-arg"]
