"""`fourbit export`: what llama.cpp and Ollama open, read back here, of the base that the adapter was trained on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn

import fourbit
from fourbit.cli.main import main
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.gguf import GGUFFile
from fourbit.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
TEXT = ["Hello World, it's 1234567 o'clock! Don't SHOUT, a text of a few words that words are joined of"]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m` with a byte-level tokenizer that joins letters, and `run`, an adapter of it in NF4."""
    place = tmp_path_factory.mktemp("export")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=290, initial_alphabet=letters, show_progress=False)
    )
    backend.add_special_tokens(["<|im_end|>", "<|endoftext|>", "<s>"])
    named = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    tokenizer = Tokenizer(backend, chat_template=TEMPLATE, named_tokens=named)
    torch.manual_seed(0)
    model = Decoder(read_spec({"model_type": "llama", "vocab_size": tokenizer.vocab_size + 3} | SIZES))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2).data.add_("norm" in name)
    fourbit.save_model(model, place / "m", tokenizer)
    trained, _ = fourbit.load(place / "m", quant_type="nf4")
    fourbit.attach(trained, fourbit.LoRAConfig(rank=4, rslora=True, alpha_pattern={"q_proj": 3.0}))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    fourbit.save_adapter(trained, place / "run", base_model=str(place / "m"))
    return place


def logits(model: fourbit.CausalLM) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(torch.arange(40)[None])
    return out


