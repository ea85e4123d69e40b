"""LoRA on embeddings and convolutions: a change of their weight, whatever they do with it; and who it is not for."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import fourbit
from fourbit.errors import InputError
from fourbit.lora.layer import AdapterLayer, adapter_parameters, adapters_of
from fourbit.lora.linear4bit import NF4Embedding
from fourbit.lora.peft_files import adapter_state, load_adapter_state

IDS = torch.tensor([[0, 3, 3, 1], [6, 2, 0, 5]])
BASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # a layer, and the shape of its input: () for ids
    "embedding": (lambda: nn.Embedding(7, 6), ()),
    "4-bit embedding": (lambda: fourbit.quantize_(nn.Embedding(7, 64), embeddings=True), ()),
    "padded embedding": (lambda: nn.Embedding(7, 6, padding_idx=3), ()),
    "Gemma's embedding": (lambda: Gemma2TextScaledWordEmbedding(7, 6, 0, embed_scale=3.0), ()),
    "BART's embedding": (lambda: BartScaledWordEmbedding(7, 6, 1, embed_scale=0.5), ()),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "unbatched conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "dilated same conv1d": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same", bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6)),
    "1x1 conv2d": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 5, 5)),
    "patches": (lambda: nn.Conv2d(3, 6, 4, stride=4), (2, 3, 8, 8)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "circular conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 5, 5)),
    "reflecting grouped conv2d": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=2, dilation=2, padding_mode="reflect"),
        (2, 4, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, stride=2), (2, 2, 4, 4, 4)),
}


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(2, 2, bias=False)
        nn.init.ones_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def made(name: str, **settings: Any) -> tuple[Holder, Tensor]:
    """A model with random LoRA on that layer, and an input."""
    torch.manual_seed(0)
    make, shape = BASES[name]
    model = Holder(make())
    fourbit.attach(model, fourbit.LoRAConfig(**{"rank": 4, "alpha": 6, "target": ["layer"]} | settings))
    return model, torch.randn(shape) if shape else IDS


def randomised(model: nn.Module, seed: int = 1) -> dict[str, nn.Parameter]:
    generator, parameters = torch.Generator().manual_seed(seed), adapter_parameters(model)
    for parameter in parameters.values():
        nn.init.normal_(parameter, generator=generator)
    return parameters


def plainly(model: Holder, x: Tensor) -> Tensor:
    """The layer with W + scale * B A as its weight, written down for each kind."""
    base, part = model.layer.base, adapters_of(model)["layer"]
    A, B = part.lora_A, part.lora_B
    if isinstance(base, nn.Embedding | NF4Embedding):
        if getattr(base, "padding_idx", None) is not None:  # a column that learns nothing
            A = torch.where(torch.arange(7) == base.padding_idx, A.detach(), A)
        return F.embedding(x, base.weight + part.scale * (B @ A).T) * float(getattr(base, "embed_scale", 1))
    groups = [b.flatten(1) @ a.flatten(1) for a, b in zip(A.chunk(base.groups), B.chunk(base.groups), strict=True)]
    change = torch.cat(groups).view_as(base.weight)
    return functional_call(base, {"weight": base.weight + part.scale * change}, (x,))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_output_and_gradients_are_those_of_a_changed_weight(name: str, rslora: bool) -> None:
    model, x = made(name, rslora=rslora)
    with fourbit.adapters_off(model):
        before = model(x)
    assert torch.equal(model(x), before) and adapters_of(model)["layer"].is_idle()  # a fresh one changes nothing
    x.requires_grad_(x.is_floating_point())
    inputs = [*randomised(model).values(), *([x] if x.requires_grad else [])]
    found, expected = model(x), plainly(model, x)
    assert (found - before).abs().max() > 0.5 and not adapters_of(model)["layer"].is_idle()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
    sign = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad((y * sign).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if name.startswith("4-bit"):
        fourbit.dequantize(model)
    again = functional_call(model.layer.base, {"weight": model.layer.weight + 0}, (x,))
    torch.testing.assert_close(again, found, rtol=1e-5, atol=5e-5)
    change = dict(fourbit.delta(model))["layer"]
    assert torch.allclose(change, model.layer.weight - model.layer.base.weight, atol=1e-5)
    fourbit.merge(model)
    assert not isinstance(model.layer, AdapterLayer)
    torch.testing.assert_close(model(x), found, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(
    "name", ["padded embedding", "Gemma's embedding", "conv1d", "grouped conv2d", "circular conv2d"]
)
def test_adapters_go_through_files_copies_switches_and_casts(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    plain = model(x)
    randomised(model)
    one = model(x)
    fourbit.save_adapter(model, tmp_path)
    again, _ = made(name)
    fourbit.load_adapter(again, tmp_path)
    fresh = Holder(copy.deepcopy(again.layer.base))
    assert fourbit.load_adapter(fresh, tmp_path) == ["layer"]
    for other in (again, fresh, copy.deepcopy(model)):
        assert torch.equal(other(x), one)
    fourbit.save_adapter(fresh, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()

    fourbit.copy_adapter(model, "default", "first")
    kept = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    randomised(model, 2)
    two = model(x)
    with fourbit.using(model, "first"):
        assert torch.equal(model(x), one)
    with fourbit.using(model, "first", "default"):
        torch.testing.assert_close(model(x) - plain, one + two - 2 * plain)
    load_adapter_state(model, kept)
    assert torch.equal(model(x), one)

    model.to(torch.bfloat16)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()  # masters stay wide beside a base that is not
    cast = model(x.bfloat16() if x.is_floating_point() else x)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), one, rtol=0.05, atol=0.2)


def test_a_convolutions_input_is_dropped_and_an_embeddings_is_not() -> None:
    model, x = made("conv2d", dropout=0.5)
    randomised(model)
    torch.manual_seed(3)
    found, part = model.train()(x), adapters_of(model)["layer"]
    torch.manual_seed(3)
    update = F.conv2d(F.conv2d(F.dropout(x, 0.5), part.lora_A, None, (2, 1), (1, 0)), part.lora_B)
    torch.testing.assert_close(found, model.layer.base(x) + part.scale * update)
    with pytest.raises(InputError, match="set dropout=0"):
        model.layer.weight + 0
    torch.testing.assert_close(model.eval()(x), plainly(model, x), rtol=1e-5, atol=1e-5)
    model, x = made("embedding", dropout=0.5)
    randomised(model)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_a_parametrised_convolution_is_adapted_and_not_merged() -> None:
    """As wav2vec's positional one: its weight is made of others, and has no place for a change."""
    model = Holder(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, groups=2, padding=1)))
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, target=["layer"]))
    randomised(model)
    x = torch.randn(2, 4, 9)
    found = model(x)
    torch.testing.assert_close(found, plainly(model, x), rtol=1e-5, atol=5e-5)
    with pytest.raises(InputError, match="no dense weight of its own to take the change: keep the adapter"):
        fourbit.merge(model)
    assert torch.equal(model(x), found)


