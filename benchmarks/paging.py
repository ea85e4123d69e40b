"""The picture of docs/paging.md: `python -m benchmarks.paging [--budget BYTES] [--out FILE]`. Pages moving over a step.

A recorder between the pager and its device notes every copy and every update with the times of the device's own
events, so the picture shows what ran, and the counters beside it are the pager's. On a CUDA GPU these are its times. On
a CPU copies are host memory's and their times a model's: 25 GB/s in each direction, updates at 3 TB/s.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fourbit.kernels.page_device import CudaDevice, CudaEvent, Direction, PageDevice
from fourbit.optim import AdamW
from fourbit.optim.paging import PAGE_BYTES, Pager

PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "paging.svg"
PAGES = 16
ELEMENTS = PAGE_BYTES // 8  # of a page: two fp32 moments
BEFORE = 8e-3  # seconds of other work before each step; forward and backward take longer, but no longer picture
BANDWIDTH = 25e9  # the model's, bytes a second each way
UPDATE_RATE = 3e12 / (26 / 8)  # bytes of state a second: AdamW moves 26 bytes for the 8 that it keeps
COLOURS = {"in": "#3182bd", "out": "#e6550d", "update": "#111111", "stay": "#e5e5e5", "other": "#9ecae1"}


@dataclass
class ModelEvent:
    """A copy, or a mark in compute's work: seconds on the model's clock."""

    begin: float
    end: float

    def synchronize(self) -> None:
        """Nothing to do: copies are done when they return."""


class ModelDevice(PageDevice):
    """Host memory whose copies have the times that a bus would take for them."""

    def __init__(self, bandwidth: float = BANDWIDTH) -> None:
        self.bandwidth, self.clock, self.waited = bandwidth, 0.0, 0.0
        self._free_at: dict[Direction, float] = {"in": 0.0, "out": 0.0}

    def work(self, seconds: float) -> None:
        """Compute is busy for so long."""
        self.clock += seconds

    def mark(self) -> ModelEvent:
        return ModelEvent(self.clock, self.clock)

    def wait(self, event: ModelEvent) -> None:
        self.waited += max(0.0, event.end - self.clock)
        self.clock = max(self.clock, event.end)

    def copy(self, direction: Direction, target: Tensor, source: Tensor, after: Sequence[ModelEvent]) -> ModelEvent:
        begin = max(self._free_at[direction], self.clock, *(event.end for event in after))
        self._free_at[direction] = begin + target.numel() / self.bandwidth
        target.copy_(source)
        return ModelEvent(begin, self._free_at[direction])

    def stalled(self) -> float:
        return self.waited


@dataclass
class Moved:
    """Something that happened to a page: "in", "out" or "update", between two events."""

    what: str
    memory: int  # address on the device
    host: int  # address on the host; 0 for an update
    begin: Any  # event
    end: Any = None


@dataclass
class Recorder:
    """A device that notes what the pager asks of it."""

    device: Any
    start: Any = None  # event that times count from; None on the model's clock
    moves: list[Moved] = field(default_factory=list)
    updating: Moved | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def close(self) -> None:
        """The update under way has been queued."""
        if self.updating is not None:
            self.updating.end, self.updating = self.device.mark(), None

    def use(self, memory: Tensor) -> None:
        self.close()
        self.device.use(memory)
        self.updating = Moved("update", memory.data_ptr(), 0, self.device.mark())
        self.moves.append(self.updating)
        if isinstance(self.device, ModelDevice):
            self.device.work(memory.numel() / UPDATE_RATE)

    def times(self, event: Any) -> tuple[float, float]:
        """Begin and end of what an event stands for, in seconds; the host waits for it."""
        if not isinstance(event, CudaEvent):
            return event.begin, event.end
        event.synchronize()
        since = self.start.begin.elapsed_time
        return since(event.begin) / 1e3, since(event.end) / 1e3

    def mark(self) -> Any:
        self.close()
        return self.device.mark()

    def copy(self, direction: Any, target: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        event = self.device.copy(direction, target, source, after)
        on_device, host = (target, source) if direction == "in" else (source, target)
        self.moves.append(Moved(direction, on_device.data_ptr(), host.data_ptr(), event, event))
        return event


def run(
    budget: int, elements: int = PAGES * ELEMENTS, steps: int = 3
) -> tuple[Pager, Recorder, list[tuple[float, float]]]:
    """Some steps of AdamW under a budget. Returns also the begin and end of the other work before each step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recorder = Recorder(CudaDevice(device) if device.type == "cuda" else ModelDevice())
    recorder.start = recorder.device.mark()
    pager = Pager(recorder, budget)  # type: ignore[arg-type]  # it has all that a PageDevice has
    weight = nn.Parameter(torch.randn(elements, device=device))
    optimizer = AdamW([weight], budget=budget)
    optimizer.pager = pager
    others = []
    for _ in range(steps):
        weight.grad = torch.randn_like(weight)
        begin = recorder.mark()
        other_work(recorder.device, device)
        others.append((begin, recorder.mark()))
        optimizer.step()
        recorder.close()
    recorder.settle()
    return pager, recorder, [(recorder.times(begin)[0], recorder.times(end)[1]) for begin, end in others]


