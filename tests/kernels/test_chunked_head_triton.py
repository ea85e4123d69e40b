"""The loss's kernel: figures and the gradient over the logits, against float64."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.kernels.chunked_head import TokenScorer
from fourbit.kernels.dispatch import force_path

chunked_head_triton = pytest.importorskip("fourbit.kernels.chunked_head_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def score(logits: Tensor, targets: Tensor, gradient: bool = True) -> tuple[Tensor, ...]:
    with force_path("triton"):
        return TokenScorer(targets, logits.shape[1])(logits, slice(0, len(logits)), gradient)


def _llama() -> None:
    logits = torch.empty(64, 128256, dtype=torch.bfloat16, device="meta")
    score(logits, torch.empty(64, dtype=torch.int64, device="meta"))


SCENARIOS = {"llama": _llama}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "far apart", "equal", "one far ahead", "banned"])
@pytest.mark.parametrize("vocabulary", [1, 63, 257])
def test_figures_and_gradient(
    guards: Any, vocabulary: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of given logits, in blocks of 64 columns: figures within 1e-6 of float64's, relative and below one nat absolute;
    the gradient within the rounding of exponent and quotient, and one to the logits' dtype."""
    monkeypatch.setattr(chunked_head_triton, "BLOCK", 64)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(5, vocabulary, generator=generator) * (1e4 if kind == "far apart" else 3)
    if kind == "equal":
        logits.fill_(7.0)
    if kind == "one far ahead":
        logits[:, vocabulary // 2] = 1e4
    if kind == "banned":
        logits[:, 1::3] = -torch.inf
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2, vocabulary // 3 * 3 % vocabulary, 0]).to(DEVICE)
    targets -= (targets % 3 == 1).long() * (kind == "banned")
    targets = targets.repeat_interleave(2)[::2]  # as a column of a wider tensor lies
    logits = guards.around(logits.to(DEVICE, dtype))
    log_p = torch.log_softmax(logits.double(), 1)
    p, want = log_p.exp(), log_p.gather(1, targets[:, None]).squeeze(1)
    before = logits.clone()
    figures = score(logits, targets, gradient=False)
    assert torch.equal(before, logits)  # nobody asked for the gradient
    again = score(logits, targets)
    guards.check()
    assert all(torch.equal(a, b) for a, b in zip(figures, again, strict=True))
    logps, entropy, correct = again
    assert logps.dtype == entropy.dtype == torch.float32
    assert (logps - want).abs().le(1e-6 * want.abs().clamp(min=1)).all()
    exact = torch.special.entr(p).sum(1)
    assert (entropy - exact).abs().le(1e-6 * exact.clamp(min=1)).all()
    assert torch.equal(correct, before.gather(1, targets[:, None]).squeeze(1) == before.amax(1))
    slope = torch.zeros_like(p).scatter_(1, targets[:, None], 1.0) - p
    z = (log_p - log_p.amax(1, keepdim=True)).clamp(min=-200)
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = p * (16 + 2 * z.abs()) * 2**-24 + (unit + 2**-23) * slope.abs() + least
    assert (logits - slope).abs().le(bound).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, of inf - inf
def test_rows_of_a_wider_tensor_and_a_bad_number(guards: Any) -> None:
    """Columns beside the logits stay; a NaN or an infinity spoils its own row, whose target is not the likeliest."""
    store = guards.around(torch.randn(4, 80, device=DEVICE))
    logits = store[:, :70]
    logits[1, 3], logits[2, 5] = torch.nan, torch.inf
    targets, beside, plain = torch.tensor([0, 1, 5, 69], device=DEVICE), store[:, 70:].clone(), logits.clone()
    figures = score(logits, targets)
    want = TokenScorer(targets, 70).plain(plain.double())
    assert torch.equal(store[:, 70:], beside)
    for row in (0, 3):
        for got, exact in zip(figures[:2], want[:2], strict=True):
            torch.testing.assert_close(got[row].double(), exact[row], rtol=1e-6, atol=1e-6)
    for row in (1, 2):
        assert figures[0][row].isnan() and figures[1][row].isnan() and not figures[2][row], row


def test_the_loss_of_a_frozen_head_takes_it_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through hidden states: a chunk of logits is never widened, and the gradient is the plain path's."""
    from fourbit.trainer.losses.tokens import token_scores

    seen, kernel = list[torch.dtype](), chunked_head_triton.token_scores
    monkeypatch.setattr(
        chunked_head_triton, "token_scores", lambda logits, *rest: seen.append(logits.dtype) or kernel(logits, *rest)
    )
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).to(DEVICE, torch.bfloat16) for n in (9, 300))
    targets, gradients = torch.arange(9, device=DEVICE), []
    for path in ("triton", "reference"):
        leaf = hidden.clone().requires_grad_()
        with force_path(path):
            token_scores(weight, leaf, targets).logps.sum().backward()
        gradients.append(leaf.grad.double())
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=2**-6)


def test_no_kernel_spills(aot: ModuleType, costs: list[Any]) -> None:
    assert {cost.kernel for cost in costs} == {"token_scores_kernel"}
    aot.assert_no_spills(costs)
