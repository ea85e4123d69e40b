"""Models of transformers in the trainers, as they are: twenty steps beside transformers + peft on the same
4-bit weights, every kind of training, and layouts that change nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import fourbit
from fourbit.data.order import step_indices
from fourbit.lora.layer import adapters_of
from fourbit.models.foreign import as_causal_lm
from fourbit.text.tokenizer_folder import folder_tokenizer
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.reward_model import RewardModel

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
STEPS, RATE, LORA = 20, 5e-3, {"rank": 4, "alpha": 8}
TARGET = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "in_proj_qkvz"]  # PEFT refuses Mamba's out_proj


@torch.no_grad()
def quantised(name: str) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES | MODELS[name]))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.2)
    return fourbit.quantize_(model)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return folder_tokenizer(tiny_folder)


def losses_of(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def peft_losses(model: Any, adapter: Path, steps: list[list[Any]]) -> list[float]:
    """A plain loop over padded rows and all logits, of the dense model that the 4-bit weights stand for."""
    import peft

    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0), list[float]()
    for rows in steps:
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
        counts = torch.tensor([row.trained + [False] * (width - len(row.ids)) for row in rows])[:, 1:]
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1][counts], ids[:, 1:][counts])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_agree_with_peft(name: str, rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = quantised(name)
    twin = fourbit.dequantize(copy.deepcopy(model))
    there = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    fourbit.attach(model, fourbit.LoRAConfig(**LORA, target=sorted(there.intersection(TARGET))), seed=0)
    for adapter in adapters_of(model).values():  # a zero B would hide a wrong scale at first
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    fourbit.save_adapter(model, tmp_path / "adapter")
    config = fourbit.SFTConfig(
        out=str(tmp_path / "run"), steps=STEPS, batch_size=3, lr=RATE, schedule="constant", warmup=0, max_grad_norm=0.0
    )
    trainer = fourbit.SFTTrainer(model, tokenizer, train=rows, config=config)
    trainer.train(display=None)
    examples = trainer.train_set.examples
    numbers = [step_indices(len(examples), 3, step, config.seed) for step in range(STEPS)]
    theirs = peft_losses(twin, tmp_path / "adapter", [[examples[i].parts[0] for i in some] for some in numbers])
    assert losses_of(tmp_path / "run") == pytest.approx(theirs, abs=2e-3)
    assert len({round(loss, 2) for loss in theirs}) > STEPS / 2  # it moves


KINDS = [
    *(("Cohere2ForCausalLM", kind) for kind in ("sft", "sigmoid", "reward", "distill from another model")),
    *(("FalconH1ForCausalLM", kind) for kind in ("sft", "sigmoid")),
]
MORE = [
    *(("Cohere2ForCausalLM", kind) for kind in ("kto", "distill from the base")),
    *(("FalconH1ForCausalLM", kind) for kind in ("kto", "reward", "distill from another model")),
]


@pytest.mark.parametrize(("name", "kind"), [*KINDS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)])
def test_every_trainer_takes_it_and_layout_changes_nothing(
    name: str, kind: str, make: Any, tokenizer: Any, tmp_path: Path
) -> None:
    def adapted(folder: Path, **_: Any) -> tuple[Any, Any]:
        model = quantised(name)
        fourbit.attach(model, fourbit.LoRAConfig(**LORA), seed=0)
        for adapter in adapters_of(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.02)
        return model, tokenizer

    def losses(out: Path, **options: Any) -> tuple[list[float], Any]:
        more = {"head": None} if kind == "reward" else {}
        if kind == "distill from another model":
            more["teacher"] = quantised("Glm4ForCausalLM")
        trainer = make(kind, out, adapted=adapted, batch_size=3, steps=2, lr=1e-2, **more, **options)
        trainer.train(display=None)
        return losses_of(out), trainer

    packed, trainer = losses(tmp_path / "packed", val=True)
    assert trainer.config.packing == (name != "FalconH1ForCausalLM")
    padded, _ = losses(tmp_path / "padded", packing=False, checkpointing="on")
    assert padded == pytest.approx(packed, rel=1e-4)


def test_packing_that_is_off_is_said(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    class Display:
        def __init__(self, total: int, done: int) -> None: ...
        def message(self, text: str) -> None:
            said.append(text)

        def show(self, record: Any) -> None: ...
        def close(self) -> None: ...

    for name, expected in {"FalconH1ForCausalLM": 1, "Glm4ForCausalLM": 0}.items():
        model, said = quantised(name), list[str]()
        fourbit.attach(model, fourbit.LoRAConfig(**LORA))
        config = fourbit.SFTConfig(out=str(tmp_path / name), steps=1)
        fourbit.SFTTrainer(model, tokenizer, train=rows, config=config).train(display=Display)
        assert len([text for text in said if "packing is off" in text]) == expected, said


def test_a_run_evaluation_and_scores_take_it(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = quantised("Cohere2ForCausalLM")
    fourbit.attach(model, fourbit.LoRAConfig(**LORA), seed=0)
    before = fourbit.evaluate_loss(model, rows, tokenizer)
    run = fourbit.Run(model, tokenizer)
    ids = torch.tensor([tokenizer.encode("abcabcabc")])
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss.item()
    loss, _ = run.forward_backward({"input_ids": ids, "labels": ids})
    assert loss.item() == pytest.approx(wanted, abs=1e-4)
    run.optim_step(lr=1e-3)
    (sample,) = run.sample(["abc"], max_new_tokens=3, temperature=0.0)
    assert sample.ids == fourbit.generate(model, [tokenizer.encode("abc")], max_new_tokens=3)[0][: len(sample.ids)]
    assert fourbit.evaluate_loss(as_causal_lm(model), rows, tokenizer) != before
    scores = RewardModel(model, torch.ones(1, 64)).score(tokenizer, rows)
    assert len(scores) == len(rows.read_text().splitlines())