def other_work(device: PageDevice, where: torch.device) -> None:
    if isinstance(device, ModelDevice):
        device.work(BEFORE)
        return
    a = torch.randn(8192, 8192, device=where, dtype=torch.bfloat16)
    for _ in range(6):
        a @ a


def draw(pager: Pager, recorder: Recorder, others: list[tuple[float, float]], path: Path) -> None:
    """The last step but one: the work before it, the step, and the work after it."""
    start, stop = others[-2][0], others[-1][0] + 0.35 * (others[-1][1] - others[-1][0])
    ms = lambda seconds: 1e3 * (seconds - start)  # noqa: E731
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    streams, table = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3.4])
    spans = page_spans(pager, recorder)
    for page, first, last in stays(pager, spans):
        table.barh(page, ms(min(last, stop)) - ms(first), left=ms(first), height=0.9, color=COLOURS["stay"])
    for what, page, begin, end in spans:
        lane = {"update": 2, "in": 1, "out": 0}[what]
        for axes, row, height in ((table, page, 0.55), (streams, lane, 0.7)):
            least = 0.05 if what == "update" else 0.0  # an update is too short to be seen otherwise
            axes.barh(row, max(ms(end) - ms(begin), least), left=ms(begin), height=height, color=COLOURS[what])
    for begin, end in others:
        streams.barh(2, ms(end) - ms(begin), left=ms(begin), height=0.7, color=COLOURS["other"], zorder=0)
    describe(pager, streams, table, ms(stop))
    figure.suptitle(headline(pager, recorder, len(others)), fontsize=10)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def page_spans(pager: Pager, recorder: Recorder) -> list[tuple[str, int, float, float]]:
    """(what, page, begin, end) in seconds, in the order in which it was asked for."""
    numbered = [*enumerate(pager.pages)]
    by_host = {page.host.data_ptr(): number for number, page in numbered if page.host is not None}
    by_memory = {page.frame.memory.data_ptr(): number for number, page in numbered if page.frame and page.resident}
    spans = []
    for move in recorder.moves:
        if move.host:
            by_memory[move.memory] = by_host[move.host]  # a frame's page is the last that came in
        begin, end = recorder.times(move.begin)[0], recorder.times(move.end or move.begin)[1]
        spans.append((move.what, by_memory[move.memory], begin, end))
    return spans


def stays(pager: Pager, spans: list[tuple[str, int, float, float]]) -> list[tuple[int, float, float]]:
    """(page, from, to): when a page had a place on the device; from its copy in to the end of its copy out."""
    found = [(number, 0.0, float("inf")) for number, page in enumerate(pager.pages) if page.resident]
    since: dict[int, float] = {}
    for what, page, begin, end in spans:
        if what == "in":
            since[page] = begin
        elif what == "out" and page in since:
            found.append((page, since.pop(page), end))
    return found + [(page, begin, float("inf")) for page, begin in since.items()]


def describe(pager: Pager, streams: Axes, table: Axes, end: float) -> None:
    streams.set_yticks([0, 1, 2], ["copies out", "copies in", "compute"])
    table.set_yticks(range(len(pager.pages)), [*map(str, range(len(pager.pages)))])
    table.invert_yaxis()
    table.set_xlim(0, end)
    table.set_ylabel("page")
    table.set_xlabel("milliseconds")
    labels = {"stay": "on the device", "in": "copied in", "update": "updated", "out": "copied out"}
    handles = [table.barh(-5, 0, color=COLOURS[key], label=label) for key, label in labels.items()]
    handles.append(streams.barh(5, 0, color=COLOURS["other"], label="forward and backward (cut short)"))
    table.set_ylim(len(pager.pages) - 0.4, -0.6)
    streams.set_ylim(-0.6, 2.6)
    streams.legend(handles=handles, ncols=5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.32), fontsize=8)


def headline(pager: Pager, recorder: Recorder, steps: int) -> str:
    c, mib = pager.counters, 2**20
    clock = "a model's clock" if isinstance(recorder.device, ModelDevice) else torch.cuda.get_device_name()
    state, budget = sum(page.size for page in pager.pages), int(pager.budget)
    return (
        f"{state / mib:.0f} MiB of AdamW state in {len(pager.pages)} pages under {budget / mib:.0f} MiB, {clock}. "
        f"Counters after {steps} steps:\n{c.hits} hits, {c.misses} misses, {c.evictions} evictions, "
        f"{c.bytes_in / mib:.0f} MiB in, {c.bytes_out / mib:.0f} MiB out, {1e3 * c.stall_seconds:.1f} ms stalled, "
        f"at most {c.peak_bytes / mib:.0f} MiB on the device"
    )


def main() -> None:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "fourbit"  # the same file each time
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=8 * PAGE_BYTES)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    pager, recorder, others = run(options.budget)
    draw(pager, recorder, others, options.out)
    print(headline(pager, recorder, len(others)))


if __name__ == "__main__":
    main()
