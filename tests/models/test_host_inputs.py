"""Inputs of layers in the host's memory, on a device whose copies take effect only where an event demands them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fourbit.kernels.dispatch import force_path
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.recompute import HostInputs, host_inputs
from tests.optim.simulated_device import SimulatedDevice

LAYERS = 6


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def loss(weights: list[Tensor], host: HostInputs | None) -> Tensor:
    """Of layers tanh(x w), whose input x nobody but the checkpoint keeps."""
    x = torch.linspace(-1, 1, 24).view(2, 12).requires_grad_() * 1
    for weight in weights:
        layer: Callable[[Tensor], Tensor] = lambda x, weight=weight: torch.tanh(x * weight)
        if host is None:
            x = layer(x)
        else:
            with saved_tensors_hooks(host.pack, host.unpack):
                x = checkpoint(layer, x, use_reentrant=False)
    return x.square().sum()


@pytest.fixture
def weights() -> list[Tensor]:
    return [torch.full((12,), 0.5 + i / 10, requires_grad=True) for i in range(LAYERS)]


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_every_copy_is_waited_for(weights: list[Tensor], seed: int | None) -> None:
    """To the bit, in backward twice, and where it is asked for one weight in the middle alone."""
    device = SimulatedDevice(seed=seed)
    wanted, host = torch.autograd.grad(loss(weights, None), weights), HostInputs(device)
    value = loss(weights, host)
    for _ in range(2):
        for found, grad in zip(torch.autograd.grad(value, weights, retain_graph=True), wanted, strict=True):
            assert torch.equal(found, grad)
    assert torch.equal(*torch.autograd.grad(value, weights[3]), wanted[3])
    assert len(host.here) == 1  # the input below the last layer that backward reached is on its way
    waits = device.waits
    del value, host
    assert device.waits == waits + 1  # and its memory is not given back under the copy


def test_one_layer_ahead_and_no_more(weights: list[Tensor]) -> None:
    device = SimulatedDevice()
    host = HostInputs(device)
    for number in range(4):
        assert host.pack(torch.full((3, 5), float(number))) == number
        assert [*host.here] == [number], "one input is on its way out, those before are gone"
    assert float(host.unpack(3)[0, 0]) == 3 and device.queued() == 1 and [*host.here] == [2]
    assert float(host.unpack(2)[0, 0]) == 2 and device.queued() == 1 and [*host.here] == [1]
    assert float(host.unpack(0)[0, 0]) == 0 and [*host.here] == [1]


def test_a_decoder_sends_the_inputs_of_layers_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors in the place of CUDA's, in a whole step: one input for each such layer, and nothing else."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5}
    sent: list[tuple[int, ...]] = []
    pack = HostInputs.pack
    monkeypatch.setattr(HostInputs, "pack", lambda host, x: (sent.append((*x.shape,)), pack(host, x))[1])
    with FakeTensorMode(), torch.device("meta"), force_path("triton"):
        model = Decoder(read_spec({"model_type": "llama", "num_attention_heads": 4} | sizes))
        model.checkpointing = ["host", "all", "host", "input", "host"]
        model.hidden(torch.zeros(1, 48, dtype=torch.int64)).sum().backward()
        assert all(p.grad is not None and p.grad.is_meta for n, p in model.named_parameters() if "lm_head" not in n)
    assert sent == 3 * [(1, 48, 64)]


def test_on_a_cpu_nothing_is_copied() -> None:
    x = torch.zeros(1000, requires_grad=True)
    with host_inputs(x)():
        y = checkpoint(lambda x: x.sin(), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(1000))
