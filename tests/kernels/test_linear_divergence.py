"""Divergences between teacher and student in chunks against full logits, torch's kl_div and TRL's GKD."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fourbit.kernels.chunked_head import dense_figures
from fourbit.kernels.linear_divergence import KINDS, Divergence, DivergenceScorer, divergence

SETTINGS = {
    "forward": {"kind": "forward-kl"},
    "reverse": {"kind": "reverse-kl"},
    "jsd": {"kind": "jsd"},
    "jsd 0.1": {"kind": "jsd", "beta": 0.1},
    "forward warm": {"kind": "forward-kl", "temperature": 2.5},
    "reverse cool": {"kind": "reverse-kl", "temperature": 0.5},
    "jsd warm": {"kind": "jsd", "temperature": 2.5, "beta": 0.9},
    "forward top 1": {"kind": "forward-kl", "top_k": 1},
    "forward top 3": {"kind": "forward-kl", "top_k": 3},
    "reverse top 3": {"kind": "reverse-kl", "top_k": 3, "temperature": 2.5},
    "jsd top 2": {"kind": "jsd", "top_k": 2},
}


def problem(rows, vocabulary, width=5, their_width=7, dtype=torch.float64, magnitude=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, width), (vocabulary, width), (rows, their_width), (vocabulary, their_width)]
    hidden, weight, theirs, their_weight = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return hidden * magnitude, weight, theirs * magnitude, their_weight


def linear_divergence(hidden, weight, teacher_hidden, teacher_weight, *, chunk_rows=64, **settings):
    wanted = Divergence(**settings)
    wanted.check(len(weight))
    scorer = DivergenceScorer(lambda part: teacher_hidden[part] @ teacher_weight.T, wanted)
    return dense_figures(hidden, weight, scorer, chunk_rows)[0]


def linear_divergence_reference(hidden, weight, teacher_hidden, teacher_weight, **settings):
    teacher = (teacher_hidden @ teacher_weight.T).detach()
    return divergence(hidden @ weight.T, teacher, Divergence(**settings))


def run(function, tensors, scale, *, train_head, **settings):
    hidden, weight, *teacher = (tensor.clone() for tensor in tensors)
    hidden.requires_grad_(), weight.requires_grad_(train_head)
    for tensor in teacher:
        tensor.requires_grad_()  # and nothing may reach them
    values = function(hidden, weight, *teacher, **settings)
    (values * scale).sum().backward()
    assert all(tensor.grad is None for tensor in teacher)
    return {"values": values.detach(), "dhidden": hidden.grad, "dweight": weight.grad}


@pytest.mark.parametrize("name", SETTINGS)
@given(
    rows=st.integers(0, 20),
    vocabulary=st.sampled_from([3, 64, 257]),
    rows_per_chunk=st.sampled_from([1, 3, 16, 1000]),
    train_head=st.booleans(),
    magnitude=st.sampled_from([0.0, 1.0, 30.0]),  # 0: all logits are equal
    seed=st.integers(0, 2**31),
)
def test_matches_full_logits(name, rows, vocabulary, rows_per_chunk, train_head, magnitude, seed):
    tensors = problem(rows, vocabulary, magnitude=magnitude, seed=seed)
    if SETTINGS[name].get("top_k") and magnitude == 0:
        return  # which of equally likely tokens are the likeliest is not defined
    scale = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    chunked = partial(linear_divergence, chunk_rows=rows_per_chunk)
    got = run(chunked, tensors, scale, train_head=train_head, **SETTINGS[name])
    want = run(linear_divergence_reference, tensors, scale, train_head=train_head, **SETTINGS[name])
    for figure, value in want.items():
        if value is None:
            assert got[figure] is None, figure
            continue
        # Logits reach 30 * 10 * 5: their float64 rounding, over the divergence's size, with room for sums' order.
        bound = 1e-12 * (1 + float(value.abs().max()) if value.numel() else 1) * max(magnitude, 1)
        torch.testing.assert_close(got[figure], value, rtol=1e-10, atol=bound, msg=lambda m, n=figure: f"{n}: {m}")


def test_is_torch_s_kl_div():
    hidden, weight, theirs, their_weight = problem(9, 50)
    log_q, log_p = F.log_softmax(hidden @ weight.T, 1), F.log_softmax(theirs @ their_weight.T, 1)
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    for kind, want in (("forward-kl", forward), ("reverse-kl", reverse)):
        got = linear_divergence(hidden, weight, theirs, their_weight, kind=kind)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_is_trl_s_gkd_loss(beta, temperature, dtype, limit):
    """Values and gradients; TRL's beta of 0 and 1 are forward and reverse KL. fp32: its own rounding of log m."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its imports warn about is not ours to mend
        from trl.experimental.gkd import GKDTrainer
    hidden, weight, theirs, their_weight = problem(12, 300, dtype=dtype)
    hidden.requires_grad_()
    student, teacher = (hidden @ weight.T)[None], (theirs @ their_weight.T)[None]
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, temperature=temperature, reduction="sum")
    (want,) = torch.autograd.grad(loss, hidden)
    kind = {0.0: "forward-kl", 1.0: "reverse-kl"}.get(beta, "jsd")
    ours = linear_divergence(
        hidden, weight, theirs, their_weight, kind=kind, temperature=temperature, beta=beta, chunk_rows=5
    ).sum()
    (got,) = torch.autograd.grad(ours, hidden)
    assert abs(ours.item() - loss.item()) <= limit * abs(loss.item())
    assert (got - want).norm() <= limit * want.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 151_936])
