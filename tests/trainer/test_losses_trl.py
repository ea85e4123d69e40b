"""Every preference loss that TRL also has: values and gradients against TRL's own trainers.

Its trainers are made without their __init__ and given a model that answers with the log-probabilities we want, so it
is their loss code that runs, not a copy of its formulas. Bounds: 1e-10 in float64 and 1e-6 in fp32, relative to the
largest absolute value of what is compared (at least 1 for losses, which are sums of terms of that order).
"""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourbit.trainer.losses.judged import mismatch_kl
from fourbit.trainer.losses.objective import Objective
from fourbit.trainer.losses.pairs import Scores, mixture, scores_of
from fourbit.trainer.preference import reward_metrics

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its imports warn about is not ours to mend
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-6}
PAIRS, LONGEST = 6, 9
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["fp64", "fp32"])


class Wide(Tensor):
    """float64 that passes for fp32: some of TRL's code casts down, or knows no float64."""

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float32

    def float(self, *arguments: Any, **options: Any) -> Tensor:
        return self if self.is_floating_point() else self.double()

    def to(self, *arguments: Any, **options: Any) -> Tensor:
        return self


class Model(nn.Module):
    """Answers with what it was made with."""

    is_gradient_checkpointing = False

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.answer(*arguments, **options)


def accelerator() -> SimpleNamespace:
    same = lambda value: value
    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


def trainer_of(kind: type, **attributes: Any) -> Any:
    trainer = object.__new__(kind)
    common = {"accelerator": accelerator(), "aux_loss_enabled": False, "_total_train_tokens": 0, "_tp_size": 1}
    for key, value in (common | {"_metrics": defaultdict(lambda: defaultdict(list))} | attributes).items():
        setattr(trainer, key, value)
    return trainer


class Sample:
    """logps, reference [2, P, L], zero past the end, and lengths [2, P]; the policy's is the leaf."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, pairs: int = PAIRS, equal: bool = False) -> None:
        make = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, LONGEST + 1, (2, pairs), generator=make)
        self.lengths[0, 0] = LONGEST
        if equal:
            self.lengths[0] = LONGEST
        self.mask = torch.arange(LONGEST) < self.lengths.unsqueeze(-1)
        draw = lambda: torch.rand(2, pairs, LONGEST, generator=make, dtype=torch.float64).to(dtype)
        self.reference = -(0.05 + 3 * draw()) * self.mask
        self.logps = ((self.reference + 4 * draw() - 2).clamp(max=-0.02) * self.mask).detach().requires_grad_()

    def one(self, number: int) -> "Sample":
        """The pair `number` alone."""
        other = object.__new__(Sample)
        for key in ("lengths", "mask", "reference"):
            setattr(other, key, getattr(self, key)[:, number : number + 1])
        other.logps = self.logps[:, number : number + 1].detach().clone().requires_grad_()
        return other

    def scores(self, ld_alpha: float | None = None) -> Scores:
        return scores_of(self.logps, self.lengths, self.reference, ld_alpha=ld_alpha)

    @property
    def completion_mask(self) -> Tensor:
        """[2P, 1 + L]: one token of prompt, then the answer."""
        flat = self.mask.flatten(0, 1).long()
        return torch.cat([torch.zeros(len(flat), 1, dtype=torch.long), flat], 1)


def fused_outputs(logps: Tensor) -> SimpleNamespace:
    nothing = torch.zeros(logps.shape)
    return SimpleNamespace(
        log_probs=logps,
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )


def dpo_loss(sample: Sample, loss_type: str, leaf: Tensor | None = None, **attributes: Any) -> Tensor:
    """TRL's DPO loss of the pairs of `sample`, a mean."""
    logps = sample.logps if leaf is None else leaf
    policy = Model(lambda **_: fused_outputs(logps.flatten(0, 1)))
    reference = Model(lambda **_: fused_outputs(sample.reference.flatten(0, 1)))
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
    divergence = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=attributes.pop("tau", 0.05))
    trainer = trainer_of(
        DPOTrainer,
        model=policy,
        ref_model=reference,
        precompute_ref_logps=False,
        args=args,
        **({"loss_types": [loss_type], "loss_weights": [1.0]} | defaults | divergence | attributes),
    )
    mask = sample.completion_mask
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return trainer._compute_loss(policy, inputs, False)


def assert_near(ours: Tensor, theirs: Tensor, dtype: torch.dtype, *, least: float = 0.0, what: str) -> None:
    ours, theirs = ours.detach().double(), theirs.detach().as_subclass(Tensor).double()
    magnitude = max(least, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) <= BOUNDS[dtype] * magnitude, f"{what}: {ours} and TRL's {theirs}"


