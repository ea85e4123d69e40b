"""Second and higher orders through LoRA layers: finite differences in float64, dense layers, MAML."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fourbit
from fourbit.kernels.attention import causal_attention
from fourbit.kernels.chunked_head import TokenScorer, dense_figures, module_figures
from fourbit.kernels.dequantize4bit import dequantize
from fourbit.kernels.linear4bit import linear4bit, lora_linears4bit
from fourbit.kernels.linear_divergence import Divergence, DivergenceScorer
from fourbit.kernels.quantize4bit import quantize
from fourbit.kernels.rms_norm import rms_norm
from fourbit.kernels.rope import rope
from fourbit.kernels.swiglu import swiglu
from fourbit.lora.layer import AdapterLayer
from fourbit.lora.linear4bit import NF4Linear
from fourbit.lora.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode uses it


def layer(n_in: int, n_out: int, *, quantised: bool = True, dropout: float = 0.0, dtype: Any = torch.float64) -> Any:
    linear = nn.Linear(n_in, n_out)
    base = NF4Linear.from_weight(linear.weight.detach(), linear.bias.detach()) if quantised else linear
    made = AdapterLayer(base.requires_grad_(False), default=LoRA(base, 2, 4, dropout))
    nn.init.normal_(made.adapters["default"].lora_B, std=0.3)
    return made.to(dtype)


class Dense(nn.Module):
    """The same layer of torch's own calls, on the decoded weight."""

    def __init__(self, layer: AdapterLayer) -> None:
        super().__init__()
        base, adapter = layer.base, layer.adapters["default"]
        weight = base.dequantize(torch.float64) if isinstance(base, NF4Linear) else base.weight.detach().clone()
        self.base = nn.Linear(base.in_features, base.out_features, dtype=torch.float64).requires_grad_(False)
        self.base.weight.copy_(weight)
        self.base.bias.copy_(base.bias)
        self.lora_A, self.lora_B = (nn.Parameter(p.detach().clone()) for p in (adapter.lora_A, adapter.lora_B))
        self.scale = adapter.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.lora_A.T) @ self.lora_B.T


def pair(quantised: bool) -> tuple[nn.Module, nn.Module]:
    """Two layers with a gate between them, ours and torch's."""
    torch.manual_seed(0)
    ours = nn.Sequential(layer(64, 8, quantised=quantised), nn.Tanh(), layer(8, 3, quantised=quantised))
    return ours, nn.Sequential(Dense(ours[0]), nn.Tanh(), Dense(ours[2]))


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def maml(model: nn.Module, tasks: list[list[Tensor]], steps: int = 2) -> tuple[Tensor, ...]:
    """Finn et al. 2017, with second order: gradients of the loss after inner steps, in the start."""
    start = trained(model)
    total = torch.zeros((), dtype=torch.float64)
    for x, y, x_after, y_after in tasks:
        fast = start
        for _ in range(steps):
            loss = F.mse_loss(torch.func.functional_call(model, fast, (x,)), y)
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - 0.5 * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
        total = total + F.mse_loss(torch.func.functional_call(model, fast, (x_after,)), y_after)
    return torch.autograd.grad(total, list(start.values()))


@pytest.mark.parametrize("quantised", [True, False])
def test_maml_is_that_of_dense_layers_in_float64(quantised: bool) -> None:
    ours, dense = pair(quantised)
    generator = torch.Generator().manual_seed(1)
    shapes = ((5, 64), (5, 3), (4, 64), (4, 3))
    tasks = [[torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes] for _ in range(2)]
    got, want = maml(ours, tasks), maml(dense, tasks)
    first_order = maml_first_order(dense, tasks)
    for mine, expected, wrong in zip(got, want, first_order, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
        assert float((wrong - expected).norm() / expected.norm()) > 0.05  # first order alone is another answer


def maml_first_order(model: nn.Module, tasks: list[list[Tensor]]) -> tuple[Tensor, ...]:
    total: list[Tensor] = [torch.zeros_like(p) for p in trained(model).values()]
    for x, y, x_after, y_after in tasks:
        fast = copy.deepcopy(model)
        for _ in range(2):
            gradients = torch.autograd.grad(F.mse_loss(fast(x), y), list(trained(fast).values()))
            with torch.no_grad():
                for p, g in zip(trained(fast).values(), gradients, strict=True):
                    p -= 0.5 * g
        loss = F.mse_loss(fast(x_after), y_after)
        total = [t + g for t, g in zip(total, torch.autograd.grad(loss, list(trained(fast).values())), strict=True)]
    return tuple(total)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_order_against_finite_differences(dropout: float, double_quant: bool) -> None:
    """In x, A and B at once, under one dropout mask; then without LoRA, in x and the bias."""
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(3, 8, generator=generator), double_quant=double_quant)
    x, A, B, bias = (
        torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_()
        for s in ((2, 8), (2, 8), (3, 2), (3,))
    )
    seed = torch.tensor(7)
    joint = lambda x, A, B: lora_linears4bit(x, [weight], [None], [A], [B], [1.5], dropout, seed)[0].sin()
    assert torch.autograd.gradgradcheck(joint, (x, A, B))
    assert torch.autograd.gradgradcheck(lambda x, b: linear4bit(x, weight, b).sin(), (x, bias))


