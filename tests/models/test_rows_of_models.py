"""Different adapters for rows of one batch in whole models: checkpointed, packed, compiled, ours and transformers'."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fourbit
from fourbit import InputError, LoRAConfig, rows, train_only, use, using
from fourbit.kernels import dispatch
from fourbit.lora.layer import adapter_layers
from fourbit.models import recompute
from fourbit.models.foreign import as_causal_lm
from fourbit.models.generate import generate_each

NAMES = ["b", None, "a"]


def adapted(model: Any, quantised: bool = True) -> Any:
    """With two adapters of rank 3 and 5 that are not zero, in training mode."""
    if quantised:
        fourbit.quantize_(model)
    for i, name in enumerate("ab"):
        fourbit.attach(model, LoRAConfig(rank=3 + 2 * i, alpha=8), name, seed=i)
    train_only(model, "a", "b")
    torch.manual_seed(3)
    for layer in adapter_layers(model).values():
        for name, parameter in layer.adapters.named_parameters():
            if name.endswith("lora_B"):
                nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.fixture(params=["ours", "transformers"], scope="module")
def model(request: pytest.FixtureRequest, random_decoder: Callable[..., Any], oracle: Callable[..., Any]) -> Any:
    made = random_decoder() if request.param == "ours" else as_causal_lm(oracle(num_hidden_layers=2, hidden_size=64))
    return adapted(made).double()  # in fp32 rounding alone grows to 1e-6 in a random model


def gradients(model: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], close: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert (grad - wanted[name]).norm() <= close * wanted[name].norm(), name


def each_alone(model: Any, ids: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i, name in enumerate(NAMES):
        with using(model, *filter(None, [name])):
            total = total + model.hidden(ids[i : i + 1]).square().sum()
    return total


def test_checkpoints_are_computed_again_with_the_adapters_of_forward(model: Any) -> None:
    """Backward inside the block, after it, after all was switched, twice; the same for adapters that were switched."""
    ids = torch.randint(97, (3, 9))
    wanted = gradients(model, lambda: each_alone(model, ids))

    def mixed(backward_inside: bool = False) -> Tensor:
        with rows(model, NAMES):
            loss = model.hidden(ids).square().sum()
            if backward_inside:
                loss.backward()
        use(model, "a")
        return torch.zeros((), requires_grad=True) if backward_inside else loss

    same(gradients(model, mixed), wanted)
    model.checkpointing = True
    try:
        same(gradients(model, lambda: each_alone(model, ids)), wanted)  # using() was left before backward
        same(gradients(model, lambda: mixed(True)), wanted)
        same(gradients(model, mixed), wanted)
        with rows(model, ["a", "b", "b"]):
            same(gradients(model, mixed), wanted)
        loss = mixed()
        loss.backward(retain_graph=True)
        same(gradients(model, lambda: loss), wanted)
    finally:
        model.checkpointing = False


@pytest.mark.parametrize("model", ["ours"], indirect=True)
def test_chunks_of_tokens_leave_such_rows_whole(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(97, (3, 9))
    wanted = gradients(model, lambda: each_alone(model, ids))
    monkeypatch.setattr(recompute, "CHUNK", 5)
    for model.checkpointing in (False, True):
        with rows(model, NAMES):
            same(gradients(model, lambda: model.hidden(ids).square().sum()), wanted)
        same(gradients(model, lambda: each_alone(model, ids)), wanted)  # in chunks, each with its adapter
    model.checkpointing = False


def test_packed_rows_of_segments(model: Any) -> None:
    """Texts of one row have what they have alone; where a model cannot keep them apart, rows are laid out anew."""
    ids, spans = torch.randint(97, (1, 12)), [(0, 5), (5, 9), (9, 12)]
    numbers = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])

    def alone() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for (start, end), name in zip(spans, NAMES, strict=True):
            with using(model, *filter(None, [name])):
                total = total + model.hidden(ids[:, start:end]).square().sum()
        return total

    def packed() -> Tensor:
        with rows(model, NAMES, numbers):
            return model.hidden(ids, spans=spans).square().sum()

    same(gradients(model, packed), gradients(model, alone))


def test_adapters_on_experts_are_refused(random_decoder: Callable[..., Any]) -> None:
    from fourbit.models.decoder import Decoder
    from fourbit.models.families import read_spec

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 8}
    more = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    moe = Decoder(read_spec({"model_type": "qwen3_moe", "num_experts_per_tok": 2} | sizes | more))
    fourbit.attach(moe, LoRAConfig(rank=2, target=["q_proj"]), "a")
    fourbit.attach(moe, LoRAConfig(rank=2, target=None, target_parameters=["experts.down_proj"]), "e")
    ids = torch.randint(97, (2, 5))
    with rows(moe, ["a", None]):
        moe.hidden(ids)  # on attention alone
    with rows(moe, ["e", "a"]), pytest.raises(InputError, match="no one weight that a module could read"):
        moe.hidden(ids)


def test_a_packed_row_that_is_padded_keeps_its_adapters(random_decoder: Callable[..., Any], monkeypatch: Any) -> None:
    """In bf16 on a CPU that multiplies it rows get places behind, which are the last text's."""
    monkeypatch.setattr(dispatch, "_cpu_multiplies_bf16", lambda: True)
    model = adapted(random_decoder().to(torch.bfloat16))
    ids, numbers = torch.randint(97, (1, 11)), torch.tensor([[0] * 5 + [2] * 6])
    with rows(model, NAMES, numbers):
        found = model.hidden(ids, spans=[(0, 5), (5, 11)])
    for start, end, name in ((0, 5, "b"), (5, 11, "a")):
        with using(model, name):
            alone = model.hidden(ids[:, start:end])
        torch.testing.assert_close(found[:, start:end], alone, rtol=0.05, atol=0.05)