def test_the_model_is_the_decoded_base_with_its_adapter(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the run trained on, and not the dense weights that its codes were made of."""
    command = ["export", "--model", str(folder / "m"), "--adapter", str(folder / "run"), "--to", "gguf", "--json"]
    assert main([*command, "--type", "f32", "--out", str(tmp_path / "m.gguf")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["read back"].startswith("100% of ") and said["run"] == f"llama-server -m {tmp_path / 'm.gguf'}"
    model, _ = fourbit.load(folder / "m", quant_type="nf4")
    fourbit.load_adapter(model, folder / "run")
    read, tokenizer = fourbit.load(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(read), logits(model), rtol=0, atol=1e-4)
    dense, own = fourbit.load(folder / "m")
    assert (logits(dense) - logits(read)).abs().max() > 0.1
    assert tokenizer.encode(TEXT[0]) == own.encode(TEXT[0]) and tokenizer.stop_ids == own.stop_ids
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert metadata["tokenizer.chat_template"] == TEMPLATE and metadata["tokenizer.ggml.add_bos_token"] is True


def test_without_an_adapter_the_model_is_dense_unless_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--model", str(folder / "m"), "--to", "ollama", "--type", "q8_0"]
    assert main([*command, "--out", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr()
    assert "dense and float32" in printed.err and f"ollama create NAME -f {tmp_path}/o/Modelfile" in printed.out
    lines = (tmp_path / "o" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and lines[-2:] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]
    assert GGUFFile(tmp_path / "o" / "model.gguf").tensors["blk.0.attn_q.weight"].format == "Q8_0"
    assert main([*command, "--quant", "nf4", "--out", str(tmp_path / "p")]) == 0
    assert "NF4 with double quantisation" in capsys.readouterr().err


def test_the_adapter_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--model", str(folder / "m"), "--to", "gguf-lora", "--out", str(tmp_path / "l.gguf")]
    assert main(command) == 2 and "say which with --adapter" in capsys.readouterr().err
    assert main([*command, "--adapter", str(folder / "run")]) == 0
    assert f"--lora {tmp_path / 'l.gguf'}" in capsys.readouterr().out
    assert len(GGUFFile(tmp_path / "l.gguf").tensors) == 2 * 2 * 7


@pytest.mark.parametrize("out", ["m/model.gguf", "m", "run/x"])
def test_what_is_read_is_not_written_over(folder: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((folder / "m").iterdir())
    command = ["export", "--model", str(folder / "m"), "--adapter", str(folder / "run"), "--to", "ollama"]
    assert main([*command, "--out", str(folder / out)]) == 2
    assert "give another place" in capsys.readouterr().err and sorted((folder / "m").iterdir()) == before


@pytest.mark.parametrize("to", ["hf", "peft"])
def test_transformers_and_peft_read_what_is_written_for_them(
    to: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the NF4 base decoded; 64 greedy tokens of the merged folder in transformers are ours; a weight that is changed
    on the way is found out."""
    command = ["export", "--model", str(folder / "m"), "--adapter", str(folder / "run"), "--to", to]
    assert main([*command, "--out", str(tmp_path / "x"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["read back"].startswith("100% of ")
    opened = {"hf": f"vllm serve {tmp_path}/x", "peft": f"PeftModel.from_pretrained(model, '{tmp_path}/x')"}
    assert said["run"] == opened[to]
    if to == "hf":
        from transformers import AutoModelForCausalLM

        model, _ = fourbit.load(folder / "m", quant_type="nf4")
        fourbit.load_adapter(model, folder / "run")
        (ours,) = fourbit.generate(model, [[5, 9, 40, 41]], max_new_tokens=64)
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
        ids = torch.tensor([[5, 9, 40, 41]])
        theirs = whole.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0)
        assert theirs[0, 4:].tolist() == list(ours)


def test_another_model_than_was_written_is_no_success(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fourbit.cli import export

    real = export.reopened

    def spoilt(*args: Any) -> Any:
        whole = real(*args)
        whole.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
        return whole

    command = ["export", "--model", str(folder / "m"), "--to", "hf", "--out"]
    monkeypatch.setattr(export, "reopened", spoilt)
    assert main([*command, str(tmp_path / "x")]) == 6 and "reads another model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()

    def missing(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(export, "reopened", missing)
    for error in (ImportError("no transformers"), torch.OutOfMemoryError("CUDA out of memory")):
        assert main([*command, str(tmp_path / type(error).__name__)]) == 0
        assert f"no second reader has read {tmp_path / type(error).__name__}: {error}" in capsys.readouterr().err
        assert (tmp_path / type(error).__name__ / "model.safetensors").is_file()


@pytest.mark.parametrize("adapted", [False, True])
def test_bitsandbytes_reads_4_bits(
    adapted: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The codes that are trained on, or of base and adapter with a small one beside them; moved too, and by ours."""
    from transformers import AutoModelForCausalLM

    command = ["export", "--model", str(folder / "m"), "--to", "bnb-4bit", "--out", str(tmp_path / "x"), "--json"]
    assert main([*command, *(["--adapter", str(folder / "run")] if adapted else [])]) == 0
    said = json.loads(capsys.readouterr().out)
    assert ("kept" in said) == adapted == ("and peft" in said["run"]) and "bitsandbytes" in said["run"]
    (tmp_path / "x").rename(tmp_path / "moved")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)
    projection = whole.model.layers[0].mlp.up_proj
    assert type(getattr(projection, "base_layer", projection)).__name__ == "Linear4bit"
    model, _ = fourbit.load(folder / "m", quant_type="nf4")
    base = logits(model)
    if adapted:
        fourbit.load_adapter(model, folder / "run")
    with torch.no_grad():
        found = whole(torch.arange(40)[None]).logits
    off = (found - logits(model)).norm() / logits(model).norm()
    assert off < 1e-5 if not adapted else off < 0.5 * (base - logits(model)).norm() / logits(model).norm()
    torch.testing.assert_close(logits(fourbit.load(tmp_path / "moved")[0]), found, rtol=0, atol=1e-3)


def test_4_bits_that_cannot_hold_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are no export, and what is advised instead works."""
    model, _ = fourbit.load(folder / "m")
    fourbit.attach(model, fourbit.LoRAConfig(rank=32))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)  # of full rank, and small beside the noise
    fourbit.save_adapter(model, tmp_path / "small")
    command = ["--model", str(folder / "m"), "--adapter", str(tmp_path / "small"), "--out", str(tmp_path / "x")]
    assert main(["export", "--to", "bnb-4bit", *command]) == 2 and "--quant nf4 packs it" in capsys.readouterr().err
    assert main(["export", "--to", "bnb-4bit", "--quant", "nf4", *command]) == 2
    assert "fourbit merge --into nf4 with more --residual-bits" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["merge", "--into", "nf4", "--quant", "nf4", "--residual-bits", "16", *command]) == 0


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({}, ""),
        ({"kind": "dora"}, "use_dora"),
        ({"kind": "vera"}, "peft_type"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),  # by its end alone PEFT would take input_layernorm too
        ({"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"q_proj": 3.0}}, "rank_pattern, alpha_pattern"),
    ],
)
def test_what_peft_opens_and_vllm_may_not(
    settings: dict[str, Any], unread: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, _ = fourbit.load(folder / "m", quant_type="nf4")
    fourbit.save_model(model, tmp_path / "decoded", merge=True)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, **settings))
    for parameter in [parameter for parameter in model.parameters() if parameter.requires_grad]:
        parameter.data += 0.1 * torch.randn_like(parameter)
    fourbit.save_adapter(model, tmp_path / "a")
    command = ["export", "--model", str(folder / "m"), "--adapter", str(tmp_path / "a"), "--to", "peft", "--json"]
    assert main([*command, "--out", str(tmp_path / "x")]) == 0
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    if unread in ("use_dora", "peft_type"):
        assert "no second reader has read" in printed.err and "read back" not in said
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "decoded"), tmp_path / "x")
        with torch.no_grad():
            torch.testing.assert_close(whole(torch.arange(40)[None]).logits, logits(model), rtol=0, atol=1e-3)
    else:
        assert said["read back"].startswith("100% of ")
    if unread:
        assert f"vLLM does not go by its {unread}: for vLLM export the model merged, --to hf" in printed.err
        assert said["run"] == f"PeftModel.from_pretrained(model, '{tmp_path}/x')"
    else:
        serve = f"vllm serve {folder}/m --enable-lora --lora-modules NAME={tmp_path}/x --max-lora-rank 8"
        assert said["run"] == serve and "vLLM" not in printed.err


def test_what_is_there_stays_and_nothing_half_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fourbit.cli import export

    command = ["export", "--model", str(folder / "m"), "--to"]
    (tmp_path / "x.gguf").write_text("mine")
    for out, to in ((tmp_path / "x.gguf", "gguf"), (tmp_path, "hf"), (tmp_path / "x.gguf", "ollama")):
        assert main([*command, to, "--out", str(out)]) == 2
        assert f"--out {out} is there already: give another place" in capsys.readouterr().err
    assert main([*command, "gguf", "--out", str(tmp_path / "y")]) == 2
    assert "--out NAME.gguf" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()

    def stopped(*args: Any) -> Any:
        raise KeyboardInterrupt

    for name, to in (("reopened", "hf"), ("write_text", "ollama")):
        monkeypatch.setattr(export, name, stopped)
        assert main([*command, to, "--out", str(tmp_path / "empty")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"] and (tmp_path / "x.gguf").read_text() == "mine"


def test_stop_tokens_that_gguf_has_no_place_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = fourbit.load(folder / "m")
    tokenizer.backend.add_special_tokens(["<|eot_id|>", "<|end|>"])
    stops = [tokenizer.backend.token_to_id(token) for token in ("<|eot_id|>", "<|end|>")]
    names = tokenizer.named_tokens
    more = Tokenizer(tokenizer.backend, chat_template=TEMPLATE, named_tokens=names, stop_ids=stops)
    fourbit.save_model(model, tmp_path / "m", more)
    command = ["export", "--model", str(tmp_path / "m"), "--adapter", str(folder / "run"), "--to"]
    assert main([*command, "gguf", "--out", str(tmp_path / "m.gguf")]) == 0
    assert re.search(r'GGUF names three .*"stop" of each request: <\|[a-z_|]+>\n', capsys.readouterr().err)
    assert main([*command, "ollama", "--out", str(tmp_path / "o")]) == 0
    text = (tmp_path / "o" / "Modelfile").read_text()
    assert "GGUF names" not in capsys.readouterr().err and text.count("PARAMETER stop") == 4
    assert f"# The adapter {folder}/run is merged into it: no ADAPTER." in text
