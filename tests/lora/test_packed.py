"""bitsandbytes' files: every form that it writes is read with the same bytes and values, whole folders too."""

import io
from contextlib import redirect_stderr
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fourbit
from fourbit.kernels.weight4bit import BLOCKSIZES
from fourbit.lora.convert import packed_layer, packed_tensors
from fourbit.lora.linear4bit import Module4bit
from fourbit.models.load import load_decoder

STORAGE = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8]
FORMS = list(product(["nf4", "fp4"], [True, False], BLOCKSIZES))


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_is_read_and_written_again(dtype: torch.dtype, storage: torch.dtype) -> None:
    """48 x 160: rows are whole blocks of 32 only, and a block of 4096 is wider than many."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight = torch.randn(48, 160, dtype=dtype)
    for kind, nested, blocksize in FORMS:
        how = {"blocksize": blocksize, "quant_type": kind, "compress_statistics": nested, "quant_storage": storage}
        packed, state = bnb.functional.quantize_4bit(weight, **how)
        pieces = {f".{name}": tensor for name, tensor in state.as_dict(packed=True).items()} | {"": packed}
        layer = packed_layer(pieces, "it")
        assert (layer.quant_type, layer.double_quant, layer.blocksize, layer.dtype) == (kind, nested, blocksize, dtype)
        theirs = bnb.functional.dequantize_4bit(packed, state)
        assert torch.equal(layer.dequantize(dtype), theirs), how
        for name, tensor in packed_tensors("", layer).items():  # what we write of it is what they wrote
            wrote = pieces[name].view(torch.uint8).view(tensor.shape) if name == "" else pieces[name]
            if "quant_state" not in name:
                assert torch.equal(tensor, wrote), (how, name)


def families() -> dict[str, tuple[Any, Any]]:
    import transformers as t

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "head_dim": 16}
    return {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**sizes, tie_word_embeddings=True)),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**sizes)),
        "mistral": (t.MistralForCausalLM, t.MistralConfig(**sizes, sliding_window=8)),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**sizes, sliding_window=8, query_pre_attn_scalar=16)),
        "olmo2": (t.Olmo2ForCausalLM, t.Olmo2Config(**sizes)),
        "granite": (t.GraniteForCausalLM, t.GraniteConfig(**sizes)),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**sizes, pad_token_id=0, tie_word_embeddings=False)),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2", "granite", "phi3"])
def test_folders_of_families_that_transformers_writes(family: str, storage: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kind, config = families()[family]
    torch.manual_seed(0)
    dense = kind(config).eval()
    for name, parameter in dense.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    how = {
        "bnb_4bit_quant_type": "fp4" if family == "qwen3" else "nf4",
        "bnb_4bit_use_double_quant": storage == "uint8",
    }
    four = BitsAndBytesConfig(load_in_4bit=True, **how, bnb_4bit_quant_storage=storage)
    with redirect_stderr(io.StringIO()):
        dense.save_pretrained(tmp_path / "dense")
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=four, dtype=torch.float32, device_map={"": "cpu"}
        )
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    ours = load_decoder(tmp_path / "theirs")
    stored = {k: v for file in (tmp_path / "theirs").glob("*.safetensors") for k, v in load_file(file).items()}
    packed = {name: part for name, part in ours.named_modules() if isinstance(part, Module4bit)}
    assert len(packed) == (8 if family == "phi3" else 14)
    for name, part in packed.items():
        assert torch.equal(part.packed.flatten(), stored[f"{name}.weight"].view(torch.uint8).flatten())
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-3)
    fourbit.save_model(ours, tmp_path / "ours")
    again = load_decoder(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))
