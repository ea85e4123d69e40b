"""Reward models end to end on a tiny model: the loss is its definition and TRL's, peers score alike, runs resume."""

import json
import math
import os
import shutil
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid

import fourbit
from fourbit.errors import InputError, NumericError
from fourbit.lora.layer import adapters_of
from fourbit.trainer.config import RewardConfig
from fourbit.trainer.losses.pairs import reward_loss
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.reward import RewardTrainer
from fourbit.trainer.reward_model import HEAD, KEY, RewardModel, read_head

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its imports warn about is not ours to mend
    from trl.trainer.reward_trainer import RewardTrainer as TRLRewardTrainer


def some_head(seed=5):
    return torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))


TRAINER, CONFIG = RewardTrainer, RewardConfig  # for `trainer_for`


def steps_of(folder):
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.pictures
def test_learns_from_ln_2_and_leaves_what_it_promised(trainer_for, tiny_folder, pairs, tmp_path):
    result = trainer_for(tiny_folder, pairs, tmp_path, val=pairs, epochs=6).train(display=None)
    steps = steps_of(tmp_path)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=6e-8)
    assert steps[0]["reward_chosen"] == steps[0]["reward_rejected"] == steps[0]["reward_accuracy"] == 0
    assert result.val_loss < 0.3 and result.val["reward_accuracy"] == 1 and result.val["reward_margin"] > 1
    for record in steps:
        assert record["reward_margin"] == pytest.approx(record["reward_chosen"] - record["reward_rejected"], abs=1e-6)
        assert record["dropped"] == 0
    head = load_file(tmp_path / HEAD)
    assert list(head) == [KEY] and head[KEY].shape == (1, 32) and head[KEY].dtype == torch.float32
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "loss.png").stat().st_size > 5000


