"""The levels this library is held to on one H100, each a named check computed from a run's figures.

Every check looks at its worst point. It is met only if every point of the grid it speaks of was measured; points left
out by --only, --quick or the clock make it "not run", and a miss among those measured makes it "not met" all the same.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from . import ops_linear, ops_lora_cost, ops_memory, ops_weights, step
from .cases import OURS, Point
from .ops_linear import FALLBACK
from .optimizers import ADAMW, ADAPTER, COPIES, EIGHT_BIT, PAGED
from .peers import bnb, dense, peft_lora
from .shapes import LLAMA_1B, LLAMA_8B, LLAMA_70B

BNB = (bnb.NESTED, bnb.PLAIN, bnb.DECODED)
LARGE = 1 << 24  # weights from which a QLoRA linear is held to its ratios: k and v are trained in one pass with q
AIM_ROWS = range(16, 129)

Line = dict[str, Any]
Variants = dict[str, Line]  # of one point, by name
Measure = Callable[[Variants], float | None]  # None where what it compares with was not measured


@dataclass(frozen=True)
class Check:
    """`measure` gives a point's number: at least `least` if `upwards`, else at most. `aimed`: where `aim` holds."""

    name: str
    applies: Callable[[Point], bool]
    measure: Measure
    least: float
    aim: float | None = None
    upwards: bool = True
    aimed: Callable[[Point], bool] = lambda point: True

    def reaches(self, value: float, level: float) -> bool:
        return value >= level if self.upwards else value <= level


@dataclass(frozen=True)
class Finding:
    """What a check found: "met", "not met" or "not run"; the worst value, where, and how many points have one."""

    check: Check
    status: str
    aim_met: bool
    worst: float | None
    where: str
    points: int
    expected: int

    def fields(self) -> Line:
        found: Line = {"kind": "check", "check": self.check.name, "status": self.status, "aim_met": self.aim_met}
        found |= {"at_least" if self.check.upwards else "at_most": self.check.least, "aim": self.check.aim}
        return found | {"worst": self.worst, "where": self.where, "points": [self.points, self.expected]}

    def __str__(self) -> str:
        sign = ">=" if self.check.upwards else "<="
        status = f"{self.status}, aim too" if self.status == "met" and self.aim_met else self.status
        aim = "" if self.check.aim is None else f" (aim {self.check.aim:g})"
        worst = "" if self.worst is None else f": worst {self.worst:.3f} at {self.where}"
        where = f" [{self.points} of {self.expected} points]"
        return f"{status:14} {self.check.name} {sign} {self.check.least:g}{aim}{worst}{where}"


def over(*names: str) -> Measure:
    """How many times as long as ours the quickest of these takes; None if none was measured."""

    def measure(variants: Variants) -> float | None:
        times = [variants[name]["over_ours"][1] for name in names if "over_ours" in variants.get(name, {})]
        return min(times, default=None)

    return measure


def bandwidth(variants: Variants) -> float | None:
    return float(variants[OURS]["bandwidth_share"]) if OURS in variants else None


def lora_cost(variants: Variants) -> float | None:
    """The share that LoRA adds to the frozen layer's time."""
    ratio = over(ops_lora_cost.FROZEN)(variants)
    return None if ratio is None else 1 / ratio - 1


def workspaces(variants: Variants) -> float | None:
    """What 4-bit layers take above the same layers with dense weights, in workspaces of the largest weight."""
    pair = [variants.get(name, {}).get("peak_bytes") for name in (OURS, ops_memory.DENSE)]
    if None in pair:
        return None
    return float(pair[0] - pair[1]) / float(variants[OURS]["workspace_bytes"])


def _linear(point: Point) -> bool:
    return point.op == "linear"


def _batch(point: Point) -> bool:
    shape = (point.N, point.K) in ops_linear.HELD_BATCHES
    return _linear(point) and point.M in ops_linear.HELD_ROWS and shape


def _one_row(point: Point) -> bool:
    return _linear(point) and point.M == 1 and point.N * point.K >= ops_linear.HELD_ONE_ROW


def _decode(point: Point) -> bool:
    return point.op == "dequantize" and point.N * point.K >= ops_weights.HELD_FROM


def _qlora(rows: int) -> Callable[[Point], bool]:
    def applies(point: Point) -> bool:
        plain = point.op == "qlora" and point.rank == 16 and point.dropout == 0
        return plain and rows == point.M and point.N * point.K >= LARGE

    return applies


