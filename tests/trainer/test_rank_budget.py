"""AdaLoRA in a run: ranks follow the schedule step by step, resumed too, and the penalty enters once a step."""

import json
from functools import partial

import pytest
import torch

import fourbit
from fourbit.errors import InputError
from fourbit.lora.layer import adapters_of

STEPS = 10
LORA = {"kind": "adalora", "rank": 2, "initial_rank": 4, "rank_warmup": 0.2, "rank_final": 0.3}
LAYERS = 14  # of the tiny model


@pytest.fixture
def adalora(adapted):
    """A function: the model with an adapter of this kind."""
    return partial(adapted, **LORA)


class Ranks(fourbit.Callback):
    """Keeps the total rank after each step, and the run's ends."""

    def __init__(self, parts):
        self.parts, self.found = parts, []

    def on_step(self, run, record):
        self.found.append(sum(int(part.kept.sum()) for part in self.parts))
        assert all(bool((part.lora_E[~part.kept] == 0).all()) for part in self.parts)


def counted(trainer):
    trainer.callbacks = (ranks := Ranks(list(adapters_of(trainer.model).values())),)
    return trainer, ranks


def expected(step):
    if step >= 7:
        return 2 * LAYERS
    return int(2 * LAYERS * (1 - max(step - 2, 0) / 5) ** 3) + 2 * LAYERS


def test_ranks_follow_the_schedule_and_a_resumed_run_is_the_unbroken_one(
    make, adalora, stopping, assert_same_runs, tmp_path
):
    whole, ranks = counted(make("sft", tmp_path / "whole", adapted=adalora, steps=STEPS, val=True, dropout=0.1))
    result = whole.train(display=None)
    assert ranks.found == [expected(step) for step in range(1, STEPS + 1)]
    assert result.best_step >= 7 and not result.unmoved  # no adapter that is larger is what the run ends with
    for at in (4, 8):
        out = tmp_path / f"broken-{at}"
        first, before = counted(make("sft", out, adapted=adalora, steps=STEPS, val=True, dropout=0.1))
        first.train(display=stopping(at))
        again, after = counted(make("sft", out, adapted=adalora, steps=STEPS, val=True, dropout=0.1, resume="auto"))
        again.train(display=None)
        assert before.found + after.found == ranks.found
        assert_same_runs(out, tmp_path / "whole", STEPS)
    saved = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["rank_pattern"]
    bare, _ = fourbit.load(whole.model.source, quant_type="nf4")
    fourbit.load_adapter(bare, tmp_path / "whole")
    assert sum(part.rank for part in adapters_of(bare).values()) == 2 * LAYERS
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(bare.eval()(ids), whole.model.eval()(ids), rtol=1e-4, atol=1e-5)


def test_another_length_is_another_run(make, adalora, stopping):
    options = {"adapted": adalora, "schedule": "constant", "warmup": 0}
    make("sft", steps=6, **options).train(display=stopping(2))
    with pytest.raises(InputError, match=r"AdaLoRA over 6 steps on groups .* AdaLoRA over 8 steps"):
        make("sft", steps=8, resume="auto", **options).train(display=None)


def test_a_run_of_ones_own_goes_on_at_its_length_alone(tiny_folder, adalora, tmp_path):
    model, tokenizer = adalora(tiny_folder)
    saved = fourbit.Run(model, tokenizer, total=6).save_state(tmp_path)
    fourbit.Run(model, tokenizer, total=6).load_state(saved)
    with pytest.raises(InputError, match=r"AdaLoRA over 6 steps on groups .* AdaLoRA over 8 steps"):
        fourbit.Run(model, tokenizer, total=8).load_state(saved)


def test_the_penalty_enters_once_a_step(make, adalora, tmp_path):
    """As the batch is split, and whatever its tokens: the gradient is that of the step's mean loss plus the penalty."""
    found = []
    for number, split in enumerate((1, 2, 4)):
        trainer = make("sft", tmp_path / str(number), adapted=adalora, steps=2, micro_batch=split, quant_type=None,
                       dtype=torch.float64)  # fmt: skip
        run, (batches, _) = trainer.run, trainer.step_data(0)
        seen = {}
        (course,) = run.courses
        with torch.no_grad():
            for part in course.parts:
                part.lora_E.fill_(0.1)
        run.forward_backward(*batches)
        plain = {name: p.grad.clone() for name, p in trainer.parameters.items()}
        alone = torch.autograd.grad(course.penalty(), [*trainer.parameters.values()], allow_unused=True)
        whole = {n: g if a is None else g + a for (n, g), a in zip(plain.items(), alone, strict=True)}
        run.optimizer.register_step_pre_hook(
            lambda *_, own=trainer, seen=seen: seen.update({n: p.grad.clone() for n, p in own.parameters.items()})
        )
        run.optim_step(1e-3)
        for name, gradient in whole.items():
            torch.testing.assert_close(seen[name], gradient, rtol=1e-12, atol=1e-14)
        found.append(whole)
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)


def test_a_run_of_ones_own_needs_its_length(tiny_folder, adalora):
    model, tokenizer = adalora(tiny_folder)
    with pytest.raises(InputError, match="give Run its number of steps, total="):
        fourbit.Run(model, tokenizer)
    assert fourbit.Run(model, tokenizer, total=5).courses
