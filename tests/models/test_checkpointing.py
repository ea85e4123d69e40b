"""What a layer keeps for backward changes memory and time, and not one bit of any gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fourbit
from fourbit.lora.attach import KINDS
from fourbit.lora.layer import adapter_parameters
from fourbit.models import recompute
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.foreign import as_causal_lm
from fourbit.models.recompute import KEEPS, keeps, leanness

SPANS = ((0, 9), (9, 14), (14, 20, 1), (20, 21, 1), (21, 29, 1), (29, 40))  # one of the texts forks
IDS = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2}
FAMILIES = {  # norms before and after, of queries and keys, soft caps, windows; experts
    "gemma2": SIZES | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "qwen3_moe": SIZES | {"norm_topk_prob": True},
}
CHOICES = [*KEEPS, [*KEEPS], [*KEEPS][::-1], ["input", "all", "host", "host"]]


def of_family(family: str, size: int = 24) -> Decoder:
    torch.manual_seed(0)
    sizes = {"intermediate_size": size, "moe_intermediate_size": size}
    model = Decoder(read_spec({"model_type": family} | FAMILIES[family] | sizes))
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, float("norm" in name), 0.2)
    return model


def adapted(model: Any, kind: str = "lora", quantised: bool = True) -> Any:
    """Trained a little, with dropout where the kind has it."""
    if quantised:
        fourbit.quantize_(model)
    some = {"rank": 3, "dropout": 0.3} if kind in ("lora", "dora", "lora-fa") else dict[str, Any]()
    fourbit.attach(model, fourbit.LoRAConfig(kind=kind, **some), seed=0)  # type: ignore[arg-type]
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def gradients(model: Any, checkpointing: Any, longer: bool = False) -> dict[str, Tensor]:
    model.checkpointing = checkpointing
    model.zero_grad()
    torch.manual_seed(5)  # of dropout
    ids, spans = (IDS.repeat(1, 5), None) if longer else (IDS, SPANS)
    model.hidden(ids, spans=spans).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model: Any, choices: list[Any], longer: bool = False) -> None:
    wanted = gradients(model, "all", longer)
    assert len(wanted) > 8 and all(grad.norm() > 0 for grad in wanted.values())
    for choice in choices:
        found = gradients(model, choice, longer)
        assert found.keys() == wanted.keys()
        for name, grad in found.items():
            assert torch.equal(grad, wanted[name]), f"{choice}: {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_no_choice_changes_a_bit(kind: str, random_decoder: Callable[..., Decoder]) -> None:
    """With dropout, in a packed row with a fork: random masks repeat, and texts stay apart."""
    same(adapted(random_decoder(layers=4, intermediate=64), kind), CHOICES)


@pytest.mark.parametrize("block", [partial(fourbit.using, weights=[0.5]), lambda m, a: fourbit.rows(m, [a, "b"])])
def test_norms_run_again_with_the_adapters_of_forward(block: Any, random_decoder: Callable[..., Decoder]) -> None:
    """Trained copies of norms, and other adapters active when backward runs."""
    model, some = (
        random_decoder().train(),
        {"rank": 2, "modules_to_save": ("input_layernorm", "post_attention_layernorm")},
    )
    for name in "ab":
        fourbit.attach(model, fourbit.LoRAConfig(**some), name, seed=ord(name))  # type: ignore[arg-type]  # several types
        for parameter in adapter_parameters(model, name).values():
            nn.init.normal_(parameter, std=0.3)
    fourbit.train_only(model, "a", "b")

    def gradients(checkpointing: str) -> list[Tensor]:
        model.checkpointing = checkpointing  # type: ignore[assignment]  # of the table
        with block(model, "a"):
            loss = model(IDS.view(2, -1)).square().mean()
        parameters = [*adapter_parameters(model, "a").values()]
        return [*torch.autograd.grad(loss, parameters)]

    wanted = gradients("all")
    for choice in KEEPS:
        assert all(map(torch.equal, gradients(choice), wanted)), choice


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_nor_in_other_families(family: str, lora: bool) -> None:
    model = of_family(family)
    same(adapted(model) if lora else model.train(), CHOICES)


def test_transformers_models_know_on_and_off(oracle: Callable[..., Any]) -> None:
    """One layer that is to run again turns it on; the numbers are those of off."""
    model = as_causal_lm(adapted(oracle(num_hidden_layers=4), quantised=False))
    for choice in (False, *CHOICES, True):
        model.checkpointing = choice
        assert model.checkpointing is bool({*keeps(choice)} & {"input", "host"}), choice
    same(model, CHOICES)


def test_each_keeps_less_than_the_one_before(alive: Any, random_decoder: Callable[..., Decoder]) -> None:
    """A word a layer: what half the layers save is half of what all do."""
    model, kept = random_decoder(layers=4, dropout=0.0), dict[str, int]()
    mixed = ["all", "input", "input", "all"]
    for choice in ("all", "products", "input", mixed):
        model.checkpointing = choice
        with alive() as made:
            hidden = model.hidden(IDS, spans=SPANS)
        kept[str(choice)] = made.bytes()
        hidden.sum().backward()
    assert kept["input"] < kept["products"] / 4 and kept["products"] < 0.9 * kept["all"]
    assert kept[str(mixed)] == pytest.approx((kept["all"] + kept["input"]) / 2, rel=0.02)


class Widest(TorchDispatchMode):
    """The most numbers of one tensor whose rows have `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (self.width,):
                self.most = max(self.most, tensor.numel() // self.width)
        return out


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_the_feed_forward_part_runs_in_chunks(
    family: str, random_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 tokens by 72: no choice changes a bit; dense masters have what one pass gives; nothing is computed for naught
    but the last product that runs again; and rows 52 wide, two a token of experts, are never more than a chunk's.
    """
    model = random_decoder(layers=4, intermediate=52) if family == "llama" else of_family(family, 52)
    if family == "llama":
        model = adapted(model)
    whole = gradients(model.eval(), "input", True)  # dropout is off: each chunk draws its own
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(recompute, "CHUNK", 72)
    for choice in ("all", "products", "input"):
        calls.clear()
        with Widest(52) as rows:
            chunked = gradients(model, choice, True)
        assert rows.most == 72 * (2 if family == "qwen3_moe" else 1), choice
        assert len(calls) == 4 * 3 * (2 if choice == "input" else 1), choice
        for name, grad in whole.items():
            assert (chunked[name] - grad).norm() <= 2e-5 * grad.norm(), f"{choice}: {name}"
    same(model.train(), CHOICES[:6], True)


def test_transforms_and_second_order_take_any_choice(
    random_decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.func has no checkpoints, so all is kept there; in chunks a gradient can be differentiated again."""
    model, ids = adapted(random_decoder(layers=2)).eval().double(), IDS.repeat(1, 2)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (ids,)).square().mean()

    found = []
    for chunk, choice in ((8192, "all"), (24, "all"), (24, "input"), (24, "host")):
        monkeypatch.setattr(recompute, "CHUNK", chunk)
        model.checkpointing = choice
        transformed = torch.func.grad(loss)(parameters)
        with sdpa_kernel(SDPBackend.MATH):  # the quick ones have no second derivative
            first = torch.autograd.grad(model(ids).square().mean(), [*parameters.values()], create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), [*parameters.values()])
        found.append([*transformed.values(), *first, *second])
    for other in found[1:]:
        for grad, wanted in zip(other, found[0], strict=True):
            assert (grad - wanted).norm() <= 1e-9 * wanted.norm()


def test_words(random_decoder: Callable[..., Decoder]) -> None:
    assert keeps(False, 2) == ["products"] * 2 and keeps(True, 2) == ["input"] * 2 and keeps("host", 2) == ["host"] * 2
    assert keeps(["all", "host"]) == ["all", "host"] and keeps(True) == ["input"]
    order: list[Any] = ["all", False, ["products", "input"], True, ("input", "host"), "host"]
    assert [*map(leanness, order)] == sorted(map(leanness, order)) and len({*map(leanness, order)}) == len(order)
    model = random_decoder()
    for wrong in ("some", ["input"], ["input", "off"], [True, False], []):
        model.checkpointing = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match="checkpointing must be True, False, one of all, products, input, host"):
            model.hidden(IDS)
