"""Reinforcement end to end on a tiny model: it learns, and says of itself what is true."""

import json
import math
import os
import signal
import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import fourbit
from fourbit.data.batch import Encoded, Example
from fourbit.data.encode import encode_chat
from fourbit.errors import InputError
from fourbit.lora.layer import adapter_parameters
from fourbit.lora.merge import merging
from fourbit.models.generate import sample
from fourbit.models.protocol import evaluating
from fourbit.trainer.interrupt import interrupts
from fourbit.trainer.losses import policy
from fourbit.trainer.losses.policy import POLICIES
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.policy import PolicyTrainer
from fourbit.trainer.reward_model import RewardModel
from fourbit.trainer.rewards import Answered, Rewards, each, rewards_of
from fourbit.trainer.rl_config import RLConfig
from fourbit.trainer.rollouts import differing, restored
from fourbit.trainer.run import active_adapters

TRAINER, CONFIG = PolicyTrainer, RLConfig  # for `trainer_for`
SMALL = {"max_new_tokens": 6, "group_size": 4, "batch_size": 2}


def many_e(prompt, answer, row):
    return answer.count("e") / max(1, len(answer))


def given(function=many_e, failed=None):
    return Rewards({"e": (1.0, each(function))}, failed)


def steps_of(folder):
    return [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def test_an_untrained_model_learns_the_letter_that_earns(trainer_for, tiny_folder, rows, val_rows, tmp_path):
    options = SMALL | {"steps": 40, "batch_size": 4, "group_size": 8, "lr": 2e-2, "eval_every": 20}
    result = trainer_for(tiny_folder, rows, tmp_path, val=val_rows, rewards=given(), **options).train(display=None)
    steps = steps_of(tmp_path)
    earned = [sum(record["reward"] for record in part) / 10 for part in (steps[:10], steps[-10:])]
    assert earned[0] < 0.1 and earned[1] > earned[0] + 0.1
    assert result.val["reward"] >= 0.5 and result.val["reward"] == result.val["reward/e"]
    for record in steps:
        assert record["sampling_gap"] < 1e-5
        assert 0 < record["entropy"] <= math.log(259) and 0 <= record["truncated"] <= 1 and record["signal"] <= 1
        assert record["rollout_tokens_per_second"] > 0 and 1 <= record["answer_tokens"] <= 6
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-000020.jsonl", "step-000040.jsonl"]
    shown = [json.loads(line) for line in (tmp_path / "samples" / "step-000040.jsonl").read_text().splitlines()]
    assert sum(one["reward"] for one in shown) / len(shown) == pytest.approx(result.val["reward"])
    assert all(one["reward/e"] == many_e(one["prompt"], one["answer"], {}) and not one["failed"] for one in shown)


@pytest.mark.parametrize("loss", POLICIES)
def test_every_loss_starts_at_ratio_1_and_kl_0_and_moves_the_policy(trainer_for, tiny_folder, rows, tmp_path, loss):
    more = {"steps": 4, "rollouts_ahead": 2, "updates": 2, "kl": 0.05, "b_seed": 1}
    more |= {"entropy_bonus": 0.01, "dropout": 0.3, "lr": 1e-3}
    more |= {} if loss in ("gspo", "luspo", "rloo") else {"top_entropy": 0.9}
    trainer = trainer_for(
        tiny_folder, rows, tmp_path, rewards=given(lambda p, a, r: len(set(a))), **SMALL, **more, loss=loss
    )
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.train(display=None)
    first, second, third, _ = steps_of(tmp_path)
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-6)
    assert first.get("clipped", 0) == 0 and third["kl"] > 1e-9 and abs(third["ratio"] - 1) > 1e-7
    assert first["reward"] == third["reward"] != second["reward"]  # the second pass is over the same answers
    moved = [name for name, p in trainer.parameters.items() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)
    assert ("value_loss" in first) == (loss == "ppo")


