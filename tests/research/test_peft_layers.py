"""LoRA on embeddings and convolutions of real architectures: PEFT's files both ways, and what is tied."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import fourbit
from fourbit.lora.layer import adapter_parameters
from fourbit.lora.peft_files import adapter_state

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),  # PEFT says what it does
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
IDS = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
BASIC = TOKENS | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
ONE = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}
SEQ2SEQ = TOKENS | {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in ONE.items()}
SEQ2SEQ |= {"d_model": 32, "max_position_embeddings": 32}
SPEECH = BASIC | {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16,
}  # fmt: skip
SOUND = IMAGES[:, 0].reshape(2, -1).repeat(1, 2)

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {  # class -> settings, input, what is targeted
    "BertForSequenceClassification": (
        BASIC, {"input_ids": IDS}, ["word_embeddings", "position_embeddings", "query", "classifier"],
    ),
    "GPT2LMHeadModel": (
        TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}, {"input_ids": IDS}, ["wte", "c_attn"],
    ),
    "Gemma2ForCausalLM": (
        BASIC | {"num_key_value_heads": 2, "head_dim": 8}, {"input_ids": IDS}, ["embed_tokens", "q_proj"],
    ),
    "BartForConditionalGeneration": (SEQ2SEQ | {"scale_embedding": True}, {"input_ids": IDS}, ["embed_tokens"]),
    "T5ForConditionalGeneration": (T5, {"input_ids": IDS, "labels": IDS}, ["relative_attention_bias", "embed_tokens"]),
    "ViTForImageClassification": (BASIC | IMAGE, {"pixel_values": IMAGES}, ["projection", "q_proj"]),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 4},
        {"pixel_values": IMAGES}, ["patch_embeddings", "downsampling_layer.1", "pwconv1"],
    ),
    "ResNetForImageClassification": (
        {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"},
        {"pixel_values": IMAGES}, ["convolution"],
    ),
    "Wav2Vec2ForSequenceClassification": (
        SPEECH, {"input_values": SOUND}, ["conv_layers.0.conv", "conv_layers.1.conv"],
    ),
}  # fmt: skip


def built(name: str) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**MODELS[name][0]))
    return randomised(model.parameters(), model)


@torch.no_grad()
def randomised(parameters: Any, model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(parameters):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    return model(**MODELS[name][1]).logits


SLOW = "ConvNext", "Bart", "GPT2", "Wav2Vec2"
CASES = [pytest.param(name, marks=pytest.mark.slow if name.startswith(SLOW) else ()) for name in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_both_ways_between_peft_and_us(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank_pattern": {MODELS[name][2][0]: 3}, "lora_dropout": 0.1}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=MODELS[name][2], use_rslora=True, **settings)
    theirs = peft.get_peft_model(built(name), config)
    randomised([p for p in theirs.parameters() if p.requires_grad], theirs, 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = built(name)
    paths = fourbit.load_adapter(ours, tmp_path / "theirs")
    expected, base = logits(theirs, name), logits(built(name), name)
    assert (expected - base).abs().max() > 0.05
    close = {"rtol": 0, "atol": 1e-5 * max(1.0, expected.abs().max().item())}
    torch.testing.assert_close(logits(ours, name), expected, **close)
    with fourbit.adapters_off(ours):
        assert torch.equal(logits(ours, name), base)
    fresh = built(name)
    if name.startswith(("T5", "Bart")):
        with pytest.raises(fourbit.InputError, match=r"embed_tokens\.weight' and .*shared\.weight' are one tied"):
            fourbit.attach(fresh, config)
    else:
        assert fourbit.attach(fresh, config) == paths
        assert adapter_state(fresh).keys() == adapter_state(ours).keys()
    fourbit.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(built(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back, name), expected, **close)
    file = "adapter_model.safetensors"
    written = load_file(tmp_path / "ours" / file)  # no whole weights, as PEFT saves of embeddings
    assert written.keys() == {key for key in load_file(tmp_path / "theirs" / file) if "lora_" in key}
    fourbit.merge(ours)
    torch.testing.assert_close(logits(ours, name), expected, **close)


def test_peft_starts_embeddings_and_convolutions_alike() -> None:
    """A zero and B normal of an embedding; A uniform by its fan-in, and B zero, of a convolution."""
    for name, target in (
        ("BertForSequenceClassification", "word_embeddings"),
        ("ResNetForImageClassification", "0.convolution"),
    ):
        theirs = peft.get_peft_model(built(name), peft.LoraConfig(r=64, target_modules=[target]))
        ours = built(name)
        fourbit.attach(ours, fourbit.LoRAConfig(rank=64, target=[target]))
        pairs = zip(adapter_parameters(ours).values(), [p for p in theirs.parameters() if p.requires_grad], strict=True)
        for mine, other in pairs:
            assert mine.shape == other.shape
            torch.testing.assert_close(mine.std(), other.std(), rtol=0.1, atol=0)
            torch.testing.assert_close(mine.abs().max(), other.abs().max(), rtol=0.3, atol=0)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_the_head_of_an_adapted_embedding_keeps_the_bases_weight(name: str, tmp_path: Path) -> None:
    """As in PEFT. Merged, the two are two, in the model, its folder, and in what is read from that."""
    model = built(name)
    head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    assert head.weight is table
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=[MODELS[name][2][0]]))
    randomised(adapter_parameters(model).values(), model, 1)
    before, expected = table.detach().clone(), logits(model, name)
    fourbit.merge(model)
    torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=1e-4)
    assert head.weight is table and torch.equal(table, before)
    assert not torch.equal(model.get_input_embeddings().weight, table)
    fourbit.save_model(model, tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, name), logits(model, name))
    tied = built(name)
    with pytest.raises(fourbit.InputError, match="differ, and are one tied tensor here: untie it"):
        fourbit.load_model(tied, tmp_path)
    tied.get_output_embeddings().weight = nn.Parameter(table.clone())
    assert torch.equal(logits(fourbit.load_model(tied, tmp_path), name), logits(model, name))


@pytest.mark.parametrize("other", [False, True])
def test_the_whole_embedding_in_pefts_file_is_the_4_bit_ones_or_refused(other: bool, tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASIC)).eval()

    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    theirs.save_pretrained(tmp_path)
    assert any("embed_tokens.base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model = base()
    model.model.embed_tokens.weight.data[7, 3] += 1.0 * other
    fourbit.quantize_(model, embeddings=True, blocksize=32)
    if other:
        with pytest.raises(
            fourbit.InputError, match=r"embed_tokens\.base_layer\.weight' is a whole weight, and it differs"
        ):
            fourbit.load_adapter(model, tmp_path)
    else:
        assert len(fourbit.load_adapter(model, tmp_path)) == 3


def test_embeddings_that_are_tied_are_untied_as_the_error_says() -> None:
    model = built("T5ForConditionalGeneration")
    with pytest.raises(
        fourbit.InputError, match=r"'encoder.embed_tokens.weight' and 'shared.weight' are one tied"
    ) as error:
        fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["encoder.embed_tokens"]))
    assert "module.weight = torch.nn.Parameter(module.weight.detach().clone())" in str(error.value)
    module = model.encoder.embed_tokens
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    assert fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["encoder.embed_tokens"])) == [
        "encoder.embed_tokens"
    ]
