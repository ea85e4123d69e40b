"""bf16 on a CPU that multiplies it: products see a few sizes only, padding to them changes nothing, memory stays."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.data.batch import Batch, Encoded, Example, micro_batches, pack, pad
from fourbit.kernels import dispatch
from fourbit.models import decoder
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec
from fourbit.trainer.loop import Run
from fourbit.trainer.losses import tokens
from fourbit.trainer.losses.tokens import batch_token_scores, token_scores
from fourbit.trainer.planner import memory_used

SPEC = Spec(96, 64, 80, 2, 2, 1, 32)


class Shapes(TorchDispatchMode):
    """Notes the shapes of every product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "addmm"):
            self.seen.add((name, *(tuple(a.shape) for a in args if isinstance(a, Tensor))))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_if_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: True)


def model_in(dtype: torch.dtype, spec: Spec = SPEC) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(spec)
    fourbit.quantize_(model)
    model.to(dtype)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8), seed=0)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.train()


def answer(length: int, draw: random.Random, start: tuple[int, ...] = ()) -> Encoded:
    ids = [*start, *(draw.randrange(1, SPEC.vocab_size) for _ in range(length - len(start)))]
    return Encoded(ids, [i > length // 2 for i in range(length)], "", "")


def rows(count: int, draw: random.Random, longest: int = 150) -> list[Any]:
    return [(i, Example((answer(draw.randint(20, longest), draw),))) for i in range(count)]


def pair(length: int, draw: random.Random) -> Example:
    start = tuple(range(1, 31))
    return Example((answer(length, draw, (*start, 5)), answer(length - 9, draw, (*start, 6))))


def results(model: Decoder, batch: Batch) -> Iterator[Tensor]:
    scores = batch_token_scores(model, batch)
    yield from scores
    scores.logps.sum().backward()
    for p in model.parameters():
        if p.grad is not None:
            yield p.grad
            p.grad = None


@pytest.fixture
def padded(as_if_bf16: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """fp32 is padded as bf16 is; the sizes that were asked for."""
    seen, narrow = list[int](), torch.empty(0, dtype=torch.bfloat16)
    for module in (decoder, tokens):
        monkeypatch.setattr(module, "bucketed", lambda size, x: seen.append(size) or dispatch.bucketed(size, narrow))
    return seen


def test_two_hundred_batches_have_products_of_few_shapes(padded: list[int]) -> None:
    """Rows of any length: tokens from 40 to 512, and trained ones from 20, have some fifty sizes."""
    draw, shapes, model = random.Random(0), Shapes(), model_in(torch.float32, Spec(96, 16, 16, 1, 1, 1, 16))
    with torch.no_grad(), shapes:
        for _ in range(200):
            for batch in micro_batches(rows(4, draw), packing=True, micro_batch="auto", token_budget=512):
                batch_token_scores(model, batch)
    sizes = {first[0] for _, first, *_ in shapes.seen}
    assert len({*padded}) > 200 and len(sizes) <= 60
    assert {dispatch.bucketed(size, torch.empty(0, dtype=torch.bfloat16)) for size in sizes} == sizes


@pytest.mark.parametrize("layout", ["packed", "padded", "forked"])
def test_padding_changes_neither_scores_nor_gradients(
    layout: str, padded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, model = random.Random(1), model_in(torch.float32)
    batch = {
        "packed": lambda: pack(rows(3, draw)),
        "padded": lambda: pad(rows(3, draw), 0),
        "forked": lambda: pack([(0, pair(61, draw)), (1, pair(70, draw))]),
    }[layout]()
    found = [*results(model, batch)]
    assert len(padded) == 2 and any(size % 8 for size in padded)
    monkeypatch.undo()
    plain = [*results(model, batch)]
    assert len(plain) == len(found) > 20
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("as_if_bf16")
def test_a_teacher_s_rows_are_padded_with_the_student_s() -> None:
    head, hidden, theirs = (torch.randn(n, 16).bfloat16() for n in (30, 9, 9))
    got = tokens.token_divergence(head, hidden, head, theirs)
    want = tokens.token_divergence(head.float(), hidden.float(), head.float(), theirs.float())
    assert got.shape == (9,) and torch.allclose(got, want, rtol=0.05, atol=0.05)
    assert len(token_scores(head, hidden, torch.arange(9)).logps) == 9


def test_buckets_are_few_and_near(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: False)
    assert dispatch.bucketed(203, x) == 203, "such products are done in fp32, and not by oneDNN"
    monkeypatch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: True)
    sizes = [dispatch.bucketed(n, x) for n in range(4097)]
    assert sizes[0] == 0 and all(n <= size <= max(n + 7, n * 17 / 16) for n, size in enumerate(sizes))
    assert [dispatch.bucketed(size, x) for size in sizes] == sizes == sorted(sizes)
    assert len({*sizes[129:]}) == 16 * 5
    assert dispatch.bucketed(203, x.float()) == dispatch.bucketed(203, x.to("meta")) == 203


def losses(dtype: torch.dtype, steps: int) -> Iterator[float]:
    """Of training on sixteen rows again and again, in random order; RssAnon is not looked at."""
    draw, model = random.Random(2), model_in(dtype)
    data = rows(16, draw, 40)
    run = Run(model)
    for _ in range(steps):
        loss, _ = run.forward_backward(
            *micro_batches(draw.sample(data, 4), packing=True, micro_batch=4, token_budget=0)
        )
        run.optim_step(3e-3)
        yield loss.item()


@pytest.mark.slow
@pytest.mark.usefixtures("as_if_bf16")
def test_losses_in_bf16_are_those_of_fp32() -> None:
    """Over 200 steps: each ten's mean within 2%."""
    wide, narrow = (torch.tensor([*losses(d, 200)]).view(-1, 10).mean(1) for d in (torch.float32, torch.bfloat16))
    assert wide[-1] < 0.8 * wide[0], "nothing was learned"
    assert ((narrow - wide).abs() < 0.02 * wide).all(), (narrow / wide).tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("as_if_bf16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_thousand_steps_is_flat(dtype: torch.dtype) -> None:
    """Rows of random lengths: RssAnon after step 100 grows by no more than 3%."""
    draw, model, used = random.Random(3), model_in(dtype, Spec(96, 16, 16, 1, 1, 1, 16)), list[int]()
    run = Run(model)
    for _ in range(1000):
        run.forward_backward(*micro_batches(rows(3, draw, 70), packing=True, micro_batch="auto", token_budget=192))
        run.optim_step(1e-4)
        used.append(memory_used(torch.device("cpu"))[1])
    assert max(used[100:]) < 1.03 * max(used[:100]), [used[i] for i in range(0, 1000, 100)]
