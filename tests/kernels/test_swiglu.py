"""swiglu and geglu against their definitions: values, gradients, what they keep."""

import pytest
import torch

from fourbit.kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference

OPS = {"silu": (swiglu, swiglu_reference), "gelu": (geglu, geglu_reference)}


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple((torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype) for _ in range(2))


@pytest.mark.parametrize("shape", [(1,), (63,), (2, 65), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OPS)
def test_equals_the_definition_to_the_bit(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = sample(shape, dtype)
    op, reference = OPS[kind]
    assert torch.equal(op(gate, up), reference(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OPS)
def test_gradients_equal_those_of_the_definition(kind: str, dtype: torch.dtype) -> None:
    op, reference = OPS[kind]
    gate, up = (t.requires_grad_() for t in sample((5, 33), dtype))
    upstream = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = torch.autograd.grad(op(gate, up), (gate, up), upstream)
    theirs = torch.autograd.grad(reference(gate, up), (gate, up), upstream)
    for a, b, name in zip(ours, theirs, ("gate", "up"), strict=True):
        assert torch.equal(a, b), f"gradient of {name}"


@pytest.mark.parametrize("kind", OPS)
def test_keeps_only_gate_and_up(kind: str) -> None:
    gate, up = (t.requires_grad_() for t in sample((5, 7), torch.float32))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        OPS[kind][0](gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


def test_unlike_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) torch.float32 and \(3,\)"):
        swiglu(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"and \(2,\) torch\.bfloat16"):
        swiglu(torch.ones(2), torch.ones(2).bfloat16())
