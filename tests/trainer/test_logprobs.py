"""Log-probabilities for every kind of output head against the head's full logits, and how often the head is run."""

import math

import pytest
import torch
from torch import nn

from fourbit.data.batch import Batch, Encoded, Example, pack
from fourbit.kernels import chunked_head
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec
from fourbit.trainer.losses.tokens import batch_token_scores, token_divergence, token_kl, token_scores

V, D = 61, 16
HEADS = [
    "dense",
    "dense trained",
    "dense bias",
    "dense bias trained",
    "nf4",
    "nf4 bias",
    "lora",
    "lora bias",
    "lora nf4",
    "lora nf4 bias",
    "lora off",
    "lora frozen",
    "lora nf4 frozen",
]


def head_of(kind: str, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    head: nn.Module = nn.Linear(D, V, bias="bias" in kind).requires_grad_("trained" in kind)
    if "nf4" in kind:
        head = NF4Linear.from_weight(head.weight.detach(), head.bias)
    if "lora" in kind:
        head = AdapterLayer(head, default=LoRA(head, 3, 6.0, dropout))
        nn.init.normal_(head.adapters["default"].lora_B)
        head.adapters.requires_grad_("frozen" not in kind)
        head.active = {} if "off" in kind else {"default": 1.0}
    return head.to(dtype)


def rows_a_chunk(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 4 * V * rows)


def gradients(head, hidden, logps, scale):
    head.zero_grad()
    hidden.grad = None
    (logps * scale).sum().backward()
    found = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    return {"hidden": hidden.grad} | {name: gradient.clone() for name, gradient in found.items()}


def full(head, hidden, targets):
    log_p = torch.log_softmax(head(hidden), 1)
    return log_p, log_p.gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rows", [1, 5, 11, 100])
def test_equals_full_logits(kind, rows, monkeypatch):
    rows_a_chunk(monkeypatch, rows)
    head = head_of(kind)
    hidden = torch.randn(11, D, dtype=torch.float64, requires_grad=True)
    targets, scale = torch.randint(V, (11,)), torch.randn(11, dtype=torch.float64)
    log_p, logps = full(head, hidden, targets)
    want = gradients(head, hidden, logps, scale)
    scores = token_scores(head, hidden, targets)
    got = gradients(head, hidden, scores.logps, scale)
    torch.testing.assert_close(scores.logps, logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores.entropy, torch.special.entr(log_p.detach().exp()).sum(1), rtol=1e-12, atol=0)
    assert torch.equal(scores.correct, log_p.argmax(1) == targets)
    trained = (
        {f"adapters.default.lora_{x}" for x in "AB"}
        if kind.startswith("lora") and "frozen" not in kind and "off" not in kind
        else set()
    )
    trained |= {"weight"} if "trained" in kind else set()
    trained |= {"bias"} if "bias trained" in kind else set()
    assert set(got) == set(want) == trained | {"hidden"}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", HEADS)
def test_fp32(kind):
    """Within 1e-6, relative and below 1 nat absolute, of the same weights in float64."""
    hidden, targets = torch.randn(40, D), torch.randint(V, (40,))
    _, want = full(head_of(kind), hidden.double(), targets)
    got = token_scores(head_of(kind, torch.float32), hidden, targets).logps
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense bias", "dense bias trained", "nf4 bias", "lora bias", "lora nf4"])
def test_gradcheck(kind, monkeypatch):
    rows_a_chunk(monkeypatch, 2)
    head = head_of(kind)
    hidden = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (3,))
    inputs = (hidden, *(p for p in head.parameters() if p.requires_grad))  # gradcheck moves them where they are
    assert torch.autograd.gradcheck(lambda *_: token_scores(head, hidden, targets).logps, inputs)


@pytest.mark.parametrize(
    ("kind", "runs"),
    [("dense bias", 1), ("nf4", 1), ("lora frozen", 1), ("dense bias trained", 2), ("lora", 2), ("lora nf4", 2)],
)
def test_a_frozen_head_runs_once(kind, runs, monkeypatch):
    """And a trained one again in backward; without gradients any head runs once."""
    rows_a_chunk(monkeypatch, 4)
    head = head_of(kind)
    seen = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    hidden, targets = torch.randn(10, D, dtype=torch.float64, requires_grad=True), torch.randint(V, (10,))
    token_scores(head, hidden, targets).logps.sum().backward()
    assert sorted(seen) == sorted([4, 4, 2] * runs)
    seen.clear()
    with torch.no_grad():
        assert not token_scores(head, hidden, targets).logps.requires_grad
    assert seen == [4, 4, 2]


