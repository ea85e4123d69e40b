"""`fourbit rl` as one types it: what it refuses, what it advises, and that the advice works."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fourbit
from fourbit.cli.config_file import CONFIG

RL = "rl --model m --data asked.jsonl --steps 2 --batch-size 2 --group-size 2 --max-new-tokens 3 --lr 1e-2"


@pytest.fixture
def asked(here: Path) -> Path:
    rows = [{"prompt": "ab" * i, "answer": str(i)} for i in range(1, 7)]
    (here / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "score.py").write_text(
        "def score(prompt, answer, row):\n    return len(set(answer)) + len(row['answer'])\n"
    )
    return here


@pytest.mark.pictures
def test_a_run_leaves_an_adapter_its_rewards_and_pictures(asked: Path, typed: Any, as_json: Any) -> None:
    told = as_json(f"{RL} --reward score.py:score --reward words:0-3=0.5 --val asked.jsonl --eval-every 1 --out run")
    assert told["steps"] == 2 and told["val_reward"] > 0 and "val_reward/score.py:score" in told
    records = [json.loads(line) for line in (asked / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "reward/words:0-3", "signal", "sampling_gap"} <= records[0].keys()
    assert (asked / "run" / "loss.png").stat().st_size > 5000
    typed("generate --model m --adapter run --data asked.jsonl --out answers.jsonl --max-new-tokens 2")
    assert len((asked / "answers.jsonl").read_text().splitlines()) == 6


WRONG = {  # what is typed wrong, what is said of it, and what is typed then
    "no reward": ("", "give a reward, such as number", "--reward number"),
    "no such reward": ("--reward nothing", "give one of these", "--reward exact"),
    "twice": ("--reward exact --reward exact=2", "with the sum of the weights", "--reward exact=3"),
    "nothing earned": ("--reward exact=0", "give one of them a weight", "--reward exact=0 --reward words:0-9"),
    "a file that fails": ("--reward bad.py:score", "mend it", "--reward score.py:score"),
    "one answer": ("--reward exact --group-size 1", "a baseline of batch or none without resample",
                   "--reward score.py:score --group-size 1 --baseline batch"),
    "groups of one": ("--reward exact --loss reinforce --group-size 1 --resample 1", "without resample",
                      "--reward exact --loss reinforce --group-size 1"),
    "kl's parts alone": ("--reward exact --kl-stop 1", "--kl-stop would do nothing, as kl is 0: leave out",
                         "--reward exact --kl-stop 1 --kl 0.1"),
    "k1": ("--reward exact --kl 0.1 --kl-estimator k1", "take k2 or k3, or kl_in reward",
           "--reward exact --kl 0.1 --kl-estimator k1 --kl-in reward"),
    "clip": ("--reward exact --loss sapo --clip-most 2", "the loss sapo takes none: leave out",
             "--reward exact --loss grpo --clip-most 2"),
    "ppo alone": ("--reward exact --lam 0.5", "no value function: leave out", "--reward exact --loss ppo --lam 0.5"),
    "ppo's baseline": ("--reward exact --loss ppo --baseline batch", "from values: leave out",
                       "--reward exact --loss ppo"),
    "a scale of nothing": ("--reward exact --baseline batch --scale-rewards group", "give batch or none, or none of",
                           "--reward exact --baseline batch --scale-rewards batch"),
    "whole answers": ("--reward exact --loss gspo --top-entropy 0.5", "as the loss gspo has one ratio an answer",
                      "--reward exact --loss dapo --top-entropy 0.5"),
    "a pass of too many": ("--reward exact --micro-batch 5", "splits the 4 examples of a step",
                           "--reward exact --micro-batch 4"),
    "dropout": ("--reward exact --dropout 0.1", "got 0.1: leave it out", "--reward exact"),
    "a round cut off": ("--reward exact --rollouts-ahead 3", "(rollouts_ahead): give 3",
                        "--reward exact --rollouts-ahead 3 --steps 3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_refused_says_what_works(asked: Path, typed: Any, kind: str) -> None:
    (asked / "bad.py").write_text("def score(")
    wrong, said, right = WRONG[kind]
    assert said in " ".join(typed(f"{RL} {wrong} --out run", code=2).split())
    typed(f"{RL} {right} --out run2")


@pytest.mark.parametrize("more", ["", "--updates 2 --kl 0.1", "--loss ppo"])
def test_a_dry_run_foresees_it(asked: Path, typed: Any, more: str) -> None:
    assert "MiB" in typed(f"{RL} --reward exact --out run --dry-run {more}")
    assert not (asked / "run").exists()


def test_a_reward_model_judges_answers_alike_however_they_were_generated(asked: Path, typed: Any) -> None:
    """Also where the policy's layers are merged for the time that it answers, and its reward model has others."""
    pairs = [{"prompt": "ab" * i, "chosen": "a" * i, "rejected": "b" * i} for i in range(1, 7)]
    (asked / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (asked / "shown.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    typed("reward --model m --data pairs.jsonl --steps 3 --lr 1e-2 --batch-size 2 --out judge")
    typed("sft --model m --data shown.jsonl --steps 2 --lr 1e-2 --batch-size 1 --target q_proj --out run")
    found = []
    for keep in ("off", "on"):
        out = f"--reward judge --n 3 --temperature 1 --max-new-tokens 4 --keep-dense {keep} --out {keep}.jsonl"
        typed(f"generate --model m --adapter run --data asked.jsonl {out}")
        found.append([json.loads(line) for line in (asked / f"{keep}.jsonl").read_text().splitlines()])
    assert [row["answer"] for row in found[0]] == [row["answer"] for row in found[1]]
    rewards = [[row["reward"] for row in rows] for rows in found]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4) and len({*rewards[0]}) > 6
    assert "MiB" in typed(f"{RL} --adapter run --reward judge --out rl --dry-run")
    told = typed("distill --model m --teacher m --teacher-adapter run --data shown.jsonl --out d --dry-run")
    assert "MiB" in told  # the same kind: an adapter of another role on a model without numbers
    assert "which is read" in typed(f"{RL} --adapter run --reward judge --out judge", code=2)
    template = (asked / "judge" / "chat_template.jinja").read_text()
    (asked / "judge" / "chat_template.jinja").write_text("{{ 'Q: ' }}" + template)
    assert "judge was trained with another template" in typed(f"{RL} --adapter run --reward judge --out rl")


def test_a_reward_model_with_codes_of_its_own_says_what_works(asked: Path, typed: Any) -> None:
    (asked / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    typed("reward --model m --data pairs.jsonl --steps 1 --batch-size 2 --rank 2 --start pissa --out judge")
    told = typed(f"{RL} --reward judge --out rl", code=2)
    assert "began as --start pissa on 4-bit codes" in " ".join(told.split()) and "(--quant none)" in told
    typed(f"{RL} --reward judge --quant none --out rl")


def test_the_command_that_is_printed_opens_a_reward_model_with_codes_of_its_own(asked: Path, typed: Any) -> None:
    (asked / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    told = typed("reward --model m --data pairs.jsonl --steps 1 --batch-size 2 --rank 2 --start pissa --out judge")
    line = " ".join(told.split()).partition("try it ")[2].partition(".score")[0]
    model, _ = fourbit.load("m", quant_type="nf4")
    assert "dense=" in line and eval(line, {"fourbit": fourbit, "model": model}).head.shape == (1, 32)  # noqa: S307  (our own line, as printed)


def test_a_run_whose_rewards_fail_keeps_what_it_learned(asked: Path, typed: Any) -> None:
    """Some that fail hinder no checkpoint; three rounds without one save before they end the run."""
    text = "calls = []\ndef score(p, a, r):\n    calls.append(1)\n"
    text += "    return len(a) if len(calls) % 3 and len(calls) < {} else None\n"
    (asked / "most.py").write_text(text.format(9))
    line = RL.replace("--steps 2", "--steps 8")
    told = typed(f"{line} --reward most.py:score --out run", code=2)
    assert "most.py:score: gave None, which is no number: mend it, then --resume auto goes on" in " ".join(told.split())
    (asked / "most.py").write_text(text.format(1000))
    typed(f"{line} --reward most.py:score --out run --resume auto")
    steps = [json.loads(line)["step"] for line in (asked / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9)]
    assert (asked / "run" / "adapter_model.safetensors").exists()


def test_the_dropout_of_a_loaded_adapter_is_said_to_be_off(asked: Path, typed: Any) -> None:
    (asked / "shown.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    for dropout, said in (("0.1", True), ("0", False)):
        typed(f"sft --model m --data shown.jsonl --steps 1 --batch-size 1 --dropout {dropout} --out sft{dropout}")
        told = typed(f"{RL} --reward score.py:score --adapter sft{dropout} --out rl{dropout}")
        assert ("dropout is off in reinforcement" in told) == said


@pytest.mark.usefixtures("ended")
def test_online_dpo_is_the_loop_that_the_docs_show(asked: Path, typed: Any) -> None:
    """The shell writes its commands down, and they run here: the tokens are few, and a check that such a model passes
    now and then stands for `number`."""
    text = (Path(__file__).parents[2] / "docs" / "reinforcement.md").read_text()
    (script,) = [part for part in text.split("```sh\n")[1:] if "for round" in part]
    noted = subprocess.run(["bash", "-c", 'fourbit() { echo "$*"; }\n' + script.partition("```")[0]],
                           check=True, capture_output=True, text=True)  # fmt: skip
    typed("sft --model m --data rows.jsonl --steps 1 --batch-size 1 --rank 2 --out runs/sft")
    commands = noted.stdout.replace("--model M", "--model m").replace("prompts.jsonl", "asked.jsonl").splitlines()
    assert [line.split()[0] for line in commands] == ["generate", "dpo"] * 3
    for line in commands:
        more = "--max-new-tokens 4" if line.startswith("generate") else "--steps 2 --batch-size 2 --lr 1e-2"
        typed(f"{line} {more}".replace("--reward number", "--reward score.py:score"))
    pairs = [(asked / f"pairs-{number}.jsonl").read_text().splitlines() for number in (1, 2, 3)]
    assert all(pairs) and all({"prompt", "chosen", "rejected"} == json.loads(row).keys() for row in pairs[2])
    weights = [(asked / "runs" / f"dpo-{n}" / "adapter_model.safetensors").read_bytes() for n in (1, 2, 3)]
    assert len({*weights}) == 3
    for number, before in ((1, "runs/sft"), (2, "runs/dpo-1"), (3, "runs/dpo-2")):
        assert f'adapter: "{before}"' in (asked / "runs" / f"dpo-{number}" / CONFIG).read_text()