def assert_same(sample: Sample, ours: Tensor, theirs: Tensor, leaf: Tensor, dtype: torch.dtype) -> None:
    """Both losses, and their gradients with respect to every token's log-probability."""
    assert_near(ours, theirs, dtype, least=1.0, what="loss")
    (our_gradient,) = torch.autograd.grad(ours, sample.logps)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)
    our_gradient, their_gradient = our_gradient * sample.mask, their_gradient * sample.mask  # of tokens that exist
    assert float(their_gradient.abs().max()) > 0, "this sample does not see the gradient"
    assert_near(our_gradient, their_gradient, dtype, what="gradient")


DPO = {  # case: our losses and settings, TRL's loss_type and attributes
    "sigmoid": ("sigmoid", {}, "sigmoid", {}),
    "sigmoid beta": ("sigmoid", {"beta": 0.7}, "sigmoid", {"beta": 0.7}),
    "robust": ("robust", {"label_smoothing": 0.2}, "robust", {"label_smoothing": 0.2}),
    "sigmoid-norm": ("sigmoid-norm", {"beta": 2.5}, "sigmoid_norm", {"beta": 2.5}),
    "ipo": ("ipo", {}, "ipo", {}),
    "hinge": ("hinge", {}, "hinge", {}),
    "hinge beta": ("hinge", {"beta": 0.5}, "hinge", {"beta": 0.5}),
    "exo": ("exo", {"label_smoothing": 0.01}, "exo_pair", {"label_smoothing": 0.01}),
    "discopop": ("discopop", {}, "discopop", {}),
    "discopop tau": ("discopop", {"tau": 1.5, "beta": 0.3}, "discopop", {"tau": 1.5, "beta": 0.3}),
    "bco at the start": ("bco", {}, "bco_pair", {}),
    "sppo-hard": ("sppo-hard", {"beta": 0.05}, "sppo_hard", {"beta": 0.05}),
    "nca": ("nca", {}, "nca_pair", {}),
    "apo-zero": ("apo-zero", {}, "apo_zero", {}),
    "apo-down": ("apo-down", {}, "apo_down", {}),
}
NAMES = {"reverse-kl": "reverse_kl", "forward-kl": "forward_kl", "jsd": "js_divergence", "alpha": "alpha_divergence"}


def our_loss(sample: Sample, losses: dict[str, float], settings: dict[str, Any], ld: float | None = None) -> Tensor:
    return mixture(Objective(losses, settings).terms, sample.scores(ld), {"shift": torch.zeros(())})


@pytest.fixture(autouse=True)
def default_dtype(request: pytest.FixtureRequest) -> Any:
    """TRL's EXO makes its constant in torch's default dtype."""
    torch.set_default_dtype(getattr(request.node, "callspec", request.node).params.get("dtype", torch.float32))
    yield
    torch.set_default_dtype(torch.float32)


@dtypes
@pytest.mark.parametrize("case", DPO)
def test_dpo_losses(case: str, dtype: torch.dtype) -> None:
    name, settings, loss_type, attributes = DPO[case]
    sample = Sample(dtype)
    ours, theirs = our_loss(sample, {name: 1.0}, settings), dpo_loss(sample, loss_type, **attributes)
    assert ours.dtype == dtype
    assert_same(sample, ours.mean(), theirs, sample.logps, dtype)
    for number in range(PAIRS):  # each pair's own value
        single = dpo_loss(sample.one(number), loss_type, **attributes)
        assert_near(ours[number], single, dtype, least=1.0, what=f"pair {number}")


