"""The Llama decoder against transformers on random tiny checkpoints; then packing, caching and recomputing."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourbit.models.decoder import Decoder, KVCache
from fourbit.models.generate import generate

Oracle = Callable[..., Any]
Ours = Callable[..., Decoder]


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def disagreement(got: Tensor, expected: Tensor) -> str | None:
    """Why logits are not the oracle's, or None.

    Within 1e-4 x the largest logit; the same arg-max wherever the oracle's first two differ by more than twice that.
    """
    bound = 1e-4 * expected.abs().max()
    worst = (got - expected).abs().max()
    if not worst <= bound:
        return f"logits differ by {worst:.2e}, more than {bound:.2e}"
    best = expected.topk(2).values
    clear = best[..., 0] - best[..., 1] > 2 * bound
    wrong = int((got.argmax(-1) != expected.argmax(-1))[clear].sum())
    return f"{wrong} of {int(clear.sum())} clear arg-maxes differ" if wrong else None


@torch.no_grad()
def test_logits_equal_the_oracle(oracle: Oracle, ours: Ours, kind: str) -> None:
    theirs = oracle(kind)
    ids = tokens(2, 96)
    assert disagreement(ours(theirs)(ids), theirs(ids).logits) is None


@torch.no_grad()
def test_logits_equal_the_oracle_in_float64(oracle: Oracle, ours: Ours, kind: str) -> None:
    """The oracle's rotary tables stay fp32 in float64 models, so rounded angles (96 x 2^-24) set the bound."""
    theirs = oracle(kind).double()
    ids = tokens(1, 96)
    expected = theirs(ids).logits
    assert (ours(theirs, torch.float64)(ids) - expected).abs().max() < 2e-5 * expected.abs().max()


def turned_by(**changes: Any) -> Callable[[Decoder], None]:
    """Another RoPE than the config's."""

    def change(model: Decoder) -> None:
        other = replace(model.spec.rope, **changes)
        model.spec = replace(model.spec, rope=other)
        for layer in model.model.layers:
            layer.self_attn.rope = other

    return change


def pairs_side_by_side(model: Decoder) -> None:
    """Q and K rows in the order of GGUF files (rotary pairs adjacent)."""
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            size = model.spec.head_dim
            rows = linear.weight.data.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)
            linear.weight.data.copy_(rows)


def one_layer_only(model: Decoder) -> None:
    layer = model.model.layers[-1].self_attn
    layer.k_proj.weight.data = layer.k_proj.weight.data.roll(1, 0)


def no_query_bias(model: Decoder) -> None:
    model.model.layers[0].self_attn.q_proj.bias.data.zero_()


def swapped_biases(model: Decoder) -> None:
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.bias, mlp.up_proj.bias = mlp.up_proj.bias, mlp.gate_proj.bias


def swapped_norms(model: Decoder) -> None:
    layer = model.model.layers[1]
    layer.input_layernorm, layer.post_attention_layernorm = layer.post_attention_layernorm, layer.input_layernorm


def other_eps(model: Decoder) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 1e-6


@pytest.mark.parametrize(
    ("kind_of_model", "fault"),
    [
        ("gqa 2:1", turned_by(theta=10500.0)),
        ("gqa 2:1", pairs_side_by_side),
        ("gqa 4:1", one_layer_only),
        ("bias", no_query_bias),
        ("bias", swapped_biases),
        ("gqa 1:1", swapped_norms),
        ("narrow head", other_eps),
        ("llama3 rope", turned_by(kind="default")),
        ("linear rope", turned_by(kind="default")),
        ("llama3 rope", turned_by(theta=525.0)),
    ],
)
@torch.no_grad()
def test_the_comparison_catches_planted_faults(
    oracle: Oracle, ours: Ours, kind_of_model: str, fault: Callable[[Decoder], None]
) -> None:
    theirs = oracle(kind_of_model)
    ids = tokens(2, 96)
    model = ours(theirs)
    assert disagreement(model(ids), theirs(ids).logits) is None
    fault(model)
    assert disagreement(model(ids), theirs(ids).logits) is not None


