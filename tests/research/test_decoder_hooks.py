"""Hooks in our own decoder, whose training step makes several layers at once, and some of their inputs again."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.quantize import quantize_
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec
from fourbit.trainer.losses.tokens import token_scores

IDS = torch.arange(10)[None]


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    made = Decoder(Spec(97, 64, 128, 2, 4, 2, 16))
    quantize_(made)
    attach(made, LoRAConfig(rank=2, alpha=4, target=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]))
    return made.train()


def loss(model: Decoder) -> Tensor:
    return token_scores(model.lm_head, model.hidden(IDS)[0, :-1], IDS[0, 1:]).logps.sum()


def called(model: Decoder) -> dict[nn.Module, str]:
    """What is called: not containers, and not the decoder and its trunk, which are asked for hidden states."""
    containers = nn.ModuleList | nn.ModuleDict
    modules = model.named_modules()
    return {m: name for name, m in modules if not isinstance(m, containers) and name not in ("", "model")}


@pytest.mark.parametrize("everywhere", [False, True])
def test_each_module_is_heard_once_in_a_training_step(model: Decoder, everywhere: bool) -> None:
    expected, heard = loss(model), Counter[str]()
    names = called(model)

    def hear(module: nn.Module, *seen: object) -> None:
        heard.update([names[module]] if module in names else [])

    places = [torch_module.register_module_forward_hook] if everywhere else [m.register_forward_hook for m in names]
    handles = [register(hear) for register in places]
    try:
        got = loss(model)
        got.backward()
    finally:
        for handle in handles:
            handle.remove()
    assert heard == dict.fromkeys(names.values(), 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_a_frozen_head_hear_backward(model: Decoder, kind: str) -> None:
    heard = list[int]()
    getattr(model.lm_head, kind)(lambda module, *seen: heard.append(1))
    loss(model).backward()
    assert heard == [1]


def test_logits_that_a_hook_inside_the_head_kept_are_not_written_over(model: Decoder) -> None:
    attach(model, LoRAConfig(rank=2, alpha=4, target=["lm_head"]), "head")
    head, kept = model.lm_head, list[Tensor]()
    assert isinstance(head, AdapterLayer)
    model.requires_grad_(False)
    hidden = model.hidden(IDS)[0, :-1]
    expected = head(hidden).clone()
    head.adapters["head"].register_forward_hook(lambda module, inputs, output: kept.append(output))
    token_scores(head, hidden, IDS[0, 1:])
    torch.testing.assert_close(torch.cat(kept), expected)
