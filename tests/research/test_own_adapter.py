"""An adapter of one's own: attached, saved, loaded and trained as LoRA is, over dense and 4-bit layers."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import fourbit
from fourbit.errors import InputError
from fourbit.lora.layer import adapters_of
from fourbit.lora.peft_files import adapter_state


class Scale(fourbit.Adapter):
    """Each output times 1 + gain (IA3, arXiv 2205.05638), after a low-rank part; a buffer counts its steps."""

    def __init__(self, base: nn.Linear | fourbit.NF4Linear, config: fourbit.LoRAConfig) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(base.out_features))
        self.down = nn.Parameter(torch.randn(config.rank, base.in_features) / config.alpha)
        self.up = nn.Parameter(torch.zeros(base.out_features, config.rank))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += self.training
        return y * (1 + self.gain) + x @ self.down.T @ self.up.T


class Other(Scale):
    """Another kind with the same tensors."""


CONFIG = fourbit.LoRAConfig(rank=3, alpha=4, rank_pattern={"q_proj": 2}, bias="all", modules_to_save=["norm"])


def model_of(folder: Path, quant_type: str | None = None) -> nn.Module:
    return fourbit.load(folder, quant_type=quant_type)[0]


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_a_round_trip(tiny_folder: Path, tmp_path: Path, quant_type: str | None) -> None:
    model = model_of(tiny_folder, quant_type)
    plain = model(IDS)
    fourbit.attach(model, CONFIG, layer=Scale, seed=0)
    assert torch.equal(model(IDS), plain)
    parts = adapters_of(model)
    assert {p.down.shape[0] for path, p in parts.items() if isinstance(p, Scale) and "q_proj" in path} == {2}
    randomised(model).train()(IDS)
    assert {int(p.calls) for p in parts.values() if isinstance(p, Scale)} == {1}
    fourbit.save_adapter(model, tmp_path)
    again = model_of(tiny_folder, quant_type)
    fourbit.load_adapter(again, tmp_path, layer=Scale)
    state, read = adapter_state(model), adapter_state(again)
    assert state.keys() == read.keys() and any("calls" in key for key in state)
    assert all(torch.equal(tensor, read[key]) and tensor.dtype == read[key].dtype for key, tensor in state.items())
    assert torch.equal(again.eval()(IDS), model.eval()(IDS)) and not torch.equal(model(IDS), plain)
    fourbit.save_adapter(again, tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_another_kind_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    model = model_of(tiny_folder)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2), layer=Scale)
    fourbit.save_adapter(model, tmp_path / "scale")
    lora = model_of(tiny_folder)
    fourbit.attach(lora, fourbit.LoRAConfig(rank=2))
    fourbit.save_adapter(lora, tmp_path / "lora")
    for folder, options, kinds in (
        ("scale", {}, "the kind fourbit.Scale, and layer= makes LORA"),
        ("scale", {"layer": Other}, "the kind fourbit.Scale, and layer= makes fourbit.Other"),
        ("lora", {"layer": Scale}, "the kind LORA, and layer= makes fourbit.Scale"),
    ):
        bare = model_of(tiny_folder)
        with pytest.raises(InputError, match=f"holds an adapter of {kinds}: give load_adapter the layer"):
            fourbit.load_adapter(bare, tmp_path / folder, **options)
        assert not adapters_of(bare)
    with pytest.raises(InputError, match="the model has rank 2, scale 16, the file a Scale"):
        fourbit.load_adapter(lora, tmp_path / "scale", layer=Scale)
    assert json.loads((tmp_path / "scale" / "adapter_config.json").read_text())["peft_type"] == "fourbit.Scale"
    with pytest.raises(KeyError, match=r"fourbit\.Scale"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), tmp_path / "scale")


class Stop(Exception):
    """After some steps."""


class Stopping:
    """A display that ends the run with an error after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, total: int, start: int) -> "Stopping":
        return self

    def show(self, record: object) -> None:
        self.left -= 1
        if not self.left:
            raise Stop

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("quant_type", ["nf4"])
def test_a_trainer_trains_resumes_and_keeps_the_best(
    tiny_folder: Path, rows: Path, val_rows: Path, tmp_path: Path, quant_type: str
) -> None:
    def trainer(out: str, layer: object, **options: object) -> fourbit.SFTTrainer:
        model, tokenizer = fourbit.load(tiny_folder, quant_type=quant_type)
        fourbit.attach(model, CONFIG, layer=layer, seed=0)
        config = fourbit.SFTConfig(
            out=str(tmp_path / out),
            steps=6,
            batch_size=2,
            lr=1e-2,
            save_every=2,
            eval_every=2,
            keep_best=True,
            **options,
        )
        return fourbit.SFTTrainer(model, tokenizer, train=str(rows), val=str(val_rows), config=config)

    whole = trainer("whole", Scale)
    whole.train(display=None)
    with pytest.raises(Stop):
        trainer("cut", Scale).train(display=Stopping(5))
    cut = trainer("cut", Scale, resume="auto")
    cut.train(display=None)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    state = adapter_state(cut.model)
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(whole.model).items())
    again = model_of(tiny_folder, quant_type)
    fourbit.load_adapter(again, tmp_path / "whole", layer=Scale)
    assert torch.equal(again(IDS), whole.model.eval()(IDS))
    assert float(state["base_model.model.model.norm.weight"].std()) > 0  # what is trained whole moved too
    with pytest.raises(InputError, match="form of its adapter"):
        trainer("cut", Other, resume="auto").train(display=None)


def test_a_trainer_refuses_at_once_what_it_would_not_save(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    model, tokenizer = fourbit.load(tiny_folder)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    model.lm_head.requires_grad_()
    with pytest.raises(InputError, match=r"does not hold all that trains: .*weight \(1\)"):
        fourbit.SFTTrainer(model, tokenizer, train=str(rows), config=fourbit.SFTConfig(out=str(tmp_path / "run")))