def test_loss_and_gradients_are_those_of_plain_pytorch(trainer_for, tiny_folder, pairs, tmp_path):
    """Each answer alone through the model, its last token's hidden state times the head; adapter and head, float64."""
    trainer = trainer_for(
        tiny_folder, pairs, tmp_path, b_seed=0, dtype=torch.float64, quant_type=None, head=some_head(), center=0.3
    )
    model, head = trainer.model, trainer.reward_model.head
    assert head.dtype == torch.float64

    def reward(part):
        end = max(i for i, trained in enumerate(part.trained) if trained)
        return model.hidden(torch.tensor([part.ids]))[0, end] @ head[0]

    rewards = [tuple(map(reward, p.parts)) for p in trainer.train_set.examples]
    want = sum(-logsigmoid(a - b) + 0.3 * (a + b) ** 2 for a, b in rewards)
    wanted = torch.autograd.grad(want, list(trainer.parameters.values()))
    (batch,) = trainer.micro_batches(trainer.train_set, range(len(rewards)), len(rewards))
    sums = trainer.sums(batch)
    assert sums.loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert sums.metrics["reward_accuracy"].tolist() == [sum(bool(a > b) for a, b in rewards), len(rewards)]
    assert sums.metrics["reward_chosen"][0].item() == pytest.approx(sum(a.item() for a, _ in rewards), rel=1e-12)
    sums.loss.backward()
    assert KEY in trainer.parameters
    for (name, parameter), gradient in zip(trainer.parameters.items(), wanted, strict=True):
        assert gradient.norm() > 0
        assert (parameter.grad - gradient).norm() <= 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("center", [0.0, 0.01, 0.7])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_the_loss_is_trls(dtype, bound, center):
    """Its own compute_loss on a model that answers with our rewards; values and gradients."""
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (3 * torch.randn(7, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    ours, theirs = ([x.clone().requires_grad_() for x in (chosen, rejected)] for _ in range(2))
    same = lambda value: value
    trainer = object.__new__(TRLRewardTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(gather=same, gather_for_metrics=same)
    trainer.args = SimpleNamespace(center_rewards_coefficient=center or None)
    trainer._metrics = {"train": {name: [] for name in ("min_reward", "mean_reward", "max_reward")}}
    trainer._metrics["train"] |= {"accuracy": [], "margin": []}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    outputs = SimpleNamespace(logits=torch.cat(theirs).unsqueeze(-1))
    want = trainer.compute_loss(lambda **_: outputs, {"attention_mask": torch.ones(14, 3)})
    got = reward_loss(*ours, center=center).mean()
    assert abs(got.item() - want.item()) <= bound * max(1, abs(want.item()))
    wanted, grads = torch.autograd.grad(want, theirs), torch.autograd.grad(got, ours)
    for a, b in zip(grads, wanted, strict=True):
        assert (a - b).abs().max() <= bound * b.abs().max()


def test_the_loss_stays_finite_far_out():
    rewards = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    losses = reward_loss(rewards, torch.zeros(3))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1e4, pytest.approx(math.log(2))] and torch.isfinite(rewards.grad).all()


def test_the_best_head_is_kept_with_the_best_adapter(trainer_for, tiny_folder, pairs, tmp_path):
    """A rate far too high: what is saved scores as the best evaluation did, not as the last."""
    trainer = trainer_for(tiny_folder, pairs, tmp_path, val=pairs, lr=0.7, epochs=6, eval_every=1)
    result = trainer.train(display=None)
    losses = [record["val_loss"] for record in read_metrics(tmp_path / "metrics.jsonl") if "val_loss" in record]
    assert result.val_loss == min(losses) < losses[-1], "choose another rate"
    again = trainer_for(tiny_folder, pairs, tmp_path / "x")
    again.model, _ = fourbit.load(tiny_folder, quant_type="nf4")
    again.reward_model, again.val_set = RewardModel.load(again.model, tmp_path), trainer.val_set
    assert again.evaluate(False)["loss"] == pytest.approx(result.val_loss, rel=1e-5)


@pytest.fixture(scope="module")
def trained(trainer_for, tiny_folder, pairs, tmp_path_factory):
    """A reward model's folder, trained on a dense base, and what its trainer makes of every chosen answer."""
    out = tmp_path_factory.mktemp("reward")
    trainer = trainer_for(tiny_folder, pairs, out, quant_type=None, dropout=0.1)
    trainer.train(display=None)
    trainer.model.eval()
    (batch,) = trainer.micro_batches(trainer.train_set, range(10), 10)
    order = sorted(range(10), key=batch.numbers.__getitem__)
    with torch.no_grad():
        return out, trainer.reward_model.rewards(batch)[0][order].tolist()


def rows_of(pairs):
    return [json.loads(line) for line in pairs.read_text().splitlines()]


def test_saved_and_loaded_it_scores_the_same_whatever_the_form(tiny_folder, pairs, trained):
    folder, want = trained
    model, tokenizer = fourbit.load(tiny_folder)
    scorer = RewardModel.load(model.train(), folder)
    state = torch.get_rng_state()
    turns = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        for row in rows_of(pairs)
    ]
    forms = [
        turns,
        [{"messages": talk} for talk in turns],
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows_of(pairs)],
    ]
    for rows in forms:
        for budget in (1, 100, 10000):
            assert scorer.score(tokenizer, rows, token_budget=budget) == pytest.approx(want, abs=1e-5)
    assert max(want) - min(want) > 0.05, "so that an order that is lost would be seen"
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert scorer.score(tokenizer, []) == []
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(NumericError, match=r"rewards of row 1 of rows hold .*, first in the output of model.norm"):
        scorer.score(tokenizer, turns)


def test_rows_that_have_no_answer_are_named(tiny_folder, trained):
    model, tokenizer = fourbit.load(tiny_folder)
    scorer = RewardModel.load(model, trained[0])
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(InputError, match=r"row 2 of rows: last message: has the role 'user'"):
        scorer.score(tokenizer, [talk, talk[:1]])
    with pytest.raises(InputError, match=r"row 1 of rows: row: is not a row to learn from"):
        scorer.score(tokenizer, [{"a": "a"}, talk])


def test_transformers_and_peft_score_alike(tiny_folder, pairs, trained):
    """LlamaForSequenceClassification with our adapter and our tensor for its head: 1e-5."""
    folder, want = trained
    config = transformers.LlamaConfig.from_pretrained(tiny_folder, num_labels=1, pad_token_id=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.LlamaForSequenceClassification.from_pretrained(tiny_folder, config=config)
        adapter = peft.LoraConfig.from_pretrained(folder)
        adapter.task_type = None  # a causal model's wrapper asks for generation, which this class has not
        model = peft.PeftModel.from_pretrained(base, folder, config=adapter).eval()
    model.base_model.model.score.weight.data = load_file(folder / HEAD)[KEY]
    _, tokenizer = fourbit.load(tiny_folder)
    found = []
    for row in rows_of(pairs):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n{row['chosen']}<|im_end|>"
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([tokenizer.encode(text)])).logits.item())
    assert found == pytest.approx(want, abs=1e-5)
    with model.disable_adapter(), torch.no_grad():
        assert abs(model(input_ids=torch.tensor([tokenizer.encode(text)])).logits.item() - want[-1]) > 1e-3


