"""Different adapters for the rows of one batch: what each row has alone, for any kind of layer and adapter, or an
error."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fourbit
from fourbit import Adapter, InputError, LoRAConfig, rows, train_only, using
from fourbit.lora.layer import adapter_layers, adapters_of

NAMES = ["a", "b", "c"]
BATCHES: dict[str, list[str | None]] = {
    "sorted": ["a", "a", "b", "b", "c"],
    "mixed up": ["c", "a", None, "b", "a"],
    "one": ["b"] * 5,
    "the base alone": [None] * 5,
    "some": [None, "c", "c", None, None],
}


class Shift(Adapter):
    """A kind of its own: y * scale, which no low-rank update is."""

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((base.weight.shape[0],), 0.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y.mul_(1 + self.gain)  # written over, as it may be


class OfBase(Shift):
    """One that must see its base."""

    def over(self, x: Tensor, base: nn.Module) -> Tensor:
        return base(x * self.gain.mean()) * self.gain


class Toy(nn.Module):
    """Ids [N, T] to [N, 3]: an embedding, linears, a convolution, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.norm = nn.Embedding(11, 32), nn.Linear(32, 64), nn.LayerNorm(64)
        self.conv, self.down, self.head = nn.Conv1d(64, 16, 3, padding=1), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.up(self.embed(ids)).tanh())
        return self.head(self.down(self.conv(h.mT).mT).tanh())


