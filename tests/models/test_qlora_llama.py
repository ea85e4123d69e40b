"""A Llama whose linears are 4-bit with LoRA: what its layers share, keep and decode; torch.compile takes it whole."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.kernels import linear4bit, lora_paths
from fourbit.models.decoder import Decoder

LAYERS, ROWS = 2, 24


@pytest.fixture
def model(random_decoder: Callable[..., Decoder]) -> Decoder:
    """Hidden size 64, 128 in between, every linear of the layers adapted."""
    return random_decoder(dropout=0.1)


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

    def counted(x: Tensor, group: Any, keep: bool) -> Any:
        served.extend([len(group.A)] if group.A else [])
        return original(x, group, keep)

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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_is_one_graph_with_the_same_numbers(
    dropout: float, random_decoder: Callable[..., Decoder]
) -> None:
    """A break of the graph would raise. Loss and every adapter gradient, forward and backward traced, within a few
    roundings of sums in another order.
    """
    model = random_decoder(dropout=dropout)
    ids = torch.randint(0, 97, (2, 16))
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(1)  # of dropout
        value = run(ids).square().mean()
        value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((value.detach(), gradients))
    (plain, want), (graph, got) = results
    torch.testing.assert_close(graph, plain, rtol=1e-6, atol=0)
    assert len(want) == 2 * 7 * LAYERS and got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