@pytest.mark.parametrize("place", ["drawing", "judging", "evaluating"])
def test_a_signal_ends_a_round_where_it_is_and_the_run_goes_on(
    trainer_for, tiny_folder, rows, val_rows, tmp_path, monkeypatch, assert_same_runs, place
):
    """Nothing more is drawn or judged, the steps before are saved, and the resumed run has the bits of an uncut one."""
    options = SMALL | {"steps": 4, "rollouts_ahead": 2, "eval_every": 2, "val": val_rows, "b_seed": 1}
    ends = {"drawing": ("draws", 3), "judging": ("judged", 27), "evaluating": ("judged", 18)}[place]  # 16 + 6 + 16
    seen = Counter()

    def signalled(what):
        seen[what] += 1
        if (what, seen[what]) == ends and seen["draws"]:  # of the run that is cut
            os.kill(os.getpid(), signal.SIGINT)

    def judge(prompt, answer, row):
        signalled("judged")
        return len(set(answer)) / 6

    def draw(*args, **how):
        signalled("draws")
        return sample(*args, **how)

    trainer_for(tiny_folder, rows, tmp_path / "whole", rewards=given(judge), **options).train(display=None)
    seen.clear()
    monkeypatch.setattr("fourbit.trainer.policy.sample", draw)
    cut = trainer_for(tiny_folder, rows, tmp_path / "cut", rewards=given(judge), **options).train(display=None)
    assert (cut.signal, cut.steps) == (signal.SIGINT, 2) and seen[ends[0]] == ends[1]
    monkeypatch.undo()
    more = options | {"resume": "auto"}
    result = trainer_for(tiny_folder, rows, tmp_path / "cut", rewards=given(judge), **more).train(display=None)
    assert (result.signal, result.steps) == (None, 4)
    assert_same_runs(tmp_path / "whole", tmp_path / "cut", 4)
    shown = [{path.name: path.read_text() for path in (tmp_path / n / "samples").iterdir()} for n in ("whole", "cut")]
    assert len(shown[0]) == 2 and shown[0] == shown[1]


def test_a_signal_waits_while_something_is_put_back():
    """What is switched for a block must not stay so: the signal that falls into its end is remembered."""
    with interrupts() as stop, stop.ending():

        @contextmanager
        def switched():
            yield
            os.kill(os.getpid(), signal.SIGTERM)

        with switched():
            pass
        assert stop.signal == signal.SIGTERM
        return
    pytest.fail("it ended the block")


