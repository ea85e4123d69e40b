"""A block in which layers compute with dense merged weights, and the weights of which are given back after it."""

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fourbit
from fourbit.lora.convert import dequantize
from fourbit.lora.layer import adapter_layers
from fourbit.lora.packed import Part, can_pack
from fourbit.lora.project import project
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from tests.lora.test_merge import X, adapted, randomised, toy
from tests.models.test_smollm2 import PROMPTS


class Stopped(Exception):
    """What ends a block early."""


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "ia3"])
def test_a_block_computes_with_dense_weights_and_gives_them_back(kind: str) -> None:
    """4-bit and dense bases, adapted and not; after an exception too, though somebody holds its traceback."""
    model = toy()
    model.append(nn.Linear(64, 64))
    for i in (2, 3):
        model[i] = fourbit.quantize_(model[i])
    sizes = {} if kind == "ia3" else {"rank": 4}
    fourbit.attach(model, fourbit.LoRAConfig(kind=kind, target=["0", "2"], **sizes))
    randomised(model).eval()
    before, layers = model(X), list(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    need = 4 * (96 * 128 + 128 * 64 + 64 * 64)
    with fourbit.merging(model, need - 1) as held:
        assert held == 0 and list(model) == layers
    gone = []
    with pytest.raises(Stopped) as caught, fourbit.merging(model, need) as held:
        assert held == need and all(type(model[i]) is nn.Linear for i in (0, 2, 3))
        gone += [weakref.ref(model[i].weight) for i in (0, 2, 3)]
        torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
        raise Stopped
    assert caught.value is not None and all(weight() is None for weight in gone)
    assert list(model) == layers and torch.equal(model(X), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_decodes_bases_alone_lets_adapters_be_switched() -> None:
    model = fourbit.quantize_(nn.Sequential(toy()))
    fourbit.attach(model, fourbit.LoRAConfig(rank=4), "a")
    fourbit.attach(model, fourbit.LoRAConfig(rank=2), "b", seed=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    rows, names = X[:, None], ["a", None, "b", "a", "b"]
    with fourbit.rows(model, names):
        wanted = model(rows)
    with fourbit.merging(model, 1e9, adapters=False) as held:
        assert held == 4 * (96 * 128 + 128 * 64)
        with fourbit.rows(model, names):
            torch.testing.assert_close(model(rows), wanted, rtol=1e-5, atol=1e-5)
        with fourbit.adapters_off(model):
            assert not torch.allclose(model(rows), wanted)


def test_dora_beside_a_decoded_base_keeps_its_norms_in_inference_mode() -> None:
    """As answers are generated: the weights of a block count their changes, whatever mode it is in."""
    model = fourbit.quantize_(nn.Sequential(toy()))
    fourbit.attach(model, fourbit.LoRAConfig(rank=4, kind="dora"))
    randomised(model)
    layer = next(iter(adapter_layers(model).values()))
    wanted = model(X).detach()
    with torch.inference_mode(), fourbit.merging(model, 1e9, adapters=False) as held:
        assert held
        torch.testing.assert_close(model(X), wanted, rtol=1e-5, atol=1e-5)
        norms = [layer.adapters["default"].norms(layer.base) for _ in range(2)]
        assert norms[0] is norms[1]
    torch.testing.assert_close(model(X), wanted, rtol=0, atol=0)


def test_a_block_leaves_what_is_hooked_compiled_or_cannot_say_its_change() -> None:
    """A hook is called as before; of an own kind without `delta` the base is decoded."""

    class Twice(fourbit.Adapter):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 2 * y

    model, seen = adapted(toy()), []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    before = model(X)
    with fourbit.merging(model, 1e9) as held:
        assert held == 4 * 128 * 64
        torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2
    other = adapted(toy())
    other[2] = torch.compile(other[2], backend="eager")
    wrapper = other[2]
    with fourbit.merging(other, 1e9) as held:
        assert held == 0 and other[2] is wrapper
    odd = fourbit.quantize_(nn.Sequential(nn.Linear(64, 64)))
    fourbit.attach(odd, fourbit.LoRAConfig(rank=2), layer=lambda base, config: Twice())
    before = odd(X[:, :64])
    with fourbit.merging(odd, 1e9) as held:
        assert held == 4 * 64 * 64 and type(odd[0].base) is nn.Linear
        torch.testing.assert_close(odd(X[:, :64]), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_are_one_product_in_a_block(bias: bool) -> None:
    """Outputs and answers of a decoder in 4 bits with an adapter, prompts of several lengths; a hook put on one of the
    layers in the block is called; weights are views of one, and gone afterwards."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    more = {"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, "attention_bias": bias}
    model = fourbit.quantize_(Decoder(read_spec(sizes | more | {"rms_norm_eps": 1e-5})).eval())
    fourbit.attach(model, fourbit.LoRAConfig(rank=4))
    randomised(model).eval()
    ids, prompts = torch.randint(90, (2, 9)), [[5, 6, 7], [1], [3, 3, 3, 3, 3]]
    with torch.no_grad():
        before = model(ids)
    plain = fourbit.generate(model, prompts, max_new_tokens=9, keep_dense="off")
    calls: list[str] = []
    with fourbit.merging(model, 1e9) as held, torch.no_grad():
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        whole, parts = attention.q_proj.joined
        assert parts == (attention.q_proj, attention.k_proj, attention.v_proj)
        assert attention.k_proj.weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()
        assert whole.weight.stride() == attention.k_proj.weight.stride() == (1, 128)  # [in, out] in memory
        assert mlp.up_proj.joined[0] is mlp.gate_proj.joined[0] and not hasattr(mlp.down_proj, "joined")
        torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-5)
        whole.register_forward_hook(lambda *args: calls.append("whole"))
        model(ids)
        handle = attention.k_proj.register_forward_hook(lambda *args: calls.append("k"))
        model(ids)
        handle.remove()  # a layer and its twin have the same hooks
        assert calls == ["whole", "k"]
        gone, total = weakref.ref(whole), sum(p.nbytes for n, p in model.named_parameters() if "_proj.weight" in n)
        assert held == total
    del whole, parts, attention, mlp
    with torch.no_grad():
        assert gone() is None and torch.equal(model(ids), before)
    for keep in ("auto", "on"):
        assert fourbit.generate(model, prompts, max_new_tokens=9, keep_dense=keep) == plain


class Pair(nn.Module):
    """Two layers on one input, of sizes that no kernel likes."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.together = ("first", "second")
        self.first, self.second = nn.Linear(67, 5, bias=bias), nn.Linear(67, 130, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(project(x, [self.first, self.second]), -1)


@pytest.mark.skipif(not can_pack([nn.Linear(2, 2)]), reason="torch has no such kernels for this CPU")
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_one_input_are_laid_out_for_several_rows(bias: bool) -> None:
    """Outputs for one row to many within 67 roundings of fp32, each layer by itself too, with hooks; its weight is what
    it was; gone afterwards."""
    torch.manual_seed(2)
    model = fourbit.quantize_(Pair(bias))
    dense = copy.deepcopy(model)
    dense.first, dense.second = (dequantize(copy.deepcopy(layer)).double() for layer in (model.first, model.second))
    with torch.inference_mode(), fourbit.merging(model, 1e9, rows=4):
        assert type(model.first) is type(model.second) is Part
        assert torch.equal(model.second.weight, dense.second.weight.float())
        for shape in ((1, 67), (4, 67), (2, 33, 67), (0, 67)):
            x = torch.randn(shape)
            size = x.double().abs() @ torch.cat((dense.first.weight, dense.second.weight)).abs().T + bias
            assert ((model(x) - dense(x.double())).abs() <= 68 * 2**-24 * size).all()
            calls: list[int] = []
            handle = model.second.register_forward_hook(lambda *args, calls=calls: calls.append(1))
            assert torch.equal(model(x)[..., 5:], model.second(x)) and len(calls) == 2
            handle.remove()
        gone = weakref.ref(model.first.joined[0])
    assert gone() is None and type(model.first) is fourbit.NF4Linear


def test_in_16_bits_an_adapter_stays_beside_its_base() -> None:
    """A change far below the rounding of the weights, all of 1, and of outputs near 0, is there in the block."""
    model = fourbit.quantize_(nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16))
    model[0].quantize_weight_(torch.ones(64, 64, dtype=torch.bfloat16))
    fourbit.attach(model, fourbit.LoRAConfig(rank=1, alpha=1))
    part = model[0].adapters["default"]
    part.lora_A.data.copy_(torch.tensor([1.0, -1.0]).repeat(32)[None])
    part.lora_B.data.fill_(2.0**-12)
    x = torch.tensor([1.0, -1.0]).repeat(32)[None].bfloat16()
    with torch.no_grad(), fourbit.merging(model, 1e9) as held:
        assert held == 2 * 64 * 64 and type(model[0].base) is nn.Linear
        assert torch.equal(model(x), torch.full((1, 64), 64 * 2.0**-12).bfloat16())


@pytest.mark.slow
def test_smollm2_answers_the_same_merged_and_in_a_block(smollm2: Path) -> None:
    """A small change of every layer over NF4, in fp32: 64 greedy tokens of five prompts, and logits; merged in bf16,
    logits within its rounding."""
    model, tokenizer = fourbit.load(smollm2, quant_type="nf4", dtype=torch.float32)
    fourbit.attach(model, fourbit.LoRAConfig(rank=8), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=2e-3)
    ids, how = [tokenizer.encode(prompt) for prompt in PROMPTS], {"max_new_tokens": 64, "batch_size": 5}
    text = torch.tensor([ids[0]])
    with torch.no_grad():
        wanted, logits = fourbit.generate(model, ids, **how), model(text)
        with fourbit.adapters_off(model):
            assert (model(text) - logits).abs().max() > 0.01 * logits.abs().max()
        with fourbit.merging(model, 1e12) as held:
            assert held > 4e8 and fourbit.generate(model, ids, **how) == wanted
        half = copy.deepcopy(model).to(torch.bfloat16)
        apart = half(text)
        rounded = fourbit.merge(half)(text)
        fourbit.merge(model)
        assert (model(text) - logits).abs().max() < 1e-4 * logits.abs().max()
        assert fourbit.generate(model, ids, **how) == wanted
    off, allowed = ((made.float() - logits).norm() / logits.norm() for made in (rounded, apart))
    assert off < max(1.5 * allowed, 0.02), "no farther than bfloat16 is by itself"
