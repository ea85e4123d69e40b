"""GGUF files that we write: every family and every type comes back, a LoRA file is the merged file less the base, and
what llama.cpp does not compute is refused before anything appears."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_oracles import MIXED, SHAPES, SIZES
from torch import nn

import fourbit
from fourbit.errors import InputError, NumericError
from fourbit.lora.layer import adapters_of
from fourbit.lora.merge import merged_state
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.gguf import GGUFFile
from fourbit.models.gguf_model import ARCHITECTURES, MIXTRAL
from fourbit.models.gguf_tokenizer import gguf_tokenizer, tokenizer_metadata
from fourbit.models.gguf_write import ROUNDING, pieces, write_lora, write_model
from fourbit.models.load import load_decoder, load_tokenizer
from fourbit.text.tokenizer import Tokenizer

TOKENS: dict[str, Any] = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(97)]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WRITTEN: dict[str, dict[str, Any]] = {
    **{name: SHAPES[name] for name in ("llama yarn", "smollm3", "mistral", "mistral whole", "ministral", "qwen2")},
    **{name: SHAPES[name] for name in ("qwen2 windows", "qwen3", "phi3", "phi3 long", "olmo2")},
    **{name: SHAPES[name] for name in ("granite", "granite bias")},
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}},
    "llama linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "gemma2": SHAPES["gemma2"] | {"query_pre_attn_scalar": 12},
    "gemma3": SHAPES["gemma3 capped"] | {"query_pre_attn_scalar": 12},
    "gemma3 pattern": SHAPES["gemma3 capped"] | {"query_pre_attn_scalar": 12, "sliding_window_pattern": 3},
    "mixtral": SHAPES["mixtral"],
    "qwen3_moe": SHAPES["qwen3_moe"] | {"norm_topk_prob": True},
}
BIAS = "its attention_bias is False, the model's True"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3 bias": (SHAPES["qwen3 bias"], BIAS),
    "olmo2 bias": (SHAPES["olmo2 bias"], BIAS),
    "smollm3 bias": (SHAPES["smollm3"] | {"mlp_bias": True}, "its mlp_bias is False, the model's True"),
    "gemma3 bias": (SHAPES["gemma3 capped"] | {"query_pre_attn_scalar": 12, "attention_bias": True}, BIAS),
    "yarn scaled": (SHAPES["llama yarn scaled"], "its rope is "),
    "dynamic": (SHAPES["llama dynamic"], "its rope is "),
    "no rope": (SHAPES["smollm3 marked"], "its no_rope is [3], the model's [0, 3]"),
    "routing": (SHAPES["qwen3_moe"], "its norm_topk_prob is True, the model's False"),
    "scale": (SHAPES["gemma2"], "its attention_scale is 0.28867513, the model's 0.2236068"),
    "no caps": (
        SHAPES["gemma2 uncapped"] | {"query_pre_attn_scalar": 12},
        "its attention_softcap is 50.0, the model's 0.",
    ),
    "windows": (SHAPES["gemma3"] | {"query_pre_attn_scalar": 12, "layer_types": MIXED[::-1]}, "its windows is "),
}


def decoder(shape: dict[str, Any]) -> Decoder:
    """Every weight drawn: a fresh norm or bias would hide faults."""
    torch.manual_seed(0)
    model = Decoder(read_spec({k: v for k, v in (SIZES | shape).items() if v is not None or k not in SIZES})).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2).data.add_("norm" in name and not model.spec.norm_plus_one)
    return model


def written(model: Decoder, path: Path, kind: str = "F32") -> GGUFFile:
    write_model(path, model, merged_state(model, torch.float32), TOKENS, kind)
    return GGUFFile(path)


@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_a_model_of_every_family_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = decoder(WRITTEN[name])
    written(model, tmp_path / "m.gguf")
    read = load_decoder(tmp_path / "m.gguf")
    for key, weight in model.state_dict().items():
        off = 2e-7 if model.spec.norm_plus_one and "norm" in key else 0  # 1 + w has fewer bits for w
        torch.testing.assert_close(read.state_dict()[key], weight, rtol=0, atol=off, msg=key)
    if (most := read.max_positions) != model.max_positions:  # what llama.cpp's architecture sees no window of
        assert most == min(filter(None, model.spec.windows))
    ids = (torch.arange(60).view(2, 30) % 97)[:, :most]
    torch.testing.assert_close(read(ids), model(ids), rtol=0, atol=1e-4 if "gemma" in name or name == "llama3" else 0)


def test_torchs_default_dtype_does_not_round_what_is_written(tmp_path: Path) -> None:
    model = decoder(WRITTEN["phi3 long"])
    written(model, tmp_path / "plain")
    torch.set_default_dtype(torch.bfloat16)
    try:
        written(model, tmp_path / "bf16")
    finally:
        torch.set_default_dtype(torch.float32)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "bf16").read_bytes()


def test_every_family_that_is_read_is_tested_here() -> None:
    families = {family for family, _, _ in (*ARCHITECTURES.values(), MIXTRAL)}
    assert families <= {shape["model_type"] for shape in WRITTEN.values()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_and_no_file_appears(name: str, tmp_path: Path) -> None:
    shape, words = REFUSED[name]
    model = decoder(shape)
    with pytest.raises(InputError, match=re.escape(words)):
        written(model, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())
    fourbit.save_model(model, tmp_path / "folder")  # the advice
    assert load_decoder(tmp_path / "folder").spec == model.spec


@pytest.mark.parametrize("kind", ROUNDING)
@torch.no_grad()
def test_every_type_is_as_near_as_it_says(
    kind: str, random_decoder: Callable[..., Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms stay exact, embeddings and head of Q4 are Q8_0; a quantiser that is off by a step is found out."""
    model = random_decoder(intermediate=80)
    types = {info.name: info.format for info in written(model, tmp_path / "m.gguf", kind).tensors.values()}
    assert types["output_norm.weight"] == "F32" and types["blk.0.attn_q.weight"] == kind
    assert types["token_embd.weight"] == types["output.weight"] == ("Q8_0" if kind[:2] == "Q4" else kind)
    assert types["blk.0.ffn_down.weight"] == ("F16" if kind[0] == "Q" else kind)  # rows of 80
    read = load_decoder(tmp_path / "m.gguf")
    for key, weight in model.state_dict().items():
        own = ROUNDING[types[pieces(model.spec, key)[0][0]]]
        assert (read.state_dict()[key] - weight).abs().max() <= own[0] * weight.abs().max() + own[1], key
    real = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda x, kind: real(x + 0.3 * np.abs(x).max() * (x == x.max()), kind))
    with pytest.raises(NumericError, match=r"comes back from .* as another weight"):
        written(model, tmp_path / "n.gguf", kind)
    assert not (tmp_path / "n.gguf").exists()


