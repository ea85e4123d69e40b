"""Our losses of reinforcement against TRL's own code, on answers of all lengths, before and after an update.

TRL's trainers compute a loss inside a method, from `self` and a model; it is called here with what it reads from them.
"""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.trainer.losses import policy
from fourbit.trainer.losses.policy import Rollouts

trl = pytest.importorskip("trl")
LOW, HIGH, DELTA, MOST_LENGTH = 0.2, 0.3, 1.6, 11
N, L = 6, 9


def made(dtype: torch.dtype, moved: float, whole: bool = True) -> dict[str, Tensor]:
    """Random rollouts; moved: how far the policy is from what it was."""
    draw = torch.Generator().manual_seed(3)
    logps = -torch.rand(N, L, generator=draw, dtype=torch.float64) * 3
    lengths = torch.tensor([9, 1, 4, 7, 0, 5])  # one whose tokens are all masked
    return {
        "logps": logps.to(dtype),
        "old": (logps + moved * torch.randn(N, L, generator=draw, dtype=torch.float64)).to(dtype),
        "reference": (logps + 0.3 * torch.randn(N, L, generator=draw, dtype=torch.float64)).to(dtype),
        "advantages": torch.randn(N, 1 if whole else L, generator=draw, dtype=torch.float64).to(dtype),
        "counts": torch.arange(L) < lengths[:, None],
        "entropy": torch.rand(N, L, generator=draw, dtype=torch.float64).to(dtype),
    }


def theirs(given: dict[str, Tensor], logps: Tensor, **settings: Any) -> Tensor:
    """What GRPOTrainer makes of it."""
    from collections import defaultdict

    from trl.trainer.grpo_trainer import GRPOTrainer

    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, steps_per_generation=1,
    )  # fmt: skip
    vars(args).update({name: settings.pop(name) for name in [*settings] if hasattr(args, name)})
    accelerator = SimpleNamespace(
        gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **how: x, num_processes=1,
        pad_across_processes=lambda x, **how: x, sync_gradients=True,
    )  # fmt: skip
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, given["entropy"], None), accelerator=accelerator,
        args=args, model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)}, use_vllm=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.0,
        loss_type="grpo", epsilon_low=LOW, epsilon_high=HIGH, max_completion_length=MOST_LENGTH,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, aux_loss_enabled=False,
        vllm_importance_sampling_correction=False,
    )  # fmt: skip
    for name in ("get_high_entropy_mask", "get_gamma_weights", "get_off_policy_mask"):
        function = getattr(GRPOTrainer, name)
        own = isinstance(vars(GRPOTrainer)[name], staticmethod)
        setattr(stub, name, function if own else lambda *a, f=function, **k: f(stub, *a, **k))
    more = settings.pop("inputs", {})
    vars(stub).update(settings)
    mask = given["counts"].to(logps.dtype)
    inputs = {
        "prompt_ids": torch.zeros(N, 1), "prompt_mask": torch.ones(N, 1), "completion_ids": torch.zeros(N, L),
        "completion_mask": mask, "advantages": given["advantages"].squeeze(1) if given["advantages"].shape[1] == 1
        else given["advantages"], "old_per_token_logps": given["old"], "ref_per_token_logps": given["reference"],
        "num_items_in_batch": mask.sum(), **more,
    }  # fmt: skip
    loss: Tensor = GRPOTrainer._compute_loss(stub, stub.model, inputs)
    return loss


def reduced(losses: Tensor, counts: Tensor, mean: policy.Mean) -> Tensor:
    weights, divisor = policy.mean_weights(counts, mean, MOST_LENGTH)
    return (losses * weights).sum() / divisor


