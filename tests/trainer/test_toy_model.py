"""A model of no family, nothing but the protocol: every trainer trains it, evaluation and generation take it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourbit
from fourbit.data.batch import pack, pad
from fourbit.data.template import template_for
from fourbit.kernels.attention import visible_keys
from fourbit.kernels.spans import Spans
from fourbit.lora.active import copy_adapter
from fourbit.models.protocol import Cache, CausalLM
from fourbit.text.tokenizer import Tokenizer
from fourbit.text.tokenizer_folder import folder_tokenizer
from fourbit.trainer.evaluate import answer_all, evaluate_loss
from fourbit.trainer.loop import cross_entropy
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.reward_model import RewardModel
from fourbit.trainer.trainer import Trainer


class Seen:
    """The toy's cache: embeddings [B, S, D] of the tokens read so far."""

    def __init__(self) -> None:
        self.words: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        self.words = None if self.words is None else self.words[rows]


class Toy(CausalLM):
    """Predicts from the token and the mean of all it follows: no layers, no positions, no attention, no norm."""

    def __init__(self, size: int = 24, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab_size, self.hidden_size, self.source = 259, size, "toy"
        self.words = nn.Embedding(self.vocab_size, size)
        self.mix = nn.Linear(2 * size, size)
        self.lm_head = nn.Linear(size, self.vocab_size)

    def hidden(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        spans: Spans | None = None,
        cache: Cache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        words = self.words(input_ids)  # [B, T, D]
        heard = words
        if cache is not None:
            assert isinstance(cache, Seen)
            heard = cache.words = words if cache.words is None else torch.cat([cache.words, words], dim=1)  # [B, S, D]
        if spans is not None:
            sees, heard = followed(spans, input_ids.numel()), words.flatten(0, 1)
        else:
            sees = visible_keys(words.shape[1], heard.shape[1], mask, words.device)[:, 0]  # [B or 1, T, S]
        mean = (sees.to(words.dtype) @ heard) / sees.sum(-1, keepdim=True)
        return torch.tanh(self.mix(torch.cat([words, mean.view_as(words)], dim=-1)))

    def new_cache(self) -> Seen:
        return Seen()

    def settings(self) -> dict[str, Any]:
        return {"model_type": "toy", "hidden_size": self.hidden_size}


def followed(spans: Spans, tokens: int) -> Tensor:
    """Which tokens each one follows, [tokens, tokens] bool: a piece what it goes on from and itself."""
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, *parent in spans:
        for up in parent:
            sees[start:end] = sees[spans[up][0]]
        sees[start:end, start:end] = True
    return sees.tril()


def adapted(seed: int = 0, **lora: Any) -> Toy:
    model = Toy(seed=seed)
    fourbit.attach(model, fourbit.LoRAConfig(**({"rank": 4, "alpha": 8, "target": ["mix", "lm_head"]} | lora)))
    return model


def with_teacher() -> Toy:
    """An adapter as it is at the start, beside one that is not: or the teacher would be the student."""
    model = adapted()
    model.mix.adapters["default"].lora_B.data.normal_()
    copy_adapter(model, "default", "teacher")
    model.mix.adapters["default"].lora_B.data.zero_()
    return model


KINDS: dict[str, tuple[str, Any, dict[str, Any]]] = {  # the kind in conftest, its model, its options
    "sft": ("sft", adapted, {}),
    "sft full": ("sft", Toy, {"full": True}),
    "dpo": ("sigmoid", adapted, {}),
    "kto": ("kto", adapted, {}),
    "reward": ("reward", lambda: adapted(target=["mix"]), {"head": None}),
    "distill": ("distill from another model", adapted, {"teacher": lambda: Toy(32, seed=1)}),
    "distill same base": ("distill from the base", with_teacher, {"teacher": "teacher"}),
}


@pytest.fixture
def toy(make: Any, tokenizer: Tokenizer) -> Any:
    """A function: the trainer of a kind, for a toy."""

    def trainer(name: str, out: Path, **options: Any) -> Trainer:
        kind, model, own = KINDS[name]
        own = own | ({"teacher": own["teacher"]()} if callable(own.get("teacher")) else {})
        options = {"batch_size": 5, "lr": 2e-2, "steps": 24, "adapted": lambda _: (model(), tokenizer)} | own | options
        return make(kind, out, **options)

    return trainer


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return folder_tokenizer(tiny_folder)


def losses_of(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_trains_it(kind: str, toy: Any, tmp_path: Path) -> None:
    result = toy(kind, tmp_path, val=True).train(display=None)
    losses = losses_of(tmp_path)
    assert losses[-1] < 0.8 * losses[0] and result.steps == len(losses) == 24 and result.val_loss < losses[0]
    assert (tmp_path / ("config.json" if kind == "sft full" else "adapter_config.json")).is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_layout_changes_nothing(kind: str, toy: Any, tmp_path: Path) -> None:
    """Packed in one row, forked or not, and padded one by one: so the toy keeps the protocol's word on spans."""
    losses = []
    for name, layout in {"packed": {}, "padded": {"packing": False}, "single": {"micro_batch": 1}}.items():
        toy(kind, tmp_path / name, **layout, steps=2).train(display=None)
        losses.append(losses_of(tmp_path / name))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_adapters_and_rewards_come_back(toy: Any, tmp_path: Path) -> None:
    trainer = toy("reward", tmp_path, steps=4)
    trainer.train(display=None)
    fresh = RewardModel.load(Toy(), tmp_path)
    batch = trainer.micro_batches(trainer.train_set, range(4), 4)[0]
    trainer.model.eval()
    with torch.no_grad():
        for ours, theirs in zip(trainer.reward_model.rewards(batch), fresh.rewards(batch), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_its_dtype_is_neither_that_of_scales_nor_of_an_adapter(bias: bool) -> None:
    model = Toy(64)
    model.mix = nn.Linear(128, 64, bias=bias)
    words = model._modules.pop("words")
    fourbit.quantize_(model.bfloat16())
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, target=["mix"]))
    model.words = words
    assert next(iter(model.parameters())).dtype == torch.uint8 and model.dtype == torch.bfloat16


def test_a_quantised_toy_is_trained(toy: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Toy(64)
    fourbit.quantize_(model)
    assert isinstance(model.mix, fourbit.NF4Linear)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8))
    toy("sft", tmp_path, adapted=lambda _: (model, tokenizer)).train(display=None)
    losses = losses_of(tmp_path)
    assert losses[-1] < 0.9 * losses[0]


def test_it_is_evaluated_and_answers(toy: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    trainer = toy("sft", tmp_path)
    model, examples = trainer.model.eval(), trainer.train_set.examples
    packed, padded = pack(list(enumerate(examples))), pad(list(enumerate(examples)), 0)
    assert cross_entropy(model, packed).loss.item() == pytest.approx(cross_entropy(model, padded).loss.item(), rel=1e-5)
    expected = cross_entropy(model, packed).loss.item() / packed.trained
    assert evaluate_loss(model, examples) == pytest.approx(expected, rel=1e-5)
    prompts = [[1, 2, 3], [1, 2], [1, 2, 3, 4, 5, 6, 7], [9]]
    assert fourbit.generate(model, prompts, max_new_tokens=8) == [slowly(model, prompt, 8) for prompt in prompts]
    samples = trainer.train_set.samples[:3]
    assert len([*answer_all(model, tokenizer, template_for(tokenizer, None), samples, max_new_tokens=4)]) == 3


def slowly(model: Toy, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_an_abstract_model_is_none() -> None:
    with pytest.raises(TypeError, match=r"abstract .*hidden"):
        CausalLM()
