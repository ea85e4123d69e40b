"""One AdamW step over all parameters of a run: ours, PyTorch's, bitsandbytes' and torchao's, 32-bit, 8-bit and paged.

Timed by the host's clock from the first launch to the last result, since launching is what hundreds of small tensors
cost. Besides time and peak memory each figure has the bytes of state, and on a GPU how many kernels a step launches and
how often the host waits for the device. "clipped" points clip the gradients' norm first, as a training step does.

The gate runs three steps with different gradients and compares every weight with float64 (`Truth`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from fourbit import optim

from .cases import OURS, Case, Point, Setting, Variant, Work, present
from .gate import UNIT
from .layer import uses
from .peers import bnb, torchao_optim
from .shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B, Decoder, Grid
from .timing import Call

ADAMW, EIGHT_BIT, PAGED = "adamw", "adamw8bit", "adamw_paged"
ADAPTER, CLIPPED = "adapter", ", clipped"
FUSED, FOREACH, COPIES = "torch fused", "torch foreach", "its copies alone"
SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
GATE_STEPS = 3
# 8-bit moments are off by half a gap between codes, at most 0.0071 of a block's largest (signed) or 0.0036 (unsigned).
# The largest of 256 normal values is about 3.2 times their root mean square, that of their squares up to 14 times
# their mean: 2.3% and half of 5% of the update. A step without weight decay or bias correction would be off by 10%.
EIGHT_BIT_BOUND = 0.05
RESIDENT_SHARE = 4  # the paged optimizer's budget is the state divided by this
COPY_BYTES = 1 << 26  # of a transfer between host and device

Parameters = list[nn.Parameter]


@dataclass(frozen=True)
class Trained:
    """What a run trains."""

    model: str
    name: str
    rank: int  # 0: all weights
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def values(self, seed: int, device: torch.device) -> Iterator[Tensor]:
        """Normal values of each shape, the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)
        for shape in self.shapes:
            yield torch.randn(shape, device=device, generator=generator).to(self.dtype)

    def weights(self, device: torch.device) -> Iterator[Tensor]:
        """In bf16 as small as a model's, or rounding would hide the update; in fp32 larger, or nothing would decay."""
        for values in self.values(0, device):
            yield values if self.dtype == torch.float32 else values / 64

    def parameters(self, device: torch.device) -> Parameters:
        return [nn.Parameter(values) for values in self.weights(device)]

    def gradients(self, step: int, device: torch.device) -> Iterator[Tensor]:
        """Those of step `step`, counted from 1; smaller where a tensor comes later, so that no two are alike."""
        for i, values in enumerate(self.values(step, device)):
            yield values / (1 + i % 7)


def adapter(shape: Decoder, rank: int) -> Trained:
    """LoRA on all linear layers, in fp32: A and B of each, 448 tensors for Llama-3-8B."""
    linears = [p for p, count in uses(shape) for _ in range(count)]
    pair = [size for p in linears for size in ((rank, p.K), (p.N, rank))]
    return Trained(shape.model, ADAPTER, rank, torch.float32, tuple(pair * shape.layers))


def full(shape: Decoder) -> Trained:
    """All weights, in bf16; the embedding is the head too."""
    linears = [(p.N, p.K) for p, count in uses(shape) for _ in range(count)]
    norm = (shape.hidden,)
    sizes = [(shape.vocabulary, shape.hidden), *([*linears, norm, norm] * shape.layers), norm]
    return Trained(shape.model, "full", 0, torch.bfloat16, tuple(sizes))


def cases(grid: Grid, setting: Setting) -> list[Case]:
    cuda = setting.device.type == "cuda"
    small = adapter(grid.decoder, grid.ranks[0])
    every = [small]
    if cuda:
        every += [adapter(LLAMA_70B, 64), full(LLAMA_1B)]
    elif LLAMA_8B.model in {p.model for p in grid.projections}:
        every.append(adapter(LLAMA_8B, 16))
    found = []
    for trained in every:
        point = partial(Point, model=trained.model, projection=trained.name, N=0, K=0, rank=trained.rank)
        first = 1 if trained is small else 2
        for op in (ADAMW, EIGHT_BIT):
            found.append(Case(point(op), first, partial(step, op, trained, setting)))
        if cuda:
            found.append(Case(point(PAGED), first, partial(paged, trained, setting)))
    clipped = Point(ADAMW, small.model, small.name + CLIPPED, 0, 0, rank=small.rank)
    return [*found, Case(clipped, 2, partial(step, ADAMW, small, setting, clipped=True))]


