"""The chunked head and loss against full logits: values and every gradient, with the head frozen and trained."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.kernels import linear_cross_entropy as lce


def run(function, hidden, weight, targets, scale, *, train_head):
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(train_head)
    losses = function(hidden, weight, targets)
    (losses * scale).sum().backward()
    return {"losses": losses.detach(), "dhidden": hidden.grad, "dweight": weight.grad}


@given(
    rows=st.integers(0, 40),
    vocabulary=st.sampled_from([1, 2, 63, 257]),
    width=st.integers(1, 17),
    rows_per_chunk=st.sampled_from([1, 3, 16, 1000]),
    train_head=st.booleans(),
    magnitude=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_matches_full_logits(rows, vocabulary, width, rows_per_chunk, train_head, magnitude, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64) * magnitude
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    scale = torch.randn(rows, generator=generator, dtype=torch.float64)
    chunked = partial(lce.linear_cross_entropy, chunk_rows=rows_per_chunk)
    got = run(chunked, hidden, weight, targets, scale, train_head=train_head)
    want = run(lce.linear_cross_entropy_reference, hidden, weight, targets, scale, train_head=train_head)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
            continue
        # float64 rounding of sums of at most 257 terms of this size, with room for their order
        bound = 1e-12 * (1 + float(value.abs().max()) if value.numel() else 1) * magnitude
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("train_head", [False, True])
def test_gradcheck(train_head):
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=train_head)
    targets = torch.randint(7, (5,))
    assert torch.autograd.gradcheck(lambda h, w: lce.linear_cross_entropy(h, w, targets), (hidden, weight))


def test_large_vocabulary_in_fp32():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 8), torch.randn(151_000, 8), torch.randint(151_000, (9,))
    want = lce.linear_cross_entropy_reference(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(lce.linear_cross_entropy(hidden, weight, targets).double(), want, rtol=1e-6, atol=1e-6)


def test_rows_do_not_see_each_other():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 16), torch.randn(50, 16), torch.randint(50, (6,))
    before = lce.linear_cross_entropy(hidden, weight, targets)
    hidden[3] += 1
    after = lce.linear_cross_entropy(hidden, weight, targets)
    others = torch.arange(6) != 3
    assert torch.equal(before[others], after[others]) and before[3] != after[3]


def test_frozen_head_saves_no_logits():
    sizes = []

    def pack(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lce.linear_cross_entropy(torch.randn(12, 4, requires_grad=True), torch.randn(300, 4), torch.zeros(12).long())
    assert sizes == [(12, 4)]


def test_rejects_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(3, 4\), \(7, 5\) and \(3,\)"):
        lce.linear_cross_entropy(torch.zeros(3, 4), torch.zeros(7, 5), torch.zeros(3).long())
