"""attach: which layers get an adapter, where it starts, and what is refused; adapters_off."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourbit.errors import InputError
from fourbit.lora.active import adapters_off
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig, pattern_key
from fourbit.lora.layer import AdapterLayer, adapter_layers, adapter_parameters, adapters_of
from fourbit.lora.quantize import quantize_
from fourbit.lora.targets import base_modules, linear_layers


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.mlp = nn.ModuleDict(
            {"gate_proj": nn.Linear(8, 12), "up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(12, 8)}
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        attn, mlp = self.self_attn, self.mlp
        x = x + attn["o_proj"](attn["q_proj"](x) * attn["k_proj"](x) + attn["v_proj"](x))
        return x + mlp["down_proj"](torch.relu(mlp["gate_proj"](self.norm(x))) * mlp["up_proj"](x))


class Decoder(nn.Module):
    def __init__(self, head: str = "lm_head") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(13, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = head
        self.add_module(head, nn.Linear(8, 13, bias=False))

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, 13]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.get_submodule(self.head)(x)


def decoder(quantized: bool) -> nn.Module:
    return quantize_(Decoder()) if quantized else Decoder()


IDS = torch.arange(13).view(1, 13)
ATTENTION = [f"layers.{i}.self_attn.{leaf}" for i in range(3) for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")]
MLP = [f"layers.{i}.mlp.{leaf}" for i in range(3) for leaf in ("gate_proj", "up_proj", "down_proj")]


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.1, generator=generator)


QS = [f"layers.{i}.self_attn.q_proj" for i in range(3)]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("all-linear", ATTENTION + MLP),
        ("attn", ATTENTION),
        ("mlp", MLP),
        (["q_proj"], QS),
        (["self_attn.q_proj", "layers.1.mlp.up_proj"], [*QS, MLP[4]]),
        (["lm_head"], ["lm_head"]),
        (r"layers\.[02]\.mlp\.(up|down)_proj", MLP[1:3] + MLP[7:9]),
        (".*head", ["lm_head"]),
    ],
)
def test_targets(target: str | list[str], names: list[str]) -> None:
    model = Decoder()
    attached = attach(model, LoRAConfig(rank=2, target=target))
    order = [name for name, module in model.named_modules() if isinstance(module, AdapterLayer)]
    assert attached == order == list(adapters_of(model))
    assert sorted(attached) == sorted(names)


def test_exclude_wins() -> None:
    model = Decoder()
    names = attach(model, LoRAConfig(rank=2, target="mlp", exclude=["up_proj", "layers.0.mlp.gate_proj"]))
    assert names == [n for n in MLP if not n.endswith("up_proj") and n != "layers.0.mlp.gate_proj"]
    model = Decoder()
    assert attach(model, LoRAConfig(rank=2, target="mlp", exclude=r".*\.(up|gate)_proj")) == MLP[2::3]


def test_patterns_are_looked_up_separately_and_the_first_key_counts() -> None:
    model = Decoder()
    config = LoRAConfig(
        rank=4,
        alpha=8,
        target="attn",
        rank_pattern={r"layers\.0\.self_attn\..*": 2, "q_proj": 3, "k_proj|v_proj": 1},
        alpha_pattern={"q_proj": 30, "layers.1.self_attn.o_proj": 5},
    )
    attach(model, config)
    got = {name: (module.rank, module.alpha) for name, module in adapters_of(model).items()}
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert [got[f"layers.0.self_attn.{leaf}"] for leaf in leaves] == [(2, 30), (2, 8), (2, 8), (2, 8)]
    assert [got[f"layers.1.self_attn.{leaf}"] for leaf in leaves] == [(3, 30), (1, 8), (1, 8), (4, 5)]
    assert got["layers.2.self_attn.o_proj"] == (4, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": ["q_prj"]}, r"target entry 'q_prj' matches no linear layer, embedding or .*Nearest: q_proj"),
        ({"target": ["q_proj", "w_proj"]}, r"target entry 'w_proj' matches no linear layer"),
        ({"target": ["proj"]}, r"target entry 'proj' matches no linear layer"),  # the end of a word is no name
        ({"target": ["norm"]}, "names a LayerNorm, which is none"),
        ({"target": ["zzz"]}, r"Last parts of the names there are: embed_tokens, q_proj"),
        ({"target": "q_proj"}, r"whole path.*pass a list: \['q_proj'\].*Nearest: q_proj"),
        ({"target": r"layers\.7\..*"}, r"regular expression that must match a layer's whole path, and .* matches none"),
        ({"exclude": ["lmhead"]}, r"exclude entry 'lmhead' matches no linear layer, embedding or .*Nearest: lm_head"),
        ({"exclude": ".*"}, r"exclude='\.\*' takes away all 21 layers"),
        ({"rank_pattern": {"q_porj": 2}}, r"rank_pattern key 'q_porj' matches none of the 21 targeted .*q_proj"),
        ({"alpha_pattern": {"lm_head": 2}}, r"alpha_pattern key 'lm_head' matches none of the 21"),
        ({"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 3}}, r"nothing: 'q_proj' stands before it"),
    ],
)
def test_what_matches_nothing_or_cannot_be_is_refused_and_the_model_left_alone(
    settings: dict[str, object], message: str
) -> None:
    model = Decoder()
    before = model(IDS)
    with pytest.raises(InputError, match=message):
        attach(model, LoRAConfig(**{"rank": 2, **settings}))
    assert not adapters_of(model) and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(IDS), before)


def test_models_without_a_place_for_it() -> None:
    with pytest.raises(InputError, match="this LayerNorm has none"):
        attach(nn.LayerNorm(4), LoRAConfig())
    with pytest.raises(InputError, match="target='attn' finds no such layer"):
        attach(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=1, target="attn"))
    with pytest.raises(InputError, match="a layer itself"):
        attach(nn.Linear(4, 4), LoRAConfig(rank=1))
    with pytest.raises(InputError, match="target='all-linear' finds no such layer"):
        attach(nn.ModuleDict({"lm_head": nn.Linear(4, 4)}), LoRAConfig(rank=1))


def test_all_linear_spares_the_output_head_however_it_is_known() -> None:
    named = Decoder("lm_head")
    told = Decoder("vocabulary")
    told.get_output_embeddings = lambda: told.get_submodule("vocabulary")
    tied = Decoder("vocabulary")
    tied.get_submodule("vocabulary").weight = tied.embed_tokens.weight
    for model in (named, told, tied):
        assert sorted(attach(model, LoRAConfig(rank=2))) == sorted(ATTENTION + MLP)
    assert "vocabulary" in attach(Decoder("vocabulary"), LoRAConfig(rank=2))  # nothing says that this one is the head


@pytest.mark.parametrize("quantized", [False, True])
def test_a_fresh_adapter_changes_nothing_and_all_else_is_frozen(quantized: bool) -> None:
    model = decoder(quantized)
    before = model(IDS)
    attach(model, LoRAConfig(rank=2))
    assert torch.equal(model(IDS), before)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.adapters.default.lora_{half}" for name in ATTENTION + MLP for half in "AB"}
    assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(model).values())
    randomise(model)
    model(IDS).square().sum().backward()
    with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_grad == trainable
    assert {id(p) for p in adapter_parameters(model).values()} == {
        id(p) for n, p in model.named_parameters() if n in trainable
    }


@pytest.mark.parametrize("quantized", [False, True])
def test_checkpointed_layers_train_every_adapter(quantized: bool) -> None:
    """Recomputing a layer in backward gives each adapter the same gradient, although the embedding is frozen."""
    gradients: list[list[Tensor]] = []
    for recompute in (False, True):
        model = decoder(quantized)
        attach(model, LoRAConfig(rank=2, dropout=0.3))
        randomise(model)
        torch.manual_seed(1)
        x = model.embed_tokens(IDS)
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        x.square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter_parameters(model).values()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def starts(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.lora_A.detach().clone() for name, module in adapters_of(model).items()}


def test_one_more_target_leaves_the_other_starts_as_they_were() -> None:
    few, many, other_seed = Decoder(), Decoder(), Decoder()
    attach(few, LoRAConfig(rank=2, target=["v_proj"]), seed=5)
    torch.manual_seed(99)  # the global stream plays no part
    state = torch.get_rng_state()
    attach(many, LoRAConfig(rank=2, target="all-linear"), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    attach(other_seed, LoRAConfig(rank=2, target=["v_proj"]), seed=6)
    all_starts = starts(many)
    for name, start in starts(few).items():
        assert torch.equal(start, all_starts[name])
        assert not torch.equal(start, starts(other_seed)[name])
    flat = [tuple(start.flatten().tolist()) for start in all_starts.values()]
    assert len(set(flat)) == len(flat)


def test_the_start_is_pinned() -> None:
    """Runs started with an earlier version must start the same with a later one."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 2)})
    attach(model, LoRAConfig(rank=1), seed=3)
    torch.testing.assert_close(
        adapters_of(model)["q_proj"].lora_A.detach(),
        torch.tensor([[0.217044652, 0.241868138, 0.262296379, 0.100973129]]),
        rtol=0,
        atol=1e-7,
    )


