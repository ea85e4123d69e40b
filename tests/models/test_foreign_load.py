"""Folders whose architecture is not built in: built by transformers on meta, filled and quantised by our loader."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.errors import EnvironmentProblem, InputError
from fourbit.lora.linear4bit import Module4bit
from fourbit.models import foreign
from fourbit.models.foreign import empty
from fourbit.models.load import load_decoder

SIZES = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Cohere2ForCausalLM": {"sliding_window": 8, "logit_scale": 0.3},  # tied
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "Qwen3NextForCausalLM": SPARSE | LINEAR | {"shared_expert_intermediate_size": 64},  # experts apart in the file
    "FalconH1ForCausalLM": MAMBA | {"mamba_n_groups": 1, "lm_head_multiplier": 0.4},  # buffers of its own
    "Glm4ForCausalLM": {},
}
IDS = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: Any) -> Path:
    return written(request.param, folders, tmp_path_factory)


def written(name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers saved, in its own layout."""
    if name not in folders:
        kind = getattr(transformers, name)
        torch.manual_seed(0)
        model = kind(kind.config_class(**SIZES | MODELS[name]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders[name]


@pytest.fixture
def cohere(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    source = written("Cohere2ForCausalLM", folders, tmp_path_factory)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_dense_is_what_transformers_loads(folder: Path) -> None:
    ours, wanted = load_decoder(folder), theirs(folder)
    assert isinstance(ours, foreign.TransformersLM) and ours.source == str(folder) and not ours.training
    for (name, value), (other, buffer) in zip(ours.named_buffers(), wanted.named_buffers(), strict=True):
        assert name == other and value.dtype == buffer.dtype
        torch.testing.assert_close(value, buffer, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), wanted(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_quantised_on_the_way_is_quantised_afterwards(folder: Path) -> None:
    ours, wanted = load_decoder(folder, quant_type="nf4"), fourbit.quantize_(theirs(folder))
    packed, other = ({n: m for n, m in each.named_modules() if isinstance(m, Module4bit)} for each in (ours, wanted))
    assert [*packed] == [*other] and ("experts" in str([*packed])) == hasattr(ours.config, "num_experts_per_tok")
    for name, layer in packed.items():
        assert torch.equal(layer.packed, other[name].packed), name
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), wanted(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_what_is_kept_in_float32_is(folders: dict[str, Path], tmp_path_factory: Any) -> None:
    folder = written("FalconH1ForCausalLM", folders, tmp_path_factory)
    ours, wanted = load_decoder(folder, dtype=torch.bfloat16), theirs(folder, torch.bfloat16)
    for (name, value), (_, other) in zip(ours.named_parameters(), wanted.named_parameters(), strict=True):
        assert value.dtype == other.dtype and torch.equal(value, other), name


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_a_saved_folder_comes_back(folder: Path, quant_type: str | None, tmp_path: Path) -> None:
    """In transformers when dense, here in any form."""
    ours = load_decoder(folder, quant_type=quant_type)
    fourbit.save_model(ours, tmp_path / "saved")
    with torch.no_grad():
        logits = ours(IDS)
        torch.testing.assert_close(load_decoder(tmp_path / "saved")(IDS), logits, rtol=1e-5, atol=1e-5)
        if quant_type is None:
            torch.testing.assert_close(theirs(tmp_path / "saved")(input_ids=IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_missing_too_much_or_twice(cohere: Path) -> None:
    tensors = load_file(cohere / "model.safetensors")

    def refused(changed: dict[str, torch.Tensor], match: str) -> None:
        save_file(changed, cohere / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=match):
            load_decoder(cohere)

    name = "model.layers.0.self_attn.q_proj.weight"
    refused({n: t for n, t in tensors.items() if n != name}, name)
    refused(tensors | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}, "layers.7")
    refused(tensors | {name: torch.zeros(3, 4)}, name)
    refused(tensors | {name.removeprefix("model."): tensors[name].clone()}, "one place")
    refused(tensors | {name: torch.full_like(tensors[name], torch.nan)}, "NaN")
    refused(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, "one tied tensor")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "nobody"}, "'nobody' is not built in .*nor in transformers"),
        ({"model_type": None}, "not built in"),
        ({"model_type": ["a"]}, "not built in"),
        ({"model_type": "vit"}, "nor in transformers"),
        ({"model_type": "nobody", "auto_map": {"AutoModel": "evil--code.Model"}}, "evil--code.Model.*never run"),
        ({"text_config": {}}, "text model alone"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1024"),
        ({"model_type": "dbrx", "ffn_config": {}, "num_experts": 10**9}, "num_experts must be at most 16384"),
        ({"model_type": "xglm", "d_model": 64, "max_position_embeddings": 10**10}, "xglm of it .*in no file"),
        ({"num_hidden_layers": "two"}, "transformers makes no cohere2 of it"),
        ({"hidden_size": -5}, "cohere2"),
        ({"layer_types": ["nothing", "else"]}, "cohere2"),
        ({"rope_parameters": {"rope_type": "none"}}, "cohere2"),
        ({"hidden_act": "exec"}, "cohere2"),
        ({"sliding_window": {"a": 1}}, "cohere2"),
    ],
)
def test_configs_of_strangers(cohere: Path, change: dict[str, Any], match: str) -> None:
    config = json.loads((cohere / "config.json").read_text())
    (cohere / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=match) as error:
        load_decoder(cohere)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gemma3n_text", "doge"])
def test_sizes_of_a_layer_and_many_small_experts_are_no_depth(kind: str) -> None:
    """262,144 rows of a layer's own vocabulary, 16,384 experts of one row each: what these families have by default."""
    from transformers import AutoConfig

    assert empty(json.loads(AutoConfig.for_model(kind).to_json_string()), "config.json", "").config.model_type == kind


def test_nothing_of_a_config_names_code(cohere: Path) -> None:
    """Its own code, and kernels from elsewhere, are passed over where the architecture is known."""
    config = json.loads((cohere / "config.json").read_text())
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "attn_implementation": "evil/kernel"}
    code |= {"_attn_implementation": "evil/kernel", "experts_implementation": "evil/kernel"}
    (cohere / "config.json").write_text(json.dumps(config | code))
    with torch.no_grad():
        assert load_decoder(cohere)(IDS).isfinite().all()


def test_without_transformers(cohere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *given: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *given)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EnvironmentProblem) as error:
        load_decoder(cohere)
    for part in ("cohere2", "nearest", "fourbit[transformers]", "docs/add-a-model.md"):
        assert part in str(error.value)