def _cost(point: Point) -> bool:
    return point.op == "lora_cost" and point.M == ops_lora_cost.HELD_ROWS and point.rank == 16


def _adapter(op: str) -> Callable[[Point], bool]:
    """All tensors of an 8B adapter of rank 16."""
    return lambda point: point.op == op and point.model == LLAMA_8B.model and point.projection == ADAPTER


def _large(*ops: str) -> Callable[[Point], bool]:
    return lambda point: point.op in ops and point.model in (LLAMA_70B.model, LLAMA_1B.model)


def times_copies(variants: Variants) -> float | None:
    ratio = over(COPIES)(variants)
    return None if ratio is None else 1 / ratio


def paging_cost(variants: Variants) -> float | None:
    """The share that paging adds to a training step's time."""
    ratio = variants.get(step.PAGED, {}).get("over_ours")
    return None if ratio is None else float(ratio[1]) - 1


CHECKS = [
    Check("decode: share of copy bandwidth", _decode, bandwidth, 0.85, 0.93),
    Check("decode: times bitsandbytes", _decode, over(bnb.NESTED), 1.25, 1.5),
    Check("one row: share of copy bandwidth", _one_row, bandwidth, 0.60, 0.75),
    Check("one row: times bitsandbytes", _one_row, over(*BNB), 1.0),
    Check("8 to 512 rows: times bitsandbytes", _batch, over(*BNB), 1.3, 2.0, aimed=lambda p: p.M in AIM_ROWS),
    Check("every point: times the best of bitsandbytes and our fallback", _linear, over(*BNB, FALLBACK), 0.98),
    Check("QLoRA linear, 8192 rows: times bitsandbytes + peft", _qlora(8192), over(peft_lora.QLORA), 1.35, 1.5),
    Check("QLoRA linear, 8192 rows: times dense without LoRA", _qlora(8192), over(dense.NAME), 0.85, 0.92),
    Check("QLoRA linear, 2048 rows: times bitsandbytes + peft", _qlora(2048), over(peft_lora.QLORA), 1.4, 1.5),
    Check("QLoRA linear, 2048 rows: times dense without LoRA", _qlora(2048), over(dense.NAME), 0.75, 0.92),
    Check("LoRA's cost, forward, 8192 rows", _cost, lora_cost, 0.05, 0.02, upwards=False),
    # 2%: rows padded to a multiple of 64 and what the allocator rounds up.
    Check("memory: workspaces of the largest weight", lambda p: p.op == "memory", workspaces, 1.02, upwards=False),
    Check("AdamW, 448 tensors: times bitsandbytes", _adapter(ADAMW), over(bnb.optimizer_name(32)), 10.0),
    Check("8-bit AdamW, 448 tensors: times bitsandbytes", _adapter(EIGHT_BIT), over(bnb.optimizer_name(8)), 10.0),
    Check("AdamW, 828 M and up: share of copy bandwidth", _large(ADAMW, EIGHT_BIT), bandwidth, 0.70, 0.85),
    Check("paged AdamW, a quarter fits: times its copies", _large(PAGED), times_copies, 1.15, upwards=False),
    Check("paged AdamW: share added to a step", lambda p: p.op == "step", paging_cost, 0.03, 0.01, upwards=False),
]


def findings(lines: Iterable[Line], points: Sequence[Point]) -> list[Finding]:
    """Every check against a run's figures; `points` is the whole grid, measured or not."""
    by_name: dict[str, Variants] = {}
    for line in lines:
        if line["kind"] == "figure":
            by_name.setdefault(line["name"], {})[line["variant"]] = line
    return [_finding(check, by_name, [point for point in points if check.applies(point)]) for check in CHECKS]


def _finding(check: Check, by_name: dict[str, Variants], expected: list[Point]) -> Finding:
    values = {point: check.measure(by_name.get(point.name, {})) for point in expected}
    measured = {point: value for point, value in values.items() if value is not None}
    if not measured:
        return Finding(check, "not run", False, None, "", 0, len(expected))
    where = (min if check.upwards else max)(measured, key=lambda point: measured[point])
    whole = len(measured) == len(expected)
    reached = check.reaches(measured[where], check.least)
    aimed = [value for point, value in measured.items() if check.aimed(point)]
    aim_met = whole and check.aim is not None and all(check.reaches(value, check.aim) for value in aimed)
    status = "not met" if not reached else "met" if whole else "not run"
    return Finding(check, status, aim_met, round(measured[where], 4), where.name, len(measured), len(expected))
