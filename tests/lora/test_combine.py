"""Several adapters as one: exact where they can be, PEFT's where that defines the same."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import fourbit
from fourbit.errors import InputError
from fourbit.lora.combine import combine
from fourbit.lora.layer import adapters_of, delta

RANKS, WEIGHTS = {"first": 3, "second": 5}, (0.7, -1.3)


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"table": nn.Embedding(40, 24), "one": nn.Linear(24, 32), "two": nn.Linear(32, 16, bias=False)}
    return nn.ModuleDict(layers)


def both() -> tuple[Any, Any]:
    """Ours and PEFT's on the same weights; "second" is rsLoRA, and not on all layers."""
    ours, theirs = net(), None
    targets = {"first": ["table", "one", "two"], "second": ["one", "table"]}
    for name, rank in RANKS.items():
        how = {"lora_alpha": 7, "use_rslora": name == "second", "target_modules": targets[name]}
        settings = peft.LoraConfig(r=rank, **how)
        theirs = theirs or peft.get_peft_model(net(), settings, name)
        if name == "second":
            theirs.add_adapter(name, settings)
        config = fourbit.LoRAConfig(rank=rank, alpha=7, rslora=name == "second", target=targets[name])
        fourbit.attach(ours, config, name, seed=1)
        for path, part in adapters_of(ours, name).items():
            nn.init.normal_(part.lora_A), nn.init.normal_(part.lora_B)
            layer = theirs.base_model.model[path]
            keys = ("lora_embedding_A", "lora_embedding_B") if path == "table" else ("lora_A", "lora_B")
            for key, value in zip(keys, (part.lora_A, part.lora_B), strict=True):
                there = getattr(layer, key)[name]
                (there if isinstance(there, nn.Parameter) else there.weight).data = value.detach().clone()
    return ours, theirs.base_model


@pytest.mark.parametrize("how", ["cat", "svd", "ties"])
def test_it_is_pefts_add_weighted_adapter(how: str) -> None:
    ours, theirs = both()
    kind = "ties_svd" if how == "ties" else how
    theirs.add_weighted_adapter(["first", "second"], list(WEIGHTS), "c", kind, density=0.4 if how == "ties" else None)
    paths = combine(ours, ["first", "second"], WEIGHTS, how=how, name="c", density=0.4)
    assert paths == ["table", "one", "two"]
    for path, change in delta(ours, "c"):
        torch.testing.assert_close(change, theirs.model[path].get_delta_weight("c"), rtol=1e-3, atol=1e-4)


def test_a_sum_is_what_both_change_together_and_adds_no_rank_beyond_theirs() -> None:
    ours, _ = both()
    combine(ours, ["first", "second"], WEIGHTS)
    combine(ours, ["first", "second"], WEIGHTS, how="svd", name="all", rank=8)
    combine(ours, ["first", "second"], WEIGHTS, how="svd", name="two", rank=2)
    x = torch.arange(40)
    run = lambda: ours["two"](ours["one"](ours["table"](x)))
    with fourbit.using(ours, "first", "second", weights=WEIGHTS):
        wanted = run()
    for name in ("combined", "all"):
        with fourbit.using(ours, name):
            torch.testing.assert_close(run(), wanted, rtol=1e-3, atol=1e-2)
    assert [part.rank for part in adapters_of(ours, "combined").values()] == [8, 8, 3]
    whole = dict(delta(ours, "combined"))
    for path, change in delta(ours, "two"):
        best = torch.linalg.svdvals(whole[path])[2:].norm()
        assert (whole[path] - change).norm() <= 1.001 * best
        assert not any(p.requires_grad for p in adapters_of(ours, "two")[path].parameters())


def test_dare_drops_and_rescales() -> None:
    """What is drawn depends on the seed; its mean over seeds is the sum; nothing is dropped at density 1."""
    ours, _ = both()
    combine(ours, ["first", "second"], WEIGHTS)
    whole, total = dict(delta(ours, "combined"))["one"], torch.zeros(32, 24)
    for seed in range(40):
        combine(ours, ["first", "second"], WEIGHTS, how="dare", name=f"s{seed}", rank=24, density=0.5, seed=seed)
        total += dict(delta(ours, f"s{seed}"))["one"] / 40
    assert (total - whole).norm() < 0.25 * whole.norm() < (dict(delta(ours, "s0"))["one"] - whole).norm()
    combine(ours, ["first", "second"], WEIGHTS, how="dare", name="full", rank=24, density=1.0)
    torch.testing.assert_close(dict(delta(ours, "full"))["one"], whole, rtol=1e-4, atol=1e-4)
    combine(ours, ["first", "second"], WEIGHTS, how="dare", name="again", rank=24, density=0.5, seed=0)
    assert torch.equal(dict(delta(ours, "again"))["one"], dict(delta(ours, "s0"))["one"])


def test_dare_ties_drops_and_then_elects_signs() -> None:
    """At density 1 both of a sign make their mean, and of two signs the larger change's counts; the rest is drawn."""
    ours, _ = both()
    one, two = (dict(delta(ours, name))["one"] for name in RANKS)
    larger = torch.where(one.abs() > two.abs(), WEIGHTS[0] * one, WEIGHTS[1] * two)
    elected = torch.where(one.sign() == two.sign(), (WEIGHTS[0] * one + WEIGHTS[1] * two) / 2, larger)
    found = {}
    for name, density, seed in (("all", 1.0, 0), ("s0", 0.5, 0), ("again", 0.5, 0), ("s1", 0.5, 1)):
        how = {"how": "dare-ties", "rank": 24, "density": density, "seed": seed}
        combine(ours, ["first", "second"], WEIGHTS, name=name, **how)
        found[name] = dict(delta(ours, name))["one"]
    torch.testing.assert_close(found["all"], elected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["s0"], found["again"]) and not torch.allclose(found["s0"], found["s1"])
    assert 0.15 < (found["s0"].abs() < 1e-4).double().mean() < 0.35  # where both were dropped


def test_what_cannot_be_one_lora_is_refused() -> None:
    ours, _ = both()
    with pytest.raises(InputError, match="a weight for each name"):
        combine(ours, ["first", "second"], [1.0])
    with pytest.raises(InputError, match="carries no adapter 'x'"):
        combine(ours, ["first", "x"], [1, 1])
    fourbit.attach(ours, fourbit.LoRAConfig(kind="dora", rank=2, target=["one"]), "d")
    with pytest.raises(InputError, match="'one' has a DoRA: such adapters can be used together, or merged"):
        combine(ours, ["first", "d"], [1, 1])
    fourbit.use(ours, "first", "d")


@pytest.mark.parametrize("kind", ["lora", "adalora", "vera"])
def test_torchs_default_dtype_and_device_change_no_start(kind: str) -> None:
    """Nor, of LoRAs, what is combined of them: all is drawn on the CPU in fp32."""
    made, target = [], ["one", "two"] + ["table"] * (kind == "lora")
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        model = net()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                for name in ("first", "second"):
                    fourbit.attach(model, fourbit.LoRAConfig(kind=kind, rank=4, target=target), name, seed=1)
                if kind == "lora":
                    for part in adapters_of(model, "first").values():
                        nn.init.ones_(part.lora_B)
                    combine(model, ["first", "second"], WEIGHTS, how="dare-ties")
        finally:
            torch.set_default_dtype(torch.float32)
        made.append(model.state_dict())
    for other in made[1:]:
        assert all(torch.equal(value, made[0][name]) for name, value in other.items())
