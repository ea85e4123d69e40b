"""Every command end to end on a tiny model: what it prints, what it leaves, and that the pieces fit each other."""

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

import fourbit
from fourbit.cli import generate
from fourbit.cli.chat import Stream
from fourbit.cli.config_file import CONFIG, read_run
from fourbit.cli.data import marked, pieces
from fourbit.cli.main import COMMANDS, main
from fourbit.cli.parse import parse
from fourbit.cli.sft import Options as SFTOptions
from fourbit.cli.show import bars
from fourbit.data.encode import load as load_rows
from fourbit.data.forms import samples_of
from fourbit.errors import visible
from fourbit.models import generate as answers
from fourbit.models.generate import Sampled, sample
from fourbit.models.load import load_tokenizer
from fourbit.outputs import Output

Typed = Callable[..., str]
AsJson = Callable[[str], dict[str, Any]]


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


def test_the_saved_config_repeats_the_run(tuned: Path, typed: Typed) -> None:
    typed(f"sft {tuned}/config.yaml --out again")
    first, second = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (tuned, "again"))
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


def test_sft_json(as_json: AsJson) -> None:
    values = as_json("sft --model m --data rows.jsonl --val 20% --steps 3 --out o")
    assert values["steps"] == 3 and values["out"] == "o"
    assert values["val_perplexity"] == pytest.approx(math.exp(values["val_loss"]))
    assert values["loss"] > 0 and values["seconds"] > 0 and values["signal"] is None


def test_full_fine_tuning_gives_a_model_that_loads(here: Path, typed: Typed, as_json: AsJson) -> None:
    assert "fourbit chat --model full" in typed("sft --model m --data rows.jsonl --full --steps 2 --out full")
    config = (here / "full" / CONFIG).read_text()
    assert 'quant: "none"' in config and "rank" not in config
    old, new = (fourbit.load(here / folder)[0].state_dict() for folder in ("m", "full"))
    assert old.keys() == new.keys() and not all(torch.equal(old[name], new[name]) for name in old)
    assert as_json("eval --model full rows.jsonl --match none")["loss"] > 0
    typed("sft full/config.yaml --resume")  # finished already: nothing is left to do, nothing breaks
    said = typed("sft full/config.yaml --resume --no-full", code=2)
    assert "was written by a run with another" in said


def test_an_existing_run_is_not_overwritten(tuned: Path, typed: Typed) -> None:
    held = {name: (tuned / name).read_bytes() for name in (CONFIG, "metrics.jsonl")}
    for flags, said in (
        ("", "--resume auto"),
        ("--resume --rank 4", "was written by a run with another"),
        ("--resume --dtype bfloat16", "was written by a run with another"),
        ("--resume --lr 0.5", "other options (lr"),
    ):
        assert said in typed(f"sft {tuned}/config.yaml {flags}", code=2)
    assert held == {name: (tuned / name).read_bytes() for name in held}


def test_bad_rows_can_be_skipped_and_are_counted(here: Path, typed: Typed) -> None:
    (here / "mixed.jsonl").write_text((here / "rows.jsonl").read_text() + "{\n")
    said = typed("sft --model m --data mixed.jsonl --out o --steps 1 --on-bad-row skip")
    assert "22 rows" in said and "1 skipped" in said


def test_eval_gives_both_and_agrees_with_the_library(tuned: Path, here: Path, as_json: AsJson) -> None:
    values = as_json(f"eval --model m --adapter {tuned} --data val.jsonl --max-new-tokens 6 --answers answers.jsonl")
    model, tokenizer = fourbit.load(
        here / "m", quant_type="nf4", double_quant=False
    )  # as the adapter's own config.yaml says
    dataset = load_rows(here / "val.jsonl", tokenizer)
    assert values["base_loss"] == pytest.approx(fourbit.evaluate_loss(model, dataset.examples), rel=1e-6)
    fourbit.load_adapter(model, tuned)
    assert values["loss"] == pytest.approx(fourbit.evaluate_loss(model, dataset.examples), rel=1e-6)
    assert values["loss"] < values["base_loss"] and values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert 0 <= values["exact_match"] <= 1 and values["rows"] == 6
    written = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    assert [row["expected"] for row in written] == [sample.answers[0][-1]["content"] for sample in dataset.samples]
    assert sum(row["exact"] for row in written) / 6 == pytest.approx(values["exact_match"])
    assert (here / "answers.base.jsonl").is_file()


