"""The kernels in the interpreter against the reference; what they compile to; how often they are launched."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fourbit.kernels.codes import dynamic_code
from fourbit.optim import AdamW, Lion

sys.path.append(str(Path(__file__).parent))  # aot.py runs this file without its conftest
from optim_tools import AdamW8bit, Lion8bit, assert_equal, distance, give_gradients, parameters, step

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _stepped(make: Any, dtype: torch.dtype, **settings: Any) -> Any:
    """Steps of large and small parameters, the last at a rate of 0, on tensors without data, for the compiler."""

    def run() -> None:
        ps = [nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in ((16, 4096), (4096, 16), (100,))]
        for p in ps:
            p.grad = torch.empty_like(p)
        optimizer = make(ps, **settings)
        for lr in (1e-3, 0.0):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

    return run


SCENARIOS = {
    "adamw": _stepped(AdamW, torch.float32, max_grad_norm=1.0),
    "adamw8bit, rounded at random": _stepped(AdamW8bit, torch.bfloat16, min_8bit_size=0),
    "adamw8bit": _stepped(AdamW8bit, torch.bfloat16, min_8bit_size=0, rounding="nearest"),
    "lion": _stepped(Lion, torch.float32),
    "lion8bit": _stepped(Lion8bit, torch.float16, min_8bit_size=0),
}
# Bytes an element: weight read and written, gradient read, each moment read and written (8-bit: and its scale).
BYTES = {"adamw": 12 + 16, "adamw8bit": 6 + 4 * (1 + 4 / 256), "lion": 12 + 8, "lion8bit": 6 + 2 * (1 + 4 / 256)}


def test_nothing_spills(aot: Any, costs: list[Any]) -> None:
    aot.assert_no_spills(costs)


def test_a_rate_of_zero_compiles_nothing_anew(costs: list[Any]) -> None:
    seen = [cost for cost in costs if cost.kernel == "step_factors_kernel"]
    assert len(seen) == len(SCENARIOS) * len({cost.capability for cost in costs})


@pytest.mark.parametrize("scenario", BYTES)
def test_instructions_fit_beside_the_copies(costs: list[Any], scenario: str) -> None:
    """Issuing an update's instructions takes an H100 no longer than moving its bytes at 70% of the copy bandwidth.

    Counted on the shortest way through the kernel, which tensors in aligned memory take: SASS of a thread, over its
    elements. Ceilings of an H100, a second: instructions of all lanes, bytes copied. 8-bit AdamW on bf16 has 142.
    """
    from fourbit.optim.update_triton import TILE_SIZE

    budget = 2.96e13 / (0.7 * 3.0e12) * BYTES[scenario]
    seen = [c for c in costs if (c.scenario, c.kernel) == (scenario, "optimizer_update_kernel")]
    seen = [c for c in seen if c.capability in (80, 90, 100)]
    assert seen
    for cost in seen:
        assert cost.path_instructions / (TILE_SIZE / cost.threads) <= budget, (cost, budget)


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of kernels in the order of their launches."""
    from fourbit.optim import step_triton, update_triton

    seen: list[str] = []

    class Recorded:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            seen.append(self.name)
            return self.kernel[grid]

    with pytest.MonkeyPatch.context() as patch:
        for module in (step_triton, update_triton):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorded(name, getattr(module, name)))
        yield seen


SHAPES = [(1,), (63,), (4097,), (), (0,), (50, 170), (16, 256)]


@pytest.mark.parametrize("make", [AdamW, Lion])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_32bit_states_are_the_references(make: Any, dtype: torch.dtype) -> None:
    """Several steps: groups, missing gradients, clipping, one that joins; odd sizes and addresses."""
    ours, theirs = parameters(SHAPES, dtype, path="triton"), parameters(SHAPES, dtype)
    split = lambda ps: [{"params": ps[:4], "lr": 1e-2}, {"params": ps[4:], "betas": (0.8, 0.95)}]
    settings: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 5.0}
    kernel, reference = make(split(ours), **settings), make(split(theirs), **settings)
    for i in range(3):
        give_gradients(ours, theirs, seed=i, missing=[(2, 5), (), (0, 6)][i])
        step(kernel, "triton")
        step(reference, "reference")
        torch.testing.assert_close(kernel.grad_norm.cpu(), reference.grad_norm, rtol=1e-6, atol=0)
    # fp32: a rounding or two; the others: now and then one falls the other way
    assert distance(ours, theirs) <= (1e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 8)
    for p, q in zip(ours, theirs, strict=True):
        assert kernel.state[p]["step"].item() == reference.state[q]["step"].item()
        for name in ("exp_avg", "exp_avg_sq"):
            if name in reference.state[q] and q.numel():
                # the clipping factor is right to fp32 in both, and counts twice in a square
                assert distance([kernel.state[p][name]], [reference.state[q][name]]) <= 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [AdamW8bit, Lion8bit])
