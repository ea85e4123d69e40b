"""`fourbit` takes folders whose architecture is not built in."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fourbit

SIZES = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "num_experts": 4}
LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
LINEAR |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Cohere2ForCausalLM": {"sliding_window": 8, "logit_scale": 0.3},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "Qwen3NextForCausalLM": LINEAR,
    "FalconH1ForCausalLM": MAMBA | {"mamba_n_groups": 1, "lm_head_multiplier": 0.4},
    "Glm4ForCausalLM": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_sft_and_generate(name: str, typed: Any, here: Path, tiny_folder: Path) -> None:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES | MODELS[name]))
    model.save_pretrained("foreign")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_folder / file, f"foreign/{file}")
    said = typed("sft --model foreign --data rows.jsonl --out run --steps 2 --batch-size 3 --target attn")
    assert ("packing is off" in said) == (name in ("Qwen3NextForCausalLM", "FalconH1ForCausalLM")) and "nf4" in said
    Path("ask.jsonl").write_text('{"prompt": "abc"}\n')
    typed("generate --model foreign --adapter run --data ask.jsonl --out said.jsonl --max-new-tokens 3")
    loaded, tokenizer = fourbit.load("foreign", quant_type="nf4")
    fourbit.load_adapter(loaded, "run")
    assert fourbit.evaluate_loss(loaded, "rows.jsonl", tokenizer) > 0
