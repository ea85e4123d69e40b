"""Modules of every shape are trained whole beside LoRA: called, asked by a method, read by their parents, copied."""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

import fourbit
from fourbit.lora.layer import adapter_parameters, adapters_of
from fourbit.lora.peft_files import adapter_state, load_adapter_state


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


class Table(nn.Module):
    """A module that others ask by a method, and that keeps a state beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.rows

    def twice(self, x: Tensor, *, times: float = 2.0) -> Tensor:
        return self(x) * times

    def get_extra_state(self) -> dict[str, int]:
        return {}

    def set_extra_state(self, state: object) -> None: ...


def test_methods_of_what_is_trained_whole_see_its_copies() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(8, 8), "table": Table()})
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, modules_to_save=["table"]))
    (copied,) = adapters_of(model)["table"].parameters()
    nn.init.constant_(copied, 3.0)
    out = model["table"].twice(torch.ones(8), times=5.0)
    assert torch.equal(out, torch.full((8,), 15.0))
    assert torch.equal(torch.autograd.grad(out.sum(), copied)[0], torch.full((8,), 5.0))
    with fourbit.adapters_off(model):
        assert torch.equal(model["table"].twice(torch.ones(8)), torch.full((8,), 2.0))


def test_a_copy_of_a_parametrised_layer_keeps_its_adapters() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["0"], modules_to_save=["1"]))
    twin, x = copy.deepcopy(randomised(model)), torch.randn(2, 8)
    assert twin.state_dict().keys() == model.state_dict().keys() and torch.equal(twin(x), model(x))


class Net(nn.Module):
    """Parameters of its own around children with some, buffers, and a projection that its parent reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(hidden=x)
        return self.linear(self.norm((h + self.attention(h, h, h)[0]).transpose(1, 2)).transpose(1, 2))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.dense = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense(hidden + self.token)


def test_modules_of_every_shape_are_trained_whole(tmp_path: Path) -> None:
    x = torch.randn(4, 5, 8)

    def net() -> Net:
        torch.manual_seed(0)
        return Net()

    config = fourbit.LoRAConfig(rank=2, target=["linear"], modules_to_save=["inner", "attention", "norm"])
    model, whole = net(), net()
    fourbit.attach(model, config)
    whole.linear.requires_grad_(False)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, whole)]
    names = adapter_parameters(model)
    for part in (names.pop("linear.lora_A"), names.pop("linear.lora_B")):
        part.requires_grad_(False)
    for _ in range(2):  # as if those modules were trained by themselves
        for each, optimizer in zip((model, whole), optimizers, strict=True):
            optimizer.zero_grad()
            each.train()(x).square().mean().backward()
            optimizer.step()
        assert torch.equal(model.eval()(x), whole.eval()(x))
    assert int(model.norm.num_batches_tracked) == 2 and int(model.norm.base.num_batches_tracked) == 0
    fourbit.save_adapter(model, tmp_path)
    again = net().eval()
    fourbit.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))
    state = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    randomised(model)
    load_adapter_state(model, state)
    assert torch.equal(again(x), model(x))
    with fourbit.adapters_off(model):
        torch.testing.assert_close(model(x), net().eval()(x))