@torch.no_grad()
def test_the_comparison_passes_a_harmless_change(oracle: Oracle, ours: Ours) -> None:
    """Counting positions from one leaves relative positions as they are."""
    ids = tokens(2, 96)
    got = ours("gqa 2:1")(ids, torch.arange(1, 97).expand_as(ids))
    assert disagreement(got, oracle("gqa 2:1")(ids).logits) is None


def test_gradients_equal_the_oracle_in_float64(oracle: Oracle, ours: Ours, kind: str) -> None:
    theirs = oracle(kind).double()
    model = ours(theirs, torch.float64)
    ids, weight = tokens(2, 20), torch.randn(2, 20, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for network in (theirs, model):
        out = network(ids)
        ((out if isinstance(out, Tensor) else out.logits) * weight).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert error < 2e-5, f"gradient of {name} is off by {error:.1e} of its norm"  # the oracle's fp32 angles again


SPANS = [(0, 17), (17, 22), (22, 23), (23, 53)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_packed_equals_single(ours: Ours, kind: str, dtype: torch.dtype, bound: float) -> None:
    model = ours(kind, dtype)
    ids = tokens(1, 53)
    weight = torch.randn(53, model.spec.hidden_size, dtype=dtype, generator=torch.Generator().manual_seed(2))
    packed = model.hidden(ids, spans=SPANS)
    singles = torch.cat([model.hidden(ids[:, a:b]) for a, b in SPANS], dim=1)
    assert (packed - singles).abs().max() <= bound * singles.abs().max()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if n != "lm_head.weight"), strict=True)
    ours_packed = torch.autograd.grad((packed * weight).sum(), parameters)
    ours_single = torch.autograd.grad((singles * weight).sum(), parameters)
    for name, a, b in zip(names, ours_packed, ours_single, strict=True):
        assert (a - b).norm() <= bound * b.norm(), f"gradient of {name}"


@torch.no_grad()
def test_another_packed_example_changes_nothing_to_the_bit(ours: Ours) -> None:
    model = ours("gqa 2:1")
    ids = tokens(1, 53)
    other = ids.clone()
    other[:, 17:22] = (other[:, 17:22] + 1) % 97
    before, after = model.hidden(ids, spans=SPANS), model.hidden(other, spans=SPANS)
    for start, end in (SPANS[0], SPANS[2], SPANS[3]):
        assert torch.equal(before[:, start:end], after[:, start:end])
    assert not torch.equal(before[:, 17:22], after[:, 17:22])


@torch.no_grad()
@pytest.mark.parametrize("steps", [[40], [1] * 40, [7, 1, 1, 31], [30, 10]])
def test_cached_equals_uncached(ours: Ours, kind: str, steps: list[int]) -> None:
    model = ours(kind, torch.float64)
    ids = tokens(2, 40)
    cache = KVCache()
    pieces = [model(part, cache=cache) for part in ids.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=0, atol=1e-10)
    assert cache.length == 40


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_equals_none(ours: Ours, kind: str, cached: bool) -> None:
    model = ours(kind, torch.float64)
    ids = tokens(1, 30)
    padded = torch.cat([torch.zeros(1, 11, dtype=torch.int64), ids], dim=1)
    mask = torch.arange(41)[None] >= 11
    if cached:
        cache = KVCache()
        pieces = [model(padded[:, a:b], cache=cache, mask=mask[:, :b]) for a, b in ((0, 20), (20, 40), (40, 41))]
        got = torch.cat(pieces, dim=1)[:, 11:]
    else:
        got = model(padded, mask=mask)[:, 11:]
    torch.testing.assert_close(got, model(ids), rtol=0, atol=1e-10)