@dtypes
@pytest.mark.parametrize("divergence", ["forward-kl", "jsd", "alpha"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid-norm", "hinge", "ipo", "exo", "robust", "discopop"])
def test_divergences(name: str, divergence: str, dtype: torch.dtype) -> None:
    smoothing = {"exo": 0.01, "robust": 0.2}.get(name)
    settings = {"beta": 0.1, "divergence": divergence} | ({"divergence_alpha": 0.3} if divergence == "alpha" else {})
    sample = Sample(dtype, seed=3)
    if dtype == torch.float64 and divergence == "alpha":
        leaf = sample.logps.detach().as_subclass(Wide).requires_grad_()
    else:
        leaf = sample.logps
    theirs = dpo_loss(
        sample,
        {"exo": "exo_pair"}.get(name, name.replace("-", "_")),
        leaf,
        label_smoothing=smoothing or 0.0,
        f_divergence_type=NAMES[divergence],
        f_alpha_divergence_coef=0.3,
    )
    ours = our_loss(sample, {name: 1.0}, settings | ({"label_smoothing": smoothing} if smoothing else {}))
    assert_same(sample, ours.mean(), theirs, leaf, dtype)


@dtypes
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid-norm", "apo-down"])
def test_length_desensitising(name: str, ld_alpha: float, dtype: torch.dtype) -> None:
    sample = Sample(dtype, seed=4)
    theirs = dpo_loss(sample, name.replace("-", "_"), ld_alpha=ld_alpha)
    ours = our_loss(sample, {name: 1.0}, {"beta": 0.1}, ld_alpha)
    assert_same(sample, ours.mean(), theirs, sample.logps, dtype)


@dtypes
@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_mixture_with_sft(ld_alpha: float | None, dtype: torch.dtype) -> None:
    """Chosen answers of one length: there a mean over the tokens of all of them is the mean over pairs of theirs."""
    sample = Sample(dtype, seed=5, equal=True)
    kinds = {"loss_types": ["sigmoid", "nca_pair", "sft"], "loss_weights": [0.8, 0.3, 0.2], "ld_alpha": ld_alpha}
    theirs = dpo_loss(sample, "sigmoid", **kinds)
    ours = our_loss(sample, {"sigmoid": 0.8, "nca": 0.3, "sft": 0.2}, {}, ld_alpha)
    assert_same(sample, ours.mean(), theirs, sample.logps, dtype)


@dtypes
def test_sft_of_a_pair(dtype: torch.dtype) -> None:
    sample = Sample(dtype, seed=6)
    for number in range(PAIRS):
        one = sample.one(number)
        theirs = dpo_loss(one, "sigmoid", loss_types=["sigmoid", "sft"], loss_weights=[1.0, 2.0])
        assert_same(one, our_loss(one, {"sigmoid": 1.0, "sft": 2.0}, {}).mean(), theirs, one.logps, dtype)


def logits_of(logps: Tensor) -> Tensor:
    """[B, L] -> [B, 1 + L, 2]: logits over two tokens whose log-probabilities of token 0 are `logps`."""
    other = torch.log(-torch.expm1(torch.where(logps == 0, -1.0, logps)))
    return torch.cat([torch.stack([logps, other], -1), torch.zeros(len(logps), 1, 2).to(logps)], 1)


def batch_of(sample: Sample) -> dict[str, Tensor]:
    """Token 0 all along; one token of prompt."""
    mask = sample.completion_mask.unflatten(0, (2, -1))
    batch = {}
    for side, own in zip(("chosen", "rejected"), mask, strict=True):
        attended = own.clone()
        attended[:, 0] = 1
        batch[f"{side}_input_ids"] = torch.zeros_like(own)
        batch[f"{side}_attention_mask"] = attended
        batch[f"{side}_labels"] = torch.where(own == 1, 0, -100)
    return batch


def reference_free_loss(kind: type, sample: Sample, leaf: Tensor, **attributes: Any) -> tuple[Tensor, dict[str, float]]:
    """The loss, and the metrics that TRL would report."""
    model = Model(lambda *_, **__: SimpleNamespace(logits=logits_of(leaf.flatten(0, 1))))
    defaults = {
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "padding_value": 0,
        "alpha": 0.0,
        "label_smoothing": 0.0,
    }
    trainer = trainer_of(kind, model=model, **(defaults | attributes))
    return trainer.get_batch_loss_metrics(model, batch_of(sample))


def leaf_of(sample: Sample, dtype: torch.dtype) -> Tensor:
    return sample.logps.detach().as_subclass(Wide).requires_grad_() if dtype == torch.float64 else sample.logps


def check_rewards(objective: Objective, sample: Sample, metrics: dict[str, float]) -> None:
    found = reward_metrics(*sample.scores().rewards(objective.compared, objective.beta))
    names = {"chosen": "chosen", "rejected": "rejected", "margin": "margins", "accuracy": "accuracies"}
    for ours, theirs in names.items():
        total, count = found[f"reward_{ours}"].tolist()
        assert total / count == pytest.approx(metrics[f"rewards/{theirs}"], rel=2e-6, abs=1e-6), ours


@dtypes
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float, dtype: torch.dtype) -> None:
    sample = Sample(dtype, seed=8)
    free = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.6, "label_smoothing": smoothing}
    theirs, metrics = reference_free_loss(CPOTrainer, sample, sample.logps, **free)
    objective = Objective({"simpo": 1.0}, {"beta": 2.0, "gamma": 0.6, "label_smoothing": smoothing})
    assert_same(sample, mixture(objective.terms, sample.scores(), {}).mean(), theirs, sample.logps, dtype)
    check_rewards(objective, sample, metrics)