def test_third_order() -> None:
    weight = quantize(torch.randn(3, 8))
    dense = dequantize(weight, torch.float64)
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    orders = []
    for f in (lambda x: linear4bit(x, weight), lambda x: x @ dense.T):
        y = f(x).sin().sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        orders.append(y)
    torch.testing.assert_close(*orders, rtol=1e-9, atol=1e-12)


def test_an_input_that_another_is_made_of() -> None:
    """A made of x, as a hypernetwork makes it: what flows through A is counted once."""
    weight = quantize(torch.randn(3, 8))
    dense = dequantize(weight, torch.float64)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    B = torch.randn(3, 2, dtype=torch.float64)
    seconds = []
    for f in (
        lambda x: lora_linears4bit(x, [weight], [None], [x.sin()], [B], [1.0])[0],
        lambda x: x @ dense.T + (x @ x.sin().T) @ B.T,
    ):
        (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("quantised", [True, False])
def test_per_example_gradients_and_ensembles(quantised: bool) -> None:
    """vmap over examples, and over adapters on one shared base."""
    ours, _ = pair(quantised)
    start = {name: p.detach() for name, p in trained(ours).items()}
    x = torch.randn(4, 64, dtype=torch.float64)
    loss = lambda parameters, x: torch.func.functional_call(ours, parameters, (x,)).square().sum()
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(start, x)
    for i in range(4):
        alone = torch.autograd.grad(loss(trained(ours), x[i]), list(trained(ours).values()))
        for got, want in zip(each.values(), alone, strict=True):
            torch.testing.assert_close(got[i], want)
    several = {name: torch.stack([p, 2 * p]) for name, p in start.items()}
    outputs = torch.func.vmap(lambda parameters: torch.func.functional_call(ours, parameters, (x,)))(several)
    torch.testing.assert_close(outputs[0], ours(x))


def test_dropout_under_vmap_obeys_its_randomness() -> None:
    torch.manual_seed(0)
    dropped = layer(64, 8, dropout=0.5)
    x = torch.randn(3, 64, dtype=torch.float64).expand(6, 3, 64)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dropped)(x)
    same = torch.func.vmap(dropped, randomness="same")(x)
    different = torch.func.vmap(dropped, randomness="different")(x)
    assert torch.equal(same[0], same[5]) and not torch.equal(different[0], different[5])


def test_tables_of_rope_that_train_get_their_gradient() -> None:
    x, cos, sin = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 2, 4), *[(1, 3, 1, 2)] * 2))
    assert torch.autograd.gradcheck(rope, (x, cos, sin))


def test_a_head_that_trains_refuses_a_second_order() -> None:
    head = layer(8, 5)
    hidden = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    scorer = TokenScorer(torch.tensor([0, 1, 2, 3]), 5)
    loss = module_figures(hidden, head, scorer, 2, in_place=True)[0].sum()
    with pytest.raises(NotImplementedError, match="a chunked head keeps first derivatives only"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    gradient = torch.func.grad(lambda h: module_figures(h, head, scorer, 2, in_place=True)[0].sum())(hidden.detach())
    plain = torch.autograd.grad(head(hidden).log_softmax(1).diagonal().sum(), hidden, create_graph=True)[0]
    torch.testing.assert_close(gradient, plain)
    plain.sum().backward()


def test_the_older_vmap_raises() -> None:
    """torch.autograd.grad(is_grads_batched=True): no wrong number, an error."""
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    y = layer(64, 8)(x)
    with pytest.raises(RuntimeError, match=r"vmap|Batching rule"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape, dtype=torch.float64), is_grads_batched=True)


