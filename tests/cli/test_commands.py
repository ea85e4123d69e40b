"""Every command end to end on a tiny model: what it prints, what it leaves, and that the pieces fit each other."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fourbit
from fourbit.cli.chat import Stream
from fourbit.cli.data import marked, pieces
from fourbit.cli.load import CONFIG, run_settings
from fourbit.cli.main import COMMANDS, main
from fourbit.cli.parse import parse
from fourbit.cli.sft import Options as SFTOptions
from fourbit.cli.show import bars, visible
from fourbit.data.encode import load as load_rows
from fourbit.kernels import border
from fourbit.models.load import load_tokenizer

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *args: str) -> str:
    """stdout of a command that ends well."""
    code = main(list(args))
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def run_json(capsys: Capture, *args: str) -> dict[str, Any]:
    """The one line that --json leaves on stdout."""
    out = run(capsys, *args, "--json")
    assert out.count("\n") == 1
    values: dict[str, Any] = json.loads(out)
    return values


@pytest.fixture(scope="session")
def tuned(tiny_folder: Path, rows: Path, val_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with values from a file, flags and defaults."""
    out = tmp_path_factory.mktemp("runs") / "tuned"
    config = out.parent / "run.yaml"
    config.write_text(f"model: {tiny_folder}\ndata: {rows}\nval: {val_rows}\nlr: 1e-2\nrank: 4\nquant: nf4-nodq\n")
    assert main(["sft", str(config), "--out", str(out), "--epochs", "4", "--rank", "8"]) == 0
    return out


def test_sft_leaves_what_it_promises(tuned: Path) -> None:
    names = {path.name for path in tuned.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "config.yaml", "metrics.jsonl", "loss.png"}
    records = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 12 and losses[-1] < losses[0]  # 22 rows in steps of 8, four times over


def test_the_saved_config_names_every_source(tuned: Path) -> None:
    lines = (tuned / "config.yaml").read_text().splitlines()
    found = {line.partition(":")[0]: line.partition("  # ")[2] for line in lines}
    where = tuned.parent / "run.yaml"
    assert found["rank"] == found["out"] == found["epochs"] == "flag"
    assert found["lr"] == f"{where}:4" and found["quant"] == f"{where}:6"
    assert found["alpha"] == found["steps"] == "default"


def test_the_saved_config_repeats_the_run(tuned: Path, tmp_path: Path, capsys: Capture) -> None:
    run(capsys, "sft", str(tuned / "config.yaml"), "--out", str(tmp_path / "again"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tuned, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        (["all"], 14),
        (["all-linear"], 14),
        (["attn"], 8),
        (["mlp"], 6),
        (["q_proj"], 2),
        (["q_proj,v_proj"], 4),
        (["q_proj", "down_proj"], 4),
        (["layers.0.mlp.up_proj"], 1),
        ([r"model\.layers\.1\..*_proj"], 7),
    ],
)
def test_targets(tiny_folder: Path, target: list[str], layers: int) -> None:
    flags = [arg for name in target for arg in ("--target", name)]
    args = ["--model", "m", "--data", "d", "--out", "o", *flags]
    options, _ = parse(SFTOptions, "sft", args)
    model, _ = fourbit.load(tiny_folder)
    assert len(fourbit.attach(model, options.lora_config())) == layers


