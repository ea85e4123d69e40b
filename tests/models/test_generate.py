"""Generation: cached and batched as one token after the other without a cache; stopping, streaming and sampling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourbit.errors import NumericError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters
from fourbit.lora.quantize import quantize_
from fourbit.models.decoder import Decoder, KVCache
from fourbit.models.generate import NOT_FINITE, Sampling, choose, generate, prompt_seeds

Oracle = Callable[..., Any]
PROMPTS = [[5, 6, 7], [11], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8], [90, 80, 70, 60, 50, 40, 30, 20]]


@pytest.fixture(scope="module")
def model(ours: Callable[..., Decoder]) -> Decoder:
    """In float64, so that rounding cannot flip a choice between batched and single runs."""
    return ours("gqa 2:1", torch.float64)


@pytest.fixture
def shapes(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tokens that each pass of the model reads."""
    seen: list[tuple[int, ...]] = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda ids, *rest, **named: seen.append(tuple(ids.shape)) or hidden(ids, *rest, **named)
    )
    return seen


@torch.no_grad()
def slowly(model: Decoder, prompt: list[int], steps: int, stop: tuple[int, ...] = ()) -> list[int]:
    """Greedy generation in its plainest form: the whole text again for each token."""
    new: list[int] = []
    while len(new) < steps:
        token = int(model(torch.tensor([prompt + new]))[0, -1].argmax())
        if token in stop:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_greedy_equals_the_plain_loop(model: Decoder, batch_size: int) -> None:
    steps = 70 if batch_size == 32 else 24  # past the first 64 tokens that the cache has room for
    got = generate(model, PROMPTS, max_new_tokens=steps, batch_size=batch_size)
    assert got == [slowly(model, prompt, steps) for prompt in PROMPTS]


def test_rows_are_selected_one_layer_after_the_other(alive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, peaks, plain = KVCache(8), list[int](), torch.Tensor.index_select
    part, rows = torch.zeros(4, 1, 2, 16), torch.arange(4)
    with alive() as made:
        for layer in range(8):
            cache.append(layer, part, part)
        held = made.bytes()

        def watched(*args: Any) -> torch.Tensor:
            taken = plain(*args)
            peaks.append(made.bytes())
            return taken

        monkeypatch.setattr(torch.Tensor, "index_select", watched)
        cache.select(rows)
        assert made.bytes() == held and max(peaks) == held + held // 8


def starting(shared: int) -> list[list[int]]:
    return [[(13 * i) % 97 for i in range(shared)] + rest for rest in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 7])]


@pytest.mark.parametrize(
    ("prompts", "passes"),
    [
        *((starting(shared), [(1, shared), (4, 5), (4, 1)]) for shared in (1, 7, 70)),
        ([PROMPTS[2]] * 3, [(1, 10), (3, 1), (3, 1)]),  # equal prompts share all but the last token
    ],
)
def test_a_common_start_is_read_once(
    model: Decoder, prompts: list[list[int]], passes: list[tuple[int, ...]], shapes: list[tuple[int, ...]]
) -> None:
    answers = generate(model, prompts, max_new_tokens=10)
    assert shapes[:3] == passes
    assert answers == [slowly(model, prompt, 10) for prompt in prompts]


def test_greedy_equals_the_oracle(oracle: Oracle, ours: Callable[..., Decoder], kind: str) -> None:
    theirs, model = oracle(kind).double(), ours(kind, torch.float64)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = [theirs.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=20) == expected


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_rows_stop_by_themselves_and_leave_the_batch(
    model: Decoder, batch_size: int, shapes: list[tuple[int, ...]]
) -> None:
    """Stop ids that cut the rows at different places, some at once."""
    full = [slowly(model, prompt, 24) for prompt in PROMPTS]
    stop = (full[0][0], full[1][5], full[2][11])
    expected = [slowly(model, prompt, 24, stop) for prompt in PROMPTS]
    shapes.clear()
    assert generate(model, PROMPTS, max_new_tokens=24, stop_ids=stop, batch_size=batch_size) == expected
    assert expected[0] == [] and len({len(answer) for answer in expected}) >= 3
    if batch_size == 5:
        rows = [count for count, _ in shapes]
        assert rows[0] == 5 and rows == sorted(rows, reverse=True) and rows[-1] < 3
        assert len(rows) == min(24, max(map(len, expected)) + 1)  # and nothing runs once all are done


