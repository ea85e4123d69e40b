"""Generation: cached and batched as one token after the other without a cache; stopping, streaming and sampling."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fourbit.errors import NumericError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters
from fourbit.lora.quantize import quantize_
from fourbit.models.decoder import Decoder
from fourbit.models.generate import generate, generate_each, prompt_seeds

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


def starting(shared: int) -> list[list[int]]:
    return [[(13 * i) % 97 for i in range(shared)] + rest for rest in ([1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 7])]


@pytest.mark.parametrize(
    ("prompts", "passes"),
    [
        *((starting(shared), [(1, shared), (1, 12), (4, 1)]) for shared in (7, 70)),  # and the rest without padding
        (starting(1), [(1, 16), (4, 1)]),  # a pass of its own would cost more than it saves
        ([PROMPTS[2]] * 3, [(1, 11), (3, 1)]),
        ([PROMPTS[0], PROMPTS[2]] * 2, [(1, 14), (4, 1)]),
    ],
)
def test_a_common_start_is_read_once(
    model: Decoder, prompts: list[list[int]], passes: list[tuple[int, ...]], shapes: list[tuple[int, ...]]
) -> None:
    answers = generate(model, prompts, max_new_tokens=10)
    assert shapes[: len(passes)] == passes
    assert answers == [slowly(model, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 12])
def test_each_text_of_a_group_of_samples_is_read_once(
    model: Decoder, batch_size: int, shapes: list[tuple[int, ...]]
) -> None:
    """Four samples of each of three prompts: rows that join late go on from what was read, and have their own luck."""
    prompts = [[9, 8, *PROMPTS[i]] for i in (0, 2, 4)] * 4
    how: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, "stop_ids": [*range(20)]}
    got = generate(model, prompts, batch_size=batch_size, **how)
    assert sum(tokens for _, tokens in shapes if tokens > 1) == sum(map(len, prompts[:3]))
    seeds = prompt_seeds(prompts, 3)
    assert got == [generate(model, [p], **{**how, "seed": [s]})[0] for p, s in zip(prompts, seeds, strict=True)]
    assert len({tuple(answer) for answer in got}) > 6 and len({len(answer) for answer in got}) > 3


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
        rows = [count for count, _ in shapes[1:]]
        assert shapes[0] == (1, sum(map(len, PROMPTS))) and rows == sorted(rows, reverse=True) and rows[-1] < 3
        assert len(rows) == min(24, max(map(len, expected)) + 1) - 1  # and nothing runs once all are done


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_those_that_wait_join_as_others_end(model: Decoder, batch_size: int, shapes: list[tuple[int, ...]]) -> None:
    """Twelve prompts, answers of 1 to 16 tokens: as one by one, and with fewer passes than batches that wait for their
    last row would take. The answers' luck is that of their prompts."""
    prompts = [[*PROMPTS[i % 5][: 1 + i % 4], i] for i in range(12)]
    full = [slowly(model, prompt, 16) for prompt in prompts]
    stop = tuple({full[0][0], full[1][2], full[5][5], full[7][9]})
    expected = [slowly(model, prompt, 16, stop) for prompt in prompts]
    shapes.clear()
    assert generate(model, prompts, max_new_tokens=16, stop_ids=stop, batch_size=batch_size) == expected
    assert max(rows for rows, _ in shapes) == batch_size
    lengths = [len(answer) + (len(answer) < 16) for _, answer in sorted(zip(map(len, prompts), expected, strict=True))]
    waiting = sum(max(lengths[i : i + batch_size]) for i in range(0, 12, batch_size))
    assert sum(tokens == 1 for _, tokens in shapes) < waiting or batch_size == 8
    how = {"max_new_tokens": 16, "temperature": 1.0, "seed": 5, "stop_ids": stop}
    assert generate(model, prompts, batch_size=batch_size, **how) == generate(model, prompts, batch_size=1, **how)


def test_a_prompt_longer_than_the_room_of_those_that_go_on(model: Decoder) -> None:
    """It joins rows that have 64 places, and they go on in the larger room."""
    prompts = [[5, 6], [7], [(7 * i) % 97 for i in range(150)]]
    expected = [slowly(model, prompt, 30) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=30, batch_size=2) == expected


def test_each_prompt_may_have_its_own_number_of_new_tokens(model: Decoder) -> None:
    most = [3, 0, 9, 1, 14]
    expected = [slowly(model, prompt, new) for prompt, new in zip(PROMPTS, most, strict=True)]
    assert generate(model, PROMPTS, max_new_tokens=most, batch_size=2) == expected
    assert [*generate_each(model, PROMPTS * 4, max_new_tokens=most * 4, batch_size=1)] == expected * 4


def test_weights_are_decoded_once_for_passes_enough(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of few tokens is over before that has paid; of many prompts it has more passes than an answer tokens."""
    rooms = list[float]()
    monkeypatch.setattr(
        "fourbit.models.generate.merging", lambda model, room, adapters, rows: rooms.append(room) or nullcontext()
    )
    for new, prompts, batch_size in ((3, PROMPTS, 5), (4, PROMPTS, 5), (3, PROMPTS, 3), (1, PROMPTS[:1], 1)):
        generate(model, prompts, max_new_tokens=new, batch_size=batch_size)
    assert [room > 0 for room in rooms] == [False, True, True, False]


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
        ({"max_new_tokens": [3, 4]}, r"one for all or each of 1 prompts, .*, got \[3, 4\]"),
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