def test_a_hook_on_a_dense_head_is_called():
    head = head_of("dense")
    head.register_forward_hook(lambda module, inputs, output: output * 2)
    hidden, targets = torch.randn(3, D, dtype=torch.float64), torch.randint(V, (3,))
    torch.testing.assert_close(token_scores(head, hidden, targets).logps, full(head, hidden, targets)[1])


@pytest.mark.parametrize("kind", ["lora", "lora nf4", "lora frozen"])
def test_dropout_in_the_head_is_the_same_again(kind, monkeypatch):
    """The gradients are those of the very dropout masks that made the values."""
    rows_a_chunk(monkeypatch, 4)
    head = head_of(kind, dropout=0.5).train()
    hidden = torch.randn(10, D, dtype=torch.float64, requires_grad=True)
    targets, scale = torch.randint(V, (10,)), torch.randn(10, dtype=torch.float64)
    torch.manual_seed(5)
    logps = torch.cat([full(head, h, t)[1] for h, t in zip(hidden.split(4), targets.split(4), strict=True)])
    want = gradients(head, hidden, logps, scale)
    torch.manual_seed(5)
    got_logps = token_scores(head, hidden, targets).logps
    after = torch.rand(1)  # what others draw in between must not matter, nor be drawn again after
    got = gradients(head, hidden, got_logps, scale)
    torch.testing.assert_close(got_logps, logps)
    assert torch.rand(1) != after
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", HEADS)
def test_no_rows(kind):
    head = head_of(kind)
    hidden = torch.randn(0, D, dtype=torch.float64, requires_grad=True)
    scores = token_scores(head, hidden, torch.zeros(0, dtype=torch.int64))
    assert scores.logps.shape == scores.entropy.shape == scores.correct.shape == (0,)
    scores.logps.sum().backward()
    assert hidden.grad.shape == (0, D)
    for name, parameter in head.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_a_banned_token_leaves_the_others_figures():
    """A bias of -inf takes a token out: its log-probability is -inf, and the entropy is that of the rest."""
    head = head_of("dense bias", torch.float32)
    hidden, targets = torch.randn(6, D), torch.tensor([3, 0, 1, 2, 4, 5])
    with torch.no_grad():
        head.bias[3] = -torch.inf
        scores, (log_p, _) = token_scores(head, hidden, targets), full(head, hidden, targets)
    assert scores.logps[0] == -torch.inf and scores.logps[1:].isfinite().all() and not scores.correct[0]
    torch.testing.assert_close(scores.entropy, torch.special.entr(log_p.exp()).sum(1))