def made(target: Any = ("up", "down"), quantised: bool = False, layer: Any = None, **more: Any) -> Toy:
    """A toy with three adapters of other ranks and scales, all of which train."""
    model = Toy()
    if quantised:
        fourbit.quantize_(model)
    for i, name in enumerate(NAMES):
        config = LoRAConfig(rank=(2, 5, 8)[i], alpha=4.0 + i, target=list(target), **more)
        fourbit.attach(model, config, name, **({} if layer is None else {"layer": layer}))
    train_only(model, *NAMES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def results(model: nn.Module, run: Callable[[], Tensor], weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and what each trained parameter gets (nothing where it is not used)."""
    model.zero_grad()
    out = run()
    if out.requires_grad:
        (out * weights).sum().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def alone(model: nn.Module, names: Sequence[str | None], ids: Tensor) -> Tensor:
    made = []
    for i, name in enumerate(names):
        with using(model, *filter(None, [name])):
            made.append(model(ids[i : i + 1]))
    return torch.cat(made)


def check(model: nn.Module, names: Sequence[str | None], ids: Tensor | None = None, close: float = 1e-6) -> None:
    """Outputs and gradients of one batch equal those of each row alone."""
    torch.manual_seed(2)
    ids = torch.randint(11, (len(names), 7)) if ids is None else ids
    weights = torch.randn(len(names), 7, 3)

    def together() -> Tensor:
        with rows(model, names):
            return model(ids)

    out, grads = results(model, together, weights)
    wanted, expected = results(model, lambda: alone(model, names, ids), weights)
    torch.testing.assert_close(out, wanted, rtol=close, atol=close)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= close * expected[name].norm(), name


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_equals_each_row_alone(batch: str, quantised: bool) -> None:
    check(made(quantised=quantised), BATCHES[batch])


KINDS: dict[str, dict[str, Any]] = {
    "embedding, convolution, head": {"target": ("embed", "up", "conv", "head")},
    "biases and whole modules": {"target": ["up"], "bias": "lora_only", "modules_to_save": ["norm", "head", "embed"]},
    "another kind": {"layer": Shift},
    "one that sees its base": {"layer": OfBase},
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_layer_and_adapter(kind: str) -> None:
    for names in (BATCHES["sorted"], BATCHES["mixed up"]):
        check(made(**KINDS[kind]), names)


def test_kinds_may_differ_from_row_to_row() -> None:
    model = made()
    fourbit.attach(model, LoRAConfig(rank=2, target=["up"]), "d", layer=Shift)  # and not on every layer
    fourbit.attach(model, LoRAConfig(rank=2, target=["down"], bias="all"), "e")
    train_only(model, *NAMES, "d", "e")
    check(model, ["d", "a", "e", None, "d"])


def test_the_base_is_computed_once_and_no_adapter_sees_another_s_rows() -> None:
    model, seen = made(), list[tuple[str, tuple[int, ...]]]()
    layer = adapter_layers(model)["up"]
    layer.base.register_forward_hook(lambda module, given, made: seen.append(("base", tuple(given[0].shape))))
    for name in NAMES:
        part = layer.adapters[name]
        part.register_forward_hook(lambda module, given, made, name=name: seen.append((name, tuple(given[0].shape))))
    with rows(model, BATCHES["mixed up"]):
        model(torch.zeros(5, 7, dtype=torch.int64))
    assert seen == [("base", (5, 7, 32)), ("c", (1, 7, 32)), ("a", (2, 7, 32)), ("b", (1, 7, 32))]
    check(model, BATCHES["mixed up"])  # and hooks may keep what they were shown


def test_tokens_of_packed_rows() -> None:
    """Numbers for each token: a segment of a row has what it has in a row of its own."""
    model = made(target=("embed", "up", "head"))
    model.conv, numbers = nn.Identity(), torch.tensor([[0, 0, 0, 1, 1, 3, 3], [1, 1, 2, 2, 2, 2, 0]])
    model.down = nn.Linear(64, 32)
    names, ids = [*NAMES, None], torch.randint(11, (2, 7))
    model.norm.requires_grad_(False)
    with rows(model, names, numbers):
        out = model(ids)
    for i, name in enumerate(names):
        with using(model, *filter(None, [name])):
            own = model(ids)
        torch.testing.assert_close(out[numbers == i], own[numbers == i], rtol=1e-6, atol=1e-6)
    with rows(model, names, numbers.tolist()):
        assert torch.equal(model(ids), out)


def test_dropout_is_drawn_for_each_adapter_s_own_rows() -> None:
    model, ids = made(dropout=0.5).train(), torch.randint(11, (5, 7))
    with rows(model, BATCHES["sorted"]):
        first, second = model(ids), model(ids)
    assert not torch.equal(first, second)
    with rows(model.eval(), BATCHES["sorted"]):
        assert torch.equal(model(ids), model(ids))
    check(model, BATCHES["sorted"])


def test_switching_inside_and_after() -> None:
    model, ids = made(), torch.randint(11, (2, 7))
    fourbit.use(model, "c")
    with using(model, "c"):
        plain = model(ids)
    with pytest.raises(RuntimeError, match="boom"), rows(model, ["a", "b"]):
        mixed = model(ids)
        with fourbit.adapters_off(model):
            base = model(ids)
        assert torch.equal(model(ids), mixed)
        with rows(model, ["b", "a"]):
            assert not torch.equal(model(ids), mixed)
        assert torch.equal(model(ids), mixed)
        raise RuntimeError("boom")
    assert torch.equal(model(ids), plain) and not torch.equal(base, mixed)


def test_several_adapters_train_together_or_none() -> None:
    model = made(bias="all")
    train_only(model, "a", "c")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".adapters.a." in n or ".adapters.c." in n}
    train_only(model)
    assert not any(p.requires_grad for p in model.parameters())
    train_only(model, "b")
    with pytest.raises(InputError, match="no adapter 'x'"):
        train_only(model, "a", "x")
    assert all(p.requires_grad for part in adapters_of(model, "b").values() for p in part.parameters())


@pytest.fixture
def refused() -> Iterator[Toy]:
    model = made(target=("embed", "up", "conv", "down", "head"))
    with rows(model, ["a", "b", None]):
        yield model


WRONG: dict[str, Callable[[Toy], Any]] = {
    "another batch": lambda m: m(torch.zeros(2, 7, dtype=torch.int64)),
    "tokens in place of rows": lambda m: m.up(torch.randn(3, 32)),  # as many as rows, by chance
    "flattened tokens": lambda m: m.up(torch.randn(21, 32)),
    "ids without rows": lambda m: m.embed(torch.zeros(3, dtype=torch.int64)),
    "channels in place of rows": lambda m: m.conv(torch.randn(64, 9)),
    "no tensor": lambda m: m.up(None),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_input_that_is_not_the_batch_is_refused(refused: Toy, what: str) -> None:
    with pytest.raises(InputError, match=r"rows\(\) of a batch \[3\]: a layer got .* so whose rows those are"):
        WRONG[what](refused)
    assert refused.up(torch.randn(3, 1, 32)).shape == (3, 1, 64)  # as advised; and a layer without adapters takes it
    assert made(target=["down"]).up(torch.randn(21, 32)).shape == (21, 64)


def test_reading_a_weight_is_refused(refused: Toy) -> None:
    for name in ("weight", "bias"):  # read as a module would that computes with it
        with pytest.raises(InputError, match=r"inside rows\(\) a layer has no one weight"):
            getattr(refused.up, name)
    assert refused.up.in_features == 32


def test_what_names_and_numbers_must_be() -> None:
    model = made()
    for names, numbers in (([], None), (["a"], [[0, 1]]), (["a"], [[-1]]), (["a"], [0]), (["a"], [[0.5]])):
        with pytest.raises(InputError, match="rows needs a name"), rows(model, names, numbers):
            pass
    with pytest.raises(InputError, match="no adapter 'x'"), rows(model, ["a", "x"]):
        pass
    assert all(layer.active == {"c": 1.0} for layer in adapter_layers(model).values())
    convolved = made(target=("conv",))
    with (
        rows(convolved, ["a", "b"], torch.zeros(2, 64, dtype=torch.int64)),
        pytest.raises(InputError, match="whose rows"),
    ):
        convolved.conv(torch.randn(2, 64, 5))  # as many channels as tokens, by chance


class Sees(nn.Module):
    """A model of text and images, as transformers marks its parts."""

    input_modalities = ("image", "text")

    def __init__(self) -> None:
        super().__init__()
        for name, senses in (("text", "text"), ("images", ("image",)), ("projector", None)):
            part = nn.Module()
            part.linear, part.input_modalities = nn.Linear(4, 4), senses
            self.add_module(name, part)


@pytest.mark.parametrize("where", ["images", "projector"])
def test_parts_that_see_no_text_are_refused(where: str) -> None:
    model = Sees()
    fourbit.attach(model, LoRAConfig(rank=2, target=["text.linear"]), "a")
    with rows(model, ["a", None]):
        model.text.linear(torch.zeros(2, 3, 4))
    fourbit.attach(model, LoRAConfig(rank=2, target=[f"{where}.linear"]), "b")
    with rows(model, ["a", None]):
        getattr(model, where).linear(torch.zeros(9, 3, 4))  # none of a's: the base, of whatever is there
    with pytest.raises(InputError, match=f"images or sound '{where}.linear'"), rows(model, ["b", None]):
        pass


def test_compiled_once_for_any_order_of_the_same_adapters() -> None:
    model, ids = made(), torch.randint(11, (4, 7))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    for names in (["a", "a", "b", "b"], ["a", "a", "b", "b"]):
        with rows(model, names):
            torch.testing.assert_close(run(ids), alone(model, names, ids), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    with rows(model, ["b", None, "a", "a"]):
        torch.testing.assert_close(run(ids), alone(model, ["b", None, "a", "a"], ids), rtol=1e-6, atol=1e-6)
