"""`fourbit sft --sweep`: a table of adapters, each in a folder that the other commands open."""

import re

import pytest

from fourbit.trainer.checkpoint import load_checkpoint
from fourbit.trainer.metrics import read_metrics

SWEEP = "sft --model m --data rows.jsonl --val val.jsonl --out runs/s --batch-size 11 --epochs 1 --target attn"


def test_a_sweep_ends_with_a_table_and_folders_that_commands_open(typed, as_json, here):
    shown = typed(f"{SWEEP} --sweep rank=2,4 --sweep lr=1e-3,2e-2")
    names = [f"rank={rank},lr={lr}" for rank in (2, 4) for lr in ("1e-3", "2e-2")]
    table = {line.split("  ")[0]: line.split() for line in shown.splitlines() if line.startswith("rank=")}
    assert re.search(r"sweep: 4 adapters of [\d.]+ kB, gradients as much, state [\d.]+ kB\n", shown)
    assert re.search(r"^adapter +steps +train loss +validation loss\n", shown, re.MULTILINE)
    rows = [table[name] for name in names]
    best = min(rows, key=lambda row: float(row[3]))
    assert [row[1] for row in rows] == ["2"] * 4 and [row for row in rows if row[-1] == "best"] == [best]
    assert f"try it  fourbit chat --model m --adapter runs/s/{best[0]}\n" in shown
    evaluated = as_json(f"eval --model m --adapter runs/s/{best[0]} --data val.jsonl --max-new-tokens 1")
    assert evaluated["loss"] == pytest.approx(float(best[3]), abs=1e-3)
    text = (here / "runs/s" / names[1] / "config.yaml").read_text()
    for setting in ("rank: 2 +# flag", "lr: 0.02 +# flag", "epochs: 1 +# flag", "steps: null +# default"):
        assert re.search(f"^{setting}$", text, re.MULTILINE), setting
    again = typed("sft runs/s/config.yaml --resume")  # all are done
    assert again.count("all 2 steps of this run were done") == 4 and table[names[0]] == next(
        line.split() for line in again.splitlines() if line.startswith(names[0] + "  ")
    )


def test_a_sweep_over_data_says_nothing_of_the_best_where_rows_differ(typed, as_json, here):
    """Each data file is read once; shares of different rows do not compare."""
    (here / "half.jsonl").write_text("\n".join((here / "rows.jsonl").read_text().splitlines()[:11]))
    line = SWEEP.replace("--data rows.jsonl --val val.jsonl", "--data rows.jsonl --val 30%")
    shown = typed(f"{line} --sweep data=rows.jsonl,half.jsonl --sweep seed=0,1")
    assert shown.count("reading data") == 2 and " best\n" not in shown
    found = as_json(f"{line.replace('runs/s', 'runs/t')} --sweep data=rows.jsonl,half.jsonl")
    assert found["best"] is None and found["failed"] == {}
    assert {name: each["steps"] for name, each in found["results"].items()} == {
        "data=rows_jsonl": 2,
        "data=half_jsonl": 1,
    }


def test_each_of_a_sweep_is_its_run_alone(typed, here):
    """The same seeds, start and order: the checkpoint of one is that of a run alone, to rounding."""
    typed(f"{SWEEP} --sweep rank=2,4")
    typed(f"{SWEEP.replace('runs/s', 'runs/alone')} --rank 4")
    ours, theirs = (
        load_checkpoint(here / "runs" / run / "checkpoints" / "step-000002")[0]["weights"]
        for run in ("s/rank=4", "alone")
    )
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def test_a_budget_bounds_all_states_together(typed, here):
    typed(f"{SWEEP} --optimizer paged-adamw --optimizer-budget 65KiB --sweep rank=2,4")
    held = 0
    for name in ("rank=2", "rank=4"):
        assert 'optimizer_budget: "32.5KiB"' in (here / "runs/s" / name / "config.yaml").read_text()
        records = read_metrics(here / "runs/s" / name / "metrics.jsonl")
        held += max(record["optimizer_bytes"] for record in records if "optimizer_bytes" in record)
    assert 0 < held <= 65 * 1024


def test_codes_that_all_share_are_not_made_anew(typed):
    line = SWEEP.replace("--target attn", "--target q_proj")
    assert "which a sweep's adapters share: take quant none" in typed(f"{line} --sweep start=default,pissa", code=2)
    told = typed(f"{SWEEP} --train-tokens '<|im_end|>' --sweep rank=2,4", code=2)
    assert "no adapter of the output head" in told  # before a step
    assert "start pissa makes" in typed(f"{line} --start pissa --quant nf4 --sweep rank=2,4", code=2)
    typed(f"{line} --quant none --sweep start=default,pissa")


@pytest.mark.parametrize(
    "flags", ["rank=2,4 --full", "rank=2,4 --adapter a", "rank=2,4 --resume runs/x/step-000001", "rank=2,", "out=a,b",
              "rank", "rank=2 --sweep rank=4"],
)  # fmt: skip
def test_what_no_sweep_goes_over_is_refused_before_the_model_is_read(typed, here, flags):
    (here / "a").mkdir()
    (here / "a" / "adapter_config.json").write_text("{}")
    assert "sweep must be NAME=A,B, once for each of data, kind, rank" in typed(
        f"{SWEEP.replace(' --target attn', '')} --sweep {flags}", code=2
    )
