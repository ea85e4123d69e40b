"""Chunked log-probabilities, entropy and correctness against full logits: values and every gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit.kernels.chunked_head import (
    TokenScorer,
    TokenScores,
    dense_figures,
    rows_per_chunk,
)

FIGURES = ("logps", "entropy", "correct")


def linear_logprobs(hidden, weight, targets, *, chunk_rows=None):
    rows = chunk_rows or rows_per_chunk(len(weight), weight.device)
    return TokenScores(*dense_figures(hidden, weight, TokenScorer(targets, len(weight)), rows))


def linear_logprobs_reference(hidden, weight, targets):
    """Through full logits, by torch's own log-softmax."""
    return TokenScores(*TokenScorer(targets, len(weight)).plain(hidden @ weight.T))


def run(function, hidden, weight, targets, scale, *, train_head):
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(train_head)
    scores = function(hidden, weight, targets)
    (scores.logps * scale).sum().backward()
    figures = {name: figure.detach() for name, figure in scores._asdict().items()}
    return figures | {"dhidden": hidden.grad, "dweight": weight.grad}


@given(
    rows=st.integers(0, 40),
    vocabulary=st.sampled_from([1, 2, 63, 257]),
    width=st.integers(1, 17),
    chunk_rows=st.sampled_from([1, 3, 16, 1000]),
    train_head=st.booleans(),
    magnitude=st.sampled_from([0.0, 1.0, 1e4]),  # 0: all logits are equal
    seed=st.integers(0, 2**31),
)
def test_matches_full_logits(rows, vocabulary, width, chunk_rows, train_head, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64) * magnitude
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    scale = torch.randn(rows, generator=generator, dtype=torch.float64)
    chunked = partial(linear_logprobs, chunk_rows=chunk_rows)
    got = run(chunked, hidden, weight, targets, scale, train_head=train_head)
    want = run(linear_logprobs_reference, hidden, weight, targets, scale, train_head=train_head)
    assert torch.equal(got.pop("correct"), want.pop("correct"))
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        # float64 rounding of sums of at most 257 terms of this size, with room for their order
        bound = 1e-12 * (1 + float(value.abs().max()) if value.numel() else 1) * max(magnitude, 1)
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["random", "within ±1e4", "equal", "one far ahead", "banned"])
@pytest.mark.parametrize("vocabulary", [1000, 151_936])
def test_softmax_in_fp32(kind, vocabulary):
    """For given fp32 logits every figure is within 1e-6, relative and below 1 nat absolute, of what float64 makes."""
    torch.manual_seed(0)
    logits = torch.randn(6, vocabulary) * 3
    if kind == "within ±1e4":
        logits = torch.rand(6, vocabulary) * 2e4 - 1e4
    if kind == "equal":
        logits = torch.full((6, vocabulary), 7.0)
    if kind == "one far ahead":
        logits[:, 17] = 1e4
    if kind == "banned":
        logits[:, ::3] = -torch.inf
    targets = torch.tensor([17, 1, 2, vocabulary - 1, 17, 500])
    log_p = torch.log_softmax(logits.double(), 1)
    p = log_p.exp()
    dlogits = F.one_hot(targets, vocabulary) - p
    logps, entropy, correct = TokenScorer(targets, vocabulary)(logits, slice(0, 6), True)
    want = log_p.gather(1, targets[:, None]).squeeze(1)
    if kind == "banned":  # the targets that are
        assert torch.equal(want == -torch.inf, logps < -1e38)
        want, logps = want[want > -torch.inf], logps[want > -torch.inf]
    assert (logps - want).abs().le(1e-6 * want.abs().clamp(min=1)).all()
    want = torch.special.entr(p).sum(1)
    assert (entropy - want).abs().le(1e-6 * want.clamp(min=1)).all()
    assert torch.equal(correct, log_p.gather(1, targets[:, None]).squeeze(1) == log_p.amax(1))
    z = (log_p - log_p.amax(1, keepdim=True)).clamp(min=-200)  # fp32 rounds it, by 2^-24 of its size, before exp
    assert (logits - dlogits).abs().le(p * (8 + z.abs()) * 2**-24 + 2**-23 * dlogits.abs() + 2**-126).all()


