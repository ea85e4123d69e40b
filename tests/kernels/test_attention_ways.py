"""The ways that packed rows take: products by batches on a CPU, one call a row on a GPU; how few shapes they see."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from fourbit.kernels import attention
from fourbit.kernels.attention import PLAIN, Scores, causal_attention
from fourbit.kernels.dispatch import force_path
from fourbit.kernels.spans import Packed, Spans

CPU = torch.device("cpu")
# Segments: 0 to 5, 5 to 12, 12 to 17, 17 to 19 (a branch of a branch), 19 to 20, 20 to 22, 22 to 23, 23 to 60, 60 to 90
FORKS: Spans = [(0, 5), (5, 9), (9, 12, 1), (12, 15, 1), (15, 17, 3), (17, 19, 3), (19, 20, 1), (20, 22), (22, 23)]
FORKS = [*FORKS, (23, 60), (60, 77), (77, 90, 10)]
MANY = {"plain": PLAIN, "window": Scores(6), "cap": Scores(softcap=1.5), "all": Scores(7, 0.5, 2.0)}
FLASH = torch.ops.aten._flash_attention_forward.default
FLASH_BACKWARD = torch.ops.aten._flash_attention_backward.default


def drawn(tokens: int, heads: int = 4, kv: int = 2, dtype: torch.dtype = torch.float64, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((1, tokens, h, size) for h in (heads, kv, kv))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    y = attend(*inputs)
    return [y, *torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))]


@pytest.mark.parametrize("how", MANY)
@pytest.mark.parametrize("area", [1 << 30, 32 * 32])
def test_products_and_torch_s_own_are_one(monkeypatch: pytest.MonkeyPatch, how: str, area: int) -> None:
    """Each segment by itself, with a mask made for the call or once, and segments in batches, all or the small ones."""
    inputs, original = drawn(90), Packed._batches
    results = []
    for most, dtype in ((0, None), (area, None), (area, torch.float64)):
        laid = lambda row, window, _, groups, __, most=most, dtype=dtype: original(row, window, most, groups, dtype)
        monkeypatch.setattr(Packed, "_batches", laid)
        results.append(with_gradients(lambda *x: causal_attention(*x, spans=FORKS, scores=MANY[how]), inputs))
    for way in results[1:]:
        for got, want in zip(way, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_on_a_cpu_within_their_rounding(dtype: torch.dtype) -> None:
    """A weight and an output are each rounded once or twice: 3 halves of the spacing, of numbers below 4."""
    inputs = drawn(90, 6, 2, dtype, 16)
    got = with_gradients(lambda *x: causal_attention(*x, spans=FORKS), inputs)
    exact = with_gradients(
        lambda *x: causal_attention(*x, spans=FORKS), [x.detach().double().requires_grad_() for x in inputs]
    )
    for mine, right in zip(got, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - right).abs().max() < 6 * torch.finfo(dtype).eps * max(1, right.abs().max())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_own_text(bad: float) -> None:
    """Batches fill short rows up: with nothing of a neighbour, and nothing that reaches one, forward or backward."""
    spans: Spans = [(0, 5), (5, 9), (9, 12, 1), (12, 19, 1), (19, 30)]
    inputs = drawn(30, dtype=torch.float32)
    clean = with_gradients(lambda *x: causal_attention(*x, spans=spans), inputs)
    with torch.no_grad():
        for x in inputs:
            x[:, 5:19] = bad
    for got, want in zip(with_gradients(lambda *x: causal_attention(*x, spans=spans), inputs), clean, strict=True):
        assert torch.equal(got[:, :5], want[:, :5]) and torch.equal(got[:, 19:], want[:, 19:])
        assert got[:, 5:19].isnan().any()


class Shapes(TorchDispatchMode):
    """The shapes of all products and of torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.calls.append(name)
        if name.startswith(("aten::bmm", "aten::_scaled_dot")):
            self.seen.add((name, *(tuple(x.shape) for x in args if isinstance(x, Tensor))))
        return func(*args, **kwargs or {})


def ragged(step: int, forks: bool) -> Spans:
    """About 500 tokens of texts of 5 to 120, or of pairs that share 5 to 60."""
    generator = torch.Generator().manual_seed(step)
    draw = lambda most: int(torch.randint(5, most, (), generator=generator))
    spans: list[tuple[int, ...]] = []
    place = 0
    while place < 500:
        parts = [draw(60), draw(60), draw(60)] if forks else [draw(120)]
        root = len(spans)
        for i, length in enumerate(parts):
            spans.append((place, place + length, root) if i else (place, place + length))
            place += length
    return spans


