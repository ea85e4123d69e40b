"""Any architecture: quantise, attach, train in one's own loop, save and load, on 27 models of transformers.

The tests hold the table of docs/architectures.md against what they find; this file, run as a program, writes it.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fourbit
from fourbit import LoRAConfig
from fourbit.errors import InputError
from fourbit.lora.layer import adapter_layers
from fourbit.lora.quantize import dense_weights

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LM = {"input_ids": IDS, "labels": IDS}
CLASSES = {"labels": torch.tensor([0, 2])}
TEXT, VISION, SOUND = (
    CLASSES | {"input_ids": IDS},
    CLASSES | {"pixel_values": IMAGES},
    CLASSES | {"input_values": IMAGES[:, 0].reshape(2, -1).repeat(1, 2)},
)
PAIRS = {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": True}

TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LABELS = {"num_labels": 3}
BASIC = TOKENS | WIDE | LABELS
IMAGE = {"image_size": 16, "patch_size": 8}
GROUPED = BASIC | {"num_key_value_heads": 2, "head_dim": 8}
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
BOTH = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
}
SPARSE = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "router_jitter_noise": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEBERTA = BASIC | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DISTIL = BASIC | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
SEQ2SEQ = TOKENS | BOTH | {"d_model": 32, "max_position_embeddings": 32}
SPEECH = BASIC | {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16,
    "apply_spec_augment": False,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # class -> kind, settings, batch
    "BertForSequenceClassification": ("encoder", BASIC, TEXT),
    "RobertaForMaskedLM": ("encoder", BASIC, LM),
    "DebertaV2ForSequenceClassification": ("encoder", DEBERTA, TEXT),
    "DistilBertForSequenceClassification": ("encoder", DISTIL, TEXT),
    "AlbertForSequenceClassification": ("encoder", BASIC | {"embedding_size": 16}, TEXT),
    "GPT2LMHeadModel": ("decoder", TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}, LM),
    "OPTForCausalLM": ("decoder", BASIC | {"ffn_dim": 64, "word_embed_proj_dim": 16}, LM),
    "GPTNeoXForCausalLM": ("decoder", BASIC, LM),
    "BloomForCausalLM": ("decoder", TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, LM),
    "LlamaForSequenceClassification": ("decoder", GROUPED, TEXT),
    "Qwen3ForCausalLM": ("decoder", GROUPED, LM),
    "Gemma2ForCausalLM": ("decoder", GROUPED, LM),
    "PhiForCausalLM": ("decoder", BASIC, LM),
    "T5ForConditionalGeneration": ("encoder-decoder", T5, LM),
    "BartForConditionalGeneration": ("encoder-decoder", SEQ2SEQ, LM),
    "WhisperForConditionalGeneration": (
        "audio encoder-decoder",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32},
        {"input_features": IMAGES.reshape(2, 8, -1)[..., :16], "labels": IDS},
    ),
    "ViTForImageClassification": ("vision", BASIC | IMAGE, VISION),
    "SwinForImageClassification": (
        "vision",
        IMAGE | LABELS | {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
        VISION,
    ),
    "CLIPModel": ("vision and text", {"text_config": BASIC, "vision_config": WIDE | IMAGE}, PAIRS),
    "SiglipModel": (
        "vision and text",
        {"text_config": BASIC | {"max_position_embeddings": 8, "projection_size": 32}, "vision_config": WIDE | IMAGE},
        PAIRS,
    ),
    "Wav2Vec2ForSequenceClassification": ("audio", SPEECH, SOUND),
    "WavLMForSequenceClassification": ("audio", SPEECH, SOUND),
    "MambaForCausalLM": ("state space", BASIC | {"state_size": 8, "time_step_rank": 4}, LM),
    "RwkvForCausalLM": ("recurrent", BASIC | {"rescale_every": 0}, LM),
    "MixtralForCausalLM": ("mixture of experts", GROUPED | {"num_local_experts": 4}, LM),
    "Qwen3MoeForCausalLM": ("mixture of experts", GROUPED | EXPERTS, LM),
    "SwitchTransformersForConditionalGeneration": (
        "mixture of experts, encoder-decoder",
        T5 | SPARSE,
        LM,
    ),
}  # fmt: skip


def built(name: str, *, quantised: bool = True) -> Any:
    """A model of that class from one seed, without dropout."""
    kind = getattr(transformers, name)
    config = kind.config_class(**MODELS[name][1])
    for part in [config, *(own for own in vars(config).values() if isinstance(own, transformers.PreTrainedConfig))]:
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    torch.manual_seed(0)
    model = kind(config)
    return fourbit.quantize_(model) if quantised else model


@torch.no_grad()
def outputs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The model's first output after the loss: logits."""
    return next(value for key, value in model(**batch).items() if key != "loss")


