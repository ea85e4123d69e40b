"""Preference training end to end on a tiny model: references agree, layout changes nothing, resuming is bit-exact."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

import fourbit
from fourbit.data.batch import micro_batches
from fourbit.data.encode import load as load_rows
from fourbit.errors import InputError
from fourbit.lora.layer import adapters_of
from fourbit.trainer.config import DPOConfig
from fourbit.trainer.losses.tokens import answer_scores
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.preference import DPOTrainer, crossed_over
from fourbit.trainer.step import StepResult

TRAINER, CONFIG = DPOTrainer, DPOConfig  # for `trainer_for`


def steps_of(folder):
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.pictures
def test_learns_from_ln_2_and_leaves_what_it_promised(trainer_for, tiny_folder, pairs, tmp_path):
    trainer = trainer_for(tiny_folder, pairs, tmp_path, val=pairs, epochs=6)
    result = trainer.train(display=None)
    steps = steps_of(tmp_path)
    first = steps[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["reward_accuracy"] == 0
    assert first["reward_margin"] == pytest.approx(0, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert result.val_loss < 0.4 and result.val["reward_accuracy"] == 1 and result.val["reward_margin"] > 0.5
    for record in steps:
        assert record["reward_margin"] == pytest.approx(record["reward_chosen"] - record["reward_rejected"], abs=1e-6)
        assert 0 <= record["token_accuracy"] <= 1 and 0 < record["entropy"] < math.log(259) and record["kl"] >= 0
        assert record["dropped"] == 0
    assert {"val_loss", "val_reward_accuracy", "val_kl"} <= read_metrics(tmp_path / "metrics.jsonl")[-1].keys()
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "loss.png").stat().st_size > 5000
    assert trainer.config.reference == "base"


def test_the_loss_is_that_of_its_definition(trainer_for, tiny_folder, pairs, tmp_path):
    """-log sigmoid(beta * difference of log-ratios), from full logits of each answer alone, in float64."""
    trainer = trainer_for(
        tiny_folder, pairs, tmp_path, b_seed=0, dtype=torch.float64, quant_type=None, reference="base"
    )
    model = trainer.model.eval()

    def logp(part):
        logits = model(torch.tensor([part.ids]))[0].log_softmax(-1)
        return sum(logits[i - 1, part.ids[i]] for i in range(1, len(part.ids)) if part.trained[i])

    losses = []
    for pair in trainer.train_set.examples:
        policy = logp(pair.parts[0]) - logp(pair.parts[1])
        with fourbit.adapters_off(model):
            base = logp(pair.parts[0]) - logp(pair.parts[1])
        losses.append(-logsigmoid(0.1 * (policy - base)).item())
    batches = trainer.micro_batches(trainer.train_set, range(len(losses)), "auto")
    assert sum(trainer.sums(batch).loss.item() for batch in batches) == pytest.approx(sum(losses), rel=1e-12)


def test_the_two_references_agree(trainer_for, tiny_folder, pairs, tmp_path):
    """Of a fresh adapter: off, and its snapshot."""
    found = {}
    for name, options in {
        "off": {"reference": "base"},
        "snapshot": {"reference": "start"},
    }.items():
        trainer = trainer_for(tiny_folder, pairs, tmp_path, **options)
        batches = trainer.micro_batches(trainer.train_set, [7, 2, 5], 3)
        found[name] = [trainer.reference_logps(batch) for batch in batches]
    for name, logps in found.items():
        for mine, theirs in zip(logps, found["off"], strict=True):
            assert mine.abs().sum() > 1
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_reference_pass_leaves_no_trace(trainer_for, tiny_folder, pairs, tmp_path):
    """No gradient, no dropout, no random number drawn, and the adapter as it was; for both live references."""
    for kind in ("base", "start"):
        trainer = trainer_for(tiny_folder, pairs, tmp_path, dropout=0.5, b_seed=0, reference=kind)
        model = trainer.model.train()
        with torch.no_grad():  # training has moved on since the start
            for module in adapters_of(model).values():
                module.lora_B += 0.05
        before = {name: p.clone() for name, p in model.named_parameters()}
        (batch,) = trainer.micro_batches(trainer.train_set, [0, 1], 2)
        state = torch.get_rng_state()
        first, second = trainer.reference_logps(batch), trainer.reference_logps(batch)
        assert torch.equal(first, second) and not first.requires_grad
        assert torch.equal(state, torch.get_rng_state())
        assert model.training and all(m.training for m in adapters_of(model).values())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) and parameter.grad is None
        model.eval()
        policy = answer_scores(model, batch).logps
        assert (policy - first).abs().max() > 1e-3, "the reference does not follow the policy"


def test_on_top_of_an_adapter_the_start_is_the_reference(trainer_for, tiny_folder, pairs, tmp_path):
    trainer = trainer_for(tiny_folder, pairs, tmp_path / "auto", b_seed=0, steps=2)
    assert trainer.config.reference == "start"
    trainer.train(display=None)
    assert steps_of(tmp_path / "auto")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    asked_for = trainer_for(tiny_folder, pairs, tmp_path / "base", b_seed=0, steps=2, reference="base")
    asked_for.train(display=None)  # a choice that may be meant: no error
    assert abs(steps_of(tmp_path / "base")[0]["loss"] - math.log(2)) > 1e-3


def test_the_reference_is_resumed_with_the_run(trainer_for, stopping, tiny_folder, pairs, tmp_path):
    """What the start was is in the checkpoint: a resumed run does not take another adapter for it."""
    first = trainer_for(tiny_folder, pairs, tmp_path, b_seed=0, dropout=0.2)
    first.train(display=stopping(2))
    again = trainer_for(tiny_folder, pairs, tmp_path, b_seed=1, dropout=0.2, resume="auto")
    again.train(display=None)
    kept = first.state()
    assert len(kept) == 1 + 28 and all(
        torch.equal(tensor, again.state()[name]) for name, tensor in kept.items() if name != "seen"
    )


def test_bco_remembers_the_mean_of_all_rewards(trainer_for, tiny_folder, pairs, tmp_path):
    trainer = trainer_for(tiny_folder, pairs, tmp_path, loss=("bco",), micro_batch=2, val=pairs, eval_every=1)
    trainer.train(display=None)
    steps = steps_of(tmp_path)
    sizes = [4, 4, 2] * 2
    for side, name in enumerate(("reward_chosen", "reward_rejected")):
        total = sum(size * record[name] for size, record in zip(sizes, steps, strict=True))
        assert trainer.seen[0, side].item() == pytest.approx(total, rel=1e-6)
        assert trainer.seen[1, side].item() == 20
    assert trainer.points["shift"].item() == pytest.approx((trainer.seen[0] / 20).mean().item())


def test_kto_sets_answers_against_other_prompts(trainer_for, tiny_folder, judged, tmp_path):
    trainer = trainer_for(tiny_folder, judged, tmp_path, loss=("kto",), b_seed=0, reference="base")
    examples = trainer.train_set.examples
    crossed = crossed_over(examples[0], examples[1], 1024)
    assert trainer.tokenizer.decode(crossed.parts[0].ids, skip_special=False) == (
        "<|im_start|>user\nsay ab<|im_end|>\n<|im_start|>assistant\nccc<|im_end|>"
        + trainer.tokenizer.decode(examples[1].parts[0].ids, skip_special=False).rpartition("<|im_end|>")[2]
    )
    batches = trainer.micro_batches(trainer.train_set, [3, 0, 1], 1)
    trainer.begin(trainer.train_set, batches)
    expected = [crossed_over(examples[a], examples[b], 1024) for a, b in ((0, 1), (1, 3), (3, 0))]
    (batch,) = micro_batches(list(enumerate(expected)), packing=False, micro_batch=3, token_budget=1, pad_id=0)
    with torch.no_grad():
        ratio = answer_scores(trainer.model.eval(), batch).logps - trainer.reference_logps(batch)
    assert trainer.points["kl"].item() == pytest.approx(max(0, ratio.sum(-1).mean().item()), abs=1e-5)


def write(path, rows):
    path = path.with_suffix(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_kto_crosses_prompts_even_where_the_step_has_one(trainer_for, tiny_folder, tmp_path):
    """A step of one example, or of answers to one prompt, takes answers from the rest of the data; never its own."""
    rows = [{"prompt": f"say {w}", "completion": w * n, "label": n > 1} for w in ("ab", "cd") for n in (3, 1)]
    trainer = trainer_for(tiny_folder, write(tmp_path / "r", rows), tmp_path, loss=("kto",), b_seed=0, reference="base")
    examples = trainer.train_set.examples

    def crossings(numbers):
        seen = []
        patch.setattr(
            "fourbit.trainer.preference.crossed_over", lambda a, b, n: seen.append((a, b)) or crossed_over(a, b, n)
        )
        trainer.begin(trainer.train_set, trainer.micro_batches(trainer.train_set, numbers, 4))
        return [(examples.index(a), examples.index(b)) for a, b in seen]

    with pytest.MonkeyPatch.context() as patch:
        assert crossings([1]) == [(1, 2)] and crossings([0, 1]) == [(0, 2), (1, 2)]
        assert crossings([0, 1, 3]) == [(0, 3), (1, 3), (3, 0)]
    one = [row for row in rows if row["prompt"] == "say ab"]
    alone = trainer_for(tiny_folder, write(tmp_path / "one", one), tmp_path, loss=("kto",), b_seed=0, reference="base")
    alone.begin(alone.train_set, alone.micro_batches(alone.train_set, [0, 1], 2))
    assert alone.points["kl"] == 0


def test_rows_longer_than_max_length_are_crossed_too(trainer_for, tiny_folder, judged, tmp_path):
    """Of a dataset that was read with another limit: a prompt that long leaves its answer a token."""
    examples = trainer_for(tiny_folder, judged, tmp_path, loss=("kto",)).train_set.examples
    crossed = crossed_over(examples[0], examples[7], 4).parts[0]
    assert len(crossed.ids) == len(examples[0].parts[0].ids) and any(crossed.trained)


def test_crossed_answers_keep_to_max_length(trainer_for, tiny_folder, judged, tmp_path):
    examples = trainer_for(tiny_folder, judged, tmp_path, loss=("kto",)).train_set.examples
    whole = crossed_over(examples[0], examples[7], 1024).parts[0]
    cut = crossed_over(examples[0], examples[7], len(whole.ids) - 3).parts[0]
    assert cut.ids == whole.ids[:-3] and cut.trained == whole.trained[:-3]


def test_kto_crosses_validation_rows_with_each_other(trainer_for, tiny_folder, judged, tmp_path):
    rows = [{"prompt": f"tell {w}", "completion": w, "label": w != "q"} for w in ("zz", "q", "uvw")]
    val = write(tmp_path / "val", rows)
    options = {"loss": ("kto",), "b_seed": 2, "reference": "base"}
    trainer = trainer_for(tiny_folder, judged, tmp_path, val=val, **options)
    alone = trainer_for(tiny_folder, val, tmp_path, **options)
    for one, dataset in ((trainer, trainer.val_set), (alone, alone.train_set)):
        one.begin(dataset, one.micro_batches(dataset, range(3), 3))
    assert trainer.points["kl"].item() == pytest.approx(alone.points["kl"].item(), rel=1e-5) and alone.points["kl"] > 0


def test_a_skipped_step_adds_nothing_to_bcos_mean(trainer_for, tiny_folder, pairs, tmp_path):
    trainer = trainer_for(tiny_folder, pairs, tmp_path, loss=("bco",), b_seed=0, reference="base")
    result = StepResult(torch.zeros(()), {}, {}, torch.zeros(()), torch.ones(()), {})
    for skipped, counts in ((1, [0, 0]), (0, [4, 4])):
        (batch,) = trainer.step_data(0)[0]
        carried = trainer.sums(batch).carried
        trainer.applied(replace(result, carried=carried, skipped=torch.tensor(float(skipped))))
        assert trainer.seen[1].tolist() == counts and (trainer.points["shift"] != 0) == (not skipped)


def test_datasets_of_another_kind_are_refused(trainer_for, tiny_folder, pairs, judged, rows, tmp_path):
    model, tokenizer = fourbit.load(tiny_folder)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    with pytest.raises(InputError, match="reads rows loaded as 'sft', got 'pairs'"):
        config = fourbit.SFTConfig(out=str(tmp_path))
        fourbit.SFTTrainer(model, tokenizer, train=load_rows(pairs, tokenizer, "pairs"), config=config)
    with pytest.raises(InputError, match="reads rows loaded as 'pairs', got 'judged'"):
        trainer_for(tiny_folder, load_rows(judged, tokenizer, "judged"), tmp_path)
    with pytest.raises(InputError, match="reads rows loaded as 'judged', got 'pairs'"):
        trainer_for(tiny_folder, judged, tmp_path, val=load_rows(pairs, tokenizer, "pairs"), loss=("kto",))
    with pytest.raises(InputError, match="reads rows loaded as 'pairs', got 'sft'"):
        trainer_for(tiny_folder, load_rows(rows, tokenizer), tmp_path)
    for given in (7, [7], iter(["a"])):
        with pytest.raises(InputError, match=r"train must be a file's path, .* got 7|row 1 of train: row: is .*, not"):
            trainer_for(tiny_folder, given, tmp_path)


def test_one_prompt_cannot_be_split(trainer_for, tiny_folder, tmp_path):
    same = [{"prompt": "say", "chosen": "a" * n, "rejected": "b"} for n in range(1, 5)]
    with pytest.raises(InputError, match=r"no row was left (for validation|to train on): rows of one"):
        trainer_for(tiny_folder, write(tmp_path / "one", same), tmp_path, val=0.5)


def test_trains_on_judged_answers(trainer_for, tiny_folder, judged, tmp_path):
    trainer = trainer_for(tiny_folder, judged, tmp_path, loss=("kto",), val=judged, epochs=8)
    result = trainer.train(display=None)
    assert result.val["reward_chosen"] > 0 > result.val["reward_rejected"]
    assert result.val["reward_chosen"] - result.val["reward_rejected"] > 0.5


def test_mixtures_and_settings_reach_the_loss(trainer_for, tiny_folder, pairs, tmp_path):
    """The mixture's loss is the sum of its parts'; and each setting moves it."""

    def loss_with(**options):
        trainer = trainer_for(tiny_folder, pairs, tmp_path, b_seed=0, reference="base", **options)
        (batch,) = trainer.micro_batches(trainer.train_set, range(10), 10)
        return trainer.sums(batch).loss.item()

    plain, sft = loss_with(), loss_with(loss=("sigmoid", "sft")) - loss_with()
    assert loss_with(loss=("sigmoid=0.5", "sft=0.25")) == pytest.approx(0.5 * plain + 0.25 * sft, rel=1e-6)
    for options in ({"beta": 0.3}, {"label_smoothing": 0.2}, {"ld_alpha": 0.0}, {"divergence": "jsd"}):
        assert loss_with(**options) != pytest.approx(plain, rel=1e-4), options


@pytest.mark.parametrize(
    "options, error",
    [
        ({"loss": ("dpo",)}, "unknown loss 'dpo'; did you mean sigmoid"),
        ({"loss": ("ipo",), "label_smoothing": 0.1}, "label_smoothing is not used by the loss ipo"),
        ({"beta": -0.1}, "beta must be above 0 and finite, got -0.1"),
        ({"loss": ("simpo",), "reference": "base"}, "reference has no use with the loss simpo"),
        ({"loss": ("kto",), "ld_alpha": 0.5}, "ld_alpha compares the two answers of a pair"),
        ({"ld_alpha": 1.5}, "ld_alpha must be at most 1, got 1.5"),
        ({"truncation": "prompt"}, "truncation must be drop or answer, got 'prompt'"),
        ({"reference": "snapshot"}, "reference must be one of auto, base or start, got 'snapshot'"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, error):
    with pytest.raises(InputError, match=error):
        DPOConfig(out="o", **options)


def test_rows_of_the_other_kind_are_refused(trainer_for, tiny_folder, pairs, judged, tmp_path):
    with pytest.raises(InputError):
        trainer_for(tiny_folder, judged, tmp_path)
    with pytest.raises(InputError):
        trainer_for(tiny_folder, pairs, tmp_path, loss=("kto",))


def test_dropped_pairs_are_counted(trainer_for, tiny_folder, pairs, tmp_path):
    lengths = [
        max(len(part.ids) for part in pair.parts)
        for pair in trainer_for(tiny_folder, pairs, tmp_path).train_set.examples
    ]
    trainer = trainer_for(tiny_folder, pairs, tmp_path, max_length=sorted(lengths)[6], steps=1)
    dropped = sum(length > sorted(lengths)[6] for length in lengths)
    assert 0 < dropped < 10 and len(trainer.train_set) == 10 - dropped
    trainer.train(display=None)
    assert steps_of(tmp_path)[0]["dropped"] == pytest.approx(dropped / 10)
    split = trainer_for(tiny_folder, pairs, tmp_path / "split", max_length=sorted(lengths)[6], val=0.3, steps=1)
    split.train(display=None)
    assert steps_of(tmp_path / "split")[0]["dropped"] == pytest.approx(dropped / 10), "of all rows that were read"


def test_a_dataset_may_be_given(trainer_for, tiny_folder, pairs, judged, tmp_path):
    _, tokenizer = fourbit.load(tiny_folder)
    for loss, kind, path in (("sigmoid", "pairs", pairs), ("kto", "judged", judged)):
        rows = load_rows(path, tokenizer, kind)
        trainer = trainer_for(tiny_folder, rows, tmp_path / loss, loss=(loss,), steps=1, val=0.2)
        assert trainer.train(display=None).steps == 1 and len(trainer.val_set) + len(trainer.train_set) == 10


def test_another_active_adapter_is_refused_where_the_reference_would_lack_it(trainer_for, tiny_folder, pairs, tmp_path):
    model = (first := trainer_for(tiny_folder, pairs, tmp_path, b_seed=0, dropout=0.2)).model
    fourbit.copy_adapter(model, "default", "other")
    fourbit.use(model, "other", "default")
    with pytest.raises(InputError, match="other is active beside 'default': call"):
        first.train(display=None)
    with pytest.raises(InputError, match="other is active"):
        DPOTrainer(model, first.tokenizer, train=pairs, config=first.config)
    DPOTrainer(model, first.tokenizer, train=pairs, config=DPOConfig(out=str(tmp_path), loss=("simpo",)))


def test_each_trainer_has_a_reference_of_its_own_and_leaves_those_of_others(
    trainer_for, stopping, tiny_folder, pairs, tmp_path
):
    first = trainer_for(tiny_folder, pairs, tmp_path / "1", b_seed=0, val=pairs, steps=2)
    first.train(display=None)
    before, kept = first.evaluate(), {n: t.clone() for n, t in first.state().items()}
    config = replace(first.config, out=str(tmp_path / "2"), reference="start")
    again = DPOTrainer(first.model, first.tokenizer, train=pairs, config=config)
    assert again.reference == ("reference-2",) and first.reference == ("reference",)
    assert first.evaluate() == before and all(torch.equal(t, kept[n]) for n, t in first.state().items())
    again.train(display=stopping(1))
    resumed = DPOTrainer(first.model, first.tokenizer, train=pairs, config=replace(config, resume="auto"))
    assert resumed.reference == ("reference-3",)
    resumed.train(display=None)
    assert all(torch.equal(t, again.state()[n]) for n, t in resumed.state().items() if n != "seen")
