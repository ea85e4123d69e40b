"""A Llama whose linears are 4-bit with LoRA: what its layers share, keep and decode."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fourbit
from fourbit.kernels import linear4bit, lora_paths
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec

LAYERS, ROWS = 2, 24


@pytest.fixture
def model() -> Decoder:
    """Hidden size 64, 128 in between, every linear of the layers adapted."""
    torch.manual_seed(0)
    made = Decoder(Spec(97, 64, 128, LAYERS, 4, 2, 16))
    fourbit.quantize_(made)
    fourbit.attach(made, fourbit.LoRAConfig(rank=4, alpha=8, dropout=0.1))
    for name, parameter in made.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    return made.train()


def step(model: Decoder) -> list[Tensor]:
    """The adapters' gradients."""
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    ids = torch.arange(ROWS).view(2, ROWS // 2)
    model.hidden(ids).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_layer_makes_four_passes_not_seven(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[int] = []
    original = linear4bit._forward

    def counted(x: Tensor, stored: Any, biases: Any, A: list[Tensor], *rest: Any) -> list[Tensor]:
        served.extend([len(A)] if A else [])
        return original(x, stored, biases, A, *rest)

    monkeypatch.setattr(linear4bit, "_forward", counted)
    step(model)
    assert served == LAYERS * [3, 1, 2, 1]


@pytest.mark.parametrize("keep", [None, False, True])
def test_checkpointing_changes_no_bit_and_keeping_saves_a_pass_of_decoding(
    model: Decoder, keep: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default weights are kept on a GPU only. Nobody needs the first layer's input's gradient: q, k, v of it."""
    want = step(model)
    decoded: list[int] = []
    for name in ("slabs", "dequantize"):
        original = getattr(lora_paths, name)
        monkeypatch.setattr(lora_paths, name, lambda *a, original=original: (decoded.append(1), original(*a))[1])
    recomputed = copy.deepcopy(model)
    recomputed.checkpointing, recomputed.keep_decoded = True, keep
    got = step(recomputed)
    assert len(decoded) == 2 * 7 * LAYERS + (0 if keep else 7 * LAYERS - 3)
    assert len(want) == 2 * 7 * LAYERS
    for mine, expected in zip(got, want, strict=True):
        assert torch.equal(mine, expected)


def test_inputs_of_projections_are_made_again_not_kept(model: Decoder, alive: Any) -> None:
    """For each row of a layer: the residuals, q, k, v, what attention gave, gate, up, each s and a few scalars."""
    with alive() as made:
        hidden = model.hidden(torch.arange(ROWS).view(2, ROWS // 2))
    assert hidden.requires_grad
    projected = 64 + 2 * 32 + 64 + 2 * 128  # q, k and v, attention's output, gate and up
    ranks = 7 * 4
    residuals, others = 2 * 64, 4 * 2 + 2 * 2  # attention's row sums, the norms' scales and dropout's seeds
    rotated = 64 + 32  # q and k
    assert made.bytes() <= 4 * ROWS * LAYERS * (projected + ranks + residuals + rotated + others) + 4 * ROWS * 64