@pytest.mark.parametrize(("forks", "most"), [(False, 90), (True, 150)])
def test_fifty_ragged_steps_see_few_shapes_in_bf16(forks: bool, most: int) -> None:
    """Forward and backward, six products a batch, however the lengths vary."""
    with Shapes() as shapes:
        for step in range(50):
            spans = ragged(step, forks)
            inputs = drawn(spans[-1][1], 1, 1, torch.bfloat16, 2)
            with_gradients(lambda *x, spans=spans: causal_attention(*x, spans=spans), inputs)
    assert len(shapes.seen) <= most, len(shapes.seen)
    assert not any("scaled_dot" in name for name in shapes.calls)


class Flash(TorchDispatchMode):
    """What the operator does, written out for a CPU: attention of each run, its queries the last of its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (FLASH, FLASH_BACKWARD):
            return func(*args, **kwargs)
        assert args[0].device.type == "cpu"
        self.calls.append((func, args, kwargs))
        if func is FLASH:
            y, unused = torch.cat([p @ v for p, _, _, v in self.runs(*args[:5], kwargs)], 1), args[0].new_zeros(1)
            return y.transpose(0, 1), unused, unused, unused, unused
        whole, q, k, v, _, _, queries, keys = args[:8]
        gradients = whole.transpose(0, 1).split(queries.diff().tolist(), 1)
        made: list[list[Tensor]] = []
        for g, (p, rows, own, values) in zip(gradients, self.runs(q, k, v, queries, keys, kwargs), strict=True):
            dp = g @ values.mT
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * self.scale(q, kwargs)
            made.append([ds @ own, *(x.unflatten(0, (k.shape[1], -1)).sum(1) for x in (ds.mT @ rows, p.mT @ g))])
        return tuple(torch.cat(parts, 1).transpose(0, 1) for parts in zip(*made, strict=True))

    def scale(self, q: Tensor, kwargs: Any) -> float:
        return kwargs.get("scale") or q.shape[2] ** -0.5

    def runs(self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, kwargs: Any) -> Any:
        """Of each run its weights, queries, keys and values, [H, tokens, ...] each."""
        left = kwargs.get("window_size_left")
        for i in range(len(queries) - 1):
            rows = q[queries[i] : queries[i + 1]].transpose(0, 1)
            own, values = (
                x[keys[i] : keys[i + 1]].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v)
            )
            ahead = own.shape[1] - rows.shape[1]
            seen = torch.ones(rows.shape[1], own.shape[1], dtype=torch.bool).tril(ahead)
            seen = seen if left is None else seen.triu(ahead - left)
            yield (rows @ own.mT * self.scale(q, kwargs)).masked_fill(~seen, -torch.inf).softmax(-1), rows, own, values


@pytest.mark.parametrize("scores", [PLAIN, Scores(6), Scores(3, 0.5), Scores(90)])
def test_one_flash_call_a_row_is_the_same_attention(monkeypatch: pytest.MonkeyPatch, scores: Scores) -> None:
    """Forks too, and every gradient: of keys that several branches see as well."""
    inputs, row = drawn(90), Packed(FORKS, 90, CPU)
    expected = with_gradients(lambda *x: causal_attention(*x, spans=FORKS, scores=scores), inputs)
    monkeypatch.setattr(attention, "_flash", lambda q, scores: True)
    with Flash() as flash:
        got = with_gradients(lambda *x: causal_attention(*x, spans=row, scores=scores), inputs)
    assert [call[0] for call in flash.calls] == [FLASH, FLASH_BACKWARD]
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


class Calls(TorchDispatchMode):
    """Every operator with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any, Any]] = []
        self.plans = False  # whether a product was made where cuDNN, which keeps a plan for every shape, was a choice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append((func, args, kwargs or {}))
        self.plans |= "bmm" in func.name() and torch.backends.cuda.cudnn_sdp_enabled()
        return func(*args, **kwargs or {})

    def of(self, part: str) -> list[tuple[Any, Any, Any]]:
        return [call for call in self.made if part in call[0].name()]


def on_a_gpu(spans: Spans, layers: int, scores: Scores = PLAIN, dtype: torch.dtype = torch.bfloat16) -> Calls:
    """Forward and backward of so many layers, on tensors without memory that go a GPU's way."""
    tokens = spans[-1][1]
    with force_path("triton"), Calls() as calls:
        row = Packed(spans, tokens, torch.device("meta"))
        for _ in range(layers):
            inputs = [torch.empty(1, tokens, h, 64, dtype=dtype, device="meta", requires_grad=True) for h in (4, 2, 2)]
            torch.autograd.grad(causal_attention(*inputs, spans=row, scores=scores).sum(), inputs)
    return calls


