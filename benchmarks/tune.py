"""Remeasures the dispatch table on this GPU: `python -m benchmarks.tune [--check] [--minutes N] [--table FILE]`.

For every shape, dtype and number of rows it times the fused kernel in each candidate configuration and the fallback
(decode, then F.linear), in turn; then the forms of base + LoRA. A result that fails its gate is no candidate. The rows
go into kernels/table.json, where they decide for their shape from the next start on. With --check nothing is written:
the dispatcher's choice is timed against the fallback, and a point that is slower ends in exit code 1.

Points run from the commonest on (bf16 first); --minutes bounds the run, and what is left out keeps the row it had.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.kernels import dispatch, plan
from fourbit.kernels.lora_linears import lora_linears4bit

from . import CHECKOUT, ceilings, gate, machine
from .cases import Setting
from .lora_buffers import ALPHA
from .ops_grouped import groups
from .run import micro, one_line
from .shapes import CUDA, Grid, Projection
from .timing import LEAST_ROUNDS, Call, Clock, Timing, clock_for, interleave, ratio, sets_for
from .tune_table import Row, dump, merged
from .weights import BYTES_PER_PARAMETER, Weights

TABLE = CHECKOUT / "kernels" / "table.json"
GRAPHED_TO = 64
PROGRAMS = (1, 2, 4)  # on a processor at a time, for configurations otherwise the same
FAR = 3.0  # candidates that the cost model finds this many times slower than the best are not tried
SLOWER = 0.98  # of the fallback's speed: what --check lets pass, the noise of two equal calls
DTYPES = (torch.bfloat16, torch.float16)
DECODE = "decode"


@dataclass
class Tuner:
    """Measures points on one device until the time is up."""

    setting: Setting
    clock: Clock
    known: dict[str, Any]  # the table's entry for this architecture
    deadline: float
    point_seconds: float = 0.15
    wrong: list[str] = field(default_factory=list)
    left_out: int = 0
    say: Callable[[str], None] = print

    def rows(self, points: Sequence[Callable[[], Row | None]]) -> list[Row]:
        found = []
        for measure in points:
            if time.monotonic() > self.deadline:
                self.left_out += 1
                continue
            row = measure()
            found += [row] if row is not None else []
        return found

    def linear(self, shape: Projection, M: int) -> Row | None:
        """One product: the quickest right configuration, and the fallback."""
        from fourbit.kernels import matmul4bit_triton

        work = Products(shape, M, self.setting)
        size = plan.Size(M, shape.N, shape.K)
        configs = candidates(self.known, size) if matmul4bit_triton.applies(self.setting.dtype, work.stored(0)) else []
        calls = {DECODE: work.fallback}
        for i, config in enumerate(configs):
            call = lambda j, config=config: matmul4bit_triton.matmul(work.x[j], work.stored(j), None, config)  # noqa: E731
            if self.right(f"{shape.model} {shape.name} M={M} {config}", call, work.judge(config)):
                calls[str(i)] = call
        timings = self.times(calls, work.sets, M)
        row = {"op": "linear", "dtype": name(self.setting.dtype), "N": shape.N, "K": shape.K, "M": M}
        row["decode_us"] = micro(timings.pop(DECODE).median)
        if timings:
            best = min(timings, key=lambda key: timings[key].median)
            row |= {"fused_us": micro(timings[best].median), "config": configs[int(best)]}
            self.say(f"{row['dtype']} {shape.N}x{shape.K} M={M}: fused {row['fused_us']}, decode {row['decode_us']} us")
        return row if timings else None

    def lora(self, shapes: Sequence[Projection], M: int, rank: int) -> Row | None:
        """Forward of base + LoRA over projections of one input, in every form."""
        work = [Products(shape, M, self.setting, seed=i) for i, shape in enumerate(shapes)]
        adapters = [adapter(shape, rank, self.setting) for shape in shapes]
        sets = min(each.sets for each in work)

        def call(form: str) -> Call:
            masters = [A for A, _ in adapters], [B for _, B in adapters]
            scales = [ALPHA / rank] * len(shapes)
            return lambda i: lora_linears4bit(
                work[0].x[i], [each.stored(i) for each in work], [None] * len(work), *masters, scales, form=form
            )

        def judge(outputs: list[Tensor]) -> float:
            late = any(plan_scales_late(work[0].x[0], shape.N) for shape in shapes)
            worst = 0.0
            for each, (A, B), y in zip(work, adapters, outputs, strict=True):
                weight = each.weights.exact if late else each.weights.rounded(self.setting.dtype)
                rounded = A.to(self.setting.dtype), B.to(self.setting.dtype)
                truth = gate.LoRATruth(work[0].x[0], torch.zeros_like(y), weight, *rounded, ALPHA / rank, None, late)
                worst = max(worst, truth.outputs()["y"].worst(y))
            return worst

        calls = {}
        for form in self.forms(work[0].x[0], shapes):
            if self.right(f"{[s.N for s in shapes]}x{shapes[0].K} M={M} r={rank} {form}", call(form), judge):
                calls[form] = call(form)
        if not calls:
            return None
        row: Row = {"op": "lora", "dtype": name(self.setting.dtype), "N": [s.N for s in shapes], "K": shapes[0].K}
        row |= {"rank": rank * len(shapes), "M": M}
        row |= {f"{form}_us": micro(t.median) for form, t in self.times(calls, sets, M).items()}
        times = ", ".join(f"{form} {row[f'{form}_us']} us" for form in calls)
        self.say(f"{row['dtype']} {row['N']}x{row['K']} r={row['rank']} M={M}: {times}")
        return row

    def forms(self, x: Tensor, shapes: Sequence[Projection]) -> list[str]:
        """ "fused" only where every base product is: the op refuses it elsewhere."""
        fused = all(dispatch.plan_linear(x, shape.N).config is not None for shape in shapes)
        return [form for form in plan.FORMS if form != "fused" or fused]

    def check(self, shape: Projection, M: int) -> Row | None:
        """The dispatcher's own choice against the fallback; a row when it is slower."""
        work = Products(shape, M, self.setting)
        layers = [work.weights.layer(i) for i in range(work.sets)]
        timings = self.times({"ours": lambda i: layers[i](work.x[i]), DECODE: work.fallback}, work.sets, M)
        low, middle, high = ratio(timings["ours"], timings[DECODE])
        chosen = dispatch.plan_linear(work.x[0], shape.N).path
        slower = middle < SLOWER
        self.say(
            f"{name(self.setting.dtype)} {shape.N}x{shape.K} M={M}: {chosen}, fallback/ours "
            f"{middle:.3f} ({low:.3f}-{high:.3f}){' SLOWER' if slower else ''}"
        )
        return {"N": shape.N, "K": shape.K, "M": M, "ratio": middle} if slower else None

    def right(self, what: str, call: Call, judge: Callable[[Any], float]) -> bool:
        """Whether the candidate computes what it should; what does not is said and counted."""
        try:
            worst = judge(call(0))
        except Exception as problem:
            worst, what = float("inf"), f"{what}: {one_line(problem)}"
        if worst <= 1:
            return True
        self.wrong.append(f"{what}: error {worst:.3g} times its bound")
        self.say(f"REFUSED {self.wrong[-1]}")
        return False

    def times(self, calls: dict[str, Call], sets: int, M: int) -> dict[str, Timing]:
        way = (self.setting.small_way if M <= GRAPHED_TO else self.setting.way)[0]
        samplers = {key: self.clock.sampler(call, sets, way) for key, call in calls.items()}
        return {key: Timing(tuple(t), way) for key, t in interleave(samplers, self.point_seconds, LEAST_ROUNDS).items()}