def test_only_what_is_named_is_wrapped() -> None:
    def net() -> nn.ModuleDict:
        table = {
            "embed": nn.Embedding(7, 8),
            "conv": nn.Conv1d(8, 8, 3),
            "fc": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
        }
        return nn.ModuleDict({"body": nn.ModuleDict(table), "pos": nn.Embedding(7, 8)})

    for target, paths in {
        "all-linear": ["body.fc"],
        ("embed", "fc"): ["body.embed", "body.fc"],
        r".*\.(conv|fc)": ["body.conv", "body.fc"],
        "body.*": ["body.embed", "body.conv", "body.fc"],
    }.items():
        assert fourbit.attach(net(), fourbit.LoRAConfig(rank=2, target=target)) == paths
    config = fourbit.LoRAConfig(rank=2, target=".*", exclude=["pos", "fc"], rank_pattern={"conv": 5})
    model = net()
    assert fourbit.attach(model, config) == ["body.embed", "body.conv"]
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model).items()}
    assert shapes == {
        "body.embed.lora_A": (2, 7), "body.embed.lora_B": (8, 2),
        "body.conv.lora_A": (5, 8, 3), "body.conv.lora_B": (8, 5, 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nn.Embedding(7, 6, max_norm=1.0), r"max_norm=1\.0 rewrites its own weight"),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), r"2 groups needs a rank that they divide, got 3"),
        (lambda: OPTLearnedPositionalEmbedding(7, 6), "a OPTLearnedPositionalEmbedding, which is none"),
        (lambda: nn.ConvTranspose1d(4, 6, 3), "a ConvTranspose1d, which is none"),
        (lambda: nn.EmbeddingBag(4, 6), "a EmbeddingBag, which is none"),
        (lambda: nn.LazyConv1d(4, 3), "has no size yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_take_lora_is_refused_by_name(layer: Callable[[], nn.Module], words: str) -> None:
    model = Holder(layer())
    before = list(model.modules())
    with pytest.raises(InputError, match=words):
        fourbit.attach(model, fourbit.LoRAConfig(rank=3, target=["layer"]))
    assert list(model.modules()) == before


@pytest.mark.parametrize("name", ["dilated same conv1d", "grouped conv2d", "circular conv2d"])
def test_where_pefts_update_is_another_files_are_refused_both_ways(name: str, tmp_path: Path) -> None:
    """PEFT ignores the base's dilation and padding mode, and its A crosses groups: it would compute something else."""
    model, x = made(name, target=["layer", "out"])
    randomised(model)
    fourbit.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "fourbit.LoRA"
    base = Holder(copy.deepcopy(model.layer.base))
    with pytest.raises(Exception, match=r"fourbit\.LoRA"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    fresh = copy.deepcopy(base)
    assert fourbit.load_adapter(fresh, tmp_path) == ["layer", "out"]
    assert torch.equal(fresh(x), model(x))
    config = (tmp_path / "adapter_config.json").read_text().replace("fourbit.LoRA", "LORA")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match="is PEFT's, which ignores the groups, dilation and padding mode"):
        fourbit.load_adapter(base, tmp_path)
    assert type(base.layer) is type(model.layer.base)


def test_a_config_that_claims_a_huge_rank_allocates_nothing(tmp_path: Path) -> None:
    for name in ("embedding", "conv2d"):
        model, _ = made(name)
        fourbit.save_adapter(model, tmp_path)
        text = (tmp_path / "adapter_config.json").read_text().replace('"r": 4', '"r": 2000000000')
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=r"lora_(embedding_)?A.*2000000000"):
            fourbit.load_adapter(Holder(model.layer.base), tmp_path)