def test_beyond_first_order_weights_stay_packed() -> None:
    """What a second order saves holds nothing as large as the weight, and a first order saves what it always did."""
    ours = layer(256, 128)
    x = torch.randn(2, 256, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        (g,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
        g.square().sum()
    assert saved and max(t.numel() * t.element_size() for t in saved) < 8 * 256 * 128 / 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, z: linear4bit(z(2, 8), w, z(1)), r"a bias must be \[3\], one for each output, got \(1,\)"),
        (lambda w, z: lora_linears4bit(z(2, 8), [w], [z(1)], [z(2, 8)], [z(3, 2)], [1.0]), r"a bias must be \[3\]"),
        (lambda w, z: rope(z(1, 4, 2, 4), z(1, 1, 1, 2), z(1, 1, 1, 2)), r"tables \[B or 1, T, 1, D / 2\]"),
        (lambda w, z: causal_attention(z(1, 4, 2, 4), z(2, 4, 2, 4), z(2, 4, 2, 4)), r"k and v \[B, S, K, D\]"),
        (lambda w, z: causal_attention(z(1, 4, 3, 4), z(1, 4, 2, 4), z(1, 4, 2, 4)), "H a multiple of K"),
        (lambda w, z: causal_attention(z(1, 4, 2, 4), z(1, 4, 2, 4), z(1, 4, 1, 4)), "k and v"),
        (lambda w, z: dense_figures(z(8, 4), z(5, 4), TokenScorer(z(1).long(), 5), 8), "got 1 for 8 rows"),
        (
            lambda w, z: dense_figures(
                z(8, 4), z(5, 4), DivergenceScorer(lambda _: z(1, 5), Divergence("forward-kl")), 8
            ),
            r"teacher logits must be \(8, 5\)",
        ),
        (lambda w, z: swiglu(z(8), z(1)), "gate and up alike"),
        (lambda w, z: rms_norm(z(2, 8), z(1), 1e-5), r"a weight of shape \(8,\)"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(quantize(torch.zeros(3, 8)), torch.zeros)


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_a_whole_language_model(tiny_folder: Path, quant_type: Any) -> None:
    """Hessian times vector of a Llama in training, against differences of its gradient; torch.func's, the same."""
    model, _ = fourbit.load(tiny_folder, quant_type=quant_type, dtype=torch.float64)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2), seed=0)
    model.double().train()  # the adapter too
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    for p in parameters.values():
        nn.init.normal_(p, std=0.1)
    ids, positions = torch.randint(0, 250, (2, 7)), torch.arange(7).expand(2, 7)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            logits = model.lm_head(model.hidden(ids, positions))
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    module, leaves = Loss(), list(parameters.values())
    direction = [torch.cos(p.detach()) for p in leaves]
    loss = lambda given: torch.func.functional_call(module, {f"model.{name}": p for name, p in given.items()}, ())
    with sdpa_kernel(SDPBackend.MATH):
        once = torch.autograd.grad(module(), leaves, create_graph=True)
        twice = torch.autograd.grad(sum((g * d).sum() for g, d in zip(once, direction, strict=True)), leaves)
    ends = []
    for step in (1e-6, -1e-6):
        moved = {name: p + step * d for (name, p), d in zip(parameters.items(), direction, strict=True)}
        ends.append(torch.autograd.grad(loss(moved), list(moved.values())))
    given = {name: p.detach() for name, p in parameters.items()}
    tangents = dict(zip(given, direction, strict=True))
    gradient, product = torch.func.jvp(torch.func.grad(loss), (given,), (tangents,))
    for i, name in enumerate(parameters):
        torch.testing.assert_close(gradient[name], once[i], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(product[name], twice[i], rtol=1e-9, atol=1e-12)
        difference = (ends[0][i] - ends[1][i]) / 2e-6
        assert float((twice[i] - difference).norm()) < 1e-4 * float(difference.norm()), name
