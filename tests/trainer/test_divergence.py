"""Divergences for heads of every kind, on both sides, against full logits."""

import pytest
import torch
from torch import nn

from fourbit.kernels import chunked_head
from fourbit.kernels.linear_divergence import Divergence, DivergenceScorer
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA
from fourbit.trainer.losses.tokens import token_divergence

V, N = 61, 11


def head_of(kind: str, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    head: nn.Module = nn.Linear(width, V, bias="bias" in kind).requires_grad_("trained" in kind)
    if "nf4" in kind:
        head = NF4Linear.from_weight(head.weight.detach(), head.bias)
    if "lora" in kind:
        head = AdapterLayer(head, default=LoRA(head, 3, 6.0))
        nn.init.normal_(head.adapters["default"].lora_B)
    return head.double()


def reference(head, hidden, teacher_head, teacher_hidden, temperature=1.0):
    log_q = torch.log_softmax(head(hidden) / temperature, 1)
    log_p = torch.log_softmax(teacher_head(teacher_hidden).detach() / temperature, 1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


@pytest.mark.parametrize("student", ["dense", "dense trained", "dense bias trained", "nf4", "lora", "lora nf4 bias"])
@pytest.mark.parametrize("teacher", ["dense", "nf4 bias", "lora nf4"])
@pytest.mark.parametrize("rows", [4, 100])
def test_equals_full_logits(student, teacher, rows, monkeypatch):
    monkeypatch.setattr(chunked_head, "CHUNK_BYTES", 2 * 4 * V * rows)
    head, teacher_head = head_of(student, 16, 0), head_of(teacher, 24, 1)
    hidden = torch.randn(N, 16, dtype=torch.float64, requires_grad=True)
    teacher_hidden = torch.randn(N, 24, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(N, dtype=torch.float64)
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    want = reference(head, hidden, teacher_head, teacher_hidden, 2.0)
    got = token_divergence(head, hidden, teacher_head, teacher_hidden, *Divergence("reverse-kl", 2.0))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    wanted = torch.autograd.grad((want * scale).sum(), inputs)
    for value, ours in zip(wanted, torch.autograd.grad((got * scale).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, value, rtol=1e-10, atol=1e-12)
    got = token_divergence(head, hidden, teacher_head, teacher_hidden, *Divergence("reverse-kl", 2.0))
    (got * scale).sum().backward()
    assert teacher_hidden.grad is None and all(p.grad is None for p in teacher_head.parameters())


@pytest.mark.parametrize("settings", [{"kind": "forward-kl", "top_k": 5}, {"kind": "jsd", "beta": 0.2}])
def test_is_the_op_on_tensors(settings):
    head, teacher_head = head_of("dense", 16, 0), head_of("dense", 24, 1)
    hidden, teacher_hidden = torch.randn(N, 16, dtype=torch.float64), torch.randn(N, 24, dtype=torch.float64)
    scorer = DivergenceScorer(lambda rows: teacher_hidden[rows] @ teacher_head.weight.T, Divergence(**settings))
    (want,) = chunked_head.dense_figures(hidden, head.weight, scorer, 4)
    got = token_divergence(head, hidden, teacher_head, teacher_hidden, *Divergence(**settings))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_one_head_may_serve_both_sides():
    """A base with and without its adapter's trunk: same head, other hidden states."""
    head = head_of("lora nf4", 16, 0)
    hidden = torch.randn(N, 16, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(N, 16, dtype=torch.float64)
    got = token_divergence(head, hidden, head, teacher, *Divergence("reverse-kl"))
    torch.testing.assert_close(got, reference(head, hidden, head, teacher))


def test_no_rows():
    for kind in ("dense", "nf4", "lora"):
        hidden = torch.randn(0, 16, dtype=torch.float64, requires_grad=True)
        values = token_divergence(
            head_of(kind, 16, 0), hidden, head_of("nf4", 16, 1), hidden.detach(), *Divergence("jsd")
        )
        values.sum().backward()
        assert values.shape == (0,) and hidden.grad.shape == (0, 16)


def test_refusals():
    head, hidden = head_of("dense", 16, 0), torch.randn(N, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="share one vocabulary, got 61 and 60 tokens"):
        token_divergence(head, hidden, nn.Linear(16, 60).double(), hidden, *Divergence("forward-kl", top_k=5))
    with pytest.raises(ValueError, match=r"got \(11, 16\) and \(10, 16\)"):
        token_divergence(head, hidden, head, hidden[1:], *Divergence("jsd"))
    with pytest.raises(ValueError, match="kind must be one of"):
        token_divergence(head, hidden, head, hidden, *Divergence("tv"))
    with pytest.raises(ValueError, match=r"top_k must be in 1\.\.61"):
        token_divergence(head, hidden, head, hidden, *Divergence("jsd", top_k=62))
