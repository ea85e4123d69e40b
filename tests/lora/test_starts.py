"""PiSSA, OLoRA, LoftQ and EVA: against their papers in float64, against PEFT, over dense and 4-bit bases, in files."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fourbit
from fourbit import InputError, LoRAConfig
from fourbit.kernels.dequantize4bit import dequantize
from fourbit.kernels.quantize4bit import quantize
from fourbit.lora.init import Directions, begin
from fourbit.lora.layer import adapter_layers, adapter_parameters, adapters_of
from fourbit.lora.linear4bit import NF4LowRank
from fourbit.lora.lora import LoRA
from fourbit.lora.merge import merged_state, requantize_
from fourbit.lora.peft_files import adapter_state
from fourbit.lora.project import project

Tell = dict[str, tuple[float, float]]
DENSE, PACKED = ["pissa", "pissa-4", "olora"], ["pissa", "pissa-4", "olora", "loftq", "loftq-3"]
RANK = 4


def net() -> nn.Sequential:
    """Two layers and a bias, of weights that have a few strong directions, as trained ones do."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight += 0.3 * torch.randn(len(layer.weight), 3) @ torch.randn(3, layer.weight.shape[1]) / 8
    return model  # its weights need gradients, as those of any model do


def put(start: str, *, quant: bool = False, **settings: Any) -> tuple[nn.Module, nn.Module, Tell]:
    """The plain model, dense, one with that start, and the errors that were told."""
    plain, errors = net(), Tell()
    model = fourbit.quantize_(copy.deepcopy(plain), skip=()) if quant else copy.deepcopy(plain)
    config = LoRAConfig(RANK, 6.0, start=start, **settings)
    dense = plain.named_parameters() if quant else None
    fourbit.attach(model, config, seed=0, dense=dense, tell=lambda path, *found: errors.update({path: found}))
    return plain, model, errors


