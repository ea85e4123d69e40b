"""LoRA on expert parameters: its mathematics, and PEFT's files both ways on models of transformers."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.active import adapters_off, remove_adapter, using
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters, adapters_of, delta
from fourbit.lora.merge import merge
from fourbit.lora.peft_files import load_adapter, save_adapter
from fourbit.lora.quantize import quantize_
from tests.lora.test_expert_weights import models, run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def randomised(model: nn.Module, name: str = "default") -> nn.Module:
    for parameter in adapter_parameters(model, name).values():
        nn.init.normal_(parameter, 0, 0.1)
    return model


def fresh(family: str) -> Any:
    return copy.deepcopy(models(family)[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # [E, out, in], and [E, in, out] with biases
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]])
def test_an_adapter_opens_in_peft_and_pefts_here(family: str, targets: list[str], tmp_path: Path) -> None:
    model = fresh(family)
    attach(model, LoRAConfig(rank=3, alpha=6, target=["q_proj"], target_parameters=targets))
    x = torch.randn(2, 7, 32)
    randomised(model)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(fresh(family), tmp_path / "ours")
    wanted = theirs(inputs_embeds=x).logits
    torch.testing.assert_close(run(model, "eager", x)[0], wanted, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    for base in (fresh(family), copy.deepcopy(models(family)[0])):
        load_adapter(base, tmp_path / "theirs")
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            y = run(base, implementation, x)[0]
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=2e-5)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == len(targets) * 2 and config["target_modules"] == ["q_proj"]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_gradient_is_that_of_the_dense_sum(family: str, implementation: str) -> None:
    """The module with W + delta put in W's place, over 4 bits and dense."""
    for base in models(family):
        model = copy.deepcopy(base)
        attach(model, LoRAConfig(rank=2, target=None, target_parameters=BOTH))
        randomised(model)
        x = torch.randn(1, 6, 32)
        parameters = adapter_parameters(model)
        y = run_with_grad(model, implementation, x)
        found = torch.autograd.grad(y.square().sum(), list(parameters.values()))
        plain = copy.deepcopy(models(family)[1])
        own: dict[str, Tensor] = {}
        for path, part in adapters_of(model).items():
            parent, _, name = path.rpartition(".")
            module = plain.get_submodule(parent)
            weight = getattr(module, name).detach()
            left, right = part.term()
            del module._parameters[name]
            vars(module)[name] = own[path] = weight + left @ right
        z = run_with_grad(plain, implementation, x)
        wanted = torch.autograd.grad(z.square().sum(), list(parameters.values()))
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        for name, a, b in zip(parameters, found, wanted, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm(), name


def run_with_grad(model: Any, implementation: str, x: Tensor) -> Tensor:
    run(model, implementation, x)  # sets the implementation
    logits: Tensor = model(inputs_embeds=x).logits
    return logits


def test_adapters_on_experts_switch_merge_and_come_off(tmp_path: Path) -> None:
    model = fresh("mixtral")
    x = torch.randn(1, 5, 32)
    bare = run(model, "eager", x)[0]
    paths = attach(model, LoRAConfig(rank=2, target_parameters=["down_proj"], rank_pattern={r"layers\.1.*": 3}), seed=0)
    assert [path for path in paths if "experts" in path] == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    assert torch.equal(run(model, "eager", x)[0], bare), "a fresh one changes nothing"
    assert [adapters_of(model)[path].rank for path in paths if "experts" in path] == [2, 3]
    randomised(model)
    adapted = run(model, "eager", x)[0]
    attach(model, LoRAConfig(rank=2, target=None, target_parameters=["down_proj"]), "second")
    randomised(model, "second")
    with using(model, "default"):
        assert torch.equal(run(model, "eager", x)[0], adapted)
    with using(model, "default", "second"):
        assert not torch.allclose(run(model, "eager", x)[0], adapted)
    with adapters_off(model):
        assert torch.equal(run(model, "eager", x)[0], bare)
    remove_adapter(model, "second")
    assert dict(delta(model))[paths[-1]].shape == models("mixtral")[1].get_parameter(paths[-1]).shape
    merge(model, "default")
    torch.testing.assert_close(run(model, "eager", x)[0], adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["experts.w1"]}, "matches no parameter but layers' weights"),
        ({"target_parameters": ["q_proj.weight"]}, "matches no parameter"),
        ({"target_parameters": BOTH, "dropout": 0.1}, "take no dropout"),
        ({"target_parameters": "experts.*"}, "target_parameters"),
        ({"target": None}, "leaves nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attach(fresh("mixtral"), LoRAConfig(**settings))


def test_targets_that_are_layers_leave_experts_alone() -> None:
    """As in PEFT: neither all-linear nor a name that an expert parameter has too means the parameter."""
    for base in models("glm4_moe"):
        for target in ("all-linear", ["down_proj"]):
            model = copy.deepcopy(base)
            assert not [path for path in attach(model, LoRAConfig(target=target)) if "mlp.experts" in path]


def test_an_adapter_of_4_bit_experts_knows_its_base(tmp_path: Path) -> None:
    packed = quantize_(fresh("qwen3_moe"), blocksize=32)
    attach(packed, LoRAConfig(rank=2, target=None, target_parameters=BOTH))
    save_adapter(randomised(packed), tmp_path)
    told: list[str] = []
    load_adapter(quantize_(fresh("qwen3_moe"), blocksize=32), tmp_path, tell=told.append)
    assert told == []
    load_adapter(fresh("qwen3_moe"), tmp_path, tell=told.append)
    assert "somewhat off" in told[0]
    other = fresh("qwen3_moe")
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    with pytest.raises(InputError, match="another base"):
        load_adapter(other, tmp_path)