def test_eval_prints_a_table(tuned: Path, typed: Typed) -> None:
    line = f"eval --model m --adapter {tuned} val.jsonl --match none"
    lines = typed(line, out=True).splitlines()
    assert lines[0].split() == ["base", "adapter"] and lines[1].split()[0] == "loss" and len(lines[1].split()) == 3
    said = typed(f"{line} --no-base --quant none")
    assert ["adapter"] in [line.split() for line in said.splitlines()]
    assert f"the adapter {tuned} was trained on nf4-nodq; on the dense base it will be somewhat off" in said


def test_eval_of_plain_text_is_its_loss(here: Path, as_json: AsJson) -> None:
    (here / "text.jsonl").write_text('{"text": "some words"}\n{"text": "and others"}\n')
    values = as_json("eval --model m text.jsonl")
    assert values["loss"] > 0 and values["rows"] == 2 and "exact_match" not in values


GENERATE = "generate --model m --data prompts.jsonl --out answers.jsonl --max-new-tokens 9 --batch-size 2"


def test_generate_answers_every_form_of_row(here: Path, as_json: AsJson) -> None:
    turn = {"role": "user", "content": "abc"}
    forms = [
        {"prompt": "abc", "id": 7},
        {"prompt": [turn]},
        {"messages": [turn]},
        {"messages": [turn, {"role": "assistant", "content": "not shown"}]},
        {"prompt": "abc", "completion": "not shown"},
    ]
    for form in forms:  # one form a file, as in training data; all five ask the same
        (here / "prompts.jsonl").write_text((json.dumps(form) + "\n") * 3)
        assert as_json(f"{GENERATE} --overwrite") == {"out": "answers.jsonl", "rows": 3}
        answers = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
        assert answers == [form | {"answer": _expected(here / "m", "abc")}] * 3


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_what_a_row_says_beside_its_messages_reaches_the_model(
    here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """System text, tools, the template's variables; and a key that nobody knows is told of."""
    (here / "t.jinja").write_text(
        "{{ mood }};{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ m.role }}:"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    more = {"system": "S", "tools": [{"type": "function", "function": {"name": "f"}}], "odd": 1}
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rows = [
        {"messages": talk, "chat_template_kwargs": {"mood": "glad"}, **more},
        {"prompt": "hi", "completion": "yo", "chat_template_kwargs": {"mood": "sad"}, **more},
    ]
    tokenizer, seen = load_tokenizer(here / "m"), list[list[int]]()

    def answers(model: Any, prompts: list[list[int]], **how: Any) -> Any:
        seen.extend(prompts)
        ids = tokenizer.encode("yo")
        return iter([Sampled(ids, [0.0] * len(ids), False) if command == "generate" else ids] * len(prompts))

    name = "cli.generate.sample_each" if command == "generate" else "trainer.evaluate.generate_each"
    monkeypatch.setattr(f"fourbit.{name}", answers)
    for i, row in enumerate(rows):
        (here / "d.jsonl").write_text(json.dumps(row) + "\n")
        out = f"--out o{i}.jsonl" if command == "generate" else ""
        said = typed(f"{command} --model m --data d.jsonl --template t.jinja --max-new-tokens 2 {out}")
        assert "'odd'" in said, said
        assert command == "generate" or "100.0%" in said
    moods = [tokenizer.decode(ids, skip_special=False) for ids in seen]
    assert moods == [f"{mood};f;system:S<|im_end|>user:hi<|im_end|>assistant:" for mood in ("glad", "sad")]


def test_a_sampled_answer_does_not_depend_on_its_neighbours(here: Path, typed: Typed) -> None:
    """The model is float32 here: its logits differ in their last bits, which decides among some 10^7 draws of one."""
    prompts = [{"prompt": "ab" * (i % 4) + "c", "id": i} for i in range(20)]
    found = []
    for batch_size, rows in ((1, prompts), (2, prompts), (5, prompts), (3, prompts[::-1])):
        (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        typed(f"{GENERATE} --temperature 1.5 --seed 3 --overwrite --batch-size {batch_size}")
        written = [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
        assert [row["id"] for row in written] == [row["id"] for row in rows]
        # Equal prompts draw their answers one after the other, so they are told apart by their order alone.
        found.append(sorted((row["prompt"], row["answer"]) for row in written))
    assert found[1:] == found[:1] * 3 and len({*found[0]}) > 15


def _expected(folder: Path, text: str) -> str:
    """The greedy answer by the library alone."""
    model, tokenizer = fourbit.load(folder, quant_type="nf4")
    prompt = tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
    (ids,) = fourbit.generate(model, [prompt], max_new_tokens=9, stop_ids=tokenizer.stop_ids)
    return tokenizer.decode(ids, skip_special=False)


@pytest.mark.usefixtures("ended")
def test_generate_keeps_the_best_of_several_as_rows_to_learn_from(here: Path, typed: Typed) -> None:
    (here / "score.py").write_text("def score(prompt, answer, row):\n    return answer.count(row['letter'])\n")
    talks = [{"messages": [{"role": "user", "content": "a" * i}], "letter": "b"} for i in range(1, 9)]
    (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    line = f"{GENERATE} --overwrite --n 6 --temperature 1.5 --reward score.py:score"
    read = lambda: [json.loads(line) for line in (here / "answers.jsonl").read_text().splitlines()]
    typed(line)
    every = read()
    assert len(every) == 48 and all(row["reward"] == row["answer"].count("b") for row in every)
    groups = [every[i : i + 6] for i in range(0, 48, 6)]
    typed(f"{line} --keep best")
    best = read()
    assert [row["reward"] for row in best] == [max(row["reward"] for row in group) for group in groups]
    assert all(row["messages"][-1]["content"].count("b") == row["reward"] for row in best)
    typed(f"{line} --keep pairs")
    pairs, differing = read(), [group for group in groups if len({row["reward"] for row in group}) > 1]
    assert len(pairs) == len(differing) > 0
    for pair in pairs:
        chosen, rejected = (pair[name][0]["content"].count("b") for name in ("chosen", "rejected"))
        assert chosen > rejected and pair["prompt"][0]["role"] == "user"
    assert len(samples_of([str(here / "answers.jsonl")], "pairs")) == len(pairs)
    assert "n of 2 or more" in typed(f"{GENERATE} --keep best --overwrite", code=2)
    assert "temperature 0 gives equal ones" in typed(f"{GENERATE} --n 2 --overwrite", code=2)


@pytest.mark.usefixtures("ended")
def test_what_generate_keeps_to_learn_from_can_be_read(
    here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may answer anything, and a reward may like it best: what no training row may hold is left out."""
    tokenizer = load_tokenizer(here / "m")
    bad = ["", " \n", f"so {tokenizer.special_tokens[0]} ends", "a\0b"]
    said, made = cycle([*bad, "fair", "good, no"]), generate.answered
    monkeypatch.setattr(generate, "answered", lambda *given: replace(made(*given), answer=next(said)))
    (here / "score.py").write_text("def score(prompt, answer, row):\n    return 9 - len(answer)\n")
    (here / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    line = f"{GENERATE} --overwrite --n 6 --temperature 1 --reward score.py:score"
    kinds: dict[str, Any] = {"best": "sft", "pairs": "pairs"}
    for keep, kind in kinds.items():
        told = typed(f"{line} --keep {keep}")
        assert "answers are left out: cut off at max_new_tokens, empty, or they spell" in told
        rows = load_rows([str(here / "answers.jsonl")], tokenizer, kind)
        assert len(rows) == len(samples_of([str(here / "prompts.jsonl")], "prompts"))
        assert all("fair" in example.parts[0].text for example in rows.examples)


@pytest.mark.parametrize("command", ["eval", "chat"])
def test_keep_dense_off_decodes_nothing_for_answers(
    here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    rooms, made = list[float](), answers.merging
    monkeypatch.setattr(answers, "merging", lambda model, room, *how: rooms.append(room) or made(model, room, *how))
    more = "rows.jsonl --batch-size 32" if command == "eval" else ""
    for keep in ("off", "on"):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        typed(f"{command} --model m {more} --max-new-tokens 2 --keep-dense {keep}")
    half = len(rooms) // 2
    assert half and not any(rooms[:half]) and all(rooms[half:])


def test_answers_that_were_cut_off_are_no_rows_to_learn_from(here: Path, typed: Typed) -> None:
    (here / "score.py").write_text("def score(prompt, answer, row):\n    return len(answer)\n")
    (here / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    told = typed(f"{GENERATE} --n 4 --temperature 0.1 --reward score.py:score --keep best --overwrite")
    assert "8 answers are left out: cut off" in told and not (here / "answers.jsonl").read_text()


def test_generate_leaves_no_half_file(here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("fourbit.cli.generate.sample_each", fail)
    (here / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (here / "answers.jsonl").write_text("older answers")
    before = {*here.iterdir()}
    assert "answers.jsonl is there already: --overwrite replaces it" in typed(GENERATE, code=2)
    typed(f"{GENERATE} --overwrite", code=4)
    assert {*here.iterdir()} == before and (here / "answers.jsonl").read_text() == "older answers"


def test_generate_keeps_what_it_answered_and_goes_on(
    here: Path, typed: Typed, as_json: AsJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "prompts.jsonl").write_text("".join(f'{{"prompt": "{"ab" * i}"}}\n' for i in range(1, 20)))
    line = f"{GENERATE} --batch-size 2 --temperature 1"
    as_json(line)
    whole = (here / "answers.jsonl").rename(here / "whole.jsonl").read_text()
    calls = [sample]  # the second one ends in Ctrl-C

    def answer(*args: Any, **more: Any) -> Any:
        if not calls:
            raise KeyboardInterrupt
        return calls.pop()(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("fourbit.models.generate.sample", answer)
        told = typed(line, code=130)
    assert "answers.jsonl keeps 16 finished rows; the same command with --resume goes on" in told
    assert "is there already: --overwrite replaces it, --resume goes on after its rows" in typed(line, code=2)
    other = line.replace("prompts.jsonl", "rows.jsonl")
    assert "holds other rows than those of this command: --overwrite replaces it" in typed(f"{other} --resume", code=2)
    as_json(f"{line} --resume")
    assert (here / "answers.jsonl").read_text() == whole


def test_eval_keeps_its_answers_and_goes_on(here: Path, typed: Typed, as_json: AsJson, monkeypatch: Any) -> None:
    line = "eval --model m --answers answers.jsonl --max-new-tokens 3 --batch-size 1 rows.jsonl"
    expected = as_json(line)
    whole = (here / "answers.jsonl").rename(here / "whole.jsonl").read_text()
    calls = [fourbit.generate, fourbit.generate]  # the third one runs out of memory

    def answer(*args: Any, **more: Any) -> Any:
        if not calls:
            raise MemoryError
        return calls.pop()(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("fourbit.models.generate.generate", answer)
        assert "answers.jsonl keeps 16 finished rows" in typed(line, code=4)
    for other in (f"{line} --match contains", line.replace("rows.jsonl", "val.jsonl")):
        assert "holds other rows than those of this command" in typed(f"{other} --resume", code=2)
    assert as_json(f"{line} --resume") == expected
    assert (here / "answers.jsonl").read_text() == whole


def test_eval_keeps_what_it_answered_and_goes_on(
    tuned: Path, here: Path, typed: Typed, as_json: AsJson, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the adapter's own folder."""
    run = shutil.copytree(tuned, here / "run")
    line = "eval --model m --adapter run --data val.jsonl --max-new-tokens 6 --answers run/answers.jsonl"
    whole = as_json(line)
    answers = {name: (run / name).read_text() for name in ("answers.jsonl", "answers.base.jsonl")}
    for name in answers:
        (run / name).unlink()
    write = Output.write

    def dies(self: Output, row: str) -> None:
        if self.written == 3 and "base" not in self.path.name:
            raise MemoryError
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", dies)
        told = typed(line, code=4)
    assert "answers.jsonl keeps 3 finished rows" in told and "answers.base.jsonl keeps 6 finished rows" in told
    assert as_json(f"{line} --resume") == whole
    assert answers == {name: (run / name).read_text() for name in answers}


def test_chat_remembers_until_reset(here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nabc\n/reset\n\nabc\n/what\n/quit\nnever read\n"))
    said = typed("chat --model m --max-new-tokens 9")
    told, _, out = said.partition("unknown command /what; there are /reset and /quit\n")
    fresh = visible(_expected(here / "m", "abc"))
    assert out.startswith(fresh + "\n") and out.endswith(fresh + "\n")
    assert out != (fresh + "\n") * 3, "the second answer does not see the first turn"
    assert "forgotten" in told


@pytest.fixture
def short(here: Path) -> Path:
    """The model with 32 positions, named `short`."""
    folder = here / "short"
    shutil.copytree(here / "m", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    return folder


def test_what_goes_beyond_the_positions_is_said(
    short: Path, here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = GENERATE.replace("--model m", "--model short")
    (here / "prompts.jsonl").write_text('{"prompt": "a"}\n')  # 20 tokens, so 12 more have room
    said = typed(line.replace("-tokens 9", "-tokens 13"))
    assert (
        "note: texts of up to 20 tokens with 13 new ones go beyond the model's 32 positions; answers end there" in said
    )
    (row,) = [json.loads(text) for text in (here / "answers.jsonl").read_text().splitlines()]
    (here / "answers.jsonl").unlink()
    typed(f"{line} --seed 1".replace("-tokens 9", "-tokens 12"))
    assert row == json.loads((here / "answers.jsonl").read_text())
    (here / "answers.jsonl").unlink()
    assert "positions" not in typed(line)
    (here / "answers.jsonl").unlink()
    (here / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "0123456789abc"}\n')
    assert "prompts.jsonl:2: the prompt has 32 tokens, which leaves no room for an answer in the" in typed(line, code=2)
    (here / "rows.jsonl").unlink()
    (here / "rows.jsonl").write_text('{"prompt": "0123456789", "completion": "bbbbb"}\n')
    assert "tokens go beyond the model's 32 positions" in typed("eval --model short rows.jsonl --max-new-tokens 1")
    assert "tokens go beyond the model's 32 positions" in typed("sft --model short --data rows.jsonl --steps 1 --out o")
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n/reset\na\n"))
    said = typed("chat --model short --max-new-tokens 20 --temperature 1")
    assert said.count("the conversation fills the model's 32 positions; /reset forgets it") in (2, 3)


def test_chat_says_what_it_cannot_read(here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input, which is closed" in typed("chat --model m", code=2)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"h\xff\n"), encoding="ascii"))
    assert "what is no ascii text reads as \ufffd (PYTHONUTF8=1" in typed("chat --model m --max-new-tokens 2")
    monkeypatch.setattr("sys.stdin", io.StringIO("<|im_end|>\nhi\n"))
    assert "'<|im_end|>' is a special token, which would steer the model" in typed("chat --model m --max-new-tokens 2")
    assert "'<|im_end|>' is a special token" in typed("chat --model m --system 'a<|im_end|>'", code=2)
    (here / "u.jinja").write_text("{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}")
    asked = "chat --model m --max-new-tokens 2 --system Briefly. --template"
    for template, lost in (("u.jinja", 1), ("chatml", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        said = typed(f"{asked} {template}")
        assert said.count("u.jinja leaves out 'Briefly.': name another one with --template") == lost


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


def test_a_stream_is_the_text_of_all_its_tokens_in_linear_time() -> None:
    words = {"<unk>": 0, **{f"_w{i}": i + 1 for i in range(9)}, **{f"<0x{b:02X}>": 10 + b for b in range(256)}}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    steps = [tokenizers.decoders.Replace("_", " "), tokenizers.decoders.ByteFallback()]
    backend.decoder = tokenizers.decoders.Sequence(
        [*steps, tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    sizes, ids = list[int](), [1, 2, *(10 + byte for byte in "né€😀".encode()), 3, 4, 10 + 0xC3, 5, 10 + 0xC3]

    def decode(part: list[int]) -> str:
        sizes.append(len(part))
        return backend.decode(part)

    written: list[str] = []
    stream = Stream(decode, written.append)
    for token in ids * 20:
        stream.add(token)
    stream.show()
    assert "".join(written) == stream.text == backend.decode(ids * 20)
    assert max(sizes) < 2 * len(ids)


def test_data_shows_what_is_trained(here: Path, typed: Typed) -> None:
    out = typed("data rows.jsonl --model m --rows 1", out=True)
    turns = json.loads((here / "rows.jsonl").read_text().splitlines()[0])["messages"]
    question, answer = (message["content"] for message in turns)
    marks = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{{+{answer}<|im_end|>+}}\n"
    assert marks in out and out.count("{+") == 1
    assert "tokens in a row" in out


def test_data_shows_both_answers_of_a_pair(here: Path, typed: Typed) -> None:
    (here / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "good", "rejected": "bad"}) + "\n")
    out = typed("data pairs.jsonl --model m", out=True)
    assert "{+good<|im_end|>+}" in out and "{+bad<|im_end|>+}" in out


def test_data_json_counts(here: Path, as_json: AsJson) -> None:
    values = as_json("data rows.jsonl --model m")
    examples = load_rows(here / "rows.jsonl", load_tokenizer(here / "m")).examples
    assert values["rows"] == 22 and values["problems"] == []
    assert values["tokens"] == sum(len(part.ids) for example in examples for part in example.parts)
    trained = sum(sum(part.trained) for example in examples for part in example.parts)
    assert values["trained_share"] == pytest.approx(trained / values["tokens"])
    pairs = [{"prompt": "p", "chosen": "c" * n, "rejected": "r"} for n in (1, 500)]
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    values = as_json("data pairs.jsonl --model m --max-length 100")
    assert values["rows"] == 1 and sum(values["dropped"].values()) == 1 and not values["skipped"]


def test_data_lists_problems_and_shows_the_rest(here: Path, typed: Typed) -> None:
    (here / "mixed.jsonl").write_text((here / "rows.jsonl").read_text() + "{\n" * 3)
    said = typed("data mixed.jsonl --model m --problems 2", code=2)
    assert "mixed.jsonl:23: " in said and "mixed.jsonl:25: " not in said and "and 1 more" in said and "{+" in said
    typed("data mixed.jsonl --model m --problems 2 --on-bad-row skip")


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


def test_doctor(typed: Typed, as_json: AsJson) -> None:
    facts = as_json("doctor")
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["fourbit"] == fourbit.__version__
    assert facts["used"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert "kernels" in typed("doctor", out=True)


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, typed: Typed) -> None:
    def version(name: str) -> str:
        if name == "gguf":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("fourbit.cli.doctor.version", version)
    said = typed("doctor", code=3)
    assert "missing: pip install gguf" in said and "gguf         missing" in said


def test_help_and_version(typed: Typed) -> None:
    page = typed("--help", out=True)
    assert all(f"fourbit {name}" in page for name in COMMANDS)
    assert typed("") == page
    assert typed("--version") == f"fourbit {fourbit.__version__}\n"


def test_sft_with_an_optimizer_and_rates_of_its_own(typed: Typed) -> None:
    """The settings are kept as they were given, and a resumed run may have another budget."""
    typed(
        "sft --model m --data rows.jsonl --out run --steps 2 --rank 4 --schedule wsd --decay 0.5 --lora-plus 16 "
        "--lr-scale '*.layers.0.*=0.5' --lr-scale '*.k_proj.*=2' --optimizer paged-adamw8bit --optimizer-budget 1MiB"
    )
    settings = read_run("run")
    assert settings["lr_scale"] == {"*.layers.0.*": 0.5, "*.k_proj.*": 2} and settings["decay"] == 0.5
    assert settings["optimizer"] == "paged-adamw8bit" and settings["optimizer_budget"] == "1MiB"
    typed("sft run/config.yaml --optimizer-budget auto --resume")
