"""On a CPU 16-bit products see a few sizes only, whatever rows' lengths are, and padding to them changes nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.data.batch import Encoded, Example, pack, pad
from fourbit.kernels import attention, chunked_head, dispatch
from fourbit.models import decoder
from fourbit.trainer.losses.tokens import batch_token_scores

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")


class Shapes(TorchDispatchMode):
    """Notes the shapes of every product and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(PRODUCTS):
            self.seen.add((name, *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return function(*args, **(kwargs or {}))


def answers(lengths: tuple[int, ...], shared: int = 0, trained: int = 5) -> Any:
    """An example of answers of these lengths, of which the first `shared` tokens are the same."""
    draw = torch.Generator().manual_seed(sum(lengths))
    common = torch.randint(1, 200, (shared,), generator=draw).tolist()
    parts = []
    for i, length in enumerate(lengths):
        own = torch.randint(1, 200, (length - shared,), generator=draw).tolist()
        parts.append(Encoded([*common, 200 + i, *own[1:]], [False] * (length - trained) + [True] * trained, "", ""))
    return Example(tuple(parts), shared)


LAYOUTS = {
    "packed": lambda n: pack([(0, answers((n,), trained=n - 190)), (1, answers((n - 8,)))]),
    "padded": lambda n: pad([(0, answers((n,))), (1, answers((40,)))], 0),
    "pairs, forked": lambda n: pack([(0, answers((n, n - 16), shared=96))]),
}


def gradients(model: Any, batch: Any) -> Iterator[torch.Tensor]:
    scores = batch_token_scores(model, batch)
    yield scores.logps
    scores.logps.sum().backward()
    for p in model.parameters():
        if p.grad is not None:
            yield p.grad
            p.grad = None


@pytest.fixture(scope="module", params=["lora", "full"])
def model(request: Any, tiny_folder: Any) -> Any:
    model, _ = fourbit.load(tiny_folder, quant_type="nf4" if request.param == "lora" else None, dtype=torch.float32)
    if request.param == "lora":
        fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8))
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_have_few_sizes(model: Any, layout: str) -> None:
    """All that depends on a row's length is a bucket's size, so nothing grows that is kept for every shape."""
    narrow = torch.empty(0, dtype=torch.bfloat16)
    try:
        model.to(torch.bfloat16)
        with Shapes() as shapes:
            for length in range(201, 225, 3):
                list(gradients(model, LAYOUTS[layout](length)))
    finally:
        model.to(torch.float32)
    sizes = {size for _, *several in shapes.seen for shape in several for size in shape}
    vocabulary, batches_and_heads, ranks = 259, range(5), 3 * 4
    assert max(sizes) >= 224
    assert not [n for n in sizes - {vocabulary, *batches_and_heads, ranks} if dispatch.bucketed(n, narrow) != n]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_changes_neither_loss_nor_gradients(model: Any, layout: str, monkeypatch: Any) -> None:
    batch = LAYOUTS[layout](203)
    plain = list(gradients(model, batch))
    narrow = torch.empty(0, dtype=torch.bfloat16)
    for module in (attention, chunked_head, decoder):
        monkeypatch.setattr(module, "bucketed", lambda size, x: dispatch.bucketed(size, narrow))
    padded = list(gradients(model, batch))
    assert len(plain) == len(padded) > 5
    for one, other in zip(plain, padded, strict=True):
        assert (one - other).norm() <= 2e-6 * one.norm()


def test_buckets_are_few_and_near() -> None:
    x = torch.empty(0, dtype=torch.bfloat16)
    sizes = [dispatch.bucketed(n, x) for n in range(4097)]
    assert sizes[0] == 0 and all(n <= size <= max(n + 7, n * 9 / 8) for n, size in enumerate(sizes))
    assert [dispatch.bucketed(size, x) for size in sizes] == sizes == sorted(sizes)
    assert len(set(sizes[65:])) == 8 * 6
    assert dispatch.bucketed(203, x.float()) == dispatch.bucketed(203, x.to("meta")) == 203
