"""Every family in GGUF: files written as llama.cpp's converter writes them, with gguf-py's writer and its own table of
tensor names, give transformers' logits; every type, and types mixed in one file, give those of the decoded weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, Keys, RopeScalingType

from fourbit.errors import InputError
from fourbit.models.gguf import READABLE, GGUFFile
from fourbit.models.gguf_model import read_spec
from fourbit.models.load import load_decoder

SIZES: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 3, "head_dim": 12},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"},
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 4.0]}
GEMMA3 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
GEMMA = {"sliding_window": 7, "query_pre_attn_scalar": 12}
SCALES = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.5}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama yarn": {"model_type": "llama", "rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen2 yarn": {"model_type": "qwen2", "head_dim": None, "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 20, "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", **GEMMA, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    "gemma3": {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7},
    "gemma3 scaled": {
        "model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 6, "rope_parameters": GEMMA3,
        "final_logit_softcapping": 5.0,
    },
    "phi3": {"model_type": "phi3", "head_dim": None, "sliding_window": 7},
    "phi3 long": {
        "model_type": "phi3", "head_dim": None, "original_max_position_embeddings": 24,
        "rope_parameters": LONG | {"partial_rotary_factor": 0.5},
    },
    "olmo2": {"model_type": "olmo2", "head_dim": None},
    "granite": {"model_type": "granite", "head_dim": None, **SCALES},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}  # fmt: skip
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}


def theirs(**shape: Any) -> Any:
    """A transformers model in fp32, every parameter drawn."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in (SIZES | shape).items() if value is not None or key not in SIZES}
    kind = shape.pop("model_type")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_("norm" in name and "gemma" not in kind)
    return model


