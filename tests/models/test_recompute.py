"""Tensors made again in backward: the same gradients, less kept, nothing leaked."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fourbit
from fourbit.data.batch import Encoded, Example, pack
from fourbit.models.recompute import recomputed
from fourbit.trainer.losses.tokens import batch_token_scores


def run(active: bool, calls: list[int]) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 4).requires_grad_()

    def step(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp() + 1

    y = step(x)
    with recomputed(y, step, x, active=active):
        # saved whole, as a view of another shape, twice, in part (rows, a column), and in another order
        out = (y.square() * y.view(4, 3).sin().view(3, 4)).sum() + y[1:].cos().sum() + y[:, 1].exp().sum()
        out = out + y.T.tanh().sum()
    return x, out


def test_gradients_to_the_bit() -> None:
    calls: list[int] = []
    x, plain = run(False, calls)
    expected = torch.autograd.grad(plain, x)[0]
    assert len(calls) == 1
    x, lean = run(True, calls)
    assert len(calls) == 2
    assert torch.equal(torch.autograd.grad(lean, x)[0], expected)
    assert len(calls) == 3  # once in backward, however often it was saved


@pytest.mark.parametrize("active", [False, True])
def test_only_the_inputs_are_kept(alive: Any, active: bool) -> None:
    x = torch.randn(1000, requires_grad=True)
    with alive() as made:
        y = x * 2
        with recomputed(y, lambda x: x * 2, x, active=active):
            z = y.square()
        del y
    assert made.bytes() == (4000 if active else 8000)  # z, and without the recipe y
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], 8 * x)


def test_other_saved_tensors_do_not_keep_themselves_alive(alive: Any) -> None:
    x = torch.randn(1000, requires_grad=True)
    with alive() as made, recomputed(x, lambda x: x, x):
        y = x.sin().exp().tanh()
    del y
    assert made.bytes() == 0


def test_chunks_of_a_value_are_made_again_too(alive: Any) -> None:
    x = torch.randn(1000, requires_grad=True)
    with alive() as made:
        y = x * 2
        with recomputed(y, lambda x: x * 2, x):
            z = torch.cat([part.square() for part in y.split(300)])
        del y
    assert made.bytes() == 4000
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], 8 * x)


def test_a_value_in_another_order_is_kept(alive: Any) -> None:
    x = torch.randn(30, 40, requires_grad=True)
    step = lambda x: x.T * 2
    y = step(x)
    with recomputed(y, step, x):
        z = y.T.square() + y.T.exp()
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], 8 * x + 2 * (2 * x).exp())


@pytest.mark.parametrize("keep", ["all", "products", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_leaves_no_tensor_to_the_garbage_collector(tiny_folder: Path, dtype: torch.dtype, keep: str) -> None:
    """What lies in a cycle of references stays for hundreds of steps: the collector counts objects, not bytes."""
    model, _ = fourbit.load(tiny_folder, quant_type="nf4", dtype=dtype)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2), seed=0)
    model.train().checkpointing = keep

    def step() -> None:
        texts = [Encoded(list(range(1, n)), [True] * (n - 1), "", "") for n in (9, 5, 30)]
        batch = pack([(i, Example((text,))) for i, text in enumerate(texts)])
        batch_token_scores(model, batch).logps.sum().backward()

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        before = sum(issubclass(type(each), Tensor) for each in gc.get_objects())
        gc.collect()
        assert sum(issubclass(type(each), Tensor) for each in gc.get_objects()) == before
    finally:
        gc.enable()
