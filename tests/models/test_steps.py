"""A step of generation is a function of what lies on its device: what a CUDA graph of it repeats is what it does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fourbit.kernels.dropout import uniform
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.quantize import quantize_
from fourbit.models.continued import Ragged, Row
from fourbit.models.decoder import Decoder
from fourbit.models.generate import Sampling, choose, generate

PROMPTS = [[5, 6, 7], [11], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8]]
LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "unique_dim", "_unique2", "item", "equal"}


class Watched(TorchDispatchMode):
    """Notes operations whose result the host sees, or that take numbers from it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, Tensor) and each.dim()]
        if func.overloadpacket.__name__ in LOOKS or len({each.device for each in tensors}) > 1:
            self.seen.add(str(func))
        return found


def texts(model: Decoder, sampling: Sampling) -> Ragged:
    def next_tokens(states: Tensor, luck: Tensor) -> Tensor:
        return choose(model.head()(states), sampling, uniform(luck[1], luck[0])).expand(2, -1)

    rows = [Row(prompt, seed, 99, None) for seed, prompt in enumerate(PROMPTS)]
    made = Ragged(model, next_tokens, False, rows)
    made.read(rows)
    return made


@pytest.fixture(params=["dense", "4 bits and an adapter"])
def model(ours: Callable[..., Decoder], request: pytest.FixtureRequest) -> Decoder:
    made = ours("gqa 2:1", torch.float64).eval()
    if request.param != "dense":
        attach(quantize_(made), LoRAConfig(rank=2), seed=0)
    return made


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=9, top_p=0.9)])
@torch.no_grad()
def test_what_is_recorded_of_one_step_makes_the_next_ones(model: Decoder, sampling: Sampling) -> None:
    """Rows of four lengths, 9 steps in one bucket of keys: operations alone, in the memory that they were recorded in,
    against the step itself."""
    eager, recorded = (texts(model, sampling) for _ in range(2))
    held = recorded.last, recorded.cache.lengths, *recorded.cache._rooms

    def step(last: Tensor, lengths: Tensor, *rooms: Tensor) -> Tensor:
        recorded.last, recorded.cache.lengths, recorded.cache._rooms = last, lengths, [*rooms]
        return recorded.advance()

    expected = [eager.step().tolist() for _ in range(10)]
    graph = make_fx(step)(*held)  # which does the first one
    assert [held[0][0].tolist(), *(graph(*held).tolist() for _ in range(9))] == expected
    assert held[1].tolist() == [len(prompt) + 10 for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 5


@torch.no_grad()
def test_steps_of_a_bucket_touch_the_same_memory(model: Decoder) -> None:
    running = texts(model, Sampling(1.0))

    def places() -> list[int]:
        return [tensor.data_ptr() for tensor in (running.last, running.cache.lengths, *running.cache._rooms)]

    before = places()
    for step in range(8):
        running.step()
        assert places() == before, step
    running.leave([1])  # the others stay where they are
    running.step()
    assert places() == before and running.last.shape == (4, 3)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=9, top_p=0.9)])
@torch.no_grad()
def test_the_host_sees_nothing_of_a_step_and_sends_nothing(model: Decoder, sampling: Sampling) -> None:
    """On the device "meta", which has no numbers: a look at one is an error, and so is a tensor of the host's in it."""
    running = texts(model.to("meta"), sampling)
    with Watched() as watched:
        for _ in range(2):
            running.advance()
    assert not watched.seen
    with Watched() as watched:
        running.last[0] + torch.tensor([1, 2, 3, 4]).to("meta")
    assert watched.seen, "or nothing would be noticed"


class Recording(TorchDispatchMode):
    """A CUDA graph's double: it notes operations, and repeats them in the memory that they had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.replayed = list[tuple[Any, Any, Any, Any]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, found in self.calls:
            for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # of a view they are one
                    old.copy_(new)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.2, "seed": 3}])
def test_steps_that_are_replayed_answer_alike(
    model: Decoder, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a double in the place of CUDA's graphs: rows end, join and outgrow a bucket, and what was recorded for
    others is not replayed."""
    made = list[Recording]()

    @contextmanager
    def recorded(graph: Recording) -> Iterator[None]:
        """Which does nothing yet: what it wrote is undone."""
        made.append(graph)
        before = [[tensor.clone() for tensor in held()]]
        with graph:
            yield
        for tensor, old in zip(held(), before[0], strict=True):
            tensor.copy_(old)

    class Always(Ragged):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.replays, running[:] = True, [self]

    def held() -> list[Tensor]:
        return [running[0].last, running[0].cache.lengths, *running[0].cache._rooms]

    running = list[Ragged]()
    most = [90, 13, 30, 30, 12]
    prompts = [*PROMPTS, [4, 4, 2]]
    expected = generate(model, prompts, max_new_tokens=most, batch_size=2, **how)
    monkeypatch.setattr("fourbit.models.generate.Ragged", Always)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    assert generate(model, prompts, max_new_tokens=most, batch_size=2, **how) == expected
    assert len(made) > 3 and sum(graph.replayed for graph in made) > 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", [{}, {"temperature": 1.2, "seed": 3}])
def test_a_gpus_graphs_answer_as_plain_steps(
    model: Decoder, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hook no graph is used; the kernels are the same, and so is every token."""
    replayed = list[int]()

    class Counted(torch.cuda.CUDAGraph):
        def replay(self) -> None:
            replayed.append(1)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    model.float().cuda()
    how |= {"max_new_tokens": [90, 13, 30, 30], "batch_size": 2}
    answers = generate(model, PROMPTS, **how)
    assert len(replayed) > 30
    with model.lm_head.register_forward_hook(lambda *_: None):
        replayed.clear()
        assert generate(model, PROMPTS, **how) == answers and not replayed