@dtypes
@pytest.mark.parametrize("sft_weight", [0.0, 1.0, 0.4])
def test_cpo(sft_weight: float, dtype: torch.dtype) -> None:
    sample = Sample(dtype, seed=9, equal=True)
    free = {"loss_type": "sigmoid", "cpo_alpha": sft_weight, "beta": 0.1, "label_smoothing": 0.05}
    theirs, metrics = reference_free_loss(CPOTrainer, sample, sample.logps, **free)
    objective = Objective({"cpo": 1.0}, {"sft_weight": sft_weight, "label_smoothing": 0.05})
    assert_same(sample, mixture(objective.terms, sample.scores(), {}).mean(), theirs, sample.logps, dtype)
    check_rewards(objective, sample, metrics)


@dtypes
def test_orpo(dtype: torch.dtype) -> None:
    """With one token of prompt TRL's likelihood of prompt and answer is that of the answer."""
    sample = Sample(dtype, seed=10, equal=True)
    leaf = leaf_of(sample, dtype)
    theirs, metrics = reference_free_loss(ORPOTrainer, sample, leaf, beta=0.3)
    objective = Objective({"orpo": 1.0}, {"beta": 0.3})
    assert_same(sample, mixture(objective.terms, sample.scores(), {}).mean(), theirs, leaf, dtype)
    check_rewards(objective, sample, metrics)


@dtypes
def test_conservative_dpo(dtype: torch.dtype) -> None:
    """TRL's DPO has no label smoothing any more; its CPO has, and with log-ratios in it that is cDPO."""
    sample = Sample(dtype, seed=11)
    scores = sample.scores()
    trainer = trainer_of(CPOTrainer, loss_type="sigmoid", beta=0.2, label_smoothing=0.15, alpha=0.0)
    theirs, *rewards = trainer.cpo_loss(*scores.ratio)
    objective = Objective({"sigmoid": 1.0}, {"beta": 0.2, "label_smoothing": 0.15})
    assert_same(sample, mixture(objective.terms, scores, {}).mean(), theirs.mean(), sample.logps, dtype)
    assert_near(scores.rewards(objective.compared, objective.beta), torch.stack(rewards), dtype, what="rewards")


@dtypes
@pytest.mark.parametrize("raised", [True, False], ids=["kl above zero", "kl below zero"])
@pytest.mark.parametrize("name", ["kto", "apo-zero-unpaired"])
def test_unpaired(name: str, raised: bool, dtype: torch.dtype) -> None:
    """The first side of the sample are the judged answers, the second the mismatched ones."""
    sample = Sample(dtype, seed=12)
    mismatched = (sample.reference[1] + (0.3 if raised else -0.3) * sample.mask[1]).to(dtype)
    labels = torch.tensor([True, False, True, True, False, False])

    def answers(own: Tensor, other: Tensor) -> Model:
        return Model(lambda input_ids, **_: fused_outputs(other if int(input_ids[0, 0]) else own))

    policy = answers(sample.logps[0], mismatched)
    trainer = trainer_of(
        KTOTrainer,
        model=policy,
        ref_model=answers(sample.reference[0], sample.reference[1]),
        precompute_ref_logps=False,
        loss_type=name.replace("-", "_"),
        calculate_KL=name == "kto",
        beta=0.1,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    own, other = sample.completion_mask.chunk(2)
    inputs = {"input_ids": torch.zeros_like(own), "attention_mask": torch.ones_like(own), "completion_mask": own}
    inputs |= {"KL_input_ids": torch.ones_like(other), "KL_attention_mask": torch.ones_like(other)}
    theirs = trainer._compute_loss(policy, inputs | {"KL_completion_mask": other, "label": labels}, False)

    kl = mismatch_kl(mismatched.sum(-1), sample.reference[1].sum(-1))
    assert float(kl) == pytest.approx(trainer._metrics["train"]["kl"][0] if name == "kto" else float(kl), rel=1e-6)
    assert (float(kl) > 0) is raised
    objective = Objective({name: 1.0}, {"desirable_weight": 1.3, "undesirable_weight": 0.8})
    scores = scores_of(sample.logps[:1], sample.lengths[:1], sample.reference[:1], labels=labels)
    ours = mixture(objective.terms, scores, {"kl": kl})
    assert_same(sample, ours.mean(), theirs, sample.logps, dtype)