WAYS: dict[str, tuple[Any, policy.Mean, dict[str, Any]]] = {
    "grpo": (lambda r: policy.clipped(r, clip_low=LOW, clip_high=HIGH), "answer", {}),
    "bnpo": (lambda r: policy.clipped(r, clip_low=LOW, clip_high=HIGH), "token", {"loss_type": "bnpo"}),
    "dr_grpo": (lambda r: policy.clipped(r, clip_low=LOW, clip_high=HIGH), "length", {"loss_type": "dr_grpo"}),
    "dapo": (lambda r: policy.clipped(r, clip_low=LOW, clip_high=HIGH), "token", {"loss_type": "dapo"}),
    "two-sided": (
        lambda r: policy.clipped(r, clip_low=LOW, clip_high=HIGH, clip_most=DELTA), "answer", {"delta": DELTA},
    ),
    "gspo": (
        lambda r: policy.clipped(r, clip_low=LOW, clip_high=HIGH, level="mean"), "answer",
        {"importance_sampling_level": "sequence"},
    ),
    "luspo": (
        lambda r: policy.clipped(r, clip_low=LOW, clip_high=HIGH, level="mean"), "sum",
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    ),
    "cispo": (lambda r: policy.cispo(r, clip_high=0.5), "token", {"loss_type": "cispo", "epsilon_high": 1.5}),
    # TRL's temperatures are fp32, and 1.05, its default and ours, has no exact one
    "sapo": (lambda r: policy.sapo(r, negative=1.25), "answer", {"loss_type": "sapo", "sapo_temperature_neg": 1.25}),
    "vespo": (policy.vespo, "token", {"loss_type": "vespo"}),
}  # fmt: skip


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("moved", [0.0, 0.4])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", WAYS)
def test_values_and_gradients_are_trls(name: str, beta: float, moved: float, dtype: torch.dtype, close: float) -> None:
    loss, mean, settings = WAYS[name]
    given = made(dtype, moved)
    mine, other = (given["logps"].clone().requires_grad_() for _ in range(2))
    rollouts = Rollouts(mine, given["old"], given["advantages"], given["counts"], given["reference"])
    losses = loss(rollouts)
    if beta:
        losses = losses + beta * policy.kl_estimate(mine, given["reference"])
    got = reduced(losses, given["counts"], mean)
    wanted = theirs(given, other, beta=beta, **settings)
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=close, atol=close)
    gradients = [torch.autograd.grad(value, logps)[0] for value, logps in ((got, mine), (wanted, other))]
    torch.testing.assert_close(*gradients, rtol=close, atol=close)
    if moved:
        assert gradients[0].count_nonzero() > 10
    assert not gradients[0][~given["counts"]].any()


@pytest.mark.parametrize("moved", [0.0, 0.4])
def test_rloo_is_trls(moved: float) -> None:
    from collections import defaultdict

    from trl.trainer.rloo_trainer import RLOOTrainer

    given = made(torch.float64, moved)
    mine, other = (given["logps"].clone().requires_grad_() for _ in range(2))
    counts, mask = given["counts"], given["counts"].double()
    losses = policy.clipped(
        Rollouts(mine, given["old"], given["advantages"], counts), clip_low=LOW, clip_high=HIGH, level="answer"
    )
    weights, divisor = policy.mean_weights(counts, "answer")
    got = (losses * weights).sum() / divisor
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, **how: x)
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (other, given["entropy"], None), accelerator=accelerator,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)}, epsilon_low=LOW,
        epsilon_high=HIGH, aux_loss_enabled=False,
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(N, 1), "prompt_mask": torch.ones(N, 1), "completion_ids": torch.zeros(N, L),
        "completion_mask": mask, "advantages": given["advantages"][:, 0], "old_logps": (given["old"] * mask).sum(1),
    }  # fmt: skip
    wanted = RLOOTrainer._compute_loss(stub, stub.model, inputs)
    # an answer none of whose tokens count adds -A there, which has no gradient, and nothing here
    wanted = wanted + given["advantages"][4, 0] / N
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(value, logps)[0] for value, logps in ((got, mine), (wanted, other))]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert gradients[0].count_nonzero() > 10


def test_what_strays_and_what_is_uncertain_is_masked_as_trl_does() -> None:
    given = made(torch.float64, 0.4)
    mine, other = (given["logps"].clone().requires_grad_() for _ in range(2))
    rollouts = Rollouts(mine, given["old"], given["advantages"], given["counts"])
    losses = policy.clipped(rollouts, clip_low=LOW, clip_high=HIGH)
    far = policy.strayed(rollouts, given["old"], 0.05)
    chosen = policy.uncertain(given["entropy"], given["counts"], 0.25)
    assert 0 < far.sum() < N and 0 < chosen.sum() < given["counts"].sum() / 3
    got = reduced(losses * ~far * chosen, given["counts"], "answer")
    wanted = theirs(given, other, off_policy_mask_threshold=0.05, top_entropy_quantile=0.25)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_are_those_of_trls_formula(scale: policy.Scale) -> None:
    """Its code stands in a method that generates; the formula is torch's own mean and std."""
    rewards = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[1] = 0.25  # no signal
    centred = rewards - rewards.mean(1, keepdim=True)
    wanted = {"group": centred / (rewards.std(1, keepdim=True) + 1e-4), "batch": centred / (rewards.std() + 1e-4)}
    torch.testing.assert_close(policy.advantages(rewards, "group", scale), wanted.get(scale, centred))


def test_a_reward_that_failed_has_no_part_in_its_group() -> None:
    rewards = torch.tensor([[1.0, float("nan"), 3.0, 5.0], [float("nan"), float("nan"), 2.0, float("nan")]])
    baselines: tuple[policy.Baseline, ...] = ("group", "leave-one-out")
    scales: tuple[policy.Scale, ...] = ("group", "none")
    for how in product(baselines, scales):
        found, alone = policy.advantages(rewards, *how), policy.advantages(rewards[:1, [0, 2, 3]], *how)
        torch.testing.assert_close(found[:1, [0, 2, 3]], alone)
        assert not found[0, 1] and not found[1].any()
    with pytest.raises(ValueError, match="2 answers a prompt"):
        policy.advantages(rewards[:, :1], "leave-one-out")