def test_too_large_and_not_finite_weights_are_told(random_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    model = random_decoder()
    weight = model.model.layers[0].mlp.up_proj.weight.data
    for value, words in ((1e6, "up to 1e.06 may be too large for it: BF16 holds them"), (float("nan"), "NaN or inf")):
        weight[0, 0] = value
        with pytest.raises(NumericError, match=words), np.errstate(all="ignore"):
            written(model, tmp_path / "m.gguf", "F16")
    weight[0, 0] = 1e6
    written(model, tmp_path / "m.gguf", "BF16")


# ---- LoRA


def adapted(shape: dict[str, Any], **config: Any) -> Decoder:
    model = decoder(shape | {"tie_word_embeddings": False})
    names = [name for name, _ in model.named_modules() if name.endswith(("proj", "embed_tokens", "lm_head"))]
    experts = ["experts.gate_up_proj", "experts.down_proj"] if model.spec.num_experts else []
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, target=names, target_parameters=experts, **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral whole", "phi3", "gemma2", "qwen3_moe"])
@torch.no_grad()
def test_a_lora_file_on_the_base_s_is_the_merged_file(name: str, rslora: bool, tmp_path: Path) -> None:
    """As llama.cpp applies it: of each tensor alpha / (columns of B) times B A, of an embedding's rows A B^T. Every
    layer's scale is right under rsLoRA and patterns, which llama.cpp's own converter leaves out."""
    patterns = {"rank_pattern": {"o_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 5.0}}
    model = adapted(WRITTEN[name], rslora=rslora, **patterns)
    write_lora(tmp_path / "lora.gguf", model, adapters_of(model))
    merged, lora = written(model, tmp_path / "merged.gguf"), GGUFFile(tmp_path / "lora.gguf")
    with fourbit.adapters_off(model):
        base = written(model, tmp_path / "base.gguf")
    assert lora.metadata["general.architecture"] == base.metadata["general.architecture"]
    assert (lora.metadata["general.type"], lora.metadata["adapter.type"]) == ("adapter", "lora")
    alpha, changed = float(lora.metadata["adapter.lora.alpha"]), set[str]()
    for own in [own.removesuffix(".lora_a") for own in lora.tensors if own.endswith(".lora_a")]:
        A, B = lora.tensor(f"{own}.lora_a"), lora.tensor(f"{own}.lora_b")
        change = alpha / B.shape[-1] * (A @ B.mT if own.startswith("token_embd") else B @ A)
        torch.testing.assert_close(base.tensor(own) + change, merged.tensor(own), rtol=0, atol=2e-6, msg=own)
        changed.add(own)
    for own in base.tensors.keys() - changed:
        assert torch.equal(base.tensor(own), merged.tensor(own)), own
    assert len(changed) > 10


def test_b_is_the_adapter_s_own_where_one_alpha_fits_all(tmp_path: Path) -> None:
    model = adapted(WRITTEN["qwen2"], alpha=7.0)
    write_lora(tmp_path / "lora.gguf", model, adapters_of(model))
    lora = GGUFFile(tmp_path / "lora.gguf")
    assert lora.metadata["adapter.lora.alpha"] == 7.0
    part: Any = adapters_of(model)["model.layers.0.mlp.up_proj"]
    assert torch.equal(lora.tensor("blk.0.ffn_up.weight.lora_b"), part.lora_B.detach())


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "dora", "target": ["q_proj"]},
        {"target": ["q_proj"], "modules_to_save": ["norm"]},
        {"target": ["q_proj"], "bias": "lora_only"},
        {"target": ["embed_tokens"]},
        {"target": ["lm_head"]},
    ],
    ids=lambda config: " ".join(map(str, config.values())),
)
def test_a_change_that_llama_cpp_s_lora_cannot_hold_is_refused_with_advice(
    config: dict[str, Any], tmp_path: Path
) -> None:
    model = decoder(WRITTEN["llama"])
    fourbit.attach(model, fourbit.LoRAConfig(**config))
    with pytest.raises(InputError, match=r"what llama.cpp's LoRA files cannot say: export the model merged"):
        write_lora(tmp_path / "lora.gguf", model, adapters_of(model))
    written(model, tmp_path / "m.gguf")  # the advice
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.slow  # a vocabulary of 49,152 tokens, three times
def test_the_tokenizer_of_smollm2_comes_back(smollm2: Path) -> None:
    own = load_tokenizer(smollm2)
    found = tokenizer_metadata(own, own.vocab_size)
    made = gguf_tokenizer(found)
    assert (found["tokenizer.ggml.pre"], made.stop_ids) == ("smollm", own.stop_ids)
    assert made.named_tokens.items() <= own.named_tokens.items() and made.eos_id == own.eos_id
    assert (made.chat_template, found["tokenizer.ggml.add_bos_token"]) == (own.chat_template, False)
    other = tokenizer_metadata(own, own.vocab_size, "{{ bos_token }}")
    assert other["tokenizer.chat_template"] == "{{ bos_token }}" and other["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_llama_cpp_opens_a_file_of_every_family_and_computes_the_same(name: str, tmp_path: Path) -> None:
    """Also what its loader asks for beyond our reader. It multiplies in 16 bits."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    sys.path.append(str(Path(__file__).parent))
    from test_tokenizer_gguf_words import original

    tokenizer = Tokenizer(original("gpt-2"))
    model = decoder(WRITTEN[name] | {"vocab_size": tokenizer.vocab_size})
    keys = tokenizer_metadata(tokenizer, tokenizer.vocab_size)
    write_model(tmp_path / "m.gguf", model, merged_state(model, torch.float32), keys, "F32")
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, verbose=False, logits_all=True)
    ids = (torch.arange(min(30, load_decoder(tmp_path / "m.gguf").max_positions or 30)) * 7) % tokenizer.vocab_size
    theirs.eval(ids.tolist())
    with torch.no_grad():
        ours = model(ids[None])[0]
    found = torch.tensor(np.array(theirs.scores[: len(ids)]))
    theirs.close()
    assert torch.equal(found.argmax(-1), ours.argmax(-1))
    assert (found - ours).abs().max() < 1e-2 * ours.abs().max()
