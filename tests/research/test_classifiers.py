"""Classifiers in one's own loop: a 4-bit body with adapters, a fresh head trained whole, both in one saved adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fourbit
from fourbit import LoRAConfig

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
TEXT = SIZE | {"vocab_size": 16, "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, tuple[dict[str, Any], str, list[str]]] = {  # class -> settings, input, its head
    "BertForSequenceClassification": (TEXT, "input_ids", ["classifier"]),
    "BertForTokenClassification": (TEXT, "input_ids", ["classifier"]),
    "RobertaForSequenceClassification": (TEXT, "input_ids", ["classifier.dense", "classifier.out_proj"]),
    "LlamaForSequenceClassification": (TEXT | {"num_key_value_heads": 2}, "input_ids", ["score"]),
    "ViTForImageClassification": (SIZE | {"image_size": 16, "patch_size": 8}, "pixel_values", ["classifier"]),
}


def classifier(name: str, head: int = 0) -> Any:
    """A 4-bit body, always the same, and the fresh head of a seed: as `from_pretrained` gives it, each time another."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**MODELS[name][0]))
    torch.manual_seed(head)
    for path in MODELS[name][2]:
        nn.init.normal_(model.get_submodule(path).weight, std=0.1)
    return fourbit.quantize_(model).eval()


def rows(name: str) -> dict[str, Tensor]:
    """Three classes told apart by one token, or by the mean of an image."""
    labels = torch.arange(12) % 3
    noise = torch.Generator().manual_seed(0)
    if MODELS[name][1] == "pixel_values":
        pixels = torch.randn(12, 3, 16, 16, generator=noise) + 2 * (labels - 1)[:, None, None, None]
        return {"pixel_values": pixels, "labels": labels}
    ids = torch.randint(5, 15, (12, 6), generator=noise)
    ids[:, :] = torch.where(torch.rand(12, 6, generator=noise) < 0.7, labels[:, None] + 1, ids)
    return {"input_ids": ids, "labels": labels[:, None].repeat(1, 6) if "Token" in name else labels}


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_head_that_was_trained_is_the_head_that_is_loaded(name: str, tmp_path: Path) -> None:
    model, batch, heads = classifier(name), rows(name), MODELS[name][2]
    entry = heads[0].partition(".")[0]
    before = {path: model.get_submodule(path).weight.clone() for path in heads}
    start = logits(model, batch)
    paths = fourbit.attach(model, LoRAConfig(rank=4, alpha=8, modules_to_save=[entry]), seed=0)
    assert torch.equal(logits(model, batch), start)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(heads) <= set(paths) and not any("lora" in own for own in trained if own.startswith(entry))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(30):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3
    tuned = logits(model.eval(), batch)
    with fourbit.adapters_off(model):
        assert torch.equal(logits(model, batch), start), "without the adapter, its head is off too"
    fourbit.save_adapter(model, tmp_path)

    fresh = classifier(name, head=1)
    assert not any(torch.equal(fresh.get_submodule(path).weight, before[path]) for path in heads)
    assert fourbit.load_adapter(fresh, tmp_path) == paths, "and without a word that the head is another"
    assert torch.equal(logits(fresh, batch), tuned)


def test_a_head_in_4_bits_cannot_be_trained_whole_and_the_error_says_what_to_do() -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))
    fourbit.quantize_(model, skip=())
    with pytest.raises(fourbit.InputError, match=r"classifier are in 4 bits .*\(skip in quantize_\)"):
        fourbit.attach(model, LoRAConfig(rank=4, modules_to_save=["classifier"]))


def own(head: int) -> nn.ModuleDict:
    """A module of one's own around the same body, with the fresh head of a seed, biases included."""
    torch.manual_seed(0)
    body = transformers.BertModel(transformers.BertConfig(**TEXT))
    torch.manual_seed(head)
    top = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))
    model = nn.ModuleDict({"body": body, "classifier": top})
    fourbit.quantize_(model)
    return model


def test_a_head_of_ones_own_is_left_dense_by_its_name(tmp_path: Path) -> None:
    """A pretrained body in a module of one's own: `classifier` is neither quantised nor adapted, and trains whole."""
    model = own(0)
    paths = fourbit.attach(model, LoRAConfig(rank=4, modules_to_save=["classifier"]))
    assert [path for path in paths if path.startswith("classifier")] == ["classifier.0", "classifier.2"]
    hidden = model["body"](torch.ones(2, 4, dtype=torch.long)).last_hidden_state
    model["classifier"](hidden).square().sum().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "classifier" in name and not name.endswith(("weight", "bias"))} == set()
    assert all(grad is not None for name, grad in trained.items() if "classifier" in name)
    fourbit.save_adapter(model, tmp_path)
    again = own(1)
    fourbit.load_adapter(again, tmp_path)
    assert torch.equal(again["classifier"](hidden), model["classifier"](hidden))