def moved(model: nn.Module, size: float = 0.05, name: str = "default") -> nn.Module:
    """The model after its adapter was trained."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model, name).values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def x_of(rows: int = 5) -> Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("start", DENSE)
def test_a_dense_base_stays_as_it_is(start: str) -> None:
    plain, model, errors = put(start, dropout=0.5)
    x = x_of()
    torch.testing.assert_close(model.train()(x), plain(x), rtol=0, atol=2e-6)
    assert all(
        torch.equal(layer.base.weight, plain.get_submodule(path).weight)
        for path, layer in adapter_layers(model).items()
    )
    assert all(part.is_idle() for part in adapters_of(model).values()) and not errors
    moved(model)
    assert not torch.allclose(model.eval()(x), plain(x), atol=1e-2)
    with fourbit.adapters_off(model):
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("start", PACKED)
@pytest.mark.parametrize("rslora", [False, True])
def test_4_bits_start_nearer_to_the_weight_than_4_bits_alone(start: str, rslora: bool) -> None:
    """And what is told is that of the layer; with the adapter off they are still there."""
    plain, model, errors = put(start, quant=True, rslora=rslora)
    assert errors.keys() == {"0", "2"}
    x = x_of()
    for path, (error, alone) in errors.items():
        W = plain.get_submodule(path).weight
        layer = adapter_layers(model)[path]
        part = cast(LoRA, layer.adapters["default"])
        codes = dequantize(cast(NF4LowRank, layer.base).stored)
        mine = (W - codes - part.scale * part.lora_B @ part.lora_A).norm() / W.norm()
        print(f"{start} {path}: |W - (W4 + s B A)| / |W| = {error:.4f}, of nf4 alone {alone:.4f}")
        assert error == pytest.approx(mine.item(), rel=1e-4)
        assert error < alone or start == "olora"  # which takes s Q R off, larger for s > 1
        assert alone == pytest.approx(
            ((W - dequantize(quantize(W, "nf4", 64, True))).norm() / W.norm()).item(), rel=1e-5
        )
        torch.testing.assert_close(layer.base.weight + 0, codes + part.scale * part.lora_B @ part.lora_A)
    with fourbit.adapters_off(model):
        torch.testing.assert_close(model(x), off := model(x))
    torch.testing.assert_close(model(x), off, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("quant", [False, True])
def test_a_step_is_that_of_the_rewritten_base(quant: bool, dropout: float) -> None:
    """Outputs and gradients of W - s B0 A0 with s B A beside it; under dropout, of what drops the change alone."""
    _, model, _ = put("pissa", quant=quant, dropout=dropout)
    moved(model)
    layer = adapter_layers(model)["0"]
    part, x, probe = cast(LoRA, layer.adapters["default"]), x_of().requires_grad_(), torch.randn(5, 96)
    assert part.lora_A0 is not None and part.lora_B0 is not None
    base, joint = layer.base, layer.joint(x)
    assert (joint is not None) == (quant and not dropout)
    torch.manual_seed(0)
    y = layer(x)
    y.backward(probe) if not dropout else y.mul(probe).sum().backward()
    A, B = part.lora_A.detach().clone().requires_grad_(), part.lora_B.detach().clone().requires_grad_()
    z = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    dropped = nn.functional.dropout(z, dropout)
    W, s = (base.weight + 0).detach(), part.scale
    rest = z @ W.T - dropped @ (s * part.lora_B0 @ part.lora_A0).T
    (rest + base.bias + s * dropped @ A.T @ B.T).mul(probe).sum().backward()
    wanted = rest + base.bias + s * dropped @ A.T @ B.T
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for own, its in ((part.lora_A, A), (part.lora_B, B), (x, z)):
        torch.testing.assert_close(own.grad, its.grad, rtol=1e-5, atol=2e-5)
    if quant and not dropout:
        (out,) = project(x, [layer])
        torch.testing.assert_close(out, y)


def test_the_papers_in_float64() -> None:
    torch.manual_seed(0)
    W, part = torch.randn(48, 64), LoRA(nn.Linear(64, 48), RANK, 8.0)
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    A, B, _ = begin(W, part, "pissa", nn.Linear(64, 48))
    leading = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    torch.testing.assert_close(part.scale * (B.double() @ A.double()), leading, rtol=0, atol=2e-5)
    torch.testing.assert_close(B.double().T @ B.double(), torch.diag(S[:RANK]) / part.scale, rtol=0, atol=2e-5)
    quick, other, _ = begin(W, part, "pissa-12", nn.Linear(64, 48))
    torch.testing.assert_close(part.scale * (other @ quick).double(), leading, rtol=0, atol=0.02)
    A, B, _ = begin(W, part, "olora", nn.Linear(64, 48))
    Q, R = torch.linalg.qr(W.double())
    torch.testing.assert_close(B.double() @ A.double(), Q[:, :RANK] @ R[:RANK], rtol=0, atol=2e-5)
    base = fourbit.NF4Linear.from_weight(W)
    for rounds in (1, 5):
        A, B, stored = begin(W, part, f"loftq-{rounds}", base)
        change = torch.zeros(48, 64, dtype=torch.float64)
        for _ in range(rounds):  # algorithm 1 of the paper
            Q = dequantize(quantize((W.double() - change).float(), "nf4", 64, True)).double()
            U, S, V = torch.linalg.svd(W.double() - Q, full_matrices=False)
            change = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
        assert stored is not None
        assert (dequantize(stored) != Q).float().mean() < 1e-3  # a value on the border between two codes
        torch.testing.assert_close(
            part.scale * (B.double() @ A.double()), change, rtol=0, atol=1e-3 if rounds > 1 else 1e-5
        )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_same_start_as_pefts(start: str) -> None:
    """A and B up to a sign, and the same base under them."""
    from peft import LoraConfig, get_peft_model

    _, model, _ = put(start)
    theirs = net()
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=start)
    peft = get_peft_model(theirs, config)
    for path, part in adapters_of(model).items():
        their: Any = peft.base_model.model.get_submodule(path)
        A, B = their.lora_A["default"].weight, their.lora_B["default"].weight
        own = cast(LoRA, part)
        torch.testing.assert_close(own.lora_B @ own.lora_A, B @ A, rtol=0, atol=1e-5)
        torch.testing.assert_close(own.lora_A.abs(), A.abs(), rtol=0, atol=1e-4)
        base = adapter_layers(model)[path].base.weight - own.scale * own.lora_B @ own.lora_A
        torch.testing.assert_close(base, their.base_layer.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x_of()), peft(x_of()), rtol=0, atol=1e-5)


def test_files_over_a_dense_base_are_plain_lora_of_twice_the_rank(tmp_path: Path) -> None:
    """For us, and for PEFT on the plain base; rsLoRA's scale too."""
    from peft import PeftModel

    for rslora in (False, True):
        _, model, _ = put("olora", rslora=rslora)
        wanted = moved(model)(x_of())
        fourbit.save_adapter(model, folder := tmp_path / str(rslora))
        again = net()
        fourbit.load_adapter(again, folder, tell=pytest.fail)
        (part, *_) = adapters_of(again).values()
        assert type(part) is LoRA and part.rank == 2 * RANK and part.lora_A0 is None
        torch.testing.assert_close(again(x_of()), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(PeftModel.from_pretrained(net(), folder)(x_of()), wanted, rtol=0, atol=1e-5)


def test_a_file_does_not_go_over_an_adapter_with_a_start(tmp_path: Path) -> None:
    """A and B of the same rank and scale are another change beside where these began."""
    fourbit.attach(plain := net(), LoRAConfig(RANK, 6.0))
    fourbit.save_adapter(moved(plain), tmp_path)
    _, model, _ = put("pissa")
    before = model(x_of())
    with pytest.raises(
        InputError, match=r"has rank 4, scale 1\.5 from a start of its own, the file rank 4, scale 1\.5; "
    ):
        fourbit.load_adapter(model, tmp_path)
    assert torch.equal(model(x_of()), before)


@pytest.mark.parametrize("start", PACKED)
def test_files_over_4_bits_bring_their_codes_back(start: str, tmp_path: Path) -> None:
    """Of the dense weights, bit for bit; without them they are refused; on a dense base a note says so."""
    plain, model, _ = put(start, quant=True)
    wanted = moved(model)(x_of())
    fourbit.save_adapter(model, tmp_path / "a")
    again = fourbit.quantize_(net(), skip=())
    with pytest.raises(InputError, match=r"needs the dense weights of 4-bit layers: dense=fourbit\.read_weights"):
        fourbit.load_adapter(again, tmp_path / "a")
    other = [(name, weight.roll(1, 0)) for name, weight in plain.named_parameters()]
    before = again(x_of())
    for wrong, words in ((other[:1], "dense lacks"), (other, "trained on another base")):
        with pytest.raises(InputError, match=words):
            fourbit.load_adapter(again, tmp_path / "a", dense=wrong)
        assert torch.equal(again(x_of()), before), "a layer that was read is not left changed"
    assert not adapter_layers(again)
    fourbit.load_adapter(again, tmp_path / "a", dense=plain.named_parameters(), tell=pytest.fail)
    assert torch.equal(again(x_of()), wanted)
    assert adapter_state(again).keys() == adapter_state(model).keys()
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == sum(
        p.numel() for p in adapter_parameters(model).values()
    )
    fourbit.save_adapter(again, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    told: list[str] = []
    dense = net()
    fourbit.load_adapter(dense, tmp_path / "a", tell=told.append)
    assert "was trained on nf4; on the dense base it will be somewhat off" in told.pop()
    assert (dense(x_of()) - wanted).norm() < 0.2 * wanted.norm()


def test_a_start_that_is_copied_merged_and_cast(tmp_path: Path) -> None:
    for quant in (False, True):
        _, model, _ = put("pissa", quant=quant)
        moved(model)
        fourbit.copy_adapter(model, "default", "kept")
        wanted = model(x_of())
        with fourbit.using(model, "kept"):
            torch.testing.assert_close(model(x_of()), wanted)
        if quant:
            fourbit.remove_adapter(copied := copy.deepcopy(model), "default")
            fourbit.remove_adapter(copied, "kept")
            fourbit.save_model(copied, tmp_path)
            torch.testing.assert_close(fourbit.load_model(net(), tmp_path)(x_of()), copied(x_of()))
            import bitsandbytes

            with pytest.raises(InputError, match="4 bits and a low-rank part, which bitsandbytes has not"):
                fourbit.to_bitsandbytes(copied, bitsandbytes)
            fourbit.dequantize(model)
        torch.testing.assert_close(fourbit.merge(model)(x_of()), wanted, rtol=0, atol=1e-5)


def test_a_dense_layer_that_was_a_conv1d_is_started_as_it_lies() -> None:
    """GPT-2's, decoded from 4 bits: an nn.Linear, whose weight is [out, in]; square ones too."""
    from transformers import Conv1D

    model = nn.Sequential(Conv1D(64, 64), Conv1D(96, 64))
    fourbit.dequantize(fourbit.quantize_(model, skip=()))
    weights = [layer.weight.detach().clone() for layer in model]
    fourbit.attach(model, LoRAConfig(64, 64.0, start="pissa"))
    for part, weight in zip(adapters_of(model).values(), weights, strict=True):
        torch.testing.assert_close(part.lora_B @ part.lora_A, weight, rtol=0, atol=1e-4)


def test_a_copy_of_a_start_changes_what_its_base_was_made_anew_to() -> None:
    """Where the base's 4-bit codes are no longer those that the start made, they alone are no base of it."""
    _, model, _ = put("pissa", quant=True)
    fourbit.copy_adapter(moved(model), "default", "kept")
    requantize_(model, bits=16)
    with fourbit.using(model, "kept"):
        wanted = net()
        wanted.load_state_dict({name: value.cpu() for name, value in merged_state(model).items()})
        torch.testing.assert_close(model(x_of()), wanted(x_of()), rtol=1e-4, atol=1e-4)


class TestEva:
    def model(self) -> nn.Module:
        return fourbit.quantize_(net(), skip=())

    def batches(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(5)
        mix = torch.randn(64, 64, generator=generator) * torch.logspace(0, -2, 64)
        return [torch.randn(40, 64, generator=generator) @ mix.T + 1 for _ in range(4)]

    def test_directions_are_those_of_all_rows_around_their_mean(self) -> None:
        """In float64 at once; PEFT's incremental PCA finds the same."""
        from peft.utils.incremental_pca import IncrementalPCA

        own, theirs, rows = Directions(64), IncrementalPCA(n_components=24), torch.cat(self.batches()).double()
        for batch in self.batches():
            own.add(batch.unflatten(0, (4, 10)))
            theirs.partial_fit(batch)
        _, S, V = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        assert ((own.rows[:8] / own.rows[:8].norm(dim=1, keepdim=True) * V[:8]).sum(1).abs() > 1 - 1e-5).all()
        torch.testing.assert_close(own.rows.norm(dim=1)[:8].double(), S[:8], rtol=1e-4, atol=0)
        assert own.total == pytest.approx(S.square().sum().item(), rel=1e-5)
        assert ((theirs.components_[:4] * V[:4]).sum(1).abs() > 0.99).all()

    def test_ranks_go_where_they_explain_most(self) -> None:
        model, data = self.model(), self.batches()
        wanted = model(data[0])
        fourbit.attach(model, LoRAConfig(RANK, 6.0, start="eva"), data=data, seed=0)
        parts = {path: cast(LoRA, part) for path, part in adapters_of(model).items()}
        assert sum(part.rank for part in parts.values()) == 2 * RANK
        assert all(part.scale == pytest.approx(6.0 / RANK) and part.is_idle() for part in parts.values())
        assert torch.equal(model(data[0]), wanted) and not model[0].base._forward_pre_hooks
        part = parts["0"]
        torch.testing.assert_close(part.lora_A @ part.lora_A.T, torch.eye(part.rank), rtol=0, atol=1e-4)

    def test_batches_may_be_keywords_and_must_be_there(self) -> None:
        class Named(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, *, x: Tensor) -> Tensor:
                return cast(Tensor, self.inner(x))

        model = Named(self.model()).train()
        with pytest.raises(InputError, match=r"start='eva' needs data, .*none reached 'inner\.0'"):
            fourbit.attach(model, LoRAConfig(RANK, start="eva"))
        assert not adapter_layers(model) and model.training
        fourbit.attach(model, LoRAConfig(RANK, start="eva"), data=[{"x": self.batches()[0]}])


def other_layer(base: nn.Module, config: LoRAConfig) -> Any:
    return type("Other", (LoRA,), {})(base, config.rank, config.alpha)


@pytest.mark.parametrize(
    ("change", "message", "then"),
    [
        ({"start": "pizza"}, "olora, eva, pissa, pissa-8, loftq or loftq-5, got 'pizza'", {"start": "pissa-8"}),
        ({"start": "loftq-0"}, "start must be default", {"start": "pissa"}),
        ({"start": "loftq"}, "for 4 bits, and '0' is dense: take start='pissa'", {"start": "pissa"}),
        ({"rank": 65}, r"takes a rank of at most 64 on '[02]', as its sizes are: lower it", {"rank": 64}),
        ({"layer": other_layer}, "for LoRA on linear layers, and '0' is none: exclude it", {"exclude": ["0"]}),
        ({"quant": True}, "needs the dense weights of 4-bit layers", {"dense": net().named_parameters()}),
        ({"quant": True, "dense": []}, "dense lacks 0.weight, 2.weight", {"dense": net().named_parameters()}),
        ({"quant": True, "dense": [("0.weight", net()[0].weight)]}, "dense lacks 2.", {}),
        ({"quant": True, "dense": [("0.weight", torch.ones(3, 3))]}, "the dense weight of '0' must be finite", {}),
        ({"quant": True, "dense": [("0.weight", torch.full((96, 64), math.nan))]}, "must be finite", {}),
    ],
)  # fmt: skip
def test_what_is_refused_and_what_it_advises(change: dict[str, Any], message: str, then: dict[str, Any]) -> None:
    """The model is as it was, its adapters and its numbers; then the advice works."""
    model = fourbit.quantize_(net(), skip=()) if change.get("quant") else net()
    before, how = model(x_of()), {key: change[key] for key in ("dense", "layer") if key in change}
    with pytest.raises(InputError, match=message):
        fourbit.attach(model, LoRAConfig(change.get("rank", RANK), start=change.get("start", "pissa")), **how)
    assert not adapter_layers(model) and torch.equal(model(x_of()), before)
    if then:
        settings = {"start": "pissa"} | {key: then[key] for key in ("start", "rank", "exclude") if key in then}
        fourbit.attach(model, LoRAConfig(**{"rank": RANK} | settings), dense=then.get("dense"))
        assert adapter_layers(model)


def test_codes_that_other_adapters_are_on_are_not_made_anew() -> None:
    plain, model, _ = put("pissa", quant=True)
    with pytest.raises(InputError, match="makes codes of '0' anew, where an adapter is: load the model again"):
        fourbit.attach(model, LoRAConfig(RANK, start="pissa"), "b", dense=plain.named_parameters())
    dense: Callable[[], Any] = net
    model = dense()
    for name in ("a", "b"):  # a dense base carries any number
        fourbit.attach(model, LoRAConfig(RANK, start="pissa"), name)
    fourbit.use(model, "a", "b")
    torch.testing.assert_close(model(x_of()), net()(x_of()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_combined_it_is_the_change_beside_the_weights_it_began_with(start: str, how: Any) -> None:
    _, model, _ = put(start, quant=True)
    fourbit.attach(model, LoRAConfig(2, 4.0), "b", seed=2)
    moved(model), moved(model, name="b")
    fourbit.use(model, "default", "b")
    x, wanted = x_of(), model(x_of())
    fourbit.combine(model, ["default", "b"], [1.0, 1.0], how=how, name="c", rank=2 * RANK + 2)
    fourbit.use(model, "c")
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
