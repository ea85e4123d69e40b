"""Runs with other optimizers, schedules and groups: what they do, what they tell, and that resuming changes no bit."""

import pytest
import torch

import fourbit
from fourbit.errors import InputError
from fourbit.optim.schedule import rate_factor
from fourbit.trainer.checkpoint import load_checkpoint
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.progress import display_for
from fourbit.trainer.sft import SFTTrainer

STEPS = 6


def run(folder, rows, out, *, full=False, display=None, dtype=torch.float32, **options):
    model, tokenizer = fourbit.load(folder, quant_type=None if full else "nf4", dtype=dtype)
    if not full:
        fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = fourbit.SFTConfig(out=str(out), full=full, **{"batch_size": 4, "lr": 1e-2, "steps": STEPS} | options)
    SFTTrainer(model, tokenizer, train=rows, config=config).train(display=display)
    return start, dict(model.named_parameters())


def steps_of(out):
    return [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def state_after(out, step=STEPS):
    tensors, _ = load_checkpoint(out / "checkpoints" / f"step-{step:06d}")
    return tensors


@pytest.mark.parametrize(
    "before, after",
    [
        (("adamw8bit", "auto"), ("adamw8bit", "auto")),
        (("paged-adamw8bit", "100KiB"), ("paged-adamw8bit", "auto")),
        (("paged-adamw", "auto"), ("paged-adamw", "150KB")),
        (("adamw", "auto"), ("paged-adamw", "150KiB")),
        (("paged-lion8bit", "100KiB"), ("lion8bit", "auto")),
    ],
    ids=str,
)
def test_resuming_with_another_budget_is_bit_exact(stopping, tiny_folder, rows, tmp_path, before, after):
    full = {"full": True, "lr": 1e-3}
    options = [full | {"optimizer": name, "optimizer_budget": budget} for name, budget in (before, after)]
    run(tiny_folder, rows, tmp_path / "whole", **options[0])
    run(tiny_folder, rows, tmp_path / "cut", **options[0], display=stopping(3))
    run(tiny_folder, rows, tmp_path / "cut", **options[1], resume="auto")
    whole, cut = state_after(tmp_path / "whole"), state_after(tmp_path / "cut")
    assert {g: set(t) for g, t in whole.items()} == {g: set(t) for g, t in cut.items()}
    for group, members in whole.items():
        for name, tensor in members.items():
            assert torch.equal(tensor, cut[group][name]), f"{group}/{name}"
    eight = [value.dtype == torch.uint8 for value in whole["optimizer"].values()]
    assert any(eight) == ("8bit" in before[0]) and whole["optimizer"]


def test_resuming_with_another_optimizer_is_refused(stopping, tiny_folder, rows, tmp_path):
    run(tiny_folder, rows, tmp_path, display=stopping(3))
    with pytest.raises(InputError, match=r"other options \(optimizer: 'adamw' -> 'lion8bit'\); use the same ones"):
        run(tiny_folder, rows, tmp_path, optimizer="lion8bit", resume="auto")


def test_the_rate_follows_the_schedule_asked_for(tiny_folder, rows, tmp_path):
    run(tiny_folder, rows, tmp_path, schedule="wsd", warmup=2, decay=0.5)
    rates = [record["lr"] for record in steps_of(tmp_path)]
    options = {"total": STEPS, "warmup": 2, "schedule": "wsd", "decay": 3}
    assert rates == [1e-2 * rate_factor(i, **options) for i in range(STEPS)]
    assert rates[3] == 1e-2 > rates[4] > rates[5] > 0


def test_lora_plus_and_patterns_scale_what_moves(tiny_folder, rows, tmp_path):
    """AdamW's first step has the size of the learning rate wherever the gradient is not next to zero."""
    lr_scale = {"model.layers.0.*": 0.5, "*.q_proj.*": 0}
    start, end = run(tiny_folder, rows, tmp_path, steps=1, warmup=0, lora_plus=16, lr_scale=lr_scale)
    moved = {name: (p.detach() - start[name]).abs().max().item() for name, p in end.items() if "lora_B" in name}
    assert len(moved) == 14
    for name, most in moved.items():
        scale = 0 if "q_proj" in name else 0.5 if ".layers.0." in name else 1
        assert most == pytest.approx(16e-2 * scale, rel=1e-3), name
    saved = state_after(tmp_path, 1)["optimizer"]
    assert not [name for name in saved if "q_proj" in name], "what does not learn needs no state"


def test_metrics_and_display_tell_the_optimizers_memory(tiny_folder, rows, tmp_path, capsys):
    sizes = {}
    for name, budget in (("adamw", "auto"), ("adamw8bit", "auto"), ("paged-adamw", "150KiB")):
        out = tmp_path / name
        run(tiny_folder, rows, out, full=True, lr=1e-3, optimizer=name, optimizer_budget=budget, display=display_for)
        records = steps_of(out)
        sizes[name] = records[-1]["optimizer_bytes"]
        paged = {key for key in records[-1] if key.startswith("page_")} | {"optimizer_host_bytes"} & set(records[-1])
        assert bool(paged) == name.startswith("paged"), paged
        said = capsys.readouterr().err
        assert "opt 0.00 GiB" in said and ("on host" in said) == name.startswith("paged")
    assert sizes["adamw8bit"] < 0.8 * sizes["adamw"], "most of this model is in tensors too small for 8 bits"
    assert sizes["paged-adamw"] < 150 * 1024 + 400 < sizes["adamw"]
    last = records[-1]
    assert last["page_bytes_in"] == last["page_bytes_out"] > 0 and last["page_misses"] > 0
    assert last["optimizer_host_bytes"] + last["optimizer_bytes"] >= sizes["adamw"] * 0.99
    assert last["page_stall_seconds"] >= 0


def test_a_budget_below_one_page_names_the_least(tiny_folder, rows, tmp_path):
    with pytest.raises(InputError, match="the least is"):
        run(tiny_folder, rows, tmp_path, full=True, optimizer="paged-adamw", optimizer_budget="1KB")


BF16 = {"full": True, "dtype": torch.bfloat16, "lr": 1e-5, "schedule": "constant", "warmup": 0}


@pytest.mark.parametrize("lr, steps", [(1e-4, 20), pytest.param(1e-5, 200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_small_rates_move_every_bf16_tensor(tiny_folder, rows, tmp_path, rounding, lr, steps):
    """Norms of 1, whose neighbours are 2^-8 away: of 32 values, 8 move at the least in the mean."""
    start, end = run(tiny_folder, rows, tmp_path, rounding=rounding, **BF16 | {"lr": lr, "steps": steps})
    norms = [name for name in start if "norm" in name]
    moved = {name for name, old in start.items() if not torch.equal(end[name], old)}
    assert len(norms) == 5 and all(p.dtype == torch.bfloat16 for p in end.values())
    if rounding == "stochastic":
        assert moved == set(start)
    else:
        assert not moved & set(norms), "the fault that the other is for"
    assert all(record["loss"] > 0 for record in steps_of(tmp_path))


def test_bf16_weights_resume_bit_for_bit(stopping, tiny_folder, rows, tmp_path):
    run(tiny_folder, rows, tmp_path / "whole", seed=3, **BF16)
    run(tiny_folder, rows, tmp_path / "cut", seed=3, **BF16, display=stopping(3))
    run(tiny_folder, rows, tmp_path / "cut", seed=3, **BF16, resume="auto")
    run(tiny_folder, rows, tmp_path / "other", seed=4, **BF16)
    whole, cut, other = (state_after(tmp_path / name)["weights"] for name in ("whole", "cut", "other"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in whole.items())


class Told:
    """A display that keeps what it is told."""

    def __init__(self):
        self.said = []

    def show(self, record): ...
    def close(self): ...
    def message(self, text):
        self.said.append(text)


def test_what_does_not_move_is_told_once_by_name(tiny_folder, rows, tmp_path):
    told = Told()
    options = {"rounding": "nearest", "lr_scale": {"*.layers.0.*": 0}, "display": lambda total, start: told, **BF16}
    _, end = run(tiny_folder, rows, tmp_path, steps=3, **options)
    (note,) = told.said
    assert note.startswith("note: ") and "trained tensors did not move in 3 steps" in note
    assert "model.layers.0.self_attn.q_proj.weight, " in note and "in 16 bits use rounding stochastic" in note
    told.said.clear()
    run(tiny_folder, rows, tmp_path / "advised", steps=3, **options | {"rounding": "stochastic", "lr_scale": {}})
    assert not told.said
    assert all(p.grad is None for p in end.values())


def test_where_all_moves_nothing_is_told(tiny_folder, rows, tmp_path):
    """LoRA's A has no gradient in the first step, while B is 0: one step says nothing, two do."""
    for steps in (1, 2, 5):
        told = Told()
        run(tiny_folder, rows, tmp_path / str(steps), steps=steps, display=lambda total, start: told)  # noqa: B023
        assert not told.said, steps


def test_an_adapter_that_no_gradient_reaches_is_told(tiny_folder, rows, tmp_path):
    """Cut off from the loss, as an expert that no token is sent to."""
    model, tokenizer = fourbit.load(tiny_folder, quant_type=None)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8))
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x, shared: torch.zeros_like(x)
    config = fourbit.SFTConfig(out=str(tmp_path), batch_size=4, lr=1e-2, steps=3)
    outcome = SFTTrainer(model, tokenizer, train=rows, config=config).train(display=None)
    assert len(outcome.unmoved) == 6
    assert all(".layers.1.mlp." in name for name in outcome.unmoved)