@pytest.mark.parametrize("case", ["random", "within ±1e4", "equal", "banned by both"])
def test_softmax_in_fp32(kind, vocabulary, case):
    """Of given fp32 logits: within 1e-6 of float64's value, plus the rounding of the log-probabilities it weighs."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, vocabulary) * 3
    if case == "within ±1e4":
        student, teacher = torch.rand(2, 6, vocabulary) * 2e4 - 1e4
    if case == "equal":
        student, teacher = torch.full((2, 6, vocabulary), 7.0)
    if case == "banned by both":
        student[:, ::3] = teacher[:, ::3] = -torch.inf
    kept = torch.arange(vocabulary) % 3 != 0 if case == "banned by both" else slice(None)
    sides = [logits[:, kept].T.double().contiguous() for logits in (student, teacher)]
    rows = torch.eye(6, dtype=torch.float64)
    want = linear_divergence_reference(rows, sides[0], rows, sides[1], kind=kind)
    dlogits = student.clone()
    (got,) = DivergenceScorer(lambda part: teacher[part], Divergence(kind))(dlogits, slice(0, 6), True)
    log_q, log_p = (torch.log_softmax(side.T, 1) for side in sides)
    weighed = {"forward-kl": log_p.exp(), "reverse-kl": log_q.exp(), "jsd": log_p.exp() + log_q.exp()}[kind]
    others = torch.maximum(log_p, log_q) if kind == "jsd" else torch.minimum(log_p, log_q)
    rounding = 2**-23 * (weighed * others.abs()).sum(1)  # 16 nats for 151,936 equal tokens: 2e-6
    assert (got - want).abs().le(1e-6 * want.abs() + rounding).all()
    dlogits = dlogits.double()
    assert dlogits.isfinite().all()
    # A softmax's gradient sums to 0.
    assert dlogits.sum(1).abs().le(1e-6 * dlogits.abs().sum(1) + 2 * rounding + 2**-23).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_agreeing_with_the_teacher_costs_nothing(kind, top_k):
    hidden, weight, *_ = problem(6, 30)
    hidden.requires_grad_()
    values = linear_divergence(hidden, weight, hidden.detach(), weight, kind=kind, top_k=top_k)
    assert values.abs().max() < 1e-15
    values.sum().backward()
    assert hidden.grad.abs().max() < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_as_top_k_are_all_tokens(kind):
    tensors, scale = problem(6, 30), torch.ones(6, dtype=torch.float64)
    every = run(linear_divergence, tensors, scale, train_head=True, kind=kind, top_k=30)
    plain = run(linear_divergence, tensors, scale, train_head=True, kind=kind)
    for name, value in plain.items():
        torch.testing.assert_close(every[name], value, rtol=1e-12, atol=1e-14)


def test_top_k_renormalises_both_sides():
    """By hand: the teacher's two likeliest tokens at 3 to 1, the student's at 1 to 1; the third does not matter."""
    student = torch.tensor([[0.0], [0.0], [5.0]]).double()
    teacher = torch.tensor([[math.log(3)], [0.0], [-1.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    got = linear_divergence(one, student, one, teacher, kind="forward-kl", top_k=2)
    assert got.item() == pytest.approx(0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5), rel=1e-14)


def test_temperature_does_not_scale_the_value():
    """The divergence of the flattened distributions, bounded by ln 2 for the JSD at any temperature; no T^2."""
    tensors = problem(20, 50, magnitude=50.0)
    for temperature in (1.0, 5.0):
        values = linear_divergence(*tensors, kind="jsd", temperature=temperature)
        assert values.max() <= math.log(2) + 1e-12
    flat = [tensors[0] / 5, tensors[1], tensors[2] / 5, tensors[3]]
    torch.testing.assert_close(linear_divergence(*flat, kind="jsd"), values, rtol=1e-10, atol=1e-12)


def test_what_the_student_rules_out_is_infinitely_far():
    student, teacher = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    for kind, want in (("forward-kl", math.inf), ("reverse-kl", math.log(2))):
        (got,) = DivergenceScorer(lambda part: teacher[part], Divergence(kind))(student.clone(), slice(0, 1), True)
        assert got.item() == pytest.approx(want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    """fp32 divergence of 16-bit logits; dX: gradients of logits rounded to 16 bits, and their product rounded again."""
    hidden, weight, theirs, their_weight = (t.to(dtype) for t in problem(10, 500, dtype=torch.float32))
    logits, teacher = (hidden @ weight.T).double().requires_grad_(), (theirs @ their_weight.T).double()
    log_q, log_p = torch.log_softmax(logits, 1), torch.log_softmax(teacher, 1)
    want = (log_p.exp() * (log_p - log_q)).sum(1)
    (dlogits,) = torch.autograd.grad(want.sum(), logits)
    got = run(linear_divergence, (hidden, weight, theirs, their_weight), 1.0, train_head=False, kind="forward-kl")
    torch.testing.assert_close(got["values"].double(), want.detach(), rtol=1e-6, atol=1e-6)
    unit, least = torch.finfo(dtype).eps, 2**-25 if dtype == torch.float16 else 0.0
    bound = (dlogits.abs() * 2 * unit + least) @ weight.double().abs() + least
    assert (got["dhidden"].double() - dlogits @ weight.double()).abs().le(bound).all()


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_is_read_on_the_host(name, train_head):
    """Meta tensors have no values: any look at one would raise."""
    tensors = [torch.empty(*t.shape, device="meta") for t in problem(12, 30)]
    tensors[0].requires_grad_(), tensors[1].requires_grad_(train_head)
    linear_divergence(*tensors, chunk_rows=5, **SETTINGS[name]).sum().backward()
    assert tensors[0].grad.shape == (12, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kl"}, "kind must be one of forward-kl, reverse-kl, jsd, got 'kl'"),
        ({"kind": "jsd", "temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"kind": "jsd", "temperature": math.nan}, "temperature must be above 0 and finite, got nan"),
        ({"kind": "jsd", "top_k": 8}, r"top_k must be in 1\.\.7, .* got 8"),
        ({"kind": "jsd", "top_k": 0}, r"top_k must be in 1\.\.7, .* got 0"),
        ({"kind": "jsd", "beta": 1.0}, r"beta of jsd must lie between 0 and 1, got 1\.0; its ends are forward-kl"),
    ],
)
def test_refuses_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(*problem(3, 7), **settings)