class Dropped(nn.Module):
    """A linear with dropout before it, as a LoRA layer has."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("dropout", [False, True])
def test_checkpointing_changes_no_bit(ours: Ours, alive: Any, dropout: bool) -> None:
    plain = ours("bias")
    if dropout:
        for layer in plain.model.layers:
            layer.mlp.down_proj = Dropped(layer.mlp.down_proj)
    recomputed = copy.deepcopy(plain)
    recomputed.checkpointing = True
    kept = []
    for model in (plain, recomputed):
        torch.manual_seed(5)
        with alive() as made:
            hidden = model.hidden(tokens(1, 53), spans=SPANS)
        kept.append(made.bytes())
        hidden.square().mean().backward()
    for (name, a), b in zip(plain.model.named_parameters(), recomputed.model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad), f"gradient of {name}"
    assert kept[1] < kept[0] / 4


def test_what_training_keeps_for_backward(ours: Ours, alive: Any) -> None:
    """Per token and layer: two residuals, q, k, v, attention's output and row sums, gate and up, two norm scales."""
    model = ours("gqa 2:1").requires_grad_(False)
    for layer in model.model.layers:  # one trainable weight in front makes every layer's activations needed
        layer.self_attn.q_proj.requires_grad_(True)
    spec, length = model.spec, 53
    with alive() as made:
        hidden = model.hidden(tokens(1, length))
    query, key = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    layer = 2 * spec.hidden_size + 2 * query + 2 * key + spec.num_attention_heads + 2 * spec.intermediate_size + 2
    outside = 2 * spec.hidden_size + 1 + spec.head_dim + 2  # output, final norm's input and scale, tables, ids, places
    assert made.bytes() <= 4 * length * (spec.num_hidden_layers * layer + outside + 8)
    assert hidden.requires_grad


def test_a_printed_model_tells_its_norms(ours: Ours) -> None:
    assert "(norm): RMSNorm(48, eps=1e-05)" in repr(ours())


def test_an_unused_graph_is_freed_at_once(ours: Ours, alive: Any) -> None:
    """A saved tensor that kept itself alive would leak every evaluation that forgets `no_grad`."""
    model = ours("gqa 2:1")
    with alive() as made:
        loss = model(tokens(1, 53), spans=SPANS).square().mean()
    assert made.bytes() > 100_000
    del loss
    assert made.bytes() == 0


@torch.no_grad()
def test_bfloat16_stays_close_to_the_oracle(oracle: Oracle, ours: Ours) -> None:
    theirs = oracle("gqa 2:1")
    exact = theirs(tokens(2, 40)).logits
    low = ours(theirs, torch.bfloat16)(tokens(2, 40))
    reference = theirs.bfloat16()(tokens(2, 40)).logits
    assert low.dtype == torch.bfloat16
    # no further from the fp32 logits than twice the oracle's own bf16 error
    assert (low.float() - exact).norm() < 2 * (reference.float() - exact).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(ours: Ours, kind: str) -> None:
    """The same code on the other device: packed gradients, and generation with left padding."""
    here = ours(kind, torch.float64)
    there = copy.deepcopy(here).cuda()
    for model in (here, there):
        model.hidden(tokens(1, 53).to(model.lm_head.weight.device), spans=SPANS).square().sum().backward()
    for (name, a), b in zip(here.model.named_parameters(), there.model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad.cpu()).norm() <= 1e-10 * a.grad.norm(), f"gradient of {name}"
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert generate(there, prompts, max_new_tokens=70) == generate(here, prompts, max_new_tokens=70)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spans": [(0, 6)], "mask": torch.ones(1, 6, dtype=torch.bool)}, "spans .* take no mask"),
        ({"spans": [(0, 2, 4, 6)], "cache": KVCache()}, "with a cache they do not fork"),
        ({"spans": [(0, 5)], "cache": KVCache()}, "spans must cover the 6 tokens"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"= \(1, 6\), got \(1, 5\)"),
        ({"spans": [(0, 5)]}, "spans must cover the 6 tokens"),
        ({"spans": [(0, 3), (4, 6)]}, "spans must cover the 6 tokens"),
        ({"spans": [(0, 2), (2, 4, 0)]}, r"spans must cover the 6 tokens .* got \[\(0, 2\), \(2, 4, 0\)\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(ours: Ours, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours()(tokens(1, 6), **arguments)
    with pytest.raises(ValueError, match=r"\[batch, tokens\], got shape \(6,\)"):
        ours()(tokens(1, 6)[0])