class Products:
    """x and a weight in as many copies as it takes to stay out of the cache."""

    def __init__(self, shape: Projection, M: int, setting: Setting, seed: int = 0) -> None:
        moved = BYTES_PER_PARAMETER * shape.weights + setting.dtype.itemsize * M * (shape.N + shape.K)
        self.sets, self.dtype = sets_for(moved, setting.cache_bytes, most=32), setting.dtype
        self.weights = Weights.random(shape.N, shape.K, setting.device, self.sets, seed=seed)
        first = setting.normal(M, shape.K, seed=1)
        self.x = [first, *(first.clone() for _ in range(self.sets - 1))]
        self.layers = [self.weights.layer(i) for i in range(self.sets)]

    def stored(self, i: int) -> Any:
        return self.layers[i].stored

    def fallback(self, i: int) -> Tensor:
        return F.linear(self.x[i], self.layers[i].dequantize(self.dtype))

    def judge(self, config: dict[str, Any]) -> Callable[[Tensor], float]:
        late = config["scale_on"] == "sums"
        weight = self.weights.exact if late else self.weights.rounded(self.dtype)
        return gate.product(self.x[0], weight, gate.UNIT[self.dtype], scaled_late=late).worst


def plan_scales_late(x: Tensor, N: int) -> bool:
    config = dispatch.plan_linear(x, N).config
    return config is not None and config["scale_on"] == "sums"


def candidates(known: dict[str, Any], size: plan.Size) -> list[dict[str, Any]]:
    """Configurations worth a try: those the cost model finds near the best, each with several programs a processor."""
    seconds = [plan.fused_seconds(known, size, config) for config in known["fused"]]
    near = [c for c, s in zip(known["fused"], seconds, strict=True) if s <= FAR * min(seconds)]
    return [config | {"programs": programs} for config in near for programs in PROGRAMS]


