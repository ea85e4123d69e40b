"""torch.compile(fullgraph=True) takes a whole QLoRA Llama in one graph: a break would raise."""

import pytest
import torch
from torch import Tensor

import fourbit
from fourbit.models.decoder import Decoder
from fourbit.models.spec import Spec


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_is_one_graph_with_the_same_numbers(dropout: float) -> None:
    """Loss and every adapter gradient, forward and backward traced, within a few roundings of sums in another order."""
    torch.manual_seed(0)
    model = Decoder(Spec(97, 64, 128, 2, 4, 2, 16))
    fourbit.quantize_(model)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, alpha=8, dropout=dropout, target="all-linear"))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(0, 97, (2, 16))

    def loss() -> Tensor:
        return model(ids).square().mean()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(1)  # of dropout
        value = run()
        value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((value.detach(), gradients))
    (plain, want), (graph, got) = results
    torch.testing.assert_close(graph, plain, rtol=1e-6, atol=0)
    assert len(want) == 2 * 7 * 2 and got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
