"""Adapters cross over to PEFT and back: same files, same layers, same logits."""

import copy
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters, adapters_of
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.peft_config import read_config, write_config
from fourbit.lora.peft_files import load_adapter, save_adapter
from fourbit.lora.quantize import quantize_
from fourbit.lora.targets import linear_layers

# peft 0.21 asks transformers 5.23 a question under an old name; the others warn of what the tests ask for
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning"),
]

LIMIT = 1e-5
IDS = torch.arange(24).view(2, 12) % 61


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A two-layer Llama with biases and grouped queries, every parameter randomised."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    randomise(model.parameters(), seed, 0.2)
    return model


def randomise(parameters: Iterable[nn.Parameter], seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def assert_same_logits(left: nn.Module, right: nn.Module) -> None:
    a, b, base = logits(left), logits(right), logits(tiny_llama())
    assert float((a - base).abs().max()) > 100 * LIMIT  # the adapter matters
    assert float((a - b).abs().max()) <= LIMIT * max(1.0, float(b.abs().max()))


ADAPTERS = {
    "all_linear": {"target": "all-linear"},
    "head_too": {"target": ["q_proj", "lm_head"]},
    "rslora": {"target": "attn", "rslora": True},
    "one_layer": {"target": ["model.layers.1.mlp.down_proj"]},
    "regex": {"target": r"model\.layers\.0\..*_proj", "exclude": ["k_proj"]},
    "by_leaf": {"rank_pattern": {"q_proj": 2, "down_proj": 5}, "alpha_pattern": {"q_proj": 1, "up_proj": 2.5}},
    "by_path": {
        "rslora": True,
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 1, r".*\.1\.self_attn\..*": 3},
        "alpha_pattern": {r"layers\.0\.mlp\..*_proj": 3, "k_proj|v_proj": 7},
    },
}


@pytest.mark.parametrize("settings", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_peft_loads_ours(settings: dict[str, object], tmp_path: Path) -> None:
    ours = tiny_llama()
    attach(ours, LoRAConfig(rank=4, alpha=6, **settings))
    randomise(adapter_parameters(ours).values(), 1, 0.3)
    save_adapter(ours, tmp_path, base_model="tiny")
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    count = sum(name.endswith("lora_A.default") for name, _ in theirs.named_modules())
    assert count == len(adapters_of(ours))
    assert_same_logits(ours, theirs)
    again = tiny_llama()
    assert load_adapter(again, tmp_path) == list(adapters_of(ours))
    assert torch.equal(logits(again), logits(ours))


def test_auto_peft_model_finds_the_base_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = tiny_llama()
    ours.save_pretrained("base")
    attach(ours, LoRAConfig(rank=2, alpha=6))
    randomise(adapter_parameters(ours).values(), 1, 0.3)
    save_adapter(ours, "run", base_model="base")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir("away")
    assert_same_logits(ours, AutoPeftModelForCausalLM.from_pretrained("../run").eval())


PEFT_ADAPTERS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj", "up_proj", "lm_head"], "use_rslora": True},
    "regex": {"target_modules": r".*\.(q|down)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "some_layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "some_layers_named": {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\..*": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9, "down_proj": 1, "unused": 4},
    },
    "rslora_patterns": {
        "target_modules": ["q_proj", "k_proj", "absent"],
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 6},
        "alpha_pattern": {"k_proj": 12},
    },
}