def test_adapters_of_the_head_answer_their_own_prompts(random_decoder: Callable[..., Any]) -> None:
    model = adapted(random_decoder(), quantised=False)
    for name in "cd":
        fourbit.attach(model, LoRAConfig(rank=3, alpha=64, target=["lm_head"]), name, seed=ord(name))
        for layer in adapter_layers(model).values():
            if name in layer.adapters:
                nn.init.normal_(layer.adapters[name].lora_B, std=0.5)
    prompts, names = [[5, 6], [5, 7], [5, 6], [9]], ["c", "d", None, "a"]
    wanted = []
    for prompt, name in zip(prompts, names, strict=True):
        with using(model, *filter(None, [name])):
            wanted += fourbit.generate(model, [prompt], max_new_tokens=6)
    for keep in ("on", "off"):
        how: Any = {"max_new_tokens": 6, "keep_dense": keep}
        assert fourbit.generate(model, prompts, adapters=names, **how) == wanted
    assert wanted[0] != wanted[2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_prompt_is_answered_by_its_adapter(model: Any, temperature: float) -> None:
    """Prompts of other lengths with a common beginning, in batches of several adapters that shrink as answers end."""
    torch.manual_seed(5)
    begin, names = torch.randint(97, (4,)).tolist(), ["a", None, "b", "a", "b", "b", None]
    prompts = [begin + torch.randint(97, (i % 4,)).tolist() for i in range(7)]
    how: dict[str, Any] = {"max_new_tokens": 9, "stop_ids": range(20), "temperature": temperature}
    seeds, wanted = list(range(7)), list[list[int]]()
    for prompt, name, seed in zip(prompts, names, seeds, strict=True):
        with using(model, *filter(None, [name])):
            wanted += fourbit.generate(model, [prompt], seed=[seed], **how)
    for size in (7, 3):
        assert fourbit.generate(model, prompts, adapters=names, batch_size=size, seed=seeds, **how) == wanted
    assert list(generate_each(model, prompts, adapters=names, batch_size=2, seed=seeds, **how)) == wanted
    assert len({*map(len, wanted)}) > 2  # some ended before others
    with pytest.raises(ValueError, match="one for each of 7 prompts, got 1"):
        fourbit.generate(model, prompts, adapters=["a"])
    with pytest.raises(InputError, match="no adapter 'x'"):
        fourbit.generate(model, prompts[:1], adapters=["x"])
