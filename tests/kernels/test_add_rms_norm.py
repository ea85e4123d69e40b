"""The residual sum inside the norm's kernels: both directions, alone and in a decoder's layers."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.kernels.dispatch import force_path
from fourbit.kernels.rms_norm import LARGEST, add_rms_norm, rms_norm_reference
from fourbit.models import decoder
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _largest() -> None:
    for columns in (4096, LARGEST):
        x, y = (torch.empty(64, columns, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
        both = add_rms_norm(x, y, torch.empty(columns, device="meta"), 1e-5)
        assert both is not None
        torch.autograd.grad(both, (x, y), [x.detach(), y.detach()])


SCENARIOS = {"largest": _largest}
IDS = torch.arange(7, device=DEVICE)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 3, 64), (5, 257)])
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype, poisoned: Any) -> None:
    """The sum rounded once, as it is kept; its norm and both gradients of that sum, one rounding each."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, y, dsum, dh = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(4))
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE)
    ours = [t.clone().requires_grad_() for t in (x, y)]
    with force_path("triton"), poisoned():
        both = add_rms_norm(*ours, weight, 1e-5)
        assert both is not None
        dx, dy = torch.autograd.grad(both, ours, [dsum, dh])
    total = (x + y).double().requires_grad_()
    h = rms_norm_reference(total, weight.double(), 1e-5)
    (want,) = torch.autograd.grad([total * 1.0, h], total, [dsum.double(), dh.double()])
    assert torch.equal(both[0], x + y) and torch.equal(dx, dy)
    unit = torch.finfo(dtype).eps
    for got, exact in ((both[1], h.detach()), (dx, want)):
        size = exact.abs() + exact.abs().mean() + dsum.double().abs()
        assert ((got.double() - exact).abs() <= (unit + 64 * 2**-23) * size).all()


def test_where_it_does_not_run() -> None:
    """On a CPU, in float64, for a weight that trains, under a transform: the layer adds and norms by itself."""
    x, weight = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with force_path("cpu"):
        assert add_rms_norm(x, x, weight, 1e-5) is None
    with force_path("triton"):
        assert add_rms_norm(x.double(), x.double(), weight, 1e-5) is None
        assert add_rms_norm(x, x.half(), weight, 1e-5) is None
        assert add_rms_norm(x, x, weight.clone().requires_grad_(), 1e-5) is None
        found = torch.func.vmap(lambda t: t if add_rms_norm(t, t, weight, 1e-5) is None else t * 0)(x)
    assert torch.equal(found, x)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=["both", "x", "y"])
def test_second_derivatives(trained: tuple[bool, bool]) -> None:
    """Of what needs a gradient: in a model's first layer the stream does not yet, what is added does."""
    x, y = (torch.randn(2, 8, device=DEVICE, requires_grad=own) for own in trained)
    weight, found, those = torch.rand(8, device=DEVICE), [], [t for t in (x, y) if t.requires_grad]
    for fused in (True, False):
        with force_path("triton"):
            total, h = add_rms_norm(x, y, weight, 1e-5) if fused else (x + y, rms_norm_reference(x + y, weight, 1e-5))
            first = torch.autograd.grad((total.square() * h.exp()).sum(), those, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), those))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual_scale", [1.0, 0.5])
@pytest.mark.parametrize(("norms", "calls"), [("before", 4), ("after", 1), ("both", 4)])
def test_in_a_decoder(norms: Any, calls: int, residual_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two a layer but the first, and the final norm: hidden states and gradients are those of plain ops."""
    torch.manual_seed(0)
    spec = Spec(19, 32, 48, 2, 2, 1, 16, norms=norms, norm_plus_one=True, residual_scale=residual_scale)
    made, heard = Decoder(spec).to(DEVICE), list[tuple[Tensor, Tensor] | None]()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data.normal_()
            parameter.requires_grad_(False)
    monkeypatch.setattr(decoder, "add_rms_norm", lambda *given: heard.append(add_rms_norm(*given)) or heard[-1])
    results = []
    for path in ("triton", "reference"):
        model = copy.deepcopy(made)
        with force_path(path):
            hidden = model.hidden(IDS)
            hidden.square().mean().backward()
        results.append(
            [hidden.detach(), *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)]
        )
    assert sum(both is not None for both in heard) == calls
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_norm_with_a_hook_is_called() -> None:
    model, heard = Decoder(Spec(19, 32, 48, 2, 2, 1, 16)).to(DEVICE), list[tuple[int, ...]]()
    model.requires_grad_(False)
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda module, given, made: heard.append(tuple(given[0].shape)))
    with force_path("triton"):
        model.hidden(IDS)
    assert heard == [(1, 7, 32)]


def test_no_kernel_spills(aot: ModuleType, costs: list[Any]) -> None:
    assert {cost.kernel for cost in costs} == {"rms_norm_forward_kernel", "rms_norm_backward_kernel"}
    aot.assert_no_spills(costs)
