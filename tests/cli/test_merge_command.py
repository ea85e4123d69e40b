"""`fourbit merge`: three forms, each told of truly and opened again by every command and by transformers."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.cli.main import main

Typed = Callable[..., str]
AsJson = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose run held rows out."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train = ["sft", "--model", str(tiny_folder), "--data", str(rows), "--val", "20%", "--out", str(out)]
    assert main([*train, "--rank", "4", "--lr", "3e-3", "--epochs", "2"]) == 0
    return out


def generated(folder: Path, prompts: list[list[int]], adapter: Path | None = None, **how: Any) -> list[list[int]]:
    model, _ = fourbit.load(folder, **how)
    if adapter is not None:
        fourbit.load_adapter(model, adapter)
    return fourbit.generate(model, prompts, max_new_tokens=64)


PROMPTS = [[*range(5, 5 + n)] for n in (3, 7, 4, 9, 6)]


def test_the_decoded_base_takes_all_of_it(here: Path, run: Path, as_json: AsJson, typed: Typed) -> None:
    """In fp32 the same tokens as base and adapter, in ours and in transformers; told per layer and in all."""
    found = as_json(f"merge --model m --adapter {run} --out merged --dtype float32")
    assert found["kept"] == pytest.approx(1, abs=1e-5) and found["agreement"] == 1 and found["kl"] < 1e-6
    wanted = generated(here / "m", PROMPTS, run, quant_type="nf4")
    assert generated(here / "merged", PROMPTS) == wanted
    theirs = AutoModelForCausalLM.from_pretrained(here / "merged")
    for prompt, tokens in zip(PROMPTS, wanted, strict=True):
        ids = torch.tensor([prompt])
        made = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert made[0, len(prompt) :].tolist() == tokens
    said = typed("eval --model merged --data val.jsonl --match none")
    assert "dense and float32" in said, "its settings say that it is not to be put in 4 bits"
    same = as_json(f"eval --model m --adapter {run} --data val.jsonl --match none")["loss"]
    assert as_json("eval --model merged --data val.jsonl --match none")["loss"] == pytest.approx(same, rel=1e-5)
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        p.name for p in (here / "merged").iterdir()
    }


def test_rows_that_are_long_are_compared_on_too(here: Path, run: Path, as_json: AsJson) -> None:
    long = {"messages": [{"role": "user", "content": "ab" * 700}, {"role": "assistant", "content": "aaa"}]}
    (here / "long.jsonl").write_text(json.dumps(long) + "\n")
    assert as_json(f"merge --model m --adapter {run} --out merged --data long.jsonl")["agreement"] >= 0


def test_the_dense_base_is_measured_against_what_was_trained(
    here: Path, run: Path, typed: Typed, as_json: AsJson
) -> None:
    said = typed(f"merge --model m --adapter {run} --out merged --into base --data val.jsonl")
    layers = re.findall(r"^model\.layers\.\d\.\S+ +delta over noise ([0-9.]+), kept ([0-9.]+)%$", said, re.MULTILINE)
    assert len(layers) == 14 and re.search(r"^all +delta over noise", said, re.MULTILINE)
    assert all(0.1 < float(ratio) < 10 for ratio, _ in layers), "the noise is that of 4 bits, not bfloat16's"
    assert re.search(r"^kl +[0-9.e-]+ nats a token\nagreement +[0-9.e-]+ of greedy tokens$", said, re.MULTILINE)
    model, _ = fourbit.load(here / "merged", dtype=torch.bfloat16)
    plain, _ = fourbit.load(here / "m", dtype=torch.bfloat16)
    fourbit.load_adapter(plain, run, force=True, tell=lambda text: None)
    for name, value in fourbit.merged_state(plain).items():
        assert torch.equal(model.state_dict()[name], value.cpu()), name


def test_4_bits_keep_it_with_a_residual_in_the_folder(here: Path, run: Path, typed: Typed, as_json: AsJson) -> None:
    found = as_json(f"merge --model m --adapter {run} --out merged --into nf4 --residual-bits 6 --dtype float32")
    assert found["kept"] > 0.95 and found["bits"] <= 6 and found["agreement"] > 0.9
    base, tuned = (as_json(f"eval --model {model} --data val.jsonl --match none")["loss"] for model in ("m", "merged"))
    whole = as_json(f"eval --model m --adapter {run} --data val.jsonl --match none")["loss"]
    assert abs(tuned - whole) < 0.1 * abs(base - whole), "codes alone would be the base again"
    assert (
        main(["generate", "--model", "merged", "--data", "val.jsonl", "--out", "a.jsonl", "--max-new-tokens", "3"]) == 0
    )
    typed("sft --model merged --data rows.jsonl --out again --steps 1 --rank 2")  # goes on from there


def test_4_bit_layers_that_become_dense_are_named(here: Path, typed: Typed, as_json: AsJson) -> None:
    """An embedding that has an adapter, say, of which no product is made."""
    model, tokenizer = fourbit.load(here / "m")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    fourbit.save_model(model, here / "untied", tokenizer)
    typed("quantize --model untied --embedding --out packed")
    model, _ = fourbit.load(here / "packed")
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["embed_tokens", "q_proj"]), seed=0)
    fourbit.save_adapter(model, here / "a")
    line = "merge --model packed --adapter a --into nf4 --out"
    assert as_json(f"{line} merged")["dense"] == ["model.embed_tokens"]
    assert re.search(r"^dense +model\.embed_tokens: in 4 bits only linear layers", typed(f"{line} b"), re.MULTILINE)


def test_what_keeps_too_little_is_refused_unless_forced(here: Path, run: Path, typed: Typed) -> None:
    line = f"merge --model m --adapter {run} --out merged --into nf4 --residual-bits 0.01"
    model, _ = fourbit.load(here / "m", quant_type="nf4")
    fourbit.load_adapter(model, run)
    for part in [p for n, p in model.named_parameters() if "lora_" in n]:
        part.data = torch.randn_like(part) * 0.02  # of full rank, and small beside the noise
    fourbit.save_adapter(model, here / "small")
    line = line.replace(str(run), "small")
    said = typed(line, code=2)
    assert re.search(r"nf4 would keep \d+\.\d% of the change, below 90%: take --into decoded.*--force", said)
    assert not (here / "merged" / "config.json").exists()
    typed(line.replace("--out merged", "--out more").replace("0.01", "9"))
    typed(line.replace("--out merged", "--out forced") + " --force")
    typed(line.replace("--out merged --into nf4", "--out dense"))


def test_several_adapters_and_no_rows(here: Path, run: Path, typed: Typed) -> None:
    model, _ = fourbit.load(here / "m", quant_type="nf4")
    fourbit.load_adapter(model, run, name="a")
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["q_proj"]), "b", seed=3)
    torch.nn.init.normal_(fourbit.lora.layer.adapters_of(model, "b")["model.layers.0.self_attn.q_proj"].lora_B)
    fourbit.save_adapter(model, here / "b", name="b")
    said = typed(f"merge --model m --adapter b --adapter {run} --weights 0.5 --weights=-1 --out merged --dtype float32")
    assert "agreement" not in said
    fourbit.use(model, "a", "b", weights=(-1, 0.5))
    wanted = fourbit.merged_state(model)
    for name, tensor in fourbit.load(here / "merged")[0].state_dict().items():
        torch.testing.assert_close(tensor, wanted[name].cpu(), rtol=1e-5, atol=1e-6)


def test_answers_come_from_merged_weights_that_are_told_of(
    here: Path, run: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones as without, where memory is short or nobody wants it; generate, eval and chat; in bfloat16 on a CPU
    that does not multiply it they are held where that is asked for."""
    how = f"--model m --adapter {run} --max-new-tokens 20"
    line = f"generate {how} --data val.jsonl --dtype"
    said = [typed(f"{line} float32 --out a.jsonl"), typed(f"eval {how} --data val.jsonl --dtype float32")]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    said.append(typed(f"chat {how} --dtype float32"))
    assert all(re.search(r"note: \d+\.\d MiB of decoded weights are held", text) for text in said)
    monkeypatch.setattr("fourbit.models.generate.product_dtype", lambda x: torch.float32)
    assert "weights are held" not in typed(f"{line} bfloat16 --out c.jsonl")
    assert "weights are held" in typed(f"{line} bfloat16 --out d.jsonl --keep-dense on")
    assert "weights are held" not in typed(f"{line} float32 --out e.jsonl --keep-dense off")
    monkeypatch.setattr("fourbit.models.generate.memory_free", lambda device: 1000)
    assert "weights are held" not in typed(f"{line} float32 --out b.jsonl")
    assert (here / "a.jsonl").read_text() == (here / "b.jsonl").read_text() == (here / "e.jsonl").read_text()
