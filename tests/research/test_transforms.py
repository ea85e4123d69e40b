"""What torch's transforms do with each op: the table of docs/transforms.md, every cell of it tried in float64.

Each op is held to a composition of torch's own calls on decoded weights, under the same transform.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fourbit.kernels import attention, linear4bit, lora_update, rms_norm, rope, swiglu
from fourbit.kernels.chunked_head import TokenScorer, dense_figures
from fourbit.kernels.dequantize4bit import dequantize
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.dropout import keep_mask, keep_scale
from fourbit.kernels.linear_divergence import Divergence, DivergenceScorer
from fourbit.kernels.quantize4bit import quantize

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it
PAGE = Path(__file__).parents[2] / "docs" / "transforms.md"
Function = Callable[..., Tensor]
Op = tuple[Function, Function, list[Tensor]]  # ours, torch's, the inputs that are differentiated


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def four_bit_linear() -> Op:
    weight = quantize(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), double_quant=True)
    dense = dequantize(weight, torch.float64)
    return lambda x, b: linear4bit.linear4bit(x, weight, b), lambda x, b: x @ dense.T + b, draw((3, 32), (6,))


def four_bit_lora() -> Op:
    """Two linears of one input under dropout."""
    generator = torch.Generator().manual_seed(0)
    weights = [quantize(torch.randn(size, 32, generator=generator)) for size in (6, 4)]
    dense = [dequantize(weight, torch.float64) for weight in weights]
    seed = torch.tensor(5)

    def ours(x: Tensor, *ab: Tensor) -> Tensor:
        return torch.cat(
            linear4bit.lora_linears4bit(x, weights, [None, None], ab[:2], ab[2:], [2.0, 0.5], 0.3, seed), -1
        )

    def theirs(x: Tensor, *ab: Tensor) -> Tensor:
        h = x * keep_mask((3, 32), 0.3, seed) * keep_scale(0.3)
        parts = zip(dense, ab[:2], ab[2:], (2.0, 0.5), strict=True)
        return torch.cat([x @ w.T + scale * (h @ A.T) @ B.T for w, A, B, scale in parts], -1)

    return ours, theirs, draw((3, 32), (2, 32), (2, 32), (6, 2), (4, 2))


def dense_lora() -> Op:
    plain = lambda y, x, A, B: y + 2.0 * (x @ A.T) @ B.T
    return lambda *xs: lora_update(*xs, 2.0), plain, draw((3, 4), (3, 5), (2, 5), (4, 2))


def norm() -> Op:
    plain = lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    return lambda x, w: rms_norm.rms_norm(x, w, 1e-5), plain, draw((3, 6), (6,))


def gate() -> Op:
    return swiglu.swiglu, lambda g, u: g * torch.sigmoid(g) * u, draw((3, 6), (3, 6))


def rotation() -> Op:
    cos, sin = rope.tables(torch.arange(3)[None], rope.frequencies(4, 100.0, dtype=torch.float64))

    def plain(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :2], x[..., 2:]) * torch.complex(cos, sin)
        return torch.cat((turned.real, turned.imag), -1)

    return lambda x: rope.rope(x, cos, sin), plain, draw((1, 3, 2, 4))


def heard() -> Op:
    """Packed, grouped heads, one example that forks."""
    spans = [(0, 2), (2, 3), (3, 5, 1), (5, 6, 1)]
    sees = torch.tensor([[j <= i for j in range(6)] for i in range(6)])
    sees[2:, :2] = sees[5, 3:5] = False

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
        scores = (q.transpose(1, 2) @ k.mT / 2.0).masked_fill(~sees, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    ours = lambda q, k, v: attention.causal_attention(q, k, v, spans=spans)
    return ours, plain, draw((1, 6, 4, 4), (1, 6, 2, 4), (1, 6, 2, 4))


def logprobs() -> Op:
    targets = torch.tensor([0, 4, 2])
    ours = lambda h, w: dense_figures(h, w, TokenScorer(targets, 5), 2)[0]
    return ours, lambda h, w: -F.cross_entropy(h @ w.T, targets, reduction="none"), draw((3, 4), (5, 4))


def distance() -> Op:
    (teacher,) = draw((3, 5))
    scorer = DivergenceScorer(lambda rows: teacher[rows], Divergence("reverse-kl", 2.0))
    p = (teacher / 2).log_softmax(1)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        q = (h @ w.T / 2).log_softmax(1)
        return (q.exp() * (q - p)).sum(1)

    return lambda h, w: dense_figures(h, w, scorer, 2)[0], plain, draw((3, 4), (5, 4))


OPS: dict[str, Callable[[], Op]] = {
    "linear4bit": four_bit_linear,
    "lora_linears4bit": four_bit_lora,
    "lora_update": dense_lora,
    "rms_norm": norm,
    "swiglu": gate,
    "rope": rotation,
    "causal_attention": heard,
    "log-probabilities": logprobs,
    "divergence": distance,
}


def scalar(f: Function) -> Function:
    return lambda *xs: f(*xs).sin().sum()


def first(f: Function, xs: list[Tensor], graph: bool = False) -> Any:
    leaves = [x.requires_grad_() for x in xs]
    return torch.autograd.grad(scalar(f)(*leaves), leaves, create_graph=graph)


def second(f: Function, xs: list[Tensor]) -> Any:
    once = first(f, xs, graph=True)
    return once, torch.autograd.grad(sum((g.square() * (i + 1)).sum() for i, g in enumerate(once)), xs)


def all_grads(f: Function, xs: list[Tensor]) -> Any:
    return torch.func.grad(scalar(f), argnums=tuple(range(len(xs))))(*xs)


def hessian_product(f: Function, xs: list[Tensor]) -> Any:
    gradient = torch.func.grad(scalar(f), argnums=tuple(range(len(xs))))
    return torch.func.jvp(gradient, tuple(xs), tuple(x.cos() for x in xs))


def dual(f: Function, xs: list[Tensor]) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(x, x.cos()) for x in xs)))


def several_gradients(f: Function, xs: list[Tensor]) -> Any:
    """Of a graph that was made outside the transform."""
    leaves = [x.requires_grad_() for x in xs]
    y = f(*leaves)
    back = lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True)
    return torch.func.vmap(back)(torch.stack([y.cos(), y.sin()]).detach())


def checkpointed(reentrant: bool) -> Callable[[Function, list[Tensor]], Any]:
    return lambda f, xs: backward(lambda *ys: checkpoint(f, *ys, use_reentrant=reentrant), xs)


def backward(f: Function, xs: list[Tensor]) -> Any:
    leaves = [x.requires_grad_() for x in xs]
    scalar(f)(*leaves).backward()
    return [x.grad for x in leaves]


def offloaded(f: Function, xs: list[Tensor]) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return first(f, xs)


def stacked(f: Function, xs: list[Tensor]) -> Any:
    return torch.func.vmap(f)(*(torch.stack([x, x.cos()]) for x in xs))


def per_example(f: Function, xs: list[Tensor]) -> Any:
    gradient = torch.func.grad(scalar(f), argnums=tuple(range(len(xs))))
    return torch.func.vmap(gradient)(*(torch.stack([x, x.cos()]) for x in xs))


TRANSFORMS: dict[str, Callable[[Function, list[Tensor]], Any]] = {
    "`create_graph=True`": second,
    "`vmap(autograd.grad)`": several_gradients,
    "`func.grad`": all_grads,
    "`func.jacrev`": lambda f, xs: torch.func.jacrev(f)(*xs),
    "`func.jvp`": lambda f, xs: torch.func.jvp(f, tuple(xs), tuple(x.cos() for x in xs)),
    "`func.hessian`": lambda f, xs: torch.func.hessian(scalar(f))(*xs),
    "Hessian times vector": hessian_product,
    "`func.vmap`": stacked,
    "`vmap(grad)`": per_example,
    "`forward_ad`": dual,
    "`checkpoint`": checkpointed(False),
    "`checkpoint`, reentrant": checkpointed(True),
    "`saved_tensors_hooks`": offloaded,
}
REFUSED = {  # all other cells are a yes
    (transform, op): "a chunked head keeps first derivatives only"
    for transform in ("`create_graph=True`", "`vmap(autograd.grad)`")
    for op in ("log-probabilities", "divergence")
}
NEEDS_MATH = {
    ("`create_graph=True`", "causal_attention"),
    ("`vmap(autograd.grad)`", "causal_attention"),
}  # torch's own: its quick kernels have no second derivative


ALL = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_every_cell_of_the_table(op: str, transform: str, path: str) -> None:
    ours, theirs, inputs = OPS[op]()
    run = TRANSFORMS[transform]
    fresh = lambda: [x.clone() for x in inputs]
    with force_path(path), sdpa_kernel(SDPBackend.MATH if (transform, op) in NEEDS_MATH else ALL):
        if (transform, op) in REFUSED:
            with pytest.raises(NotImplementedError, match=REFUSED[transform, op]):
                run(ours, fresh())
            return
        torch.testing.assert_close(run(ours, fresh()), run(theirs, fresh()), rtol=1e-9, atol=1e-10)


def cell(transform: str, op: str) -> str:
    return (
        "error" if (transform, op) in REFUSED else "with `SDPBackend.MATH`" if (transform, op) in NEEDS_MATH else "yes"
    )


def test_the_page_shows_this_table() -> None:
    rows = [["", *(f"`{op}`" if "-" not in op and op != "divergence" else op for op in OPS)], ["---"] * (len(OPS) + 1)]
    rows += [[transform, *(cell(transform, op) for op in OPS)] for transform in TRANSFORMS]
    assert "\n".join(f"| {' | '.join(row)} |" for row in rows) in PAGE.read_text()


@cache
def own_rules() -> dict[str, type]:
    """Every autograd.Function of the kernels."""
    known = list(torch.autograd.Function.__subclasses__())
    return {rule.__name__: rule for rule in known if rule.__module__.startswith("fourbit.kernels")}


def test_no_backward_is_once_differentiable_in_silence() -> None:
    """A rule that is written by hand names what stands for it beyond the first order, or refuses."""
    assert own_rules()
    for name, rule in own_rules().items():
        if name == "_Rows":
            continue  # torch's own calls on what it was given: gradgradcheck in tests/kernels/test_lora_rows.py
        names = {*rule.backward.__code__.co_names}
        if name == "_Eager":
            names |= {*linear4bit._differentiate.__code__.co_names}
        assert names & {"beyond_first", "derivatives", "_first_only", "TimesFrozen", "GroupedFrozen"}, name