@pytest.mark.parametrize(("vocabulary", "rows"), [(1000, 300), (151_936, 9)])
def test_fp32_against_float64(vocabulary, rows):
    """Products included: the bound is 1e-6 relative, above the rounding of dot products of 64 terms."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 64), torch.randn(vocabulary, 64) * 0.125
    targets = torch.randint(vocabulary, (rows,))
    want = linear_logprobs_reference(hidden.double(), weight.double(), targets)
    got = linear_logprobs(hidden, weight, targets, chunk_rows=7)
    for name in ("logps", "entropy"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("magnitude", [0.0, 1.0])  # 0: uniform, where a token's share of 70,000 is least
def test_16_bits(dtype, train_head, magnitude):
    """fp32 softmax of 16-bit logits; gradients are products of 16-bit gradients of logits, rounded once more."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 32, dtype=dtype) * magnitude, torch.randn(70_000, 32, dtype=dtype) * 0.3
    targets, scale = torch.randint(70_000, (20,)), torch.rand(20) / 300
    logits = (hidden @ weight.T).double().requires_grad_()
    log_p = torch.log_softmax(logits, 1)
    logps = log_p.gather(1, targets[:, None]).squeeze(1)
    (dlogits,) = torch.autograd.grad(logps.sum(), logits)
    got = run(partial(linear_logprobs, chunk_rows=8), hidden, weight, targets, scale, train_head=train_head)
    torch.testing.assert_close(got["logps"].double(), logps.detach(), rtol=1e-6, atol=1e-6)
    dlogits = dlogits * scale[:, None]
    # Each 16-bit rounding is relative, 3 of them meet; fp16 also loses what is below 2^-25 to its smallest number.
    unit, least = torch.finfo(dtype).eps, 2**-25 if dtype == torch.float16 else 0.0
    bound = (dlogits.abs() * 2 * unit + least * scale[:, None]) @ weight.double().abs() + least
    assert (got["dhidden"].double() - dlogits @ weight.double()).abs().le(bound).all()
    if train_head:
        want = dlogits.T @ hidden.double()
        bound = (dlogits.abs() * 4 * unit + least * scale[:, None]).T @ hidden.double().abs() + 3 * least  # 3 chunks
        assert (got["dweight"].double() - want).abs().le(bound).all()


def test_rows_do_not_see_each_other():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 16), torch.randn(50, 16), torch.randint(50, (6,))
    before = linear_logprobs(hidden, weight, targets)
    hidden[3] += 1
    after = linear_logprobs(hidden, weight, targets)
    others = torch.arange(6) != 3
    for name in FIGURES:
        assert torch.equal(getattr(before, name)[others], getattr(after, name)[others])
    assert before.logps[3] != after.logps[3] and before.entropy[3] != after.entropy[3]


def test_ties_are_correct_and_nan_is_not():
    """The last target is the least that fp32 can tell from the likeliest token."""
    hidden = torch.tensor([[1.0], [1.0], [torch.nan], [1 + 2**-23]])
    scores = linear_logprobs(hidden, torch.tensor([[1.0], [2.0], [2.0], [2 - 2**-23]]), torch.tensor([2, 0, 1, 3]))
    assert scores.correct.tolist() == [True, False, False, False]
    assert scores.logps.isnan().tolist() == scores.entropy.isnan().tolist() == [False, False, True, False]


def test_only_log_probabilities_carry_a_gradient():
    scores = linear_logprobs(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.zeros(3).long())
    assert [getattr(scores, name).requires_grad for name in FIGURES] == [True, False, False]


def test_frozen_head_saves_no_logits():
    sizes = []

    def pack(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear_logprobs(torch.randn(12, 4, requires_grad=True), torch.randn(300, 4), torch.zeros(12).long())
    assert sizes == [(12, 4)]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("train_hidden", "train_head", "gradients", "products"),
    [
        (True, False, True, 2),
        (False, False, True, 1),
        (True, True, True, 4),
        (False, True, True, 3),
        (True, True, False, 1),
    ],
)
def test_products_of_a_chunk(train_hidden, train_head, gradients, products):
    """Logits and dX with a frozen head; logits, and again in backward with dX and dW, with a trained one."""
    hidden = torch.randn(12, 4, requires_grad=train_hidden)
    weight = torch.randn(30, 4, requires_grad=train_head)
    with Products() as seen, torch.set_grad_enabled(gradients):
        logps = linear_logprobs(hidden, weight, torch.zeros(12).long(), chunk_rows=4).logps
        if logps.requires_grad:
            logps.sum().backward()
    assert seen.count == 3 * products


@pytest.mark.parametrize("train_head", [False, True])
def test_nothing_is_read_on_the_host(train_head):
    """Meta tensors have no values: any look at one would raise."""
    hidden = torch.empty(12, 4, device="meta", requires_grad=True)
    weight = torch.empty(30, 4, device="meta", requires_grad=train_head)
    scores = linear_logprobs(hidden, weight, torch.empty(12, dtype=torch.int64, device="meta"), chunk_rows=5)
    scores.logps.sum().backward()
    assert hidden.grad.shape == (12, 4) and scores.correct.shape == (12,)


@pytest.mark.parametrize("wrong", [-100, -1, 7])
def test_rejects_targets_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"targets must be in 0\.\.6, .* got {wrong};"):
        linear_logprobs(torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, wrong, 6]))


def test_rejects_targets_of_another_type():
    with pytest.raises(ValueError, match=r"targets must be int64, got torch\.int32"):
        linear_logprobs(torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.int32))
