"""Adapters through their files: against dense changes in float64; smaller ones."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fourbit
from fourbit import InputError, LoRAConfig
from fourbit.lora.inspect import SMALL, difference, extract, read_files, report, resize, show
from fourbit.lora.layer import adapter_parameters, adapters_of
from fourbit.lora.peft_files import WEIGHTS
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec


def net() -> nn.Module:
    torch.manual_seed(0)
    parts = {"emb": nn.Embedding(11, 24), "up": nn.Linear(24, 40), "down": nn.Linear(40, 24), "norm": nn.LayerNorm(24)}
    return nn.ModuleDict(parts)


def saved(folder: Path, seed: int = 1, rank: int = 6, **settings: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with a random adapter, whose files are in `folder`, and its dense changes in float64."""
    model = net()
    fourbit.attach(model, LoRAConfig(rank, 9.0, **{"target": ["emb", "up", "down"], **settings}))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    fourbit.save_adapter(model, folder)
    return model, {path: change.double() for path, change in fourbit.delta(model.double())}


def test_what_is_told_is_that_of_the_dense_change(tmp_path: Path) -> None:
    _, changes = saved(tmp_path, rslora=True, rank_pattern={"up": 3}, alpha_pattern={"down": 2.0})
    found = report(read_files(tmp_path)[1])
    total = sum(change.square().sum().item() for change in changes.values())
    assert found.keys() == changes.keys()
    for path, change in changes.items():
        S = torch.linalg.svdvals(change)[: (3 if path == "up" else 6)]
        p = (S / S.sum()).tolist()
        layer, energy = found[path], S.square().cumsum(0)
        assert layer["rank"] == len(S) and not layer["dead"]
        assert layer["norm"] == pytest.approx(change.norm().item(), rel=1e-6)
        assert layer["energy"] == pytest.approx(change.square().sum().item() / total, rel=1e-6)
        assert layer["effective_rank"] == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-6)
        assert layer["rank_99"] == next(i + 1 for i, e in enumerate(energy) if e >= 0.99 * energy[-1])


def test_layers_that_do_nothing_are_dead(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "a")
    adapter_parameters(model)["up.lora_B"].data.zero_()
    adapter_parameters(model)["down.lora_B"].data.mul_(1e-6)
    fourbit.save_adapter(model.float(), tmp_path / "b")
    found = report(read_files(tmp_path / "b")[1])
    assert [path for path, layer in found.items() if layer["dead"]] == ["down", "up"]
    assert found["up"] | {"rank": 6} == {**dict.fromkeys(found["up"], 0), "rank": 6, "dead": 1}


def test_two_adapters_are_compared_as_their_dense_changes(tmp_path: Path) -> None:
    _, one = saved(tmp_path / "a")
    _, two = saved(tmp_path / "b", 2, 3, target=["up", "down"])
    found = difference(read_files(tmp_path / "a")[1], read_files(tmp_path / "b")[1])
    for path, layer in found.items():
        a, b = one[path], two.get(path, torch.zeros_like(one[path]))
        cosine = (a * b).sum() / (a.norm() * b.norm()) if path in two else 0.0
        wanted = {"a": a.norm(), "b": b.norm(), "difference": (a - b).norm(), "cosine": cosine}
        assert layer == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-6, abs=1e-9)
    same = difference(read_files(tmp_path / "a")[1], read_files(tmp_path / "a")[1])
    assert all(layer["difference"] < 1e-12 * layer["a"] for layer in same.values())
    saved(tmp_path / "c")
    files = read_files(tmp_path / "c")[1] | {"up": (torch.ones(1, 2), torch.ones(3, 1), ("", ""))}
    with pytest.raises(InputError, match="'up' has other sizes in the two adapters"):
        difference(read_files(tmp_path / "a")[1], files)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_smaller_adapter_is_the_nearest(tmp_path: Path, rslora: bool) -> None:
    """Eckart and Young's error, on every layer; ours and PEFT load it; biases and identity stay; small layers too."""
    from peft import PeftModel

    settings = {"rslora": rslora, "rank_pattern": {"down": 2}, "bias": "lora_only"}
    model, changes = saved(tmp_path / "a", **settings)
    found = resize(tmp_path / "a", 3, tmp_path / "b")
    again = net()
    fourbit.load_adapter(again, tmp_path / "b", tell=pytest.fail)
    kept = dict(fourbit.delta(again.double()))
    for path, change in changes.items():
        U, S, V = torch.linalg.svd(change, full_matrices=False)
        rank = 2 if path == "down" else 3
        torch.testing.assert_close(kept[path], (U[:, :rank] * S[:rank]) @ V[:rank], rtol=1e-5, atol=1e-5)
        assert found[path]["rank"] == rank
        assert found[path]["error"] == pytest.approx((S[rank:].norm() / S.norm()).item(), rel=1e-4, abs=1e-6)
    copies = [adapter_parameters(m)["up.copies.bias"] for m in (model, again)]
    torch.testing.assert_close(*copies)
    if not rslora:
        fourbit.save_adapter(again.float(), tmp_path / "c")
        resize(tmp_path / "a", 3, tmp_path / "d")
        assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "d" / WEIGHTS).read_bytes()
    theirs = PeftModel.from_pretrained(net(), tmp_path / "b")
    layer = theirs.base_model.model["up"]
    torch.testing.assert_close(layer.get_delta_weight("default").double(), kept["up"], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="rank must be below 6, the largest of this adapter's layers, got 6"):
        resize(tmp_path / "a", 6, tmp_path / "e")