def test_goes_on_from_a_head(trainer_for, tiny_folder, pairs, tmp_path):
    head = some_head()
    trainer = trainer_for(tiny_folder, pairs, tmp_path, head=head, lr_scale={KEY: 0.0}, steps=2)
    trainer.train(display=None)
    assert torch.equal(trainer.reward_model.head, head), "a factor of 0 leaves it as it is"
    assert torch.equal(read_head(trainer.model, tmp_path), head)
    assert any(module.lora_B.any() for module in adapters_of(trainer.model).values())
    moved = trainer_for(tiny_folder, pairs, tmp_path / "moved", head=head, steps=2)
    moved.train(display=None)
    assert not torch.equal(moved.reward_model.head, head) and torch.equal(head, some_head()), "a copy is trained"


def test_the_head_has_its_own_learning_rate(trainer_for, tiny_folder, pairs, tmp_path):
    """Adam's first step moves every entry by the learning rate: that of the head is head_lr, whatever lr is."""
    for head_lr in (1e-3, 4e-2):
        trainer = trainer_for(tiny_folder, pairs, tmp_path / str(head_lr), head_lr=head_lr, steps=1, warmup=0)
        trainer.train(display=None)
        moved = trainer.reward_model.head.abs()
        assert moved.max().item() == pytest.approx(head_lr, rel=1e-3) and moved.median().item() > 0.9 * head_lr
    again = RewardTrainer(trainer.model, trainer.tokenizer, train=pairs, config=trainer.config)
    assert again.config.lr_scale == trainer.config.lr_scale == {KEY: pytest.approx(4)}


def test_a_head_that_is_none_is_refused(tiny_folder, trained, tmp_path):
    def folder(name, change=lambda file: None):
        copy = tmp_path / name
        shutil.copytree(trained[0], copy, ignore=shutil.ignore_patterns("checkpoints"))
        change(copy / HEAD)
        return copy

    good = load_file(trained[0] / HEAD)[KEY]
    cases = {
        "missing": (lambda f: f.unlink(), f"holds no {HEAD}. fourbit reward writes one"),
        "other key": (lambda f: save_file({"weight": good}, f), f"must hold the one tensor '{KEY}', got weight"),
        "two": (lambda f: save_file({KEY: good, "a": good + 1}, f), f"must hold the one tensor '{KEY}', got a, score"),
        "empty": (lambda f: save_file({}, f), "got none"),
        "wide": (lambda f: save_file({KEY: torch.zeros(1, 48)}, f), r"must be \[1, 32\] for this model, got \[1, 48\]"),
        "flat": (lambda f: save_file({KEY: good[0].clone()}, f), r"got \[32\]"),
        "nan": (lambda f: save_file({KEY: good * math.nan}, f), "holds NaN or infinity"),
        "ints": (lambda f: save_file({KEY: good.long()}, f), "must hold floats"),
        "text": (lambda f: f.write_text("x" * 40), "no valid safetensors file"),
        "link": (lambda f: (f.unlink(), f.symlink_to(trained[0] / HEAD)), "a link out of its folder"),
        "pipe": (lambda f: (f.unlink(), os.mkfifo(f)), "must be a regular file"),
    }
    for name, (change, message) in cases.items():
        model, _ = fourbit.load(tiny_folder)
        with pytest.raises(InputError, match=message):
            RewardModel.load(model, folder(name, change))
        assert not adapters_of(model), "the model is untouched"
    with pytest.raises(InputError, match=r"head must be \[1, 32\] for this model, got \[32, 1\]"):
        RewardModel(fourbit.load(tiny_folder)[0], torch.zeros(32, 1))


def test_a_head_with_nan_is_not_saved(trainer_for, tiny_folder, pairs, tmp_path):
    trainer = trainer_for(tiny_folder, pairs, tmp_path, head=some_head() * math.nan)
    with pytest.raises(NumericError, match=r"'score\.weight' holds NaN or infinity"):
        trainer.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match=r"center must be at least 0, got -0\.1"):
        RewardConfig(out="o", center=-0.1)
    with pytest.raises(InputError, match=r"head_lr must be above 0 and finite, got 0\.0"):
        RewardConfig(out="o", head_lr=0.0)
    with pytest.raises(InputError, match="truncation must be drop or answer"):
        RewardConfig(out="o", truncation="prompt")