def step(op: str, trained: Trained, setting: Setting, *, clipped: bool = False) -> Work:
    """All tools with state of one width."""
    absent: dict[str, str] = {}
    race = Race(trained, setting.device, clipped, 8 if op == EIGHT_BIT else 32)
    own = {"bits": race.bits, "rounding": "nearest", **({"max_grad_norm": MAX_NORM} if clipped else {})}  # as peers do
    variants = [race.variant(OURS, lambda p: optim.AdamW(p, **SETTINGS, **own), own=True)]
    if op == ADAMW:
        variants.append(race.variant(FUSED, lambda p: torch.optim.AdamW(p, **SETTINGS, fused=True)))
        variants.append(race.variant(FOREACH, lambda p: torch.optim.AdamW(p, **SETTINGS, foreach=True)))
    if present(bnb.missing(), absent, "bitsandbytes"):
        make = partial(bnb.adamw, bits=race.bits, **SETTINGS)
        variants.append(race.variant(bnb.optimizer_name(race.bits), make))
    wanted = op == EIGHT_BIT and setting.device.type == "cuda"
    if wanted and present(torchao_optim.missing(), absent, torchao_optim.NAME):
        variants.append(race.variant(torchao_optim.NAME, partial(torchao_optim.adamw, **SETTINGS)))
    return race.work(variants, absent)


def paged(trained: Trained, setting: Setting) -> Work:
    """32-bit state of which a quarter fits the budget, beside nothing but the copies of the rest, both ways at once.

    bitsandbytes pages by CUDA's managed memory, which over-subscribed can hang a GPU: it has no part in this."""
    race = Race(trained, setting.device, False, 32)
    budget = int(race.state_bytes / RESIDENT_SHARE)
    variants = [race.variant(OURS, lambda p: optim.AdamW(p, **SETTINGS, rounding="nearest", budget=budget), own=True)]
    copies = Variant(COPIES, lambda: copies_both_ways(int(race.state_bytes) - budget, setting.device), lambda done: 0.0)
    return race.work([*variants, copies], {})


@dataclass(frozen=True)
class Race:
    """One point: the same weights and gradients for every tool."""

    trained: Trained
    device: torch.device
    clipped: bool
    bits: int

    @property
    def state_bytes(self) -> float:
        """Of two moments: 4 bytes each, or 1 and its part of a block's scale."""
        return self.trained.size * (8 if self.bits == 32 else 2 * (1 + 4 / 256))

    def variant(self, name: str, make: Callable[[Parameters], Any], *, own: bool = False) -> Variant:
        truth = Truth(self.trained, self.device, self.clipped)
        judge = truth.by_element if self.bits == 32 else truth.by_norm
        return Variant(name, lambda: self.call(name, make), judge, own, facts)

    def call(self, name: str, make: Callable[[Parameters], Any]) -> "Step":
        """The last of the gate's steps, with all before it done."""
        parameters = self.trained.parameters(self.device)
        taken = Step(parameters, make(parameters), self.clipped and name != OURS)
        for number in range(1, GATE_STEPS + 1):
            for parameter, gradient in zip(parameters, self.trained.gradients(number, self.device), strict=True):
                parameter.grad = gradient
            if number < GATE_STEPS:
                taken(0)
        return taken

    def work(self, variants: list[Variant], absent: dict[str, str]) -> Work:
        """Weights and both moments are read and written, gradients read, and read once more for their norm."""
        weights = self.trained.size * self.trained.dtype.itemsize
        moved = (4 if self.clipped else 3) * weights + 2 * self.state_bytes
        extra = {"parameters": self.trained.size, "tensors": len(self.trained.shapes)}
        extra["parameter_dtype"] = str(self.trained.dtype).removeprefix("torch.")
        cuda = self.device.type == "cuda"
        return Work(variants, 0.0, moved, 1, ("wall",), absent, peak=cuda, least_rounds=3, extra=extra)


@dataclass(frozen=True)
class Step:
    """A Call: one step; returns the weights."""

    parameters: Parameters
    optimizer: Any
    clips: bool  # by torch's function, where the optimizer does not do it itself

    def __call__(self, i: int) -> Parameters:
        if self.clips:
            nn.utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=True)
        self.optimizer.step()
        return self.parameters


