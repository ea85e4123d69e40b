"""AdaLoRA against PEFT's over a whole run, against the paper's formulas in float64, and its files."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fourbit.errors import InputError
from fourbit.lora.active import adapters_off, copy_adapter, using
from fourbit.lora.adalora import AdaLoRA, RankBudget
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.convert import dequantize
from fourbit.lora.layer import adapter_parameters, adapters_of
from fourbit.lora.lora import LoRA
from fourbit.lora.peft_files import load_adapter, save_adapter
from fourbit.lora.quantize import quantize_

# peft 0.21 asks transformers 5.23 a question under an old name
pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]

LIMIT = 1e-5
STEPS = 20
IDS = torch.arange(24).view(2, 12) % 61
TARGET = ["q_proj", "k_proj", "down_proj"]
CONFIG = LoRAConfig(kind="adalora", rank=2, initial_rank=5, alpha=6, target=TARGET, rank_warmup=0.15, rank_final=0.25)
MORE: dict[str, Any] = {"lora_alpha": 6, "target_modules": TARGET, "orth_reg_weight": 0.1}
PEFTS = {"init_r": 5, "target_r": 2, "tinit": 3, "tfinal": 5, "total_step": STEPS} | MORE
NOT = torch.zeros(())  # of skipped


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def with_adapter(base: nn.Module, std: float = 0.2, **how: Any) -> nn.Module:
    model = copy.deepcopy(base)
    attach(model, CONFIG, seed=0, **how)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def parts_of(model: nn.Module) -> list[AdaLoRA]:
    return list(adapters_of(model).values())  # type: ignore[arg-type]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def assert_close(ours: Tensor, theirs: Tensor, limit: float = LIMIT) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).abs().max()) <= limit * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
def test_a_whole_run_is_pefts(base: LlamaForCausalLM, quantised: bool) -> None:
    """Forward, gradients with the penalty, a step, and after each step the budget, what is kept and every lambda."""
    start = quantize_(copy.deepcopy(base)) if quantised else copy.deepcopy(base)
    ours, dense = with_adapter(start, 0.5), dequantize(copy.deepcopy(start)) if quantised else copy.deepcopy(base)
    theirs = get_peft_model(dense, AdaLoraConfig(**PEFTS)).eval()
    named = dict(theirs.named_parameters())
    pairs = []
    for name, parameter in adapter_parameters(ours).items():
        path, _, own = name.rpartition(".")
        pairs.append((parameter, named[f"base_model.model.{path}.{own}.default"]))
        with torch.no_grad():
            pairs[-1][1].copy_(parameter)
    assert_close(logits(ours), logits(theirs))
    budget = RankBudget(parts_of(ours), STEPS)
    optimizers = [torch.optim.SGD(own, lr=0.05) for own in zip(*pairs, strict=True)]
    for step in range(1, STEPS + 1):
        (ours(input_ids=IDS, labels=IDS).loss + budget.penalty()).backward()
        theirs.base_model(input_ids=IDS, labels=IDS).loss.backward()  # with the penalty
        if step == 1:
            for mine, reference in pairs:
                assert mine.grad is not None and reference.grad is not None
                assert float((mine.grad - reference.grad).norm()) <= LIMIT * float(reference.grad.norm())
        for optimizer in optimizers:
            optimizer.step()
        if step == 1:
            for pair in pairs:
                assert_close(*pair)
        budget.after_step(step, NOT)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert budget.budget(step) == theirs.base_model.rankallocator.budget_schedule(step)[0]
        assert sum(int(part.kept.sum()) for part in budget.parts) == budget.budget(step)
        for mine, reference in pairs:
            assert torch.equal(mine == 0, reference == 0) and torch.isfinite(mine).all()
            assert_close(mine, reference, 1e-4)
    ranks = [int(part.kept.sum()) for part in budget.parts]
    assert sum(ranks) == 2 * len(ranks) and len({*ranks}) > 1
    assert_close(logits(ours), logits(theirs), 1e-4)


@pytest.mark.parametrize(("begin", "end", "steps"), [(0.1, 0.5, 100), (0.0, 0.0, 7), (0.3, 0.7, 10), (0.2, 0.1, 1)])
def test_the_schedule_is_the_papers(begin: float, end: float, steps: int) -> None:
    config = LoRAConfig(kind="adalora", rank=3, initial_rank=8, rank_warmup=begin, rank_final=end)
    budget = RankBudget([AdaLoRA(nn.Linear(16, 16), config) for _ in range(4)], steps)
    first, final, found = round(begin * steps), steps - round(end * steps), [budget.budget(i) for i in range(steps + 1)]
    for step, count in enumerate(found):
        share = min(1.0, max(0.0, (step - first) / (final - first))) if final > first else 0.0
        assert count == (12 if step >= final else int(12 + 20 * (1 - share) ** 3))
    assert found == sorted(found, reverse=True) and found[-1] == 12


def test_the_papers_formulas_in_float64() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).double()
    config = LoRAConfig(kind="adalora", rank=1, initial_rank=3, alpha=6)
    model = nn.Sequential(linear)
    attach(model, config, dtype=torch.float64)
    (part,) = parts_of(model)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    P, E, Q = part.lora_B, part.lora_E.flatten(), part.lora_A
    x = torch.randn(4, 7, dtype=torch.float64)
    want = x @ (linear.weight + 2 * P @ torch.diag(E) @ Q).T + linear.bias
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(part.delta(linear.weight), 2 * P @ torch.diag(E) @ Q, rtol=0, atol=1e-10)
    eye = torch.eye(3, dtype=torch.float64)
    off = (P.T @ P - eye).square().sum().sqrt() + (Q @ Q.T - eye).square().sum().sqrt()
    budget = RankBudget([part], 10)
    torch.testing.assert_close(budget.penalty(), 0.1 * off / 2, rtol=0, atol=1e-10)
    means = {name: torch.zeros_like(p) for name, p in part.named_parameters()}
    spreads = {name: torch.zeros_like(p) for name, p in part.named_parameters()}
    for step in (1, 2):
        model(x * step).square().sum().backward()
        with torch.no_grad():
            for name, p in part.named_parameters():
                now = (p * p.grad).abs()
                means[name] = 0.85 * means[name] + 0.15 * now
                spreads[name] = 0.85 * spreads[name] + 0.15 * (now - means[name]).abs()
        budget.after_step(step, NOT)
        before = {name: buffer.clone() for name, buffer in part.named_buffers()}
        part.lora_A.grad.fill_(float("nan"))
        budget.after_step(step, torch.ones(()))  # a step that was skipped says nothing
        assert all(torch.equal(buffer, before[name]) for name, buffer in part.named_buffers())
        model.zero_grad()
    score = {name: means[name] * spreads[name] for name in means}
    want = score["lora_E"].flatten() + score["lora_A"].mean(1) + score["lora_B"].mean(0)
    torch.testing.assert_close(part.scores(), want, rtol=1e-10, atol=1e-10)
    assert int(part.kept.sum()) == budget.budget(2) == 1
    assert bool(part.kept[want.argmax()]) and int((part.lora_E == 0).sum()) == 2


def pruned(base: nn.Module, ranks: list[int], **how: Any) -> nn.Module:
    """A model whose layers keep so many triplets."""
    model = with_adapter(base, **how)
    for part, rank in zip(parts_of(model), ranks, strict=True):
        part.kept.copy_(torch.arange(5) < rank)
        part.lora_E.data.masked_fill_(~part.kept[:, None], 0)
    return model


def test_its_file_is_plain_lora_with_ranks_of_their_own(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """PEFT and we open it as LoRA; a layer without a triplet is not in it, unless the file has its bias."""
    ranks = [2, 0, 4, 1, 5, 2]
    ours = pruned(base, ranks)
    paths = list(adapters_of(ours))
    save_adapter(ours, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and raw["rank_pattern"] and raw["r"] == 2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(logits(ours), logits(theirs))
    again = copy.deepcopy(base)
    assert load_adapter(again, tmp_path) == [path for path, rank in zip(paths, ranks, strict=True) if rank]
    assert [part.rank for part in adapters_of(again).values()] == [rank for rank in ranks if rank]  # type: ignore[attr-defined]
    assert {type(part) for part in adapters_of(again).values()} == {LoRA}
    assert_close(logits(again), logits(ours))


def test_a_layer_that_keeps_its_bias_alone_is_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    untouched = copy.deepcopy(model)
    attach(model, LoRAConfig(kind="adalora", rank=1, bias="lora_only"))
    with torch.no_grad():
        for part in parts_of(model):
            assert part.copies is not None
            part.copies.bias.normal_()  # type: ignore[union-attr, operator]
            part.lora_E.normal_()
    last = parts_of(model)[1]
    last.kept.zero_(), last.lora_E.data.zero_()
    save_adapter(model, tmp_path)
    theirs, x = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path), torch.randn(3, 4)
    load_adapter(untouched, tmp_path)
    assert_close(untouched(x), model(x))
    assert_close(theirs(x), model(x))


def test_it_is_switched_copied_and_cast_as_any(base: LlamaForCausalLM) -> None:
    model = pruned(base.bfloat16(), [2, 0, 4, 1, 5, 2])
    base.float()
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    output = model(IDS).logits
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(part.lora_E.grad is not None for part in parts_of(model))
    kept = logits(model)
    copy_adapter(model, "default", "copy")
    with adapters_off(model):
        assert torch.equal(logits(model), logits(copy.deepcopy(base).bfloat16()))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(1)
    with using(model, "copy"):
        assert torch.equal(logits(model), kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"initial_rank": 3, "rank": 4}, "initial_rank must be at least the final rank, 4, got 3"),
        ({"rank_warmup": 0.6}, "rank_warmup and rank_final are shares of one run, at most 1 together, got 0.6 and 0.5"),
    ],
)
def test_schedules_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoRAConfig(kind="adalora", **settings)


def test_a_fresh_one_changes_nothing(base: LlamaForCausalLM) -> None:
    model = copy.deepcopy(base)
    attach(model, CONFIG)
    assert torch.equal(logits(model), logits(base)) and all(part.is_idle() for part in parts_of(model))
    with pytest.raises(InputError, match="give Run its number of steps, total="):
        AdaLoRA.course(parts_of(model), None)


@pytest.mark.filterwarnings("ignore:Adapter 'default'", "ignore:The following rank_pattern")  # of peft's own files
@pytest.mark.parametrize("alpha", [0, 6])
def test_pefts_own_file_is_read_as_plain_lora(base: LlamaForCausalLM, tmp_path: Path, alpha: int) -> None:
    """After a run, its ranks its own, one layer's none left; the same tensors compute the same, and are saved so."""
    ids, ours, generator = torch.arange(12).view(2, 6), copy.deepcopy(base), torch.Generator().manual_seed(0)
    config = AdaLoraConfig(target_r=2, init_r=5, lora_alpha=alpha, target_modules=["q_proj", "up_proj"], total_step=9)
    theirs = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
    names = [name for name, _ in theirs.base_model.model.named_parameters() if "lora_E" in name]
    kept = {name: [i < n % 5 for i in range(5)] for n, name in enumerate(names)}
    theirs.peft_config["default"].rank_pattern = kept
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours(ids).logits, base(ids).logits, atol=1e-2)
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_file_of_pefts_that_does_not_fit_is_refused(base: LlamaForCausalLM, tmp_path: Path) -> None:
    get_peft_model(
        copy.deepcopy(base), AdaLoraConfig(target_r=2, init_r=3, target_modules=["q_proj"], total_step=9)
    ).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in whole if key.endswith("lora_E"))
    for wrong in (torch.zeros(2, 1), torch.zeros(()), torch.zeros(3)):
        save_file(
            {name: t.contiguous() for name, t in (whole | {key: wrong}).items()}, tmp_path / "adapter_model.safetensors"
        )
        with pytest.raises(InputError, match="must fit, got"):
            load_adapter(copy.deepcopy(base), tmp_path)
