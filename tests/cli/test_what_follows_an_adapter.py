"""What an adapter was trained with goes with it: template, 4-bit form and base, for every command, from any folder."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.cli.config_file import CONFIG, read_run
from fourbit.cli.main import main
from fourbit.data.template import FILE as TEMPLATE
from fourbit.data.template import template_for
from fourbit.kernels import dispatch
from fourbit.lora.peft_files import trained_base
from fourbit.models.save import save_model

Typed = Callable[..., str]
OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PAIRS = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2} for w in ("ab", "c", "def")]
TRAININGS = {
    "sft": "sft --data rows.jsonl",
    "dpo": "dpo --data pairs.jsonl",
    "reward": "reward --data pairs.jsonl",
    "distill": "distill --teacher m --data rows.jsonl",
}


@pytest.fixture(autouse=True)
def nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats end at once."""
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.fixture(scope="module")
def run_elsewhere(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a template of its own, named by a relative path, whose file has changed since."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("elsewhere"))
        Path("m").symlink_to(tiny_folder)
        Path("own.jinja").write_text(OWN)
        sft = ["sft", "--model", "m", "--data", str(rows), "--steps", "1", "--rank", "2", "--quant", "nf4-nodq"]
        assert main([*sft, "--template", "own.jinja", "--out", "run"]) == 0
        Path("own.jinja").write_text("{{ messages[0]['content'] }}")
    return folder / "run"


@pytest.fixture
def tuned(here: Path, run_elsewhere: Path) -> Path:
    """A copy of that run, and pairs to go on with, in another folder."""
    (here / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    shutil.copytree(run_elsewhere, here / "run")
    return here / "run"


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_goes_on_with_template_and_form(tuned: Path, typed: Typed, command: str) -> None:
    said = typed(f"{TRAININGS[command]} --model m --adapter run --steps 1 --out o")
    assert f"template: run/{TEMPLATE}, as in training" in said and "NF4 and" in said
    assert Path("o", TEMPLATE).read_text() == OWN
    assert read_run("o")["quant"] == "nf4-nodq"


def test_answers_are_asked_for_with_template_and_form(tuned: Path, typed: Typed, as_json: Callable) -> None:
    adapted = "--model m --adapter run --max-new-tokens 2"
    for command in ("chat --model m --adapter run", f"generate {adapted} --data rows.jsonl --out answers.jsonl"):
        said = typed(command)
        assert f"template: run/{TEMPLATE}, as in training" in said and "NF4 and" in said
    loss = as_json(f"eval {adapted} --data val.jsonl --match none")["loss"]
    Path("again.jinja").write_text(OWN)
    said = typed(f"eval {adapted} --data val.jsonl --match none --template again.jinja --json")
    assert json.loads(said.splitlines()[-1])["loss"] == loss and "another template" not in said
    assert "note: run was trained with another template" in typed(
        f"eval {adapted} --data val.jsonl --match none --template chatml"
    )


def test_a_teacher_s_template_is_the_student_s(tuned: Path, typed: Typed) -> None:
    typed("distill --model m --teacher m --teacher-adapter run --data rows.jsonl --rank 2 --steps 1 --out o")
    assert Path("o", TEMPLATE).read_text() == OWN
    said = typed(f"{TRAININGS['distill']} --model m --teacher-adapter run --template chatml --rank 2 --steps 1 --out p")
    assert "note: run was trained with another template" in said


def test_a_reward_model_scores_with_its_template(tuned: Path, typed: Typed) -> None:
    typed("reward --model m --adapter run --data pairs.jsonl --epochs 3 --lr 1e-2 --out rm")
    model, tokenizer = fourbit.load("m", quant_type="nf4", double_quant=False)
    scorer = fourbit.RewardModel.load(model, "rm")
    row = [{"role": "user", "content": "say ab"}, {"role": "assistant", "content": "ababab"}]
    asked = scorer.score(tokenizer, [row], template=template_for(tokenizer, f"run/{TEMPLATE}"))
    assert scorer.score(tokenizer, [row]) == asked != scorer.score(tokenizer, [row], template="chatml")
    scorer.save("copy")
    assert Path("copy", TEMPLATE).read_text() == OWN


def test_a_full_model_has_the_template_it_was_trained_with(here: Path, typed: Typed) -> None:
    (here / "own.jinja").write_text(OWN)
    typed("sft --model m --data rows.jsonl --steps 1 --full --template own.jinja --out o")
    assert fourbit.load("o")[1].chat_template == OWN
    assert "dense and" in typed("chat --model o"), "as it was trained"


def test_dtype_auto_is_what_the_device_multiplies_and_training_had(
    tuned: Path, typed: Typed, as_json: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert as_json("doctor")["used"]["dtype"] == "bfloat16"
    model, _ = fourbit.load("m", quant_type="nf4", dtype="auto")
    assert {model.dtype, fourbit.load("m")[0].dtype} == {torch.bfloat16, torch.float32}
    train = "sft --model m --data rows.jsonl --rank 2 --steps 1"
    typed(f"{train} --out narrow")
    typed(f"{train} --out wide --dtype float32")
    assert [read_run(run)["dtype"] for run in ("narrow", "wide")] == ["bfloat16", "float32"]
    then = {"narrow": "bfloat16", "wide": "float32"}
    for run, dtype in then.items():
        assert f"and {dtype} on" in typed(f"chat --model m --adapter {run}")
        typed(f"{train.replace('--rank 2', '')} --adapter {run} --out after-{run}")
        assert read_run(f"after-{run}")["dtype"] == dtype
    typed(f"{train} --out wide --resume")  # in the dtype that it began in, not another run
    monkeypatch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: False)
    assert "and float32 on" in typed("chat --model m --adapter narrow"), "this device has no such product"
    assert fourbit.load("m", dtype="auto")[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["chatml", "zephyr", "plain", "llama3"])
def test_a_built_in_means_the_same_as_a_file(tiny_folder: Path, name: str, tmp_path: Path) -> None:
    """A tokenizer with a bos token that its own template leaves out: the built-ins leave it out too, but for llama3."""
    _, tokenizer = fourbit.load(tiny_folder)
    tokenizer = type(tokenizer)(
        tokenizer.backend,
        named_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        chat_template=tokenizer.chat_template,
    )
    built_in, talk = template_for(tokenizer, name), [{"role": "user", "content": "x"}]
    (tmp_path / TEMPLATE).write_text(built_in.portable())
    assert template_for(tokenizer, tmp_path / TEMPLATE).render(talk) == built_in.render(talk)
    assert ("<|endoftext|>" in built_in.render(talk)) == (name == "llama3")


def test_another_base_is_refused_by_every_command(tuned: Path, typed: Typed) -> None:
    other = {
        name: tensor + 0.3 * torch.randn(tensor.shape) for name, tensor in load_file("m/model.safetensors").items()
    }
    Path("other").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        Path("other", name).write_bytes(Path("m", name).read_bytes())
    save_file(other, "other/model.safetensors", metadata={"format": "pt"})
    asked = ["chat --adapter run", "eval --adapter run --data val.jsonl", "generate --adapter run rows.jsonl --out x"]
    asked += [f"{line} --adapter run --steps 1 --out o" for line in TRAININGS.values()]
    for line in asked:
        assert "run was trained on another base" in typed(f"{line} --model other", code=2)
    assert "goes on by force" in typed("chat --model other --adapter run --force")
    line = "distill --data rows.jsonl --model m --teacher other --teacher-adapter run --steps 1 --rank 2 --out o"
    assert "run was trained on another base" in typed(line, code=2)


def test_another_form_of_the_base_is_told(tuned: Path, typed: Typed) -> None:
    told = "the adapter run was trained on nf4-nodq; on the dense base it will be somewhat off"
    assert told in typed("chat --model m --adapter run --quant none")
    assert told in typed("dpo --data pairs.jsonl --model m --adapter run --quant none --steps 1 --out o")


def test_the_form_is_known_from_the_adapter_alone(tuned: Path, typed: Typed) -> None:
    (tuned / CONFIG).write_text("quant: none\ntemplate: plain\n")  # somebody else's now
    said = typed("chat --model m --adapter run")
    assert "NF4 and" in said and f"run/{TEMPLATE}" in said
    (tuned / TEMPLATE).unlink()
    save_file(load_file(tuned / "adapter_model.safetensors"), tuned / "adapter_model.safetensors")  # as PEFT leaves it
    assert trained_base(tuned) is None
    assert "NF4 with double quantisation" in typed("chat --model m --adapter run")


@pytest.mark.parametrize(
    "text", ["a: [b\n", "quant: none\n", "- a\n", "format: fourbit run 2\nquant: none\n", "\0\xff"]
)
def test_somebody_else_s_config_is_no_run_of_ours(here: Path, typed: Typed, text: str) -> None:
    model, tokenizer = fourbit.load("m")
    save_model(model, "theirs", tokenizer)
    Path("theirs", CONFIG).write_bytes(text.encode("latin-1"))
    assert "NF4 with double quantisation" in typed("chat --model theirs")


def test_what_a_run_says_of_itself_is_checked(here: Path, typed: Typed) -> None:
    typed("sft --model m --data rows.jsonl --steps 1 --full --out o")
    text = Path("o", CONFIG).read_text()
    assert text.startswith("format: fourbit run 1\n") and "dense and" in typed("chat --model o")
    for wrong in ("[nf4]", "4", "gptq", "true", "{a: b}"):
        Path("o", CONFIG).write_text(text.replace('quant: "none"', f"quant: {wrong}"))
        assert "quant must be one of nf4, nf4-nodq, none or null, got" in typed("chat --model o", code=2)
    Path("o", CONFIG).write_text(text)
    typed(f"sft o/{CONFIG} --out p")  # a run's settings are settings
    Path("q.yaml").write_text(text.replace("fourbit run 1", "alpaca"))
    assert "unknown setting 'format'" in typed("sft q.yaml --out r", code=2)


def test_sft_goes_on_from_an_adapter(tuned: Path, typed: Typed) -> None:
    typed("sft --data rows.jsonl --model m --adapter run --epochs 3 --lr 1e-2 --out o --resume")
    before, after = (load_file(Path(name, "adapter_model.safetensors")) for name in ("run", "o"))
    assert before.keys() == after.keys() and before["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"].any()
    said = typed("sft --data rows.jsonl --model m --adapter run --rank 4 --out p", code=2)
    assert "the adapter run brings its own rank: leave them out" in said


def test_the_base_is_named_by_its_whole_path(tuned: Path) -> None:
    assert json.loads((tuned / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        Path("m").resolve()
    )
