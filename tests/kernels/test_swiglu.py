"""swiglu against its definition: values, gradients, what it keeps."""

import pytest
import torch

from fourbit.kernels.swiglu import swiglu, swiglu_reference


def sample(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple((torch.randn(shape, generator=generator, dtype=torch.float64) * 4).to(dtype) for _ in range(2))


@pytest.mark.parametrize("shape", [(1,), (63,), (2, 65), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = sample(shape, dtype)
    assert torch.equal(swiglu(gate, up), swiglu_reference(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_the_definition(dtype: torch.dtype) -> None:
    gate, up = (t.requires_grad_() for t in sample((5, 33), dtype))
    upstream = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    ours = torch.autograd.grad(swiglu(gate, up), (gate, up), upstream)
    theirs = torch.autograd.grad(swiglu_reference(gate, up), (gate, up), upstream)
    for a, b, name in zip(ours, theirs, ("gate", "up"), strict=True):
        assert torch.equal(a, b), f"gradient of {name}"


def test_keeps_only_gate_and_up() -> None:
    gate, up = (t.requires_grad_() for t in sample((5, 7), torch.float32))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


def test_unlike_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) torch.float32 and \(3,\)"):
        swiglu(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"and \(2,\) torch\.bfloat16"):
        swiglu(torch.ones(2), torch.ones(2).bfloat16())