def test_sft_json(tiny_folder: Path, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ["--model", str(tiny_folder), "--data", str(rows), "--val", "20%", "--steps", "3", "--out", str(tmp_path)]
    values = run_json(capsys, "sft", *args)
    assert values["steps"] == 3 and values["out"] == str(tmp_path)
    assert values["val_perplexity"] == pytest.approx(math.exp(values["val_loss"]))
    assert values["loss"] > 0 and values["seconds"] > 0 and values["signal"] is None


def test_full_fine_tuning_gives_a_model_that_loads(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "full"
    args = ["--model", str(tiny_folder), "--data", str(rows), "--full", "--steps", "2", "--out", str(out)]
    assert f"fourbit chat --model {out}" in run(capsys, "sft", *args)
    assert "quant: none" in (out / "config.yaml").read_text() and "rank" not in (out / "config.yaml").read_text()
    old, new = (fourbit.load(folder)[0].state_dict() for folder in (tiny_folder, out))
    assert old.keys() == new.keys() and not all(torch.equal(old[name], new[name]) for name in old)
    values = run_json(capsys, "eval", "--model", str(out), str(rows), "--no-exact")
    assert values["loss"] > 0
    run(capsys, "sft", str(out / "config.yaml"), "--resume")  # finished already: nothing is left to do, nothing breaks


def test_an_existing_run_is_not_overwritten(tuned: Path, capsys: Capture) -> None:
    before = (tuned / "config.yaml").read_bytes()
    config = str(tuned / "config.yaml")
    assert main(["sft", config]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main(["sft", config, "--resume", "--rank", "4"]) == 2
    assert "is a run with rank 8, and is resumed with 4" in capsys.readouterr().err
    assert main(["sft", config, "--resume", "--dtype", "bfloat16"]) == 2
    assert "is a run with dtype float32, and is resumed with bfloat16" in capsys.readouterr().err
    held = {name: (tuned / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    assert main(["sft", config, "--resume", "--lr", "0.5"]) == 2
    assert "other options (lr" in capsys.readouterr().err
    assert held == {name: (tuned / name).read_bytes() for name in held} and held["config.yaml"] == before


def test_bad_rows_can_be_skipped_and_are_counted(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: Capture
) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(rows.read_text() + "{\n")
    args = ["sft", "--model", str(tiny_folder), "--data", str(mixed), "--out", str(tmp_path / "o"), "--steps", "1"]
    assert main([*args, "--on-bad-row", "skip"]) == 0
    assert "22 rows" in (err := capsys.readouterr().err) and "1 skipped" in err


def test_eval_gives_both_and_agrees_with_the_library(
    tuned: Path, tiny_folder: Path, val_rows: Path, capsys: Capture, tmp_path: Path
) -> None:
    args = ["eval", "--model", str(tiny_folder), "--adapter", str(tuned), "--data", str(val_rows)]
    answers = tmp_path / "answers.jsonl"
    values = run_json(capsys, *args, "--max-new-tokens", "6", "--answers", str(answers))
    model, tokenizer = fourbit.load(tiny_folder, quantize="nf4-nodq")  # as the adapter's own config.yaml says
    dataset = load_rows(val_rows, tokenizer)
    assert values["base_loss"] == pytest.approx(fourbit.evaluate_loss(model, dataset.examples), rel=1e-6)
    fourbit.load_adapter(model, tuned)
    assert values["loss"] == pytest.approx(fourbit.evaluate_loss(model, dataset.examples), rel=1e-6)
    assert values["loss"] < values["base_loss"] and values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert 0 <= values["exact_match"] <= 1 and values["rows"] == 6
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["expected"] for row in written] == [sample.answers[0][-1]["content"] for sample in dataset.samples]
    assert sum(row["exact"] for row in written) / 6 == pytest.approx(values["exact_match"])
    assert (tmp_path / "answers.base.jsonl").is_file()


def test_eval_prints_a_table(tuned: Path, tiny_folder: Path, val_rows: Path, capsys: Capture) -> None:
    args = ["eval", "--model", str(tiny_folder), "--adapter", str(tuned), str(val_rows), "--no-exact"]
    lines = run(capsys, *args).splitlines()
    assert lines[0].split() == ["base", "adapter"] and lines[1].split()[0] == "loss" and len(lines[1].split()) == 3
    assert main([*args, "--no-base", "--quant", "none"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["adapter"]
    assert "the adapter was trained on nf4-nodq; on none it will be somewhat off" in printed.err


def test_eval_of_plain_text_is_its_loss(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n{"text": "and others"}\n')
    values = run_json(capsys, "eval", "--model", str(tiny_folder), str(tmp_path / "text.jsonl"))
    assert values["loss"] > 0 and values["rows"] == 2 and "exact_match" not in values


def test_generate_answers_every_form_of_row(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    turn = {"role": "user", "content": "abc"}
    forms = [
        {"prompt": "abc", "id": 7},
        {"prompt": [turn]},
        {"messages": [turn]},
        {"messages": [turn, {"role": "assistant", "content": "not shown"}]},
        {"prompt": "abc", "completion": "not shown"},
    ]
    data, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    for form in forms:  # one form a file, as in training data; all five ask the same
        data.write_text((json.dumps(form) + "\n") * 3)
        values = run_json(capsys, "generate", *_prompts(tiny_folder, data, out))
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        assert values == {"out": str(out), "rows": 3}
        assert [{**form, "answer": answer["answer"]} for answer in answers] == answers
        assert {answer["answer"] for answer in answers} == {_expected(tiny_folder, "abc")}


def _prompts(model: Path, data: Path, out: Path) -> list[str]:
    return ["--model", str(model), "--data", str(data), "--out", str(out), "--max-new-tokens", "9", "--batch-size", "2"]


def _expected(folder: Path, text: str) -> str:
    """The greedy answer by the library alone."""
    model, tokenizer = fourbit.load(folder, quantize="nf4")
    prompt = tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    return tokenizer.decode(fourbit.generate(model, [prompt], max_new_tokens=9, stop_ids=tokenizer.stop_ids)[0])


def test_generate_leaves_no_half_file(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("fourbit.cli.generate.generate", fail)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "a.jsonl").write_text("older answers")
    assert main(["generate", *_prompts(tiny_folder, tmp_path / "p.jsonl", tmp_path / "a.jsonl")]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "a.jsonl"}
    assert (tmp_path / "a.jsonl").read_text() == "older answers"


def test_chat_remembers_until_reset(tiny_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nabc\n/reset\n\nabc\n/what\n/quit\nnever read\n"))
    assert main(["chat", "--model", str(tiny_folder), "--max-new-tokens", "9"]) == 0
    printed = capsys.readouterr()
    fresh = visible(_expected(tiny_folder, "abc"))
    assert printed.out.startswith(fresh + "\n") and printed.out.endswith(fresh + "\n")
    assert printed.out != (fresh + "\n") * 3, "the second answer does not see the first turn"
    assert "forgotten" in printed.err and "unknown command /what" in printed.err


def test_a_stream_holds_back_half_characters(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)  # a token a byte
    written: list[str] = []
    stream = Stream(tokenizer.decode, written.append)
    for token in tokenizer.encode("aé€😀"):
        stream.add(token)
    assert [text for text in written if text] == ["a", "é", "€", "😀"]
    stream.add(tokenizer.encode("é")[0])  # the model stopped in mid-character
    stream.show()
    assert "".join(written) == stream.text == "aé€😀\N{REPLACEMENT CHARACTER}"


def test_data_shows_what_is_trained(tiny_folder: Path, rows: Path, capsys: Capture) -> None:
    first = json.loads(rows.read_text().splitlines()[0])["messages"]
    out = run(capsys, "data", str(rows), "--model", str(tiny_folder), "--rows", "1")
    question, answer = (message["content"] for message in first)
    marks = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{{+{answer}<|im_end|>+}}\n"
    assert marks in out and out.count("{+") == 1
    assert "tokens in a row" in out


def test_data_shows_both_answers_of_a_pair(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "good", "rejected": "bad"}) + "\n")
    out = run(capsys, "data", str(tmp_path / "pairs.jsonl"), "--model", str(tiny_folder))
    assert "{+good<|im_end|>+}" in out and "{+bad<|im_end|>+}" in out


def test_data_json_counts(tiny_folder: Path, rows: Path, capsys: Capture) -> None:
    values = run_json(capsys, "data", str(rows), "--model", str(tiny_folder))
    dataset = load_rows(rows, load_tokenizer(tiny_folder))
    assert values["rows"] == 22 and values["problems"] == []
    assert values["tokens"] == sum(len(part.ids) for example in dataset.examples for part in example.parts)
    assert values["trained_share"] == pytest.approx(
        sum(sum(part.trained) for example in dataset.examples for part in example.parts) / values["tokens"]
    )


def test_data_lists_problems_and_shows_the_rest(tiny_folder: Path, rows: Path, tmp_path: Path, capsys: Capture) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(rows.read_text() + "{\n" * 3)
    args = ["data", str(mixed), "--model", str(tiny_folder), "--problems", "2"]
    assert main(args) == 2
    printed = capsys.readouterr()
    assert "mixed.jsonl:23: " in printed.err and "mixed.jsonl:25: " not in printed.err and "and 1 more" in printed.err
    assert "{+" in printed.out
    assert main([*args, "--on-bad-row", "skip"]) == 0


def test_pieces_join_to_the_text_and_keep_every_kind(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    turns = [{"role": "user", "content": "é😀 \x1b[31m"}, {"role": "assistant", "content": "ö\nx"}]
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    ((example,),) = (e.parts for e in load_rows(tmp_path / "r.jsonl", tokenizer).examples)
    found = list(pieces(example, tokenizer))
    assert "".join(text for _, text in found) == example.text
    assert "".join(text for kind, text in found if kind.startswith("trained")) == "ö\nx<|im_end|>"
    assert [text for kind, text in found if kind == "context special"] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    shown = marked(example, tokenizer)
    assert "\x1b" not in shown and r"\x1b[31m" in shown


def test_cut_tokens_are_shown_as_cut(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c" * 30},
        {"role": "assistant", "content": "d", "weight": 0},
    ]
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    ((example,),) = (e.parts for e in load_rows(tmp_path / "r.jsonl", tokenizer, max_length=30).examples)
    shown = marked(example, tokenizer)
    assert shown.replace("{+", "").replace("+}", "").replace("[-", "").replace("-]", "") == example.text
    assert sum(len(text) for kind, text in pieces(example, tokenizer) if kind == "cut") > 0 and "[-" in shown


def test_bars_count_every_value() -> None:
    values = [0, 3, 3, 12, 99]
    lines = bars(values).splitlines()
    assert sum(int(line.split()[-1]) for line in lines) == len(values) and len(lines) <= 10
    assert bars([5]).split() == ["5", "█" * 40, "1"]
    assert bars([100]).splitlines()[-1].split()[-1] == "1"


def test_doctor(capsys: Capture) -> None:
    facts = run_json(capsys, "doctor")
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["fourbit"] == fourbit.__version__
    assert facts["used"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "kernels" in run(capsys, "doctor")


def test_doctor_shows_how_many_rows_are_decoded_inside_the_product(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(border, "BORDER", {"sm_90": 48})
    shown = run_json(capsys, "doctor")["rows decoded inside the product"]
    assert shown.keys() - {"this GPU"} == border.TILES.keys()
    assert shown["sm_90"] == "48 (measured)" and shown["sm_80"].startswith(f"{border.SAFE} (not measured")


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("fourbit.cli.doctor.version", version)
    assert main(["doctor"]) == 3
    printed = capsys.readouterr()
    assert "gguf" in printed.out and "missing: pip install gguf" in printed.err


def test_help_and_version(capsys: Capture) -> None:
    page = run(capsys, "--help")
    assert all(f"fourbit {name}" in page for name in COMMANDS)
    assert run(capsys) == page
    assert run(capsys, "--version") == f"fourbit {fourbit.__version__}\n"


def test_sft_with_an_optimizer_and_rates_of_its_own(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    """The settings are kept as they were given, and a resumed run may have another budget."""
    out = tmp_path / "run"
    flags = ["--steps", "2", "--rank", "4", "--schedule", "wsd", "--decay", "0.5", "--lora-plus", "16"]
    flags += ["--lr-scale", "*.layers.0.*=0.5", "--lr-scale", "*.k_proj.*=2", "--optimizer", "paged-adamw8bit"]
    args = ["sft", "--model", str(tiny_folder), "--data", str(rows), "--out", str(out)]
    assert main([*args, *flags, "--optimizer-budget", "1MiB"]) == 0
    settings = run_settings(str(out))
    assert settings["lr_scale"] == {"*.layers.0.*": 0.5, "*.k_proj.*": 2} and settings["decay"] == 0.5
    assert settings["optimizer"] == "paged-adamw8bit" and settings["optimizer_budget"] == "1MiB"
    assert main(["sft", str(out / CONFIG), "--optimizer-budget", "auto", "--resume"]) == 0