def test_streaming(model: Decoder) -> None:
    seen: list[int] = []
    stop = (slowly(model, PROMPTS[0], 12)[8],)
    answers = generate(model, PROMPTS[:1], max_new_tokens=12, stop_ids=stop, on_token=seen.append)
    assert answers == [seen] == [slowly(model, PROMPTS[0], 12, stop)]


def test_training_works_after_generation(ours: Callable[..., Decoder]) -> None:
    """What a pass under inference mode leaves behind (decoding tables, buffers) must not break or change a gradient."""
    before, after = (quantize_(ours("bias")) for _ in range(2))
    generate(after, PROMPTS, max_new_tokens=3)
    grads = []
    for network in (after, before):
        attach(network, LoRAConfig(rank=4), seed=0)
        network(torch.tensor(PROMPTS[2:3])).square().mean().backward()
        grads.append([parameter.grad for parameter in adapter_parameters(network).values()])
    for a, b in zip(*grads, strict=True):
        assert a is not None and torch.equal(a, b)


def test_nothing_to_do_and_training_mode_is_put_back(model: Decoder) -> None:
    model.train()
    assert generate(model, []) == [] and generate(model, PROMPTS, max_new_tokens=0) == [[]] * 5
    trains = model.training and model.model.layers[0].training
    model.eval()
    assert trains


@pytest.mark.parametrize("options", [{}, {"top_k": 7}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}])
def test_a_sampled_answer_depends_on_its_prompt_and_the_seed_alone(model: Decoder, options: dict[str, Any]) -> None:
    settings = {"max_new_tokens": 20, "temperature": 1.3, **options}
    together = generate(model, PROMPTS, seed=3, **settings)
    for batch_size in (1, 2, 5):
        assert together == generate(model, PROMPTS, seed=3, batch_size=batch_size, **settings)
    assert together[::-1] == generate(model, PROMPTS[::-1], seed=3, batch_size=2, **settings)
    assert together[2] == generate(model, PROMPTS[2:3], seed=3, **settings)[0]
    assert together != generate(model, PROMPTS, seed=4, **settings)
    same = generate(model, [PROMPTS[0]] * 8, seed=3, **settings)
    assert len({tuple(answer) for answer in same}) > 1  # equal prompts do not share their luck
    assert same[0] == together[0]
    seeds = prompt_seeds([PROMPTS[0]] * 8, 3)
    assert len({*seeds}) == 8 and same[5:] == generate(model, [PROMPTS[0]] * 3, seed=seeds[5:], **settings)


def test_an_answer_ends_where_prompt_and_answer_have_max_length(model: Decoder) -> None:
    full = [slowly(model, prompt, 9) for prompt in PROMPTS]
    rooms = [min(9, 12 - len(prompt)) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=9, max_length=12) == [
        a[:n] for a, n in zip(full, rooms, strict=True)
    ]
    assert rooms == [9, 9, 1, 9, 4]