def row(name: str, model: nn.Module, adapters: list[str]) -> str:
    """The model's line of the table."""
    packed = [path for path, layer in model.named_modules() if isinstance(layer, fourbit.NF4Linear)]
    left = [
        f"{leaves(names)} ({why.partition(':')[0]})"
        for why, names in dense_weights(model).items()
        if "no linear layer" not in why
    ]
    other = sorted({why.split()[0] for why in dense_weights(model) if "no linear layer" in why})
    cells = name, MODELS[name][0], str(len(packed)), str(len(adapters)), "; ".join(left), ", ".join(other)
    return f"| {' | '.join(cells)} |"


def leaves(names: dict[str, int]) -> str:
    """Names without the numbers of layers, each once."""
    return ", ".join(dict.fromkeys(".".join(p for p in name.split(".")[-3:-1] if not p.isdecimal()) for name in names))


SLOW = ["DistilBert", "Albert", "OPT", "Bloom", "Phi", "Swin", "Wav2Vec2", "Qwen3Moe"]  # much like others of these
CASES = [pytest.param(name, marks=pytest.mark.slow if name.startswith(tuple(SLOW)) else ()) for name in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_quantised_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, batch = built(name), MODELS[name][2]
    paths = fourbit.attach(model, LoRAConfig(rank=2, alpha=4))
    assert row(name, model, paths) in PAGE.read_text(), "write the page anew: run this file"
    start = outputs(model.eval(), batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=3e-3), []
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    without = [
        path for path, layer in adapter_layers(model).items() for p in layer.adapters.parameters() if not p.grad.any()
    ]
    assert without == []
    as_trained = outputs(model, batch)
    assert torch.equal(outputs(model.eval(), batch), as_trained) and not torch.equal(as_trained, start)
    assert torch.equal(outputs(copy.deepcopy(model), batch), as_trained)
    fourbit.save_adapter(model, tmp_path / "adapter")
    again = built(name).eval()
    assert fourbit.load_adapter(again, tmp_path / "adapter") == paths
    assert torch.equal(outputs(again, batch), as_trained)


def test_falcon_is_refused_by_name_for_its_own_forward() -> None:
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**BASIC))
    words = r"h\.0\.self_attention\.query_key_value\.weight, .*FalconLinear has a forward of its own"
    with pytest.raises(InputError, match=words):
        fourbit.quantize_(model)
    with pytest.raises(InputError, match=r"'all-linear' finds no such layer.* FalconLinear has a forward of its own"):
        fourbit.attach(model, LoRAConfig(rank=2))


def test_rwkv_that_scales_its_weights_in_place_is_refused() -> None:
    """It does so before it answers, by default: a packed weight cannot be written into."""
    torch.manual_seed(0)
    model = fourbit.quantize_(transformers.RwkvForCausalLM(transformers.RwkvConfig(**BASIC, rescale_every=1))).eval()
    with pytest.raises(RuntimeError, match="the weight of such a layer is made when it is read"):
        outputs(model, LM)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
def test_gpt2_adapters_are_pefts_and_know_their_base_in_4_bits_and_dense(tmp_path: Path) -> None:
    """Its layers keep their weight transposed (Conv1D): PEFT's files, and the base's identity, do not mind."""
    ours, batch = built("GPT2LMHeadModel"), MODELS["GPT2LMHeadModel"][2]
    fourbit.attach(ours, LoRAConfig(rank=2))
    for parameter in ours.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    fourbit.save_adapter(ours, tmp_path)
    dense = built("GPT2LMHeadModel", quantised=False).eval()
    with pytest.warns(UserWarning, match="was trained on nf4; on the dense base it will be somewhat off"):
        fourbit.load_adapter(dense, tmp_path)
    with pytest.warns(UserWarning, match="fan_in_fan_out to True"):  # PEFT finds that by itself
        peft_model = peft.PeftModel.from_pretrained(built("GPT2LMHeadModel", quantised=False), tmp_path).eval()
    torch.testing.assert_close(outputs(peft_model, batch), outputs(dense, batch))
    peft_model.save_pretrained(tmp_path / "back")
    again = built("GPT2LMHeadModel").eval()
    fourbit.load_adapter(again, tmp_path / "back")
    assert torch.equal(outputs(again, batch), outputs(ours.eval(), batch))


if __name__ == "__main__":
    found = [row(name, model := built(name), fourbit.attach(model, LoRAConfig(rank=2))) for name in MODELS]
    text, mark, _ = PAGE.read_text().partition("| --- | --- | --: | --: | --- | --- |\n")
    PAGE.write_text(text + mark + "\n".join(found) + "\n")
