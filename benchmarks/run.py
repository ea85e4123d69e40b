"""The run: build each case, judge every variant, time in turn those that passed, and keep what there is no time for.

A variant whose result is wrong, or that raises, is refused: no time of it is taken. If it is one of ours, the run ends
in exit code 1. Cases run by priority, what the targets are held to first; when the time is up the rest is left out.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .cases import GATE_SEED, OURS, Case, Setting, Variant, Work
from .ceilings import Ceilings
from .timing import LEAST_ROUNDS, Call, Clock, Timing, interleave, ratio

NO_ROOM = "does not fit in memory"
Line = dict[str, Any]  # one line of a result file
Print = Callable[[str], None]


@dataclass
class Result:
    """Everything a run found, as lines of the result file, and what it did not get to."""

    lines: list[Line] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why
    wrong: list[str] = field(default_factory=list)  # ours that failed

    def figures(self) -> list[Line]:
        return [line for line in self.lines if line["kind"] == "figure"]


@dataclass(frozen=True)
class Runner:
    setting: Setting
    clock: Clock
    ceilings: Ceilings
    facts: Line
    case_seconds: float
    deadline: float  # of time.monotonic()
    least_rounds: int = LEAST_ROUNDS
    keep: Callable[[Line], None] = lambda line: None  # takes every line as soon as it is there
    say: Print = print

    def run(self, cases: list[Case]) -> Result:
        result = Result()
        for case in in_turn(cases):
            if time.monotonic() > self.deadline:
                result.left_out.append(case.point.name)
                continue
            self.case(case, result)
            self.clean()
        return result

    def case(self, case: Case, result: Result) -> None:
        """Judge and time one case. What does not fit in memory is left out; what fails otherwise counts as wrong."""
        try:
            work = case.build()
            result.absent |= work.absent
            if calls := self.judged(case, work, result):
                self.timed(case, work, calls, result)
        except torch.OutOfMemoryError as problem:
            self.say(f"LEFT OUT {case.point.name}: {one_line(problem)}")
            result.left_out.append(case.point.name)
        except Exception as problem:
            self.say(f"FAILED {case.point.name}: {one_line(problem)}")
            result.wrong.append(f"{case.point.name}: {one_line(problem)}")

    def timed(self, case: Case, work: Work, calls: dict[str, tuple[Call, float]], result: Result) -> None:
        timings, walls = self.times(work, calls)
        facts = {variant.name: variant.facts for variant in work.variants}
        for name in calls:
            line = self.figure(case, work, name, timings, walls)
            if work.peak:
                line["peak_bytes"] = self.clock.peak_bytes(calls[name][0])
            line |= facts[name](calls[name][0])
            self.add(line | {"gate": calls[name][1]}, result)
        self.say(shown(case, [line for line in result.lines if line.get("name") == case.point.name]))

    def add(self, line: Line, result: Result) -> None:
        result.lines.append(line)
        self.keep(line)

    def judged(self, case: Case, work: Work, result: Result) -> dict[str, tuple[Call, float]]:
        """The calls that computed what they should, with their largest error over its bound."""
        passed: dict[str, tuple[Call, float]] = {}
        for variant in work.variants:
            problem, call, worst = self.judge(variant)
            if problem is None:
                if call is not None:
                    passed[variant.name] = (call, worst)
                continue
            text = f"{case.point.name}: {variant.name}: {problem}"
            self.say(f"REFUSED {text}")
            fields = {"kind": "refused", "name": case.point.name, **case.point.fields(), "variant": variant.name}
            self.add({**fields, "problem": problem, **self.facts}, result)
            if variant.own and not problem.startswith(NO_ROOM):
                result.wrong.append(text)
        return passed

    def judge(self, variant: Variant) -> tuple[str | None, Call | None, float]:
        """(what is wrong or None, the call, the largest error over its bound)."""
        try:
            torch.manual_seed(GATE_SEED)
            call = variant.make()
            torch.manual_seed(GATE_SEED)
            worst = round(float(variant.judge(call(0))), 6)
        except torch.OutOfMemoryError as problem:
            return f"{NO_ROOM}: {one_line(problem)}", None, 0.0
        except Exception as problem:  # a peer may fail in any way it likes
            return one_line(problem), None, 0.0
        return (None if worst <= 1 else f"error {worst:.3g} times its bound"), call, worst

    def times(
        self, work: Work, calls: dict[str, tuple[Call, float]]
    ) -> tuple[dict[str, Timing], dict[str, Timing] | None]:
        """Timings in the leading way of the work, and by the host's clock where that is asked for too."""
        share, least = self.case_seconds / len(work.ways), min(self.least_rounds, work.least_rounds)
        samplers, ways = {}, {}
        for name, (call, _) in calls.items():
            samplers[name], ways[name] = self.sampler(call, work.sets, work.ways[0])
        taken = interleave(samplers, share, least)
        timings = {name: Timing(tuple(seconds), ways[name]) for name, seconds in taken.items()}
        if len(work.ways) == 1:
            return timings, None
        samplers = {name: self.clock.sampler(call, work.sets, work.ways[1]) for name, (call, _) in calls.items()}
        walls = {
            name: Timing(tuple(seconds), work.ways[1]) for name, seconds in interleave(samplers, share, least).items()
        }
        return timings, walls

    def sampler(self, call: Call, sets: int, way: str) -> tuple[Callable[[], float], str]:
        """What cannot be captured in a graph is enqueued ahead instead, and the figure says so."""
        try:
            return self.clock.sampler(call, sets, way), way
        except Exception:
            if way != "graph":
                raise
            return self.clock.sampler(call, sets, "queue"), "queue"

    def figure(
        self, case: Case, work: Work, name: str, timings: dict[str, Timing], walls: dict[str, Timing] | None
    ) -> Line:
        timing = timings[name]
        low, middle, high = timing.quartiles
        line: Line = {"kind": "figure", "name": case.point.name, **case.point.fields(), "variant": name}
        line |= {"us": micro(middle), "us_quartiles": [micro(low), micro(high)], "rounds": len(timing.seconds)}
        line |= {"timed": timing.timed, "sets": work.sets, "flops": work.flops, "bytes": work.bytes}
        line |= {"dtype": str(self.setting.dtype).removeprefix("torch."), **work.extra}
        if work.flops or work.bytes:
            line["roofline_share"] = round(self.ceilings.seconds(work.flops, work.bytes) / middle, 4)
            line["bandwidth_share"] = round(work.bytes / middle / self.ceilings.bandwidth, 4)
        if walls is not None:
            line["us_with_launch"] = micro(walls[name].median)
        if OURS in timings and name != OURS:
            line["over_ours"] = [round(value, 4) for value in ratio(timings[OURS], timing)]  # quartiles
        return line | self.facts

    def clean(self) -> None:
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()


def in_turn(cases: list[Case]) -> Iterator[Case]:
    """By priority; within one, a case of each op in turn, so that a short run has something of everything."""
    for priority in sorted({case.priority for case in cases}):
        queues: dict[str, list[Case]] = {}
        for case in cases:
            if case.priority == priority:
                queues.setdefault(case.point.op, []).append(case)
        while queues:
            for op in list(queues):
                yield queues[op].pop(0)
                if not queues[op]:
                    del queues[op]


def shown(case: Case, lines: list[Line]) -> str:
    """A line for people: who took how long."""
    times = ", ".join(f"{line['variant']} {line['us']:.4g}" for line in lines if line["kind"] == "figure")
    return f"{case.point.name}: {times} us"


def micro(seconds: float) -> float:
    return float(f"{seconds * 1e6:.5g}")


def one_line(problem: BaseException) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0][:300] if text else 'no message'}"