def test_a_smaller_adapter_of_a_start_is_no_start_any_more(tmp_path: Path) -> None:
    model = fourbit.quantize_(net(), skip=())
    config = LoRAConfig(4, 4.0, start="pissa", target=["up", "down"])
    fourbit.attach(model, config, dense=net().named_parameters())
    for parameter in adapter_parameters(model).values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fourbit.save_adapter(model, tmp_path / "a")
    resize(tmp_path / "a", 8 - 1, tmp_path / "b")
    told: list[str] = []
    fourbit.load_adapter(fourbit.quantize_(net(), skip=()), tmp_path / "b", tell=told.append)
    assert "slightly other weights" in told.pop()


class TestExtract:
    def tuned(self, norm: float = 0.0, rank: int = 5) -> nn.Module:
        model = net()
        torch.manual_seed(1)
        with torch.no_grad():
            for layer in (model["up"], model["down"]):
                layer.weight += torch.randn(layer.weight.shape[0], rank) @ torch.randn(rank, layer.weight.shape[1])
            model["norm"].weight += norm
        return model

    def pull(self, tuned: nn.Module, rank: int, folder: Path) -> dict[str, dict[str, float]]:
        base, shape_only = dict(net().state_dict()), net().to("meta")
        return extract(shape_only, base, tuned.state_dict().items(), rank, folder, "base")

    def test_an_adapter_of_full_rank_is_the_tuned_model(self, tmp_path: Path) -> None:
        tuned, model = self.tuned(norm=SMALL / 2), net()
        found = self.pull(tuned, 5, tmp_path)
        assert found.pop("norm.weight") == {"left_out": pytest.approx(SMALL / 2, rel=1e-3)}
        assert found.keys() == {"up", "down"} and all(layer["error"] < 1e-5 for layer in found.values())
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5
        fourbit.load_adapter(model, tmp_path)
        for path in ("up", "down"):
            torch.testing.assert_close(model[path].weight + 0, tuned[path].weight + 0, rtol=0, atol=1e-5)

    def test_one_of_less_rank_says_what_is_lost(self, tmp_path: Path) -> None:
        tuned = self.tuned()
        found = self.pull(tuned, 2, tmp_path)
        for path in ("up", "down"):
            S = torch.linalg.svdvals((tuned[path].weight - net()[path].weight).double())
            assert found[path]["error"] == pytest.approx((S[2:].norm() / S.norm()).item(), rel=1e-3)
        assert found.keys() == {"up", "down"}

    def test_what_no_adapter_can_hold_is_refused(self, tmp_path: Path) -> None:
        for tuned, message in (
            (self.tuned(norm=0.1), "'norm.weight', no linear layer's, differs by 10.0%"),
            (net(), "the tuned model differs in no linear layer: there is nothing to extract"),
            (nn.ModuleDict({"emb": net()["emb"]}), "the tuned model lacks down.bias: there is nothing to extract"),
            (nn.ModuleDict({"up": nn.Linear(24, 41)}), "the two are not one dense model, tuned. 1 of another shape"),
            (nn.ModuleDict({"more": nn.Linear(1, 1)}), "the two are not one dense model, tuned."),
        ):
            with pytest.raises(InputError, match=message.replace(".", r"\.")):
                self.pull(tuned, 4, tmp_path / "x")
            assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["dora", "ia3", "vera", "lora-fa"])
def test_every_kind_is_shown(tmp_path: Path, kind: str) -> None:
    """LoRA's matrices as ever, and the norm of every other tensor under its own name."""
    model = nn.ModuleDict({"up": nn.Linear(32, 40), "down": nn.Linear(40, 32)})
    fourbit.attach(model, LoRAConfig(kind=kind, modules_to_save=["down"]), seed=0)
    parts = adapters_of(model)
    fourbit.save_adapter(model, tmp_path)
    told, _, layers = show(tmp_path)
    assert told == ("lora" if kind == "lora-fa" else kind) and {*layers} - {"base_model"} == {"up", "down"}
    want = {name: p.norm().item() for name, p in parts["down"].copies.named_parameters()}
    assert layers["down"] == pytest.approx({"|weight|": want["weight"], "|bias|": want["bias"]}, rel=1e-5)
    assert ("norm" in layers["up"]) == (kind in ("dora", "lora-fa"))
    if kind == "dora":
        assert layers["up"]["|lora_magnitude_vector|"] == pytest.approx(parts["up"].lora_magnitude_vector.norm().item())


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    first = next(key for key in whole if key.endswith("lora_A.weight"))
    for change, message in (
        ({first: torch.full_like(whole[first], math.nan)}, "must be finite matrices of rank 6"),
        ({first: whole[first][:3]}, "must be finite matrices of rank 6"),
        ({"base_model.model.up.lora_magnitude_vector": torch.ones(40)}, "only plain LoRA is compared and resized"),
    ):
        save_file({key: value.contiguous() for key, value in (whole | change).items()}, tmp_path / WEIGHTS)
        with pytest.raises(InputError, match=message):
            read_files(tmp_path)


def test_adapters_of_experts_are_shown_and_are_not_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    moe = Decoder(Spec(97, 32, 16, 1, 4, 2, 8, num_experts=4, num_experts_per_tok=2))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    fourbit.attach(moe, LoRAConfig(2, target=["q_proj"], target_parameters=["experts.down_proj"]))
    fourbit.save_adapter(moe, tmp_path)
    _, _, layers = show(tmp_path)
    assert any("q_proj" in path for path in layers) and any("experts" in path for path in layers)
    with pytest.raises(InputError, match="only plain LoRA is compared"):
        read_files(tmp_path)