def draws(logits: list[float], sampling: Sampling, count: int = 20000) -> torch.Tensor:
    """How often each token is chosen, as a share."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor(logits).expand(count, -1)
    return choose(rows, sampling, drawn).bincount(minlength=len(logits)) / count


LOGITS = [2.0, -1.0, 1.0, 0.0, -30.0, 1.5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax(temperature: float) -> None:
    expected = (torch.tensor(LOGITS) / temperature).softmax(0)
    # 5 standard deviations of a share over 20,000 draws, at most 5 * sqrt(0.25 / 20000)
    torch.testing.assert_close(draws(LOGITS, Sampling(temperature)), expected, rtol=0, atol=0.018)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0, top_k=1), {0}),
        (Sampling(1.0, top_k=3), {0, 5, 2}),
        (Sampling(1.0, top_k=99), {0, 1, 2, 3, 5}),  # token 4 has probability 1e-14
        (Sampling(1.0, top_p=0.4), {0}),  # the first holds 0.46
        (Sampling(1.0, top_p=0.47), {0, 5}),
        (Sampling(1.0, top_p=0.75), {0, 5, 2}),
        (Sampling(1.0, top_k=2, top_p=0.99), {0, 5}),
        (Sampling(1e-9), {0}),
    ],
)
def test_top_k_and_top_p_cut_and_rescale(sampling: Sampling, allowed: set[int]) -> None:
    shares = draws(LOGITS, sampling)
    assert set(shares.nonzero().squeeze(1).tolist()) == allowed
    kept = torch.tensor([x if i in allowed else -torch.inf for i, x in enumerate(LOGITS)])
    torch.testing.assert_close(shares, kept.softmax(0), rtol=0, atol=0.018)


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    temperature=st.floats(5e-324, 1.7e308),
    top_k=st.integers(0, 15) | st.just(2**31 - 1),
    top_p=st.floats(5e-324, 1.0),
    drawn=st.floats(0, 1, exclude_max=True),
)
def test_any_logits_give_a_token_that_may_be_chosen(
    logits: list[float], temperature: float, top_k: int, top_p: float, drawn: float
) -> None:
    row = torch.tensor([logits])
    token = int(choose(row, Sampling(temperature, top_k, top_p), torch.tensor([drawn], dtype=torch.float64)))
    better = sum(x > logits[token] for x in logits)
    assert better < (top_k or len(logits))
    mass = ((row.double() - row.max()) / temperature).softmax(-1)[0]
    assert mass[token] > 0 and mass[row[0] > logits[token]].sum() <= top_p + 1e-9


@given(
    bad=st.sampled_from([float("nan"), float("inf")]),
    temperature=st.sampled_from([0.0, 5e-324, 1.0]),
    top=st.booleans(),
)
def test_logits_that_are_no_numbers_choose_nothing(bad: float, temperature: float, top: bool) -> None:
    """And the rows beside them, one with a token that can never come, do."""
    rows = torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0], [-torch.inf, -torch.inf, 3.0], [-torch.inf] * 3])
    sampling = Sampling(temperature, top_k=2, top_p=0.9) if top and temperature else Sampling(temperature)
    chosen = choose(rows, sampling, torch.full((4,), 0.99, dtype=torch.float64)).tolist()
    assert chosen == [2, NOT_FINITE, 2, NOT_FINITE]


def test_padding_brings_no_token_of_others_with_it(ours: Callable[..., Decoder]) -> None:
    model = ours("gqa 2:1", torch.float64)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.clone())  # untied, where it was tied
    model.model.embed_tokens.weight.data[0] = torch.nan
    model.lm_head.weight.data[0] = 0
    for prompts in (PROMPTS, [[5, 7, *prompt] for prompt in PROMPTS]):
        assert generate(model, prompts, max_new_tokens=9) == [slowly(model, prompt, 9) for prompt in prompts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_activations_that_overflow_name_their_layer(ours: Callable[..., Decoder], temperature: float) -> None:
    model = ours("gqa 2:1").half()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e5).clamp_(-6e4, 6e4)
    said = "token 1 of an answer .*, first in the output of model.layers.1.mlp.*, in float16; .* bfloat16 or float32"
    with pytest.raises(NumericError, match=said):
        generate(model, PROMPTS, temperature=temperature, max_new_tokens=2)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(generate(model.float(), PROMPTS, temperature=temperature, max_new_tokens=2))  # the advice
    model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(
        NumericError, match=r"first in the output of model.layers.0.self_attn.o_proj, in float32; the m"
    ):
        generate(model, PROMPTS, temperature=temperature, max_new_tokens=2)
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(NumericError, match=r"model.layers.0.self_attn.o_proj.base, .* \(without adapter\)"):
        generate(model, PROMPTS, temperature=temperature, max_new_tokens=2)


def test_without_a_seed_torchs_generator_decides(model: Decoder) -> None:
    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generate(model, [[1, 2], [1, 2]], max_new_tokens=12, temperature=2.0)

    assert drawn(1) == drawn(1) != drawn(2)
    before = torch.get_rng_state()
    generate(model, [[1, 2]], max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before), "the likeliest tokens need no luck"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[97]]}, "prompt 0 holds a token id outside 0 to 96"),
        ({"prompts": [[-1]]}, "outside 0 to 96"),
        ({"prompts": [[1], [2]], "on_token": print}, "one prompt, got 2"),
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
        ({"batch_size": 0}, "batch_size 1 or more"),
        ({"max_length": 1}, "prompt 0 has 1 tokens, which leaves no room in max_length 1"),
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and finite, got 0.0"),
        ({"top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"top_p": 0.5}, "top_p draws, and temperature 0"),
    ],
)
def test_impossible_arguments(model: Decoder, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": [[1]], **arguments})