def test_8bit_states_take_the_nearest_code(make: Any, dtype: torch.dtype) -> None:
    """Against the rule in float64, from the state that the kernel had before the step.

    A moment is right to 4 units of fp32 of what it is made of (a decoding, two products, a sum), a block's scale to its
    block's largest such error; so a code is the nearest but for twice the two. A weight meets a dozen roundings, and
    one to its dtype.
    """
    unit = 2.0**-24
    ps = parameters([(4096,), (4097,), (70, 100)], dtype, path="triton")
    optimizer = make(ps, lr=1e-3, weight_decay=0.1, rounding="nearest")
    group, rule = optimizer.param_groups[0], optimizer.rule
    for number in (1, 2, 3):
        give_gradients(ps, seed=number)
        for p in ps:
            p.grad[p.grad.abs() < 0.1] = 0  # zeros, and from there tiny moments
        before = [(decoded(optimizer, p), p.grad.cpu().double(), p.detach().cpu().double()) for p in ps]
        step(optimizer, "triton")
        lr, (beta1, beta2) = group["lr"], group["betas"]
        for p, (moments, g, old) in zip(ps, before, strict=True):
            exact, expected = rule.define(old, g, tuple(moments), group, number)
            rests = [1 - beta for beta in (group["betas"] if rule.name == "adamw" else group["betas"][1:])]
            parts = [m.abs() + part * rest for m, part, rest in zip(moments, (g.abs(), g * g), rests, strict=False)]
            errors = [4 * unit * part for part in parts]
            for moment, value, error in zip(rule.moments, expected, errors, strict=True):
                assert_nearest(optimizer.state[p], moment, value, error)
            if rule.name == "adamw":
                root = expected[1].sqrt() / (1 - beta2**number) ** 0.5 + group["eps"]
                slack = lr / (1 - beta1**number) * errors[0] / root
            else:  # a sign may be wrong where nothing is left of the direction
                direction = moments[0] * beta1 + g * (1 - beta1)
                slack = torch.where(direction.abs() <= 4 * unit * (moments[0].abs() + g.abs()), 2 * lr, 0.0)
            bound = slack + 12 * unit * (old.abs() + (exact - old).abs())
            rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
            assert ((p.detach().cpu().double() - exact).abs() <= bound + rounding * (exact.abs() + bound)).all()


def decoded(optimizer: Any, p: nn.Parameter) -> list[torch.Tensor]:
    """A parameter's 8-bit moments in float64 on the host; zeros before the first step."""
    found = []
    for moment in optimizer.rule.moments:
        state, name = optimizer.state.get(p, {}), moment.name
        if name not in state:
            found.append(torch.zeros(p.shape, dtype=torch.float64))
            continue
        scales = state[f"{name}_absmax"].cpu().double().repeat_interleave(256)[: p.numel()].view(p.shape)
        found.append(dynamic_code(moment.signed).double()[state[name].cpu().long()] * scales)
    return found