def test_a_layer_in_two_places_gets_one_adapter() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    assert attach(model, LoRAConfig(rank=1)) == ["a.0"]
    assert model["b"] is model["a"][0] and isinstance(model["b"], AdapterLayer)


def test_names_stay_what_they_were_before_the_adapters() -> None:
    model = Decoder()
    before = base_modules(model)
    attach(model, LoRAConfig(rank=1, target="all-linear"))
    assert base_modules(model) == before


def test_dtype_and_settings_reach_the_layers() -> None:
    model = Decoder()
    attach(model, LoRAConfig(rank=4, alpha=6, dropout=0.5, rslora=True), dtype=torch.bfloat16)
    for module in adapters_of(model).values():
        assert (module.rank, module.alpha, module.dropout, module.scale) == (4, 6, 0.5, 3.0)
        assert module.lora_A.dtype == module.lora_B.dtype == torch.bfloat16


def test_a_layer_that_is_compiled_by_itself_gets_its_adapter() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"), nn.ReLU())
    x = torch.randn(3, 4)
    base = net(x)
    assert attach(net, LoRAConfig(rank=2)) == ["0"]
    torch.nn.init.normal_(net[0].adapters["default"].lora_B)
    assert not torch.equal(net(x), base)
    with adapters_off(net):
        assert torch.equal(net(x), base)


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_off_is_the_base_exactly(quantized: bool) -> None:
    model = decoder(quantized)
    base = model(IDS)
    attach(model, LoRAConfig(rank=2, dropout=0.5))
    randomise(model)
    with adapters_off(model):
        assert torch.equal(model(IDS), base)
        with adapters_off(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), base)  # the inner block has not switched them on
    assert not torch.equal(model(IDS), base)


