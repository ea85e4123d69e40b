"""Ops with a backward of their own, called where nothing is to be differentiated, under transforms and a compiler."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fourbit.kernels import attention, rms_norm, rope, swiglu
from fourbit.kernels.derivatives import run

X = torch.linspace(-2, 2, 2 * 3 * 4 * 8).view(2, 3, 4, 8)
SIDE = torch.linspace(0, 1, 3 * 4)[None, :, None].expand(2, 12, 1)[:, :3, :, None].expand(2, 3, 1, 4)
HOW = attention.Scores()
BIAS = torch.zeros(2, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
OPS: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu.swiglu,
    "geglu": swiglu.geglu,
    "rms_norm": lambda x, y: rms_norm.rms_norm(x, y[0, 0, 0], 1e-5),
    "rope": lambda x, y: rope.rope(x, SIDE.cos(), SIDE.sin()) + y,
    "attention": lambda x, y: run(attention._Written, attention._written, x, y, x - y, BIAS, HOW),
}


class Counted(torch.autograd.Function):
    """2 x, which says by what way it was called."""

    ways: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Counted.ways.append(type(ctx).__name__)
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        return 3 * g[0]  # not the plain one's


def twice(x: Tensor) -> Tensor:
    Counted.ways.append("plain")
    return 2 * x


def test_autograd_is_asked_only_where_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "ways", [])
    x = torch.ones(3, requires_grad=True)
    y = run(Counted, twice, x)
    y.sum().backward()
    assert Counted.ways == ["CountedBackward"] and x.grad is not None and x.grad.tolist() == [3, 3, 3]
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = run(Counted, twice, x)
        assert not y.requires_grad and y.is_inference() == (off is torch.inference_mode) and y.tolist() == [2, 2, 2]
    assert Counted.ways[1:] == ["SimpleNamespace"] * 2
    with torch.no_grad():  # a transform differentiates inside all the same
        assert torch.func.grad(lambda x: run(Counted, twice, x).sum())(x.detach()).tolist() == [2, 2, 2]
        assert torch.func.vmap(lambda x: run(Counted, twice, x))(x.detach()).tolist() == [2, 2, 2]
    assert Counted.ways[3:] == ["plain"] * 2


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_the_same_with_gradients_and_without(name: str) -> None:
    """Bit for bit, of tensors that want gradients or not; what is made under no_grad can be trained on."""
    op, a, b = OPS[name], X.clone().requires_grad_(), X.flip(0).clone().requires_grad_()
    wanted = op(a, b)
    assert wanted.requires_grad and wanted.grad_fn is not None
    for off in (torch.no_grad, torch.inference_mode):
        for x, y in ((a, b), (a.detach(), b.detach())):
            with off():
                made = op(x, y)
            assert torch.equal(made, wanted) and not made.requires_grad and made.grad_fn is None
    with torch.no_grad():
        made = op(a, b)
    (made * a).sum().backward()
    assert a.grad is not None and torch.equal(a.grad, wanted.detach())
    assert torch.equal(a.detach(), X), "an input is not written over"