@dataclass(frozen=True)
class Truth:
    """The gate's steps in float64, a tensor at a time."""

    trained: Trained
    device: torch.device
    clipped: bool

    def weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(before, after) of each tensor."""
        scales = [self.scale(number) for number in range(1, GATE_STEPS + 1)]
        gradients = [self.trained.gradients(number, self.device) for number in range(1, GATE_STEPS + 1)]
        for start, *some in zip(self.trained.weights(self.device), *gradients, strict=True):
            p, mean, square = start.double(), torch.zeros_like(start.double()), torch.zeros_like(start.double())
            for number, (gradient, scale) in enumerate(zip(some, scales, strict=True), 1):
                p = adamw(p, gradient.double() * scale, mean, square, number)
            yield start, p

    def scale(self, number: int) -> float:
        if not self.clipped:
            return 1.0
        squares = [float(g.double().square().sum()) for g in self.trained.gradients(number, self.device)]
        return min(1.0, MAX_NORM / (sum(squares) ** 0.5 + 1e-6))

    def by_element(self, given: Sequence[Tensor]) -> float:
        """The largest error over its bound.

        A step may round the weight's factor, their product and the new weight. Its own size may be off by some units,
        as moments cancel: units of bf16 where weights are bf16, since torch keeps its moments so.
        """
        unit, worst = UNIT[self.trained.dtype], 0.0
        for mine, (start, exact) in zip(given, self.weights(), strict=True):
            size = torch.maximum(start.double().abs(), exact.abs()) + SETTINGS["lr"]
            bound = GATE_STEPS * unit * (3 * size + 64 * SETTINGS["lr"])
            worst = max(worst, _finite(((mine.detach().double() - exact).abs() / bound).max()))
        return worst

    def by_norm(self, given: Sequence[Tensor]) -> float:
        """The error of the whole update, beside what rounding the weights alone may do."""
        unit, error, update, rounding = UNIT[self.trained.dtype], 0.0, 0.0, 0.0
        for mine, (start, exact) in zip(given, self.weights(), strict=True):
            error += float((mine.detach().double() - exact).square().sum())
            update += float((exact - start.double()).square().sum())
            rounding += float((GATE_STEPS * unit * exact).square().sum())
        return _finite(error**0.5 / (EIGHT_BIT_BOUND * update**0.5 + rounding**0.5))


def adamw(p: Tensor, g: Tensor, mean: Tensor, square: Tensor, number: int) -> Tensor:
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; the moments in place."""
    beta1, beta2 = SETTINGS["betas"]
    mean.mul_(beta1).add_(g, alpha=1 - beta1)
    square.mul_(beta2).add_(g * g, alpha=1 - beta2)
    step = (mean / (1 - beta1**number)) / ((square / (1 - beta2**number)).sqrt() + SETTINGS["eps"])
    return p - SETTINGS["lr"] * (step + SETTINGS["weight_decay"] * p)


def _finite(value: Tensor | float) -> float:
    value = float(value)
    return value if value == value else float("inf")


def facts(call: Step) -> dict[str, Any]:
    """Bytes of state, and on a GPU the launches of a step and the host's waits."""
    found: dict[str, Any] = state_bytes(call.optimizer)
    if call.parameters[0].device.type == "cuda":
        found |= host_calls(lambda: call(0))
    return found


def state_bytes(optimizer: Any) -> dict[str, int]:
    """As ours says it; else by the tensors in its state, each storage once. torchao's are subclasses of several."""
    if hasattr(optimizer, "state_bytes"):
        device, host = optimizer.state_bytes()
        return {"state_bytes": device, "state_bytes_on_host": host}
    storages: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain(value):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return {"state_bytes": sum(storages.values())}


def _plain(value: Any) -> list[Tensor]:
    if not isinstance(value, Tensor):
        return []
    if hasattr(value, "__tensor_flatten__"):
        return [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [value]


def host_calls(work: Callable[[], Any]) -> dict[str, int]:
    """How often `work` launches a kernel, and how often the host waits in it, as the profiler sees the CUDA runtime."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        with record_function("the work"):
            work()
        torch.cuda.synchronize()
    return count_calls([(e.name, e.time_range.start, e.time_range.end) for e in seen.events() or []], "the work")


def count_calls(events: Sequence[tuple[str, float, float]], within: str) -> dict[str, int]:
    """Launches and waits among (name, start, end) that begin while `within` lasts."""
    start, end = next((start, end) for name, start, end in events if name == within)
    names = [name for name, begun, _ in events if start <= begun <= end]
    launches = sum("LaunchKernel" in name or "GraphLaunch" in name for name in names)
    return {"launches": launches, "waits": sum(name.startswith("cu") and "Synchronize" in name for name in names)}


@cache
def _pinned() -> Tensor:
    return torch.empty(2, COPY_BYTES, dtype=torch.uint8, pin_memory=True)


def copies_both_ways(size: int, device: torch.device) -> Call:
    """`size` bytes to the device and as many back, on two streams that wait for nothing: what paging cannot beat."""
    host, staging = _pinned(), torch.empty(2, COPY_BYTES, dtype=torch.uint8, device=device)
    streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]

    def call(i: int) -> None:
        current = torch.cuda.current_stream(device)
        for stream, target, source in zip(streams, (staging[0], host[1]), (host[0], staging[1]), strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for done in range(0, size, COPY_BYTES):
                    length = min(COPY_BYTES, size - done)
                    target[:length].copy_(source[:length], non_blocking=True)
            current.wait_stream(stream)

    return call