def test_adapters_off_restores_each_state_even_after_an_error() -> None:
    model = Decoder()
    names = attach(model, LoRAConfig(rank=2))
    layers = adapter_layers(model)
    layers[names[3]].active = {}
    with pytest.raises(RuntimeError, match="in the block"), adapters_off(model):
        assert not any(layer.active for layer in layers.values())
        raise RuntimeError("in the block")
    assert [name for name, layer in layers.items() if not layer.active] == [names[3]]


segments = st.sampled_from(["a", "b", "proj", "q_proj", "0", "1", "layers", "lora_A", "weight"])
paths = st.lists(segments, min_size=1, max_size=4).map(".".join)


@given(
    st.lists(paths, min_size=1, max_size=8),
    st.one_of(st.lists(paths, min_size=1, max_size=3), st.sampled_from([r".*proj", r"(a|b)\..*", r".*\.\d", "a.b"])),
    st.one_of(st.just(()), st.lists(paths, min_size=1, max_size=2), st.sampled_from([r".*0.*", "b"])),
)
def test_targets_mean_what_they_mean_to_peft(
    tree: Callable[[list[str]], nn.Module],
    names: list[str],
    target: str | list[str],
    exclude: str | list[str] | tuple[()],
) -> None:
    model = tree(names)
    layers = list(linear_layers(model))

    def peft(**rules: object) -> list[str]:
        return [name for name in layers if check_target_module_exists(LoraConfig(**rules), name)]

    expected = peft(target_modules=target, exclude_modules=exclude or None)
    try:
        assert attach(model, LoRAConfig(rank=1, target=target, exclude=exclude)) == expected
    except InputError as refusal:  # stricter than PEFT only where an entry means nothing
        rules = [rule for rule in (target, exclude) if rule]
        alone = [each for rule in rules for each in ([rule] if isinstance(rule, str) else [[entry] for entry in rule])]
        assert not expected or any(not peft(target_modules=entry) for entry in alone), refusal


@given(
    paths,
    st.lists(
        st.sampled_from(["q_proj", "proj", "a", "b.proj", r".*\.0", "a|b", "^a", r"layers\.\d+\.a", "p.oj"]), max_size=4
    ),
)
def test_pattern_keys_match_as_in_peft(name: str, keys: list[str]) -> None:
    theirs = get_pattern_key(keys, name)
    assert pattern_key(keys, name) == (theirs if any(re.match(rf"(.*\.)?({key})$", name) for key in keys) else None)


def test_layers_to_transform_that_leave_none_are_refused_and_the_advice_works() -> None:
    """A number that no layer has, and as in PEFT any where nothing is around the layers' list."""
    model, path = Decoder(), "layers.2.self_attn.q_proj"
    for number in (9, 2):
        config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[number])
        with pytest.raises(
            InputError, match=rf"layers_to_transform=\[{number}\] leaves none of layers.*{path} \(3\): give"
        ):
            attach(model, config)
    assert attach(model, LoraConfig(r=2, target_modules=[path])) == [path]