def test_every_answer_is_trained_as_often_as_updates_says(trainer_for, tiny_folder, rows, tmp_path):
    """Also where an epoch is no whole number of rounds: the last one is gone on with."""
    more = {"rollouts_ahead": 3, "updates": 2, "epochs": 1, "batch_size": 2}
    trainer = trainer_for(tiny_folder, rows, tmp_path, rewards=given(), **SMALL | more)
    steps = -(-len(trainer.train_set) // 2)
    assert steps % 3 and trainer.total == -(-steps // 3) * 6 and trainer.steps_per_epoch == 2 * steps
    trained = Counter()
    for step in range(trainer.total):
        batches, _ = trainer.step_data(step)
        trained.update((trainer.round.first, number) for batch in batches for number in batch.numbers)
    assert set(trained.values()) == {2} and len({first for first, _ in trained}) == trainer.total // 6
    with pytest.raises(InputError, match="patience 1 needs more than 1 evaluations"):
        RLConfig(out="x", updates=2, patience=1).check_rows(8, 2)


def test_what_rounds_take_is_told_apart_from_updates(trainer_for, tiny_folder, rows, tmp_path):
    def slow(prompt, answer, row):
        time.sleep(0.1)
        return len(answer)

    trainer_for(tiny_folder, rows, tmp_path, rewards=given(slow), **SMALL, steps=2).train(display=None)
    for record in steps_of(tmp_path):  # 8 answers, each judged in 0.1 s
        assert record["tokens"] / record["tokens_per_second"] < 0.8
        assert 8 * record["answer_tokens"] / record["rollout_tokens_per_second"] > 0.8


def test_drawn_answers_have_the_chances_that_the_model_gives_them(adapted, tiny_folder):
    model, tokenizer = adapted(tiny_folder, b_seed=2)
    prompts = [tokenizer.encode(text) for text in ("ab", "ab", "longer than that")]
    for temperature in (1.0, 0.6):
        made = sample(model, prompts, max_new_tokens=5, temperature=temperature, seed=1, stop_ids=tokenizer.stop_ids)
        assert made[0].ids != made[1].ids
        for prompt, one in zip(prompts, made, strict=True):
            with evaluating(model):
                logits = model(torch.tensor([prompt + one.ids]))[0] / temperature
            wanted = logits.log_softmax(-1)[torch.arange(len(prompt) - 1, len(logits) - 1), torch.tensor(one.ids)]
            torch.testing.assert_close(torch.tensor(one.logps), wanted, rtol=1e-4, atol=1e-4)
            assert one.ended == (one.ids[-1] in tokenizer.stop_ids)


def test_failed_rewards_teach_nothing_and_are_counted(trainer_for, tiny_folder, rows, tmp_path):
    turn = Counter()

    def now_and_then(prompt, answer, row):
        turn["calls"] += 1
        if turn["calls"] % 3:
            raise ValueError("no luck")
        return len(answer)

    trainer = trainer_for(tiny_folder, rows, tmp_path, rewards=given(now_and_then), **SMALL, steps=2)
    batches, _ = trainer.step_data(0)
    counts, rewards = trainer.round.counts, trainer.round.answers["reward"]
    assert rewards.isnan().sum() == 6 and not counts[rewards.isnan()].any() and counts[~rewards.isnan()].any()
    assert trainer.rewards.failures == {"e: raised ValueError: no luck": 6}
    assert all(trainer.sums(batch).loss.isfinite() for batch in batches)
    with pytest.raises(InputError, match=r"no answer of 3 rounds got a reward.*gave None"):
        trainer_for(tiny_folder, rows, tmp_path, rewards=given(lambda *_: None), **SMALL, steps=9).train(display=None)


def test_truncated_answers_are_masked_or_penalised_and_groups_without_signal_exchanged(
    trainer_for, tiny_folder, rows, tmp_path
):
    how = dict(rewards=given(lambda p, a, r: 1.0), **SMALL)
    masked = trainer_for(tiny_folder, rows, tmp_path, truncated="mask", truncated_penalty=0.5, **how)
    masked.step_data(0)
    made = masked.round
    assert not made.counts[made.answers["truncated"] == 1].any()
    late = made.answers["truncated"] == 1
    made.counts[:] = False  # nothing counts at all: no NaN
    assert all(not masked.sums(batch).loss and masked.sums(batch).weight > 0 for batch in masked.step_data(0)[0])
    assert late.any() and (made.answers["reward"][late] == 0.5).all()
    asked = Counter()

    def by_prompt(prompt, answer, row):
        asked[prompt] += 1
        return 0.0

    trainer_for(tiny_folder, rows, tmp_path, resample=2, **how | {"rewards": given(by_prompt)}).step_data(0)
    assert len(asked) == 6 and set(asked.values()) == {4}  # two prompts, and twice two others


def test_a_reward_model_on_the_same_base_judges_as_by_itself(adapted, tiny_folder, pairs, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    config = fourbit.RewardConfig(out=str(tmp_path / "reward"), steps=3, batch_size=4, lr=1e-2)
    fourbit.RewardTrainer(model, tokenizer, train=pairs, config=config, head=head).train(display=None)
    talk = [{"messages": [{"role": "user", "content": "say ab"}, {"role": "assistant", "content": "abab"}]}]
    fresh, _ = fourbit.load(tiny_folder, quant_type="nf4")
    wanted = RewardModel.load(fresh, tmp_path / "reward").score(tokenizer, talk)

    policy, _ = adapted(tiny_folder, b_seed=3)
    rewards = rewards_of([f"{tmp_path / 'reward'}=2", "exact=0.5"], policy)
    ids, trained = encode_chat(talk[0]["messages"], tokenizer)
    example = Example((Encoded(ids, trained),), label=True)
    (earned,) = rewards([Answered("say ab", "abab", {"answer": "abab"}, example)])
    assert earned["reward"] == pytest.approx(2 * wanted[0] + 0.5, abs=1e-5)
    assert all(p.requires_grad for p in adapter_parameters(policy).values())
    assert not any(p.requires_grad for p in adapter_parameters(policy, "reward-1").values())


@pytest.mark.parametrize(
    "options, why",
    [
        ({"loss": "grpol"}, "loss must be one of"),
        ({"group_size": 1}, "compares the answers to a prompt"),
        ({"kl_in": "reward"}, "kl_in would do nothing, as kl is 0"),
        ({"kl": 0.1, "kl_estimator": "k1"}, "mean gradient 0"),
        ({"loss": "sapo", "clip_low": 0.1}, "clip_low would do nothing, as the loss sapo takes none"),
        ({"loss": "ppo", "baseline": "batch"}, "ppo's come from values"),
        (
            {"loss": "gspo", "top_entropy": 0.2},
            "top_entropy would do nothing, as the loss gspo has one ratio",
        ),
        ({"baseline": "batch", "scale_rewards": "group"}, "give batch or none, or none of them"),
        ({"baseline": "none", "scale_rewards": "batch"}, "a baseline of none leaves them above 0 there: give none"),
        ({"micro_batch": 17}, "micro_batch splits the 16 examples of a step"),
        ({"lam": 0.5}, "lam would do nothing, as the loss grpo has no value function"),
        ({"steps": 9, "rollouts_ahead": 4, "updates": 2}, "each answer of the last round.*give 12$"),
        (
            {"loss": "reinforce", "group_size": 1, "resample": 2},
            "resample compares the answers to a prompt, got group_size 1",
        ),
    ],
)
def test_settings_that_cannot_work_together_are_refused(options, why):
    with pytest.raises(InputError, match=why):
        RLConfig(out="x", **options)


@pytest.mark.parametrize("loss", [loss for loss in POLICIES if loss != "ppo"])
@pytest.mark.parametrize("baseline", [None, "group", "batch", "none"])
def test_answers_that_earn_the_same_have_no_advantage_that_explodes(loss, baseline):
    """Whatever mean is taken off, a group without a deviation is not divided by it: at most n - 1 deviations."""
    way = RLConfig(out="x", loss=loss, baseline=baseline, micro_batch=16).way
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    for given in (rewards, torch.ones(2, 4), torch.ones(8, 1)):
        if given.shape[1] > 1 or way.baseline not in ("group", "leave-one-out"):
            assert policy.advantages(given, way.baseline, way.scale).abs().max() < given.numel()


@pytest.mark.parametrize("spec, why", [
    ("nothing", "no check"), ("words", "told what matches"), ("exact=0", "weight 0"), ("exact=nan", "from -1e9"),
    ("a.py:f", "FileNotFound"),
])  # fmt: skip
def test_rewards_that_are_none_are_refused(spec, why):
    with pytest.raises(InputError, match=why):
        rewards_of([spec], None)
    with pytest.raises(InputError, match="given twice"):
        rewards_of(["exact", "exact=2"], None)


def test_checkpoints_hold_the_round_as_plain_tensors(trainer_for, tiny_folder, rows, tmp_path):
    trainer = trainer_for(tiny_folder, rows, tmp_path, rewards=given(), **SMALL, steps=2)
    trainer.step_data(0)
    made, again = trainer.round, restored(trainer.round.state())
    assert again.numbers == made.numbers and torch.equal(again.counts, made.counts)
    assert again.ids == made.ids and all(again.ids)
    assert again.tokens.keys() == made.tokens.keys() and again.answers.keys() == made.answers.keys()
    made.answers["reward"][2] = made.answers["reward/e"][2] = math.nan  # its reward failed
    state, again = made.state(), restored(made.state())
    assert all(value.isfinite().all() for value in state.values())
    assert all(torch.equal(again.answers[name].isnan(), made.answers[name].isnan()) for name in made.answers)


def test_layers_that_run_again_draw_no_dropout(trainer_for, tiny_folder, rows, tmp_path):
    more = {"dropout": 0.3, "checkpointing": "on", "b_seed": 1, "steps": 2, "loss": "ppo"}
    trainer_for(tiny_folder, rows, tmp_path, rewards=given(), **SMALL, **more).train(display=None)
    assert len(steps_of(tmp_path)) == 2


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_a_step_is_foreseen_with_all_its_answers(trainer_for, tiny_folder, rows, tmp_path, loss):
    more = {"loss": loss, "updates": 2, "kl": 0.1}
    trainer = trainer_for(tiny_folder, rows, tmp_path, rewards=given(), **SMALL, **more)
    trainer.token_budget = 10**6
    case = trainer.case()
    assert case.batch.examples == 8 and case.forecast().peak > 0
    trainer.step_data(0)
    assert case.batch.tokens >= sum(batch.tokens for batch in trainer.step_data(0)[0])


def test_a_value_function_takes_no_activations_beside_the_policys(trainer_for, tiny_folder, rows, tmp_path):
    """Its pass comes when the policy's graph is gone: a pass like it, which keeps states under its head too.
    Both at once would be twice as much."""
    most = {}
    for loss in ("grpo", "ppo"):
        options = {"loss": loss, "updates": 2, "kl": 0.1, "group_size": 4, "batch_size": 4, "max_new_tokens": 64}
        options |= {"rank": 8}  # as the value function has
        trainer = trainer_for(tiny_folder, rows, tmp_path / loss, rewards=given(), **options)
        phases = trainer.case().forecast().phases
        most[loss] = max(parts["activations"] for name, parts in phases.items() if name.startswith("forward"))
    assert most["ppo"] <= 1.25 * most["grpo"]


def test_answering_is_foreseen_too(trainer_for, tiny_folder, rows, tmp_path, monkeypatch):
    """With decoded weights where they would be held, and the keys of as many rows as answer together."""
    make = lambda **more: trainer_for(tiny_folder, rows, tmp_path, rewards=given(), **SMALL | more).case()
    small, many = make(), make(batch_size=8)
    with merging(small.model, math.inf) as held:
        pass
    phase = lambda case: case.forecast().phases["answering"]
    assert phase(small)["activations"] == small.answering > held > 0
    assert many.answering > small.answering and not phase(small)["gradients"]
    one = make(batch_size=1)
    assert one.answering < small.answering  # of four answers; rounds of two steps and evaluations draw more
    assert make(batch_size=1, rollouts_ahead=2, steps=2).answering == small.answering
    assert make(batch_size=1, val=rows).answering > small.answering
    monkeypatch.setattr("fourbit.models.generate.memory_free", lambda device: held)
    assert make().answering == small.answering - held
    assert max(small.ways(["products"]).values()) >= sum(phase(small).values())


def test_a_value_function_leaves_the_policy_as_it_is(adapted, tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder, b_seed=1, target=["q_proj"])
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, alpha=4), "mine", seed=1)
    fourbit.use(model, "default", "mine")
    how = {"train": rows, "rewards": given(), "adapter": "mine"}
    before = model(torch.tensor([[5, 6, 7]]))
    trainer = PolicyTrainer(model, tokenizer, config=RLConfig(out=str(tmp_path), loss="ppo"), **how)
    assert torch.equal(model(torch.tensor([[5, 6, 7]])), before)
    assert {name.partition(".")[0] for name in trainer.parameters} == {"value", "model"}
    config = RLConfig(out=str(tmp_path), loss="ppo", value_lr=1e-3)
    with pytest.raises(InputError, match="value_lr would do nothing, as an optimizer of your own"):
        PolicyTrainer(model, tokenizer, config=config, optimizer=torch.optim.SGD, **how)


def test_what_is_clipped_is_what_the_loss_clips():
    logps = torch.tensor([[0.3, 0.3, -0.3], [0.3, -0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    advantages, counts = torch.tensor([[1.0], [-1.0]]).double(), torch.ones(2, 3, dtype=torch.bool)
    rollouts = policy.Rollouts(logps, torch.zeros_like(logps), advantages, counts)
    ways = [(loss, {}) for loss in POLICIES] + [("grpo", {"clip_most": 1.2}), ("reinforce", {"clip_high": 0.2})]
    for loss, options in ways:
        surrogate = RLConfig(out="x", loss=loss, **options).way.surrogate
        outside = policy.outside(surrogate, rollouts)
        if loss in ("cispo", "sapo", "vespo"):
            assert outside is None
            continue
        (gradient,) = torch.autograd.grad(surrogate(rollouts).sum(), logps)
        if loss in ("grpo", "dr-grpo", "dapo", "ppo", "reinforce"):
            assert torch.equal(outside, gradient == 0), loss
            assert outside.sum() == {"reinforce": 0}.get(loss, 3) + len(options) * (1 if loss == "grpo" else 2)
        else:  # a ratio of the whole answer
            assert torch.equal(outside.all(1), (gradient == 0).all(1)), loss


def test_answers_that_strayed_teach_nothing(trainer_for, tiny_folder, rows, tmp_path):
    """Of an answer that is worse than its group's, once the policy gives it less than it was drawn with."""
    how = {"rewards": given(lambda p, a, r: len(set(a))), "loss": "dr-grpo", "b_seed": 1, **SMALL}
    trainer = trainer_for(tiny_folder, rows, tmp_path, stray=0.5, micro_batch=1, **how)
    batches, _ = trainer.step_data(0)
    made = trainer.round
    worse = made.tokens["advantages"][:, 0] < 0
    assert 0 < worse.sum() < 8 and all(trainer.sums(batch).loss for batch in batches)
    made.tokens["sampled"] += 1.0  # nats: as if it had been drawn by another
    for batch in batches:
        assert bool(trainer.sums(batch).loss) != bool(worse[[*batch.numbers]].all())


def test_tokens_that_strayed_are_found_under_any_padding():
    """With advantages of tokens, as PPO's: those below 0 of an answer that lost more than it may."""
    logps, old = torch.tensor([[-9.0, -9.0, -9.0, 0.0]]), torch.zeros(1, 4)
    advantages, counts = torch.tensor([[-1.0, 2.0, -1.0, 0.0]]), torch.tensor([[True, True, True, False]])
    for width in (3, 4):
        part = [each[:, :width] for each in (logps, old, advantages, counts)]
        far = policy.strayed(policy.Rollouts(*part), part[1], 8.0)
        assert far.tolist() == [[True, False, True, False][:width]]
        assert not policy.strayed(policy.Rollouts(*part), part[1], 9.5).any()


def test_a_ratio_is_bounded_where_the_advantage_is_below_0_alone():
    logps = torch.full((2, 1), 2.0, dtype=torch.float64, requires_grad=True)
    old, advantages = torch.zeros(2, 1).double(), torch.tensor([[1.0], [-1.0]]).double()
    rollouts = policy.Rollouts(logps, old, advantages, torch.ones(2, 1).bool())
    losses = RLConfig(out="x", loss="reinforce", clip_most=3).way.surrogate(rollouts)
    losses.sum().backward()
    all_of_it = pytest.approx(-math.exp(2))
    assert losses.tolist() == [[all_of_it], [3.0]] and logps.grad.tolist() == [[all_of_it], [0.0]]


def test_only_known_rewards_make_a_signal():
    nan = float("nan")
    rewards = torch.tensor([[1.0, 1.0, nan], [1.0, 2.0, nan], [nan, nan, nan], [0.0, 0.0, 0.0], [0.5, nan, nan]])
    assert differing(rewards).tolist() == [False, True, False, False, False]


def test_a_value_function_takes_no_adapter_that_is_there(adapted, tiny_folder, rows, tmp_path):
    model, tokenizer = adapted(tiny_folder)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2), "value", seed=0)
    fourbit.use(model, "default", "value", weights=[1.0, 0.5])
    fourbit.train_only(model, "default")
    config = fourbit.RLConfig(out=str(tmp_path), loss="ppo", kl=0.0)
    trainer = fourbit.PolicyTrainer(model, tokenizer, train=rows, rewards=lambda p, a, r: 0.0, config=config)
    assert trainer.values is not None and trainer.values.adapter == "value-2"
    assert not any(p.requires_grad for p in adapter_parameters(model, "value").values())
    assert active_adapters(model) == {"default": 1.0, "value": 0.5}
    fourbit.use(model, "default")
    other = fourbit.PolicyTrainer(model, tokenizer, train=rows, rewards=lambda p, a, r: 0.0, config=config)
    assert other.values is not None and other.values.adapter == "value-3"
    assert all(p.requires_grad for one in (other, trainer) for p in one.trained_parameters().values())
