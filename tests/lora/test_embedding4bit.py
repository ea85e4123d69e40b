"""Embeddings and tied heads in 4 bits: rows decode as the whole table does, heads and their gradients work on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.errors import InputError
from fourbit.lora.linear4bit import NF4Embedding, NF4Linear
from fourbit.lora.quantize import Form, quantize_by_plan_
from fourbit.losses import token_scores

FORMS = [("nf4", 64, True), ("nf4", 32, False), ("fp4", 64, True), ("nf4", 128, True), ("fp4", 4096, False)]


def table(form: tuple[str, int, bool], rows: int = 700, dtype: torch.dtype = torch.float32) -> NF4Embedding:
    torch.manual_seed(0)
    new = NF4Embedding.empty((rows, 64), *form)
    new.quantize_weight_(torch.randn(rows, 64).to(dtype))
    return new


class Tied(nn.Module):
    """Ids to logits through one weight."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 64), nn.Linear(64, 97, bias)
        self.inner = nn.Linear(64, 64)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_of_the_decoded_table(form: tuple[str, int, bool], dtype: torch.dtype) -> None:
    """700 rows of 64: with blocks of 128 and 4096 a row is no whole block, and groups of 256 scales end within rows."""
    ours = table(form, dtype=dtype)
    ids = torch.tensor([[0, 699, 5], [5, 257, 401]])
    found = ours(ids)
    assert found.dtype == dtype and torch.equal(found, F.embedding(ids, ours.dequantize(dtype)))
    assert ours(ids[:0]).shape == (0, 3, 64) and ours(torch.tensor(3)).shape == (64,)
    with pytest.raises(IndexError):
        ours(torch.tensor([700]))
    assert ours.to(torch.float16)(ids).dtype == torch.float16 and ours.absmax.dtype != torch.float16


@pytest.mark.parametrize("form", FORMS)
def test_values_are_bitsandbytes(form: tuple[str, int, bool]) -> None:
    import bitsandbytes as bnb

    kind, blocksize, double_quant = form
    ours, weight = table(form), None
    torch.manual_seed(0)
    weight = torch.randn(700, 64)
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=blocksize, quant_type=kind)
    assert torch.equal(ours.packed.view(-1), packed.view(-1))
    theirs = F.embedding(torch.arange(700), bnb.functional.dequantize_4bit(packed, state))
    torch.testing.assert_close(ours(torch.arange(700)), theirs, rtol=0, atol=0.02 * double_quant)


class Largest(TorchDispatchMode):
    """The most values of a tensor that is made inside."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = any(part.alias_info is not None for part in func._schema.returns)
        if isinstance(out, Tensor) and not alias:
            self.values = max(self.values, out.numel())
        return out


def test_only_the_rows_looked_up_are_decoded() -> None:
    ours = table(("nf4", 64, True), rows=60_000)
    with Largest() as largest:
        ours(torch.arange(50))
    assert largest.values == 50 * 64


def test_a_tied_head_shares_its_bytes_and_the_chunked_head_works_on_it() -> None:
    model = fourbit.quantize_(Tied(), embeddings=True)
    assert isinstance(model.embed, NF4Embedding) and isinstance(model.head, NF4Linear)
    assert model.head.packed is model.embed.packed and model.head.absmax is model.embed.absmax
    hidden = torch.randn(40, 64, requires_grad=True)
    again = hidden.detach().clone().requires_grad_()
    targets = torch.randint(0, 97, (40,))
    weights = torch.randn(40)
    (token_scores(model.head, hidden, targets).logps * weights).sum().backward()
    logps = F.log_softmax(again @ model.embed.dequantize().T, 1).gather(1, targets[:, None]).squeeze(1)
    (logps * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, again.grad, rtol=1e-5, atol=1e-6)


def test_what_is_tied_stays_tied_through_moves_files_and_dense_again(tmp_path: Path) -> None:
    ids = torch.arange(97)
    model = fourbit.quantize_(Tied(bias=True), embeddings=True)
    fourbit.save_model(model, tmp_path)
    for other in (Tied(bias=True), fourbit.quantize_(Tied(bias=True), embeddings=True)):
        again = fourbit.load_model(other, tmp_path)
        assert again.head.packed is again.embed.packed and torch.equal(again(ids), model(ids))
    fourbit.save_model(again, tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    dense = fourbit.dequantize(again)
    assert type(dense.embed) is nn.Embedding and dense.head.weight is dense.embed.weight
    torch.testing.assert_close(dense(ids), model(ids))
    fourbit.save_model(dense, tmp_path / "dense")
    again = fourbit.load_model(fourbit.quantize_(Tied(bias=True), embeddings=True), tmp_path / "dense")
    assert again.head.packed is again.embed.packed and not again.head.packed.is_meta


def test_adapters_train_beside_a_4bit_embedding() -> None:
    model = fourbit.quantize_(Tied(), embeddings=True)
    assert fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["inner", "head"])) == ["head", "inner"]
    model(torch.arange(9)).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 4 and all(grad is not None for grad in grads)
    with pytest.raises(InputError, match="in 4 bits and cannot be trained"):
        fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["inner"], modules_to_save=["embed"]), name="b")


def test_compiles_as_one_graph() -> None:
    ours = table(("nf4", 64, True))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.arange(9)), ours(torch.arange(9)))


def test_embeddings_of_another_kind_stay_dense() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * 8

    model = nn.ModuleDict({"a": Scaled(9, 32), "b": nn.Embedding(9, 32, max_norm=1.0), "c": nn.Linear(32, 32)})
    fourbit.quantize_(model, embeddings=True)
    assert [type(part) for part in model.values()] == [Scaled, nn.Embedding, NF4Linear]


def test_a_plan_says_the_form_of_each_layer() -> None:
    plan = {"embed": Form("fp4", 32, False), "head": Form("fp4", 32, False), "inner": None}
    model = quantize_by_plan_(Tied(), plan)
    assert model.head.packed is model.embed.packed and type(model.inner) is nn.Linear
    assert (model.embed.quant_type, model.embed.blocksize, model.embed.double_quant) == plan["embed"]
    model = quantize_by_plan_(Tied(), {"head": Form()})  # what shares its weight goes with it
    assert model.head.packed is model.embed.packed
    for wrong, message in (
        ({"inne": Form()}, r"'inne' is no linear layer or embedding here\. Nearest: inner"),
        ({"head": Form(), "embed": Form("fp4")}, "plan: 'embed' shares its weight with a layer of another form"),
        ({"scaled": Form()}, "plan: 'scaled' is no linear layer"),
    ):
        before = Tied()
        before.scaled = nn.Embedding(9, 32, max_norm=1.0)
        with pytest.raises(InputError, match=message):
            quantize_by_plan_(before, wrong)
        assert type(before.head) is nn.Linear
    with pytest.raises(InputError, match="plan: 'inner' cannot be put in 4 bits: it is so already"):
        quantize_by_plan_(fourbit.quantize_(Tied()), {"inner": Form()})
    with pytest.raises(InputError, match="blocksize must be a power of two from 32 to 4096, got 48"):
        quantize_by_plan_(Tied(), {"inner": Form(blocksize=48)})