@pytest.mark.parametrize("scores", [PLAIN, Scores(6, 0.25)])
def test_what_a_gpu_is_asked_for(scores: Scores) -> None:
    """A call a layer each way with the row's starts, made once; grouped heads as they are, keys of forks repeated."""
    calls = on_a_gpu(FORKS, 3, scores)
    forward, backward = calls.of("_flash_attention_forward"), calls.of("_flash_attention_backward")
    assert len(forward) == len(backward) == 3 and not calls.of("scaled_dot") and not calls.of("bmm")
    assert len({id(call[1][3]) for call in forward}) == len({id(call[1][4]) for call in forward}) == 1
    q, k, v, queries, keys, most_q, most_k, dropout, causal, _ = forward[0][1]
    assert q.shape == (90, 4, 64) and k.shape == v.shape and k.shape[1:] == (2, 64)
    assert queries.shape == keys.shape == (10,) and queries.dtype == keys.dtype == torch.int32
    assert (dropout, causal, most_q) == (0.0, True, 37)
    left = forward[0][2].get("window_size_left", -1)
    assert (left, forward[0][2].get("scale")) == (scores.window - 1, scores.scale)
    laid = Packed(FORKS, 90, CPU).batches(scores.window, 0, 2, torch.float32)
    assert laid.starts[1][-1] == k.shape[0] and [max(size[i] for size in laid.sizes) for i in (1, 2)] == [
        most_q,
        most_k,
    ]
    plain = on_a_gpu([(0, 40), (40, 90)], 1)
    assert plain.of("_flash_attention_forward")[0][1][1].shape[0] == 90 and not plain.of("embedding")


@pytest.mark.parametrize("case", ["fp32", "softcap", "odd heads", "old GPU"])
def test_what_flash_does_not_take_is_not_left_to_torch(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Each segment by the kernels that need no plan, or with a soft cap by products."""
    if case == "old GPU":
        monkeypatch.setattr(attention, "path_for", lambda q: "reference")
    size = 36 if case == "odd heads" else 64
    dtype = torch.float32 if case == "fp32" else torch.bfloat16
    with force_path("triton"), Calls() as calls:
        inputs = [torch.empty(1, 90, h, size, dtype=dtype, device="meta") for h in (4, 2, 2)]
        causal_attention(*inputs, spans=FORKS, scores=Scores(softcap=20.0 * (case == "softcap")))
    assert calls.of("aten::bmm") and not calls.of("flash") and calls.plans == (case == "softcap")


@pytest.mark.parametrize(
    ("queries", "keys", "hidden", "plan"),
    [
        (1, 64, True, None),
        (1, 64, False, False),
        (40, 90, True, False),
        (300, 300, False, False),
        (512, 512, False, True),
    ],
)
def test_only_whole_rows_of_few_lengths_get_cudnn(queries: int, keys: int, hidden: bool, plan: bool | None) -> None:
    """One query beside a mask is two products over the keys where they lie; other rows go to kernels without plans."""
    shapes = ((2, 4, queries, 64), (2, 2, keys, 64), (2, 2, keys, 64))  # as a cache has them
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta").transpose(1, 2) for shape in shapes)
    visible = torch.ones(2, 1, queries, keys, dtype=torch.bool, device="meta") if hidden else None
    with force_path("triton"), Calls() as calls:
        assert causal_attention(q, k, v, visible=visible).shape == q.shape
    assert len(calls.of("aten::bmm")) == 2 and (plan is None or calls.plans == plan)
    moved = [args[0].numel() for name in ("clone", "copy") for _, args, _ in calls.of(name)]
    assert plan is not None or max(moved, default=0) < k.numel()


@pytest.mark.parametrize("chosen", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_what_the_caller_switched_off_stays_off(monkeypatch: pytest.MonkeyPatch, chosen: SDPBackend) -> None:
    """The recipe for second derivatives on a GPU (docs/transforms.md) is to leave nothing but MATH on."""
    row, seen = [torch.empty(1, 90, h, 64, dtype=torch.bfloat16, device="meta") for h in (4, 2, 2)], list[Any]()
    asked, own = lambda: seen.append(_cur_sdpa_kernel_backends()), F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *x, **how: asked() or own(*x, **how))
    with force_path("triton"), sdpa_kernel(chosen), Calls() as calls:
        for spans in (None, FORKS):
            causal_attention(*row, spans=spans)
    assert len(seen) == 1 + len(Packed(FORKS, 90, CPU).batches(0, 0, 2, None).sizes)
    assert all(on == [chosen] for on in seen) and not calls.of("_flash_attention_forward")


def test_products_have_second_derivatives() -> None:
    """What makes its weights again in backward leaves a graph where one is wanted."""
    inputs = [x.detach()[:, :9].requires_grad_() for x in drawn(12, 2, 1, size=2)]
    attend = lambda *x: causal_attention(
        *x, spans=[(0, 4), (4, 6), (6, 7, 1), (7, 8, 2), (8, 9, 2)], scores=MANY["all"]
    )
    assert torch.autograd.gradgradcheck(attend, inputs, fast_mode=True)


def test_a_long_text_gets_no_bias() -> None:
    """Which would take the square of its length."""
    laid = Packed([(0, 60_000), (60_000, 60_004)], 60_004, CPU).batches(0, 256 * 256, 3, torch.bfloat16)
    assert laid.sizes == [(1, 60_000, 60_000), (1, 16, 16)] and laid.biases[0] is None