def assert_nearest(state: dict[str, torch.Tensor], moment: Any, value: torch.Tensor, error: torch.Tensor) -> None:
    """A moment's codes and scales are the best for values that are known to `error`."""
    code, blocks = dynamic_code(moment.signed).double(), -(-value.numel() // 256)
    values, errors = (nn.functional.pad(t.reshape(-1), (0, 256 * blocks - value.numel())) for t in (value, error))
    scales, slack = values.view(-1, 256).abs().amax(1), errors.view(-1, 256).amax(1)
    assert ((state[f"{moment.name}_absmax"].cpu().double() - scales).abs() <= slack).all()
    scales, slack = (t.repeat_interleave(256) for t in (scales, slack))
    borders = (code[:-1] + code[1:]) / 2
    best = torch.searchsorted(borders, values / scales.clamp(min=1e-300))
    taken = nn.functional.pad(state[moment.name].cpu().reshape(-1).long(), (0, 256 * blocks - value.numel()))
    away, least = ((values - code[c] * scales).abs()[: value.numel()] for c in (taken, best))
    assert (away <= least + 2 * (errors + slack)[: value.numel()]).all()


def test_encoding_is_exact() -> None:
    """Every border between codes, and its neighbours in fp32, at scales from the smallest to the largest.

    A fresh Lion with beta2 = 0 keeps the gradient itself as its moment, and AdamW with betas 0 its square.
    """
    from fourbit.kernels.blockwise import quantize_blockwise

    for make, signed in ((Lion8bit, True), (AdamW8bit, False)):
        code = dynamic_code(signed)
        borders = ((code[:-1].double() + code[1:].double()) / 2).float()
        up, down = (torch.nextafter(borders, borders.new_full((), s * torch.inf)) for s in (1, -1))
        values = torch.cat([torch.tensor([1.0, 0.0, -0.0]), borders, up, down, code])
        values = values if signed else values.abs().sqrt()
        blocks = [torch.cat([torch.tensor([1.0]), part]) for part in values.split(255)]
        values = torch.cat([torch.nn.functional.pad(b, (0, 256 - len(b))) for b in blocks])
        scales = [1.0, 0.1, 3e-20, 3.3e-39, 1e38, 7.7] if signed else [1.0, 0.3, 1e-15, 1e-19, 1e15, 7.7]
        p = nn.Parameter(torch.zeros(len(scales), len(values), device=DEVICE))
        p.grad = torch.stack([values * s for s in scales]).to(DEVICE)
        optimizer = make([p], betas=(0.0, 0.0), min_8bit_size=0)
        step(optimizer, "triton")
        moment = p.grad.cpu() if signed else p.grad.cpu().square()
        codes, absmax = quantize_blockwise(moment, code, 256)
        name = optimizer.rule.moments[0 if signed else 1].name
        assert torch.equal(optimizer.state[p][f"{name}_absmax"].cpu(), absmax)
        assert torch.equal(optimizer.state[p][name].cpu(), codes), signed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_random_is_the_references(dtype: torch.dtype) -> None:
    ours, theirs = (parameters([(63,), (5001,)], dtype, path="triton") for _ in range(2))
    for p in (*ours, *theirs):
        p.data[::3] *= 2.0**-16  # where fp16 is subnormal, too
    settings: dict[str, Any] = {"lr": 2**-6 + 2**-17, "seed": 3}  # a key beyond 2^31
    for make in (Lion, Lion8bit):  # whose steps are exact, so that nothing but the draws could differ
        kernel, reference = (make(ps, **settings) for ps in (ours, theirs))
        for i in range(2):
            give_gradients(ours, theirs, seed=i)
            step(kernel, "triton")
            step(reference, "reference")
        assert_equal(ours, theirs)


@pytest.mark.parametrize("make", [AdamW, AdamW8bit])
def test_writes_nothing_beside_its_parameters(make: Any) -> None:
    """Parameters and gradients inside larger buffers, at odd addresses and of odd lengths."""
    for start, size in ((1, 4100), (4, 4097), (3, 4096), (16, 257), (16, 4111)):
        buffer = torch.full((2, 5000), float("nan"), device=DEVICE)
        p = nn.Parameter(buffer[0, start : start + size])
        p.data.fill_(1.0)
        p.grad = buffer[1, start : start + size]
        p.grad.fill_(0.5)
        optimizer = make([p], lr=0.125, weight_decay=0.0, min_8bit_size=0, max_grad_norm=1e9)
        step(optimizer, "triton")
        assert (p - 0.875).abs().max() <= 12 * 2**-24  # a dozen roundings of values of 1 at most; the state was 0
        torch.testing.assert_close(optimizer.grad_norm.cpu(), torch.tensor(0.5 * size**0.5))
        outside = torch.ones(5000, dtype=torch.bool)
        outside[start : start + size] = False
        assert buffer.cpu()[:, outside].isnan().all()


def test_one_launch_and_one_for_each_width(launches: list[str]) -> None:
    """For any number of parameters, beside torch's for the norm."""
    ps = parameters([(300,)] * 5 + [(5000,)] * 2, path="triton")
    for least, widths in ((4096, 2), (1, 1)):
        expected = ["step_factors_kernel"] + ["optimizer_update_kernel"] * widths
        optimizer = AdamW8bit(ps, max_grad_norm=1.0, min_8bit_size=least)
        give_gradients(ps, seed=0)
        for _ in range(2):
            launches.clear()
            step(optimizer, "triton")
            assert launches == expected
