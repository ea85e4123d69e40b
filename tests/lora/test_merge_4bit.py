"""What becomes of a merged change: rounded to 4 bits it goes, in codes with a residual beside them it stays."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import fourbit
from fourbit.kernels.dequantize4bit import dequantize
from fourbit.kernels.quantize4bit import quantize
from fourbit.lora.layer import adapters_of
from fourbit.lora.linear4bit import NF4LowRank
from fourbit.lora.merge import Fidelity, fidelity, merged_state, requantize_


def layer(size: int, rank: int, share: float, *, double_quant: bool = False, seed: int = 0) -> Any:
    """A 4-bit layer of N(0, 0.02) with a random LoRA whose change has that share of the weight's norm."""
    torch.manual_seed(seed)
    model = nn.Sequential(fourbit.NF4Linear.from_weight(torch.randn(size, size) * 0.02, double_quant=double_quant))
    fourbit.attach(model, fourbit.LoRAConfig(rank=rank, alpha=rank))
    part, weight = adapters_of(model)["0"], model[0].base.dequantize()
    with torch.no_grad():
        part.lora_A.normal_(), part.lora_B.normal_()
        part.lora_B *= share * weight.norm() / part.delta(weight).norm()
    return model


def rounded(model: Any) -> Fidelity:
    """Of the merged weight, quantised again."""
    wanted = model[0].merged(torch.float32).detach()
    return Fidelity.of(model[0].base.dequantize(), wanted, dequantize(quantize(wanted)))


@pytest.mark.parametrize(("share", "kept"), [(0.003, 0.01), (0.01, 0.02), (0.03, 0.04), (0.1, 0.84), (0.3, 0.99)])
def test_what_rounding_to_4_bits_deletes(share: float, kept: float) -> None:
    found = rounded(layer(1024, 16, share))
    print(f"|D| / |W| = {share:.1%}: quantised again, {found}")
    assert abs(found.kept - kept) < 0.02
    assert abs(found.change**0.5 - share * 20.48) < 0.01 * share * 20.48  # |W| of 1024 x 1024 of N(0, 0.02)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("size", "rank"), [(1024, 8), (512, 4)])
def test_codes_and_a_residual_keep_a_small_change(size: int, rank: int, double_quant: bool) -> None:
    """At 1% of the weight's norm, within 0.3 bit a weight."""
    model = layer(size, rank, 0.01, double_quant=double_quant)
    wanted = model[0].merged(torch.float32).detach()
    found = requantize_(model)["0"]
    bits = 16 * (model[0].A.numel() + model[0].B.numel()) / wanted.numel()
    print(f"{size} x {size}, rank {rank}: {bits:.3f} bits a weight beside 4, {found}")
    assert bits <= 0.3 and found.kept > 0.99 and found.change > 1e4 * found.noise
    assert type(model[0]) is NF4LowRank and torch.equal(model[0].A.bfloat16(), model[0].A)
    x = torch.randn(4, size)
    torch.testing.assert_close(model(x), x @ wanted.T, rtol=1e-3, atol=1e-3)


def test_a_change_of_too_high_a_rank_is_fitted_by_codes_and_residual_together() -> None:
    """Never farther than the old codes with the best residual, nor than rounding with the best one."""
    for share in (0.01, 0.2):
        model = layer(256, 64, share, seed=1)
        plain, wanted = model[0].base.dequantize(), model[0].merged(torch.float32).detach()
        left = [(wanted - codes) for codes in (plain, dequantize(quantize(wanted)))]
        best = [torch.linalg.svdvals(rest)[2:].square().sum().item() for rest in left]  # rank 2 is 0.25 bit
        found = requantize_(model)["0"]
        assert len(model[0].A) == 2
        assert found.noise < 1.02 * min(best), (share, found, best)
    assert found.kept > 0.9 and best[1] < best[0]


def test_what_else_is_adapted_is_merged_beside_it() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"packed": nn.Linear(64, 64), "dense": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})
    fourbit.quantize_(model, skip=["dense"])
    config = fourbit.LoRAConfig(rank=2, target=["packed", "dense"], bias="lora_only", modules_to_save=["norm"])
    fourbit.attach(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    x = torch.randn(5, 64)
    run = lambda: model["norm"](model["dense"](model["packed"](x)))
    wanted = run()
    assert requantize_(model, bits=2).keys() == {"packed"}
    assert type(model["dense"]) is nn.Linear and type(model["norm"]) is nn.LayerNorm
    torch.testing.assert_close(run(), wanted, rtol=0.02, atol=0.02)


def test_merged_into_the_dense_base_the_noise_is_what_4_bits_were_off_by() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 256, bias=False))
    weight, packed = dense[0].weight.detach().clone(), fourbit.quantize_(copy.deepcopy(dense))
    for model in (dense, packed):
        fourbit.attach(model, fourbit.LoRAConfig(rank=4), seed=0)
        nn.init.normal_(adapters_of(model)["0"].lora_B, std=0.02, generator=torch.Generator().manual_seed(0))
    ((own,), (found,)) = (fidelity(packed, merged_state(model)).values() for model in (packed, dense))
    assert own.noise == 0 and own.kept == pytest.approx(1)
    off, change = weight - packed[0].base.dequantize(), dict(fourbit.delta(dense))["0"]
    assert found.noise == pytest.approx(off.square().sum().item(), rel=1e-3)
    assert found.along == pytest.approx((change * (change + off)).sum().item(), rel=1e-3)


def test_4_bit_tables_become_dense_beside_it() -> None:
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    fourbit.quantize_(model, embeddings=True)
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["0", "1"]))
    requantize_(model)
    assert type(model[0]) is nn.Embedding and type(model[1]) is NF4LowRank


def test_where_nothing_in_4_bits_changes_nothing_is_made_anew() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    with pytest.raises(fourbit.InputError, match="no layer in 4 bits is changed"):
        requantize_(model)
    fourbit.merge(model)


def test_codes_and_what_is_beside_them_go_through_files(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4", dtype="bfloat16")
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, target=["q_proj", "down_proj"]), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    requantize_(model, bits=3)
    fourbit.save_model(model, tmp_path, tokenizer)
    again, _ = fourbit.load(tmp_path, dtype="bfloat16")
    own, read = model.state_dict(), again.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")  # with peft, base and adapter
    ids = torch.arange(9)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0.05, atol=0.1)


def test_low_rank_parts_of_an_older_save_go(tiny_folder: Path, tmp_path: Path) -> None:
    """Whatever is saved over them; an adapter with a file of its own stays."""
    (plain, tokenizer), (model, _) = (fourbit.load(tiny_folder, quant_type="nf4") for _ in range(2))
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    fourbit.save_adapter(model, tmp_path)
    fourbit.save_model(plain, tmp_path, tokenizer)
    files, adapter = {file.name for file in tmp_path.iterdir()}, {"adapter_config.json", "adapter_model.safetensors"}
    assert adapter <= files
    requantize_(model)
    for merge in (False, True):
        fourbit.save_model(model, tmp_path, tokenizer)
        assert isinstance(fourbit.load(tmp_path)[0].model.layers[0].self_attn.q_proj, NF4LowRank)
        fourbit.save_model(plain, tmp_path, tokenizer, merge=merge)
        assert {file.name for file in tmp_path.iterdir()} == files - adapter