def adapter(shape: Projection, rank: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """fp32 masters whose values the run's dtype holds exactly."""
    A = setting.normal(rank, shape.K, seed=3, scale=shape.K**-0.5).float()
    return A, setting.normal(shape.N, rank, seed=4, scale=rank**-0.5).float()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shapes_of(grid: Grid) -> list[Projection]:
    """One projection of each size."""
    return list({(p.N, p.K): p for p in reversed(grid.projections)}.values())[::-1]


def groups_of(grid: Grid) -> Iterator[list[Projection]]:
    """What shares an input: every projection alone, q/k/v and gate/up."""
    for shape in shapes_of(grid):
        yield [shape]
    for model in dict.fromkeys(p.model for p in grid.projections):
        yield from groups([p for p in grid.projections if p.model == model]).values()


def main(argv: Sequence[str] | None = None, grid: Grid = CUDA, device: torch.device | None = None) -> int:
    """`grid` and `device` replace the defaults: for tests."""
    start = time.monotonic()
    options = parser().parse_args(argv)
    if device is None and not torch.cuda.is_available():
        parser().error("tuning measures a GPU, and torch sees none here")
    device = device or torch.device("cuda", torch.cuda.current_device())
    architecture, deadline = dispatch.architecture(device), start + 60 * options.minutes
    table = json.loads(options.table.read_text())
    known = plan.entry(architecture)
    if known is None:
        parser().error(
            f'{options.table} has no entry for {architecture} to start from: add its ceilings and "fused" rows'
        )
    settings = [Setting(device, dtype, machine.cache_bytes(device)) for dtype in DTYPES]
    tuners = [Tuner(setting, clock_for(device), known, deadline) for setting in settings]
    if options.check:
        return check(tuners, grid)
    limits = ceilings.measure(settings[0], tuners[0].clock)
    fresh = {"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none", "source": "measured"}
    fresh |= {"copy_bandwidth": float(f"{limits.bandwidth:.3g}"), "matmul_rate": float(f"{limits.rate:.3g}")}
    fresh |= {"sms": dispatch.processors(device)}
    for op in ("linear", "lora"):  # what wins for the base decides which forms of LoRA there are
        for tuner in tuners:
            rows = tuner.rows(list(points(tuner, op, grid)))
            table[architecture] = merged(table.get(architecture, known) | fresh, rows)
            options.table.write_text(dump(table))
        reload(options.table)
    return report(tuners, f"wrote {options.table}")


def points(tuner: Tuner, op: str, grid: Grid) -> Iterator[Callable[[], Row | None]]:
    served = max((row["M"] for row in tuner.known["fused"]), default=0)  # above, there is nothing to choose
    if op == "linear":
        for M in grid.rows:
            for shape in shapes_of(grid) if served >= M else ():
                yield lambda shape=shape, M=M: tuner.linear(shape, M)
    else:
        for rank in grid.ranks:
            for M in grid.rows:
                for group in groups_of(grid):
                    yield lambda group=group, M=M, rank=rank: tuner.lora(group, M, rank)


def check(tuners: Sequence[Tuner], grid: Grid) -> int:
    for tuner in tuners:
        asked = [lambda s=s, M=M, t=tuner: t.check(s, M) for M in grid.rows for s in shapes_of(grid)]
        slower = tuner.rows(asked)
        tuner.wrong += [
            f"{row['N']}x{row['K']} M={row['M']}: {row['ratio']:.3f} of the fallback's speed" for row in slower
        ]
    return report(tuners, f"checked against the fallback, {SLOWER:g} of its speed allowed")


def report(tuners: Sequence[Tuner], done: str) -> int:
    left_out, wrong = sum(t.left_out for t in tuners), [text for t in tuners for text in t.wrong]
    for text in wrong:
        print(f"WRONG: {text}")
    print(f"{done}; {left_out} points left out for want of time, {len(wrong)} wrong")
    return int(bool(wrong))


def reload(path: Path) -> None:
    """What was just measured decides from here on, if it is the package's own table that was written."""
    if path.samefile(TABLE):
        for cached in (plan.table, plan.linear, plan.lora):
            cached.cache_clear()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--check", action="store_true", help="write nothing; fail where a choice is slower than decoding")
    made.add_argument("--minutes", type=float, default=9.0, help="stop taking points after this long (default 9)")
    made.add_argument("--table", type=Path, default=TABLE, help="default: kernels/table.json of this checkout")
    return made


if __name__ == "__main__":
    sys.exit(main())