def llama_cpp_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's converter: the two rotary halves of each head interleaved."""
    count, *rest = weight.shape
    return weight.reshape(heads, 2, count // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def settings(writer: GGUFWriter, config: Any) -> None:
    """What the converter says of a config, with the writer's own methods."""
    kind, heads = config.model_type, config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if SIZES["head_dim"] != config.hidden_size // heads or kind.startswith(("gemma", "qwen3")):
        writer.add_key_length(size)
        writer.add_value_length(size)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if kind in ("llama", "mistral", "mixtral", "smollm3", "granite", "phi3"):
        writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "beta_fast" in rope:
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if kind.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        if kind == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", 256))
        if "long_factor" in rope:
            for name in ("long", "short"):
                factors = np.array(rope[f"{name}_factor"], dtype=np.float32)
                writer.add_tensor(f"rope_factors_{name}.weight", factors)
            stretch, original = 256 / 24, 24
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original))))
    if kind in ("qwen3_moe", "mixtral"):
        writer.add_expert_count(config.num_experts if kind == "qwen3_moe" else config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def split(model: Any) -> dict[str, torch.Tensor]:
    """The state with gate and up of experts apart, under the names that the converter stacks them by."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                found[name.replace("gate_up_proj", f"{part}_proj.weight")] = half
        else:
            found[name + ".weight" * name.endswith("experts.down_proj")] = tensor
    return found


def file_names(model: Any) -> dict[str, str]:
    """A weight's name as above and in the file, as gguf-py's table has it; a tied head is left out."""
    architecture = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in split(model)}
    return {
        name: found for name, found in names.items()
        if name != "lm_head.weight" or not model.config.tie_word_embeddings
    }  # fmt: skip


@pytest.fixture
def convert(write_gguf: Callable[..., Path]) -> Callable[..., Path]:
    """`convert(model)`: its GGUF file; `change(writer)` adds to it, `skip` leaves out a tensor."""

    def write(model: Any, change: Callable[[GGUFWriter], Any] = lambda writer: None, skip: str = "") -> Path:
        config = model.config

        def fill(writer: GGUFWriter) -> None:
            settings(writer, config)
            change(writer)
            state = split(model)
            for name, found in file_names(model).items():
                tensor = state[name]
                heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
                part = name.split(".")[-2]
                if part in heads and config.model_type in ("llama", "mistral", "mixtral", "smollm3", "granite"):
                    tensor = llama_cpp_rows(tensor, heads[part])
                if "gemma" in config.model_type and name.endswith("norm.weight"):
                    tensor = tensor + 1
                if found != skip:
                    writer.add_tensor(found, tensor.contiguous().numpy())

        return write_gguf(fill, architecture=ARCHITECTURES.get(config.model_type, config.model_type))

    return write


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_converted_model_has_its_logits_and_weights(name: str, convert: Callable[..., Path]) -> None:
    model = theirs(**MODELS[name])
    path = convert(model)
    ours = load_decoder(path)
    ids = torch.arange(60).view(2, 30) % 97  # longer than the windows, and than a LongRoPE's first length
    expected, found = model(ids).logits, ours(ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for key, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[key], rtol=0, atol=1e-6, msg=key)


ONES = np.ones((1, 48), dtype=np.float32)
REFUSED: list[tuple[str, Callable[[GGUFWriter], Any], str, str]] = [
    ("granite", lambda w: None, "granite.attention.scale", "attention.scale must be a number above 0"),
    ("gemma2", lambda w: None, "gemma2.attention.sliding_window", "sliding_window must be a whole number from 1"),
    ("olmo2", lambda w: w.add_sliding_window(7), "", "olmo2.attention.sliding_window must be 0 (anything else"),
    ("qwen3", lambda w: w.add_expert_count(8), "", "qwen3.expert_count must be 0 (anything else"),
    ("qwen2", lambda w: w.add_attn_logit_softcapping(3.0), "", "attn_logit_softcapping must be 0 (anything else"),
    ("llama yarn", lambda w: w.add_rope_scaling_yarn_attn_factor(2.0), "", "yarn_attn_factor must be 1 (anything"),
    ("phi3 long", lambda w: None, "rope_factors_long.weight", "longrope needs tensors 'rope_factors_short.weight'"),
    ("phi3", lambda w: w.add_rope_scaling_type(RopeScalingType.LONGROPE), "", "longrope needs tensors"),
    ("gemma3", lambda w: w.add_float32("gemma3.rope.freq_base_swa", 0.0), "", "freq_base_swa must be a number above"),
    ("olmo2", lambda w: None, "blk.1.post_ffw_norm.weight", "missing: model.layers.1.post_feedforward_layernorm"),
    ("llama", lambda w: w.add_tensor("blk.0.attn_qkv.weight", ONES), "", "unknown: model.layers.0.self_attn.qkv_proj"),
    ("qwen3", lambda w: w.add_tensor("blk.0.ffn_gate_shexp.weight", ONES), "", "belongs to no model"),
    ("llama", lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", ONES), "", "unknown: model.layers.0.mlp.gate"),
    ("llama", lambda w: w.add_tensor("blk.0.ffn_up_exps.weight", ONES), "", "must be [experts, out, in], of at most"),
    ("mixtral", lambda w: None, "llama.expert_used_count", "expert_used_count must be a whole number from 1"),
    ("qwen3_moe", lambda w: None, "blk.1.ffn_up_exps.weight", "1 missing: model.layers.1.mlp.experts.gate_up_proj"),
]


@pytest.mark.parametrize(("name", "change", "without", "words"), REFUSED)
def test_what_a_family_does_not_have_is_refused_and_what_it_needs_must_be_there(
    name: str, change: Callable[[GGUFWriter], Any], without: str, words: str, convert: Callable[..., Path]
) -> None:
    path = convert(theirs(**MODELS[name]), change, skip=without)
    file = GGUFFile(path)
    file.metadata.pop(without, None)
    file.tensors.pop(without, None)
    with pytest.raises(InputError) as caught:
        if without and not without.startswith("blk."):
            read_spec(file)
        load_decoder(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["gemma2", "gemma3 scaled", "smollm3"])
def test_what_a_file_does_not_say_is_as_llama_cpp_has_it(name: str, convert: Callable[..., Path]) -> None:
    """Gemma 2's caps, no one else's, and one base of RoPE for all."""
    file = GGUFFile(convert(theirs(**MODELS[name])))
    said = {key: value for key, value in file.metadata.items() if "softcap" not in key and "freq_base" not in key}
    assert len(said) < len(file.metadata)
    file.metadata = said
    spec = read_spec(file)
    assert (spec.attention_softcap, spec.logit_softcap) == ((50, 30) if name == "gemma2" else (0, 0))
    assert spec.rope.theta == 10000


KEYS = [v for kind in (Keys.Rope, Keys.Attention, Keys.LLM) for v in vars(kind).values() if str(v)[:6] == "{arch}"]
OTHERS = ("attention.layer_norm_epsilon", "pooling_type", "tensor_data_layout", "expert_used_count")
VALUES = [0, 1, -1, 7, True, False, 0.0, 2.5, float("nan"), "", "yarn", ["a"], np.array([0, 7]), np.array([0.5])]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3 long", "granite", "qwen3", "qwen3_moe", "mixtral"])
def test_any_value_of_any_key_is_taken_or_refused_by_name(name: str, convert: Callable[..., Path]) -> None:
    """The keys are all that gguf-py knows of ropes, attention and models; an array is never a number."""
    file = GGUFFile(convert(theirs(**MODELS[name])))
    plain, kind = file.metadata, file.metadata["general.architecture"]
    for key in KEYS:
        for value in VALUES:
            file.metadata = plain | {key.replace("{arch}", str(kind)): value}
            try:
                spec = read_spec(file)
            except InputError as error:
                assert str(file.path) in str(error) or "config: " in str(error)
                continue
            said_to_nobody = key.removeprefix("{arch}.") in ("rope.scaling.finetuned", *OTHERS)
            assert spec.num_hidden_layers and (said_to_nobody or not isinstance(value, list | np.ndarray)), key


# ---- every type


def random_rows(kind: str, rows: int, size: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Rows of a type: quantised by gguf-py, or for K-quants, which it cannot make, random blocks of small scales."""
    if kind not in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"):
        return gguf.quants.quantize(rng.normal(scale=0.05, size=(rows, size)).astype(np.float32), Kind[kind])
    values, length = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = rng.integers(0, 256, (rows * size // values, length), dtype=np.uint8)
    for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "IQ4_NL": (0,)}.get(kind, (0, 2)):
        blocks[:, at : at + 2] = rng.normal(scale=1e-4, size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kinds", [*((kind,) for kind in READABLE), READABLE], ids=[*READABLE, "mixed"])
@torch.no_grad()
def test_every_type_gives_the_logits_of_its_decoded_weights(
    kinds: tuple[str, ...], write_gguf: Callable[..., Path]
) -> None:
    """Rows of 288 are no whole blocks of 256: as llama-quantize does, these take another type in a file of K-quants."""
    shape = {"hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 2, "head_dim": 64}
    model = theirs(model_type="llama", **shape)
    config, rng = model.config, np.random.default_rng(0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state, number = model.state_dict(), 0

    def fill(writer: GGUFWriter) -> None:
        nonlocal number
        settings(writer, config)
        for name, found in file_names(model).items():
            tensor = state[name]
            if tensor.ndim == 1:
                writer.add_tensor(found, tensor.numpy())
                continue
            kind = kinds[number % len(kinds)]
            kind = kind if tensor.shape[1] % gguf.GGML_QUANT_SIZES[Kind[kind]][0] == 0 else "Q5_0"
            number += 1
            stored = random_rows(kind, *tensor.shape, rng)
            writer.add_tensor(found, stored, raw_dtype=Kind[kind])
            decoded = torch.from_numpy(gguf.quants.dequantize(stored, Kind[kind]))
            if (part := name.split(".")[-2]) in heads:  # back from the converter's order of rows
                rows, count = decoded.shape[0], heads[part]
                decoded = decoded.reshape(count, rows // count // 2, 2, -1).swapaxes(1, 2).reshape(decoded.shape)
            tensor.copy_(decoded)

    ours = load_decoder(write_gguf(fill))
    ids = torch.arange(40).view(2, 20)
    expected, found = model(ids).logits, ours(ids)
    assert expected.isfinite().all() and (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, state[name]), name