class Capped(nn.Linear):
    """A head that is not linear: its backward needs its output, so the scores may not overwrite it."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("trained", [False, True])
def test_a_head_that_needs_its_output(trained):
    torch.manual_seed(0)
    head = Capped(D, V, dtype=torch.float64).requires_grad_(trained)
    hidden = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    targets, scale = torch.tensor([0, 5, 7]), torch.randn(3, dtype=torch.float64)
    want = gradients(head, hidden, full(head, hidden, targets)[1], scale)
    got = gradients(head, hidden, token_scores(head, hidden, targets).logps, scale)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_refusals(kind):
    head, hidden = head_of(kind), torch.randn(3, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"targets must be in 0\.\.{V - 1}, .* got {V};"):
        token_scores(head, hidden, torch.tensor([0, V, 1]))
    with pytest.raises(ValueError, match=r"got \(3, 16\) and \(2,\)"):
        token_scores(head, hidden, torch.tensor([0, 1]))


def tiny_batch(last: int = 7) -> tuple[Decoder, Batch]:
    torch.manual_seed(0)
    config = Spec(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    parts = [
        Encoded([5, 1, 2, 3], [False, False, True, True], "", "a:1"),
        Encoded([8, 1, last], [False, True, True], "", "a:2"),
    ]
    return Decoder(config), pack([(i, Example((part,))) for i, part in enumerate(parts)])


def test_scores_of_a_batch_are_of_its_trained_tokens():
    model, batch = tiny_batch()
    model.requires_grad_(False)
    scores = batch_token_scores(model, batch)
    logits = model(batch.input_ids, batch.position_ids, batch.spans).flatten(0, 1)
    log_p = torch.log_softmax(logits[[1, 2, 4, 5]], 1)
    want = log_p[range(4), [2, 3, 1, 7]]
    torch.testing.assert_close(scores.logps, want)


def test_a_token_that_the_model_lacks_is_named():
    model, batch = tiny_batch()
    batch.targets[batch.targets == 7] = V
    with pytest.raises(ValueError, match=rf"got {V};"):
        batch_token_scores(model, batch)


def test_token_kl_is_the_divergence_over_two_tokens_and_below_it_over_more():
    make = torch.Generator().manual_seed(0)
    policy, reference = (3 * torch.randn(2, 200, 2, generator=make, dtype=torch.float64)).log_softmax(-1)
    found = token_kl(policy[:, 0].requires_grad_(), reference[:, 0])
    wanted = (policy.exp() * (policy - reference)).sum(-1).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert not found.requires_grad
    policy, reference = (3 * torch.randn(2, 200, 50, generator=make, dtype=torch.float64)).log_softmax(-1)
    whole = (policy.exp() * (policy - reference)).sum(-1)
    found = token_kl(policy[:, 0], reference[:, 0])
    assert (found >= 0).all() and (found <= whole).all() and (found < 0.99 * whole).any()


def test_token_kl_at_its_ends():
    """Certain tokens, impossible ones, and what stands past an answer's end (0 and 0)."""
    sure, never = torch.tensor([0.0, 0.0, -1e4, -1e4]), torch.tensor([0.0, -1e4, 0.0, -1e4])
    found = token_kl(sure, never)
    assert found.isfinite().all() and (found >= 0).all() and found[0] == 0 and found[3] == 0
    assert found[1:3].tolist() == [pytest.approx(1e4, rel=1e-6), pytest.approx(-math.log(1e-12), rel=1e-3)]


def test_a_head_may_be_any_module_or_a_weight() -> None:
    """A weight, a module without `out_features`, and the plain layer: one loss, one gradient."""
    torch.manual_seed(0)
    layer, targets = nn.Linear(D, V, bias=False).double(), torch.tensor([3, 0, 7])
    hidden = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    found = []
    for head in (layer, layer.weight, nn.Sequential(nn.Identity(), layer)):
        scores = token_scores(head, hidden, targets)
        found.append((scores.logps, *torch.autograd.grad(scores.logps.sum(), (hidden, layer.weight))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    far = token_divergence(layer.weight, hidden, nn.Sequential(layer), hidden.detach())
    torch.testing.assert_close(far, torch.zeros_like(far), rtol=0, atol=1e-12)


def test_under_autocast_chunks_add_up_in_the_heads_dtype(monkeypatch) -> None:
    """Else each would round the gradient of a trained head: torch's is rounded once."""
    rows_a_chunk(monkeypatch, 1)
    layer, generator = nn.Linear(D, 40, bias=False), torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(600, D, generator=generator), torch.randint(40, (600,), generator=generator)
    exact = nn.Linear(D, 40, bias=False, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    nn.functional.cross_entropy(exact(hidden.double()), targets, reduction="sum").backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = -token_scores(layer, hidden, targets).logps.sum()
    loss.backward()
    assert (layer.weight.grad - exact.weight.grad).norm() < 2**-7 * exact.weight.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "dense trained", "dense bias trained"])
def test_under_autocast_logits_are_as_torch_makes_them(kind: str, dtype: torch.dtype) -> None:
    """Of fp32 weights, and hidden states in fp32 or 16 bits; backward runs outside, as torch wants it."""
    head, targets, found = head_of(kind, torch.float32), torch.tensor([3, 0, 7]), []
    leaf = torch.randn(3, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = leaf.to(dtype)
        near = token_divergence(head, hidden, head, hidden.detach()).sum()  # 0, and so is its gradient
        ours = near - token_scores(head, hidden, targets).logps
        theirs = nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    for loss in (ours, theirs):
        found.append([loss, *gradients(head, leaf, loss, 1.0).values()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-7)
