"""What was trained is what is saved: heads, biases and whole modules beside LoRA, in PEFT's files, both ways."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import fourbit
from fourbit.errors import InputError
from fourbit.lora.layer import adapter_parameters, adapters_of
from fourbit.lora.peft_files import adapter_state

# peft 0.21 asks transformers 5.23 a question under an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(24).view(3, 8) % 50
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
WEIGHTS = "adapter_model.safetensors"
CONFIGS = {
    "SEQ_CLS": {"task_type": "SEQ_CLS"},
    "head and pooler": {"modules_to_save": ["classifier", "pooler"]},
    "embeddings": {"modules_to_save": ["word_embeddings", "classifier"]},
    "biases": {"bias": "all"},
    "biases of LoRA": {"bias": "lora_only", "modules_to_save": ["classifier"]},
    "all of it": {"task_type": "SEQ_CLS", "bias": "all"},
}


def bert(dtype: torch.dtype = torch.float32) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return randomised(BertForSequenceClassification(BertConfig(**SIZES, num_hidden_layers=2, num_labels=3))).to(dtype)


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS.keys())
def test_both_ways_between_peft_and_us(settings: dict[str, object], tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"], **settings)
    theirs = randomised(get_peft_model(bert(), config), 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = bert()
    fourbit.load_adapter(ours, tmp_path / "theirs")
    assert (logits(theirs) - logits(bert())).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    with fourbit.adapters_off(ours):  # the base again, which peft's biases are no longer
        assert torch.equal(logits(ours), logits(bert()))
    fresh = bert()
    fourbit.attach(fresh, config)
    assert adapter_state(fresh).keys() == adapter_state(ours).keys()
    assert torch.equal(logits(fresh), logits(bert()))
    randomised(fresh, 2)
    fourbit.save_adapter(fresh, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(bert(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(fresh), rtol=0, atol=1e-5)
    again = bert()
    fourbit.load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(fresh))
    fourbit.save_adapter(again, tmp_path / "again")
    for file in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


def test_copies_train_switch_and_leave_with_their_adapter() -> None:
    model, x = bert(torch.bfloat16), logits(bert(torch.bfloat16))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = fourbit.LoRAConfig(rank=2, target=["query"], modules_to_save=["classifier", "LayerNorm"], bias="all")
    fourbit.attach(model, config, seed=0)
    trained = adapter_parameters(model)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {"classifier.adapters.default.copies.weight"}
    model.train()(IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(p.grad is not None for name, p in trained.items() if "lora_A" not in name)
    randomised(model, 3)
    one = logits(model)
    fourbit.copy_adapter(model, "default", "kept")
    randomised(model, 4)
    assert not torch.equal(logits(model), one)
    with fourbit.using(model, "kept"):
        assert torch.equal(logits(model), one) and torch.equal(model.classifier.bias, adapters_bias(model, "kept"))
    with pytest.raises(InputError, match=r"default and kept cannot be active together: .*own copy of '.*LayerNorm'"):
        fourbit.use(model, "default", "kept")
    with fourbit.adapters_off(model):
        assert torch.equal(logits(model), x)
    fourbit.remove_adapter(model, "default")
    fourbit.remove_adapter(model, "kept")
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == base.keys()


def adapters_bias(model: nn.Module, name: str) -> Tensor:
    copies = adapters_of(model, name)["classifier"].copies
    return copies.bias.bfloat16()


@pytest.mark.parametrize("quantised", [False, True])
def test_a_rank_above_a_layers_sizes_is_what_it_is_to_peft(quantised: bool, tmp_path: Path) -> None:
    """As of a gate of one output, which all-linear meets."""

    def gated(dense: bool = True) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
        packed = fourbit.quantize_(model) if quantised else model
        return fourbit.dequantize(packed) if dense and quantised else packed

    theirs = randomised(get_peft_model(gated(), LoraConfig(r=8, lora_alpha=4, target_modules="all-linear")), 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, x = gated(dense=False), torch.randn(5, 64, requires_grad=True)
    assert fourbit.load_adapter(ours, tmp_path / "theirs") == ["0", "1"]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(theirs(x).sum(), [x, *(p for p in theirs.parameters() if p.requires_grad)])
    got = torch.autograd.grad(ours(x).sum(), [x, *adapter_parameters(ours).values()])
    for mine, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
    fourbit.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(gated(), tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert fourbit.attach(gated(), fourbit.LoRAConfig(rank=8)) == ["0", "1"]


REFUSED: dict[str, tuple[Callable[[nn.Module], object], dict[str, object], str]] = {
    "typo": (lambda _: None, {"modules_to_save": ["clasifier"]}, "'clasifier' matches no module. Nearest: classifier"),
    "empty": (lambda _: None, {"modules_to_save": ["dropout"]}, "'dropout' names nothing that can be trained"),
    "text": (lambda _: None, {"modules_to_save": "classifier"}, "must be a list of texts, got 'classifier'"),
    "4-bit": (
        lambda model: fourbit.quantize_(model, skip=()),
        {"modules_to_save": ["classifier"]},
        r"'classifier': classifier are in 4 bits and cannot be trained: leave them dense \(skip",
    ),
    "nothing left": (lambda _: None, {"modules_to_save": ["query"]}, r"leaves nothing of target=\('query',\)"),
    "bias": (lambda _: None, {"bias": "some"}, "bias must be one of none, all or lora_only, got 'some'"),
}


@pytest.mark.parametrize(("change", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_whole(
    change: Callable[[nn.Module], object], settings: dict[str, object], message: str
) -> None:
    model = bert()
    change(model)
    with pytest.raises(InputError, match=message):
        fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["query"], **settings))
    assert not adapters_of(model)


def test_tied_weights_are_untied_by_advice_or_refused() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=1)).eval()
    for named in (["decoder"], ["word_embeddings"], ["decoder", "word_embeddings"]):
        config = fourbit.LoRAConfig(rank=2, target=["query"], modules_to_save=named)
        with pytest.raises(InputError, match=r"are one tied tensor, and trained copies would drift apart: untie them"):
            fourbit.attach(model, config)
    module = model.cls.predictions.decoder  # what the sentence says
    module.weight = nn.Parameter(module.weight.detach().clone())
    module.bias = nn.Parameter(module.bias.detach().clone())
    fourbit.attach(model, config)


def test_a_save_that_leaves_something_out_is_refused(tmp_path: Path) -> None:
    model = bert()
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["query"]))
    model.classifier.requires_grad_()
    with pytest.raises(InputError, match=r"does not hold all that trains: classifier\.weight, classifier\.bias \(2\)"):
        fourbit.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.classifier.requires_grad_(False)
    fourbit.save_adapter(model, tmp_path)
    kept = fourbit.quantize_(bert(), skip=["classifier"])  # as advised where it is in 4 bits
    fourbit.attach(kept, fourbit.LoRAConfig(rank=2, target=["query"], modules_to_save=["classifier"]))


def test_a_peft_config_is_read_as_its_file_is() -> None:
    limited = LoraConfig(r=2, target_modules=["query"], layers_to_transform=[1], rank_pattern={"query": 3})
    model = bert()
    assert fourbit.attach(model, limited) == ["bert.encoder.layer.1.attention.self.query"]
    assert adapters_of(model)["bert.encoder.layer.1.attention.self.query"].rank == 3
    assert fourbit.attach(bert(), {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"})
    for config, message in (
        (LoraConfig(target_modules=["query"], lora_bias=True), "lora_bias=True is a PEFT feature"),
        (LoraConfig(target_modules=["query"], init_lora_weights="gaussian"), "init_lora_weights must be True"),
        (LoraConfig(), "the LoraConfig: the key 'target_modules' is missing"),
        (LoraConfig(target_modules=["quary"]), "'quary' matches no linear layer.*Nearest: query"),
    ):
        with pytest.raises(InputError, match=message):
            fourbit.attach(bert(), config)


def test_no_seed_follows_torch() -> None:
    def start(seed: int | None) -> tuple[Tensor, Tensor]:
        model = bert()
        torch.manual_seed(5)
        fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["query"]), seed=seed)
        parts = [tensor for key, tensor in adapter_state(model).items() if "lora_A" in key]
        assert not torch.equal(*parts)
        return torch.cat(parts), torch.rand(())

    drawn, given, untouched = start(None), start(7), torch.manual_seed(5) and torch.rand(())
    assert torch.equal(drawn[0], start(None)[0]) and not torch.equal(drawn[0], given[0])
    assert torch.equal(given[1], untouched) and not torch.equal(drawn[1], untouched)


def test_file_tensors_of_the_wrong_kind(tmp_path: Path) -> None:
    model = bert()
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["query"], modules_to_save=["classifier"]))
    fourbit.save_adapter(model, tmp_path)
    key = "base_model.model.classifier.weight"
    save_file(load_file(tmp_path / WEIGHTS) | {key: torch.zeros(3, 16, dtype=torch.int32)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"classifier\.weight' holds NaN, infinity or"):
        fourbit.load_adapter(bert(), tmp_path)