@pytest.mark.parametrize("settings", PEFT_ADAPTERS.values(), ids=PEFT_ADAPTERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_load_theirs(settings: dict[str, object], dtype: torch.dtype, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    theirs = get_peft_model(tiny_llama(), config).eval()
    adapter = [parameter for name, parameter in theirs.named_parameters() if "lora_" in name]
    randomise(adapter, 2, 0.3)
    for parameter in adapter:  # saved in `dtype`, and computed in fp32 by both
        parameter.data = parameter.data.to(dtype)
    theirs.save_pretrained(tmp_path)
    for parameter in adapter:
        parameter.data = parameter.data.float()
    ours = tiny_llama()
    names = load_adapter(ours, tmp_path)
    assert len(names) == len(adapter) // 2
    assert_same_logits(theirs, ours)
    assert {parameter.dtype for parameter in adapter_parameters(ours).values()} == {torch.float32}
    kept = tiny_llama()
    load_adapter(kept, tmp_path, dtype=None)
    assert {parameter.dtype for parameter in adapter_parameters(kept).values()} == {dtype}


@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_over_a_4bit_base(quant: str, tmp_path: Path) -> None:
    """Ours on a quantised transformers model = PEFT on the dense model with the decoded weights; gradients too."""
    ours, dense = quantize_(tiny_llama(), quant), tiny_llama()
    for name, layer in ours.named_modules():
        if isinstance(layer, NF4Linear):
            dense.get_submodule(name).weight.data = layer.dequantize()
    attach(ours, LoRAConfig(rank=4, alpha=6, target="all-linear"))
    randomise(adapter_parameters(ours).values(), 1, 0.3)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(dense, tmp_path, is_trainable=True).eval()
    assert_same_logits(ours, theirs)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    assert len(wanted) == len(adapter_parameters(ours))
    for name, module in adapters_of(ours).items():
        for half in ("lora_A", "lora_B"):
            mine, reference = getattr(module, half).grad, wanted[f"base_model.model.{name}.{half}.default.weight"]
            assert float((mine - reference).norm()) <= LIMIT * float(reference.norm()), f"{name}.{half}"
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {
        f"{name}.adapters.default.{half}" for name in adapters_of(ours) for half in ("lora_A", "lora_B")
    }


def test_any_module_crosses_over(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))

    ours, x = model(), torch.randn(4, 6)
    attach(ours, LoRAConfig(rank=2, rank_pattern={"2.1": 1}))
    randomise(adapter_parameters(ours).values(), 3, 0.5)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    theirs = PeftModel.from_pretrained(model(), tmp_path)
    torch.testing.assert_close(theirs(x), ours(x), rtol=LIMIT, atol=LIMIT)


segments = st.sampled_from(["a", "b", "q_proj", "proj", "0", "1", "layers", "lora_A", "weight", "a+b", "model"])
paths = st.lists(segments, min_size=1, max_size=4).map(".".join)


@given(
    st.dictionaries(paths, st.tuples(st.integers(1, 3), st.sampled_from([1, 2.5, 8])), min_size=1, max_size=8),
    st.data(),
)
def test_written_configs_mean_the_same_to_peft(
    tree: Callable[[list[str]], nn.Module], wanted: dict[str, tuple[int, float]], data: st.DataObject
) -> None:
    """Whatever adapters a model carries, PEFT's own rules give the written config the same layers, ranks and scales."""
    model = tree(list(wanted))
    layers = list(linear_layers(model))
    names = [name for name in layers if data.draw(st.booleans(), label=name)] or layers
    attach(model, LoRAConfig(rank=1, target="|".join(name.replace("+", r"\+") for name in names)))
    for name, module in adapters_of(model).items():
        module.rank, module.alpha = wanted[name]
        module.rslora = data.draw(st.booleans(), label=f"rslora {name}")
    text = write_config(model, adapters_of(model), "")
    raw = json.loads(text)
    theirs = LoraConfig(**raw)
    listed = raw["target_modules"]
    assert isinstance(listed, str) or listed == sorted(listed)
    found = [name for name, _ in model.named_modules() if not name.endswith(".base")]
    assert sorted(name for name in found if name and check_target_module_exists(theirs, name)) == sorted(names)
    for name, module in adapters_of(model).items():
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, name), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern, name), theirs.lora_alpha)
        assert rank == module.rank
        assert alpha / (rank**0.5 if theirs.use_rslora else rank) == pytest.approx(module.scale, rel=1e-12)
    assert read_config(raw, "f").targeted(model) == names


@given(
    st.lists(paths, min_size=1, max_size=8),
    st.one_of(st.lists(paths, min_size=1, max_size=3), st.just(r".*0.*")),
    st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 1), max_size=2)),
    st.one_of(st.none(), st.sampled_from(["layers", "a"]), st.lists(st.sampled_from(["layers", "model"]), max_size=2)),
    st.one_of(st.none(), st.lists(paths, max_size=2), st.just(r".*0.*")),
)
def test_files_mean_the_layers_that_peft_means(
    tree: Callable[[list[str]], nn.Module],
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    target: list[str] | str,
    indices: int | list[int] | None,
    containers: str | list[str] | None,
    exclude: str | list[str] | None,
) -> None:
    """A config means the layers that PEFT means, and a file with tensors for these goes onto them."""
    model = tree([*names, "model.layers.0.a", "model.layers.1.layers.0.a", "layers.1.a"])
    indices = indices if isinstance(target, list) else None
    containers = containers if indices not in (None, []) else None  # PEFT refuses one without the other
    settings = {"target_modules": target, "exclude_modules": exclude}
    settings |= {"layers_to_transform": indices, "layers_pattern": containers}
    expected = [name for name in linear_layers(model) if check_target_module_exists(LoraConfig(**settings), name)]
    if not expected:
        return
    folder, whole = tmp_path_factory.mktemp("adapter"), copy.deepcopy(model)
    attach(whole, LoRAConfig(rank=1, target="|".join(map(re.escape, expected))))
    save_adapter(whole, folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | settings))
    assert read_config(raw | settings, "f").targeted(model) == expected
    assert load_adapter(model, folder) == expected


def test_all_linear_in_a_file_spares_the_head() -> None:
    raw = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": "all-linear"}
    model = tiny_llama()
    expected = [name for name in linear_layers(model) if name != "lm_head"]
    assert read_config(raw, "f").targeted(model) == expected


@pytest.mark.parametrize("ranks", [{"x.q": 1, "a.q": 2, "b.a.q": 3, "c.q": 1}, {"x.a+b": 2, "x.aab": 1, "x.z": 1}])
def test_written_patterns_tell_paths_apart_that_end_alike(
    tree: Callable[[list[str]], nn.Module], ranks: dict[str, int]
) -> None:
    model = tree(list(ranks))
    attach(model, LoRAConfig(rank=1))
    for name, module in adapters_of(model).items():
        module.rank = ranks[name]
    raw = json.loads(write_config(model, adapters_of(model), ""))
    patterns = raw["rank_pattern"]
    assert {name: patterns.get(get_pattern_key(patterns, name), raw["r"]) for name in ranks} == ranks
