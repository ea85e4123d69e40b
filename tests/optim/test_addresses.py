"""The table of addresses under CUDA graphs, with capture and replay played by hand: what a graph does is its copy."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourbit.kernels.dispatch import force_path
from fourbit.optim import AdamW, addresses, optimizer

pytest.importorskip("triton")
SHAPES = [(300,), (5000,), (0,)]
Capture = Callable[[Any], None]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """A step under capture; nothing of it may happen before a replay, which here means the copy alone."""

    def captured(some: Any) -> None:
        with monkeypatch.context() as patch:
            for module in (addresses, optimizer):
                patch.setattr(module, "is_capturing", lambda device: True)
            some.step()

    return captured


def table_of(some: Any) -> Any:
    (pool,) = some._pools.values()
    return pool.plans["addresses"]


def wanted(ps: Any) -> list[list[int]]:
    return [[p.data_ptr(), p.grad.data_ptr() or 16] for p in ps]


def test_what_was_captured_stays_and_later_steps_do_not_trust_the_table(
    tools: SimpleNamespace, capture: Capture
) -> None:
    ours, theirs = tools.parameters(SHAPES), tools.parameters(SHAPES)
    graphed, eager = AdamW(ours), AdamW(theirs)
    with force_path("triton"):
        tools.give_gradients(ours, theirs, seed=0)
        graphed.step()
        eager.step()
        capture(graphed)  # at unchanged addresses: it must copy all the same
        eager.step()
        at_capture, static = wanted(ours), [p.grad for p in ours]
        (host,) = table_of(graphed)._captured
        assert host.tolist() == at_capture
        for seed in (1, 2, 3):
            if seed != 3:
                tools.give_gradients(ours, theirs, seed=seed)  # others, at other addresses
            graphed.step()
            eager.step()
            assert table_of(graphed).table.tolist() == wanted(ours) != at_capture
            assert host.tolist() == at_capture
            table_of(graphed).table.copy_(host)  # a replay
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert static[0].data_ptr() == at_capture[0][1]


def test_addresses_are_copied_only_when_they_changed(tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ps, copies = tools.parameters(SHAPES), []
    some = AdamW(ps)
    with force_path("triton"):
        tools.give_gradients(ps, seed=0)
        some.step()
        monkeypatch.setattr(torch.Tensor, "pin_memory", None)
        monkeypatch.setattr(addresses.Addresses, "_on_host", lambda *_: copies.append(1))
        some.step()
    assert not copies


def test_each_capture_has_memory_of_its_own(tools: SimpleNamespace, capture: Capture) -> None:
    ps = tools.parameters(SHAPES)
    some = AdamW(ps)
    with force_path("triton"):
        for seed in (0, 1):
            tools.give_gradients(ps, seed=seed)
            some.step()
            capture(some)
        first, second = table_of(some)._captured
        assert first.data_ptr() != second.data_ptr() and first.tolist() != second.tolist()
        with pytest.raises(RuntimeError, match="take one step of the optimizer outside of a CUDA graph before each"):
            capture(some)


def test_nothing_joins_or_moves_once_a_graph_has_its_addresses(tools: SimpleNamespace, capture: Capture) -> None:
    """It would go on with the old state: in memory that may be another's by then."""
    ps = tools.parameters(SHAPES)
    some = AdamW(ps)
    with force_path("triton"):
        tools.give_gradients(ps, seed=0, missing=[1])
        with pytest.raises(RuntimeError, match=r"parameters join while a CUDA graph captures .* Take a step before"):
            capture(some)
        assert not some.state
        some.step()
        capture(some)
        tools.give_gradients(ps, seed=1)
        with pytest.raises(RuntimeError, match="parameters join"):
            some.step()
        ps[1].grad = None
        some.step()
        saved = some.state_dict()
        with pytest.raises(RuntimeError, match="state is loaded, cleared or moved"):
            some.load_state_dict(saved)
        some.state.clear()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="state is loaded, cleared or moved"):
                some.step()
    other = AdamW(ps)
    other.load_state_dict(saved)
    assert other.state[ps[0]]["step"] == 3
