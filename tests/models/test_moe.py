"""Qwen3-MoE and Mixtral in the decoder, held to transformers: logits, gradients, files, generation, adapters."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.layer import adapter_parameters
from fourbit.lora.linear4bit import Module4bit
from fourbit.lora.peft_files import save_adapter
from fourbit.lora.quantize import quantize_
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.load import load_decoder
from fourbit.models.save import save_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SMALL |= {"vocab_size": 50, "max_position_embeddings": 64, "initializer_range": 0.2, "num_experts_per_tok": 2}
QWEN = SMALL | {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 5}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN | {"norm_topk_prob": True},
    "qwen3_moe-raw": QWEN | {"num_experts_per_tok": 5, "tie_word_embeddings": True, "attention_bias": True},
    "mixtral": SMALL | {"intermediate_size": 24, "num_local_experts": 4, "sliding_window": None},
    "mixtral-window": SMALL | {"intermediate_size": 24, "num_local_experts": 3, "sliding_window": 4},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@cache
def theirs(case: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.partition("-")[0], **CASES[case])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.ndim < 2 else 0, 0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(case)
    theirs(case).save_pretrained(home)
    return home


IDS = torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0))


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    top = wanted.topk(2).values
    sure = top[..., 0] - top[..., 1] > 2e-4 * wanted.abs().max()
    assert torch.equal(found.argmax(-1)[sure], wanted.argmax(-1)[sure])


def test_logits_files_and_generation(case: str, folder: Path, tmp_path: Path) -> None:
    model, wanted = load_decoder(folder), theirs(case)(IDS).logits
    close(model(IDS), wanted)
    packed = model(IDS.reshape(1, -1), spans=[(0, 11), (11, 22)])
    close(packed.view_as(wanted), wanted)
    cache, steps = model.new_cache(), []
    with torch.no_grad():
        for token in IDS.unbind(1):  # past the window
            steps.append(model(token[:, None], cache=cache))
    close(torch.cat(steps, dim=1), wanted)
    save_model(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(again(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    close(load_decoder(tmp_path)(IDS), wanted)


def test_an_adapter_on_attention_and_experts_is_pefts(case: str, folder: Path, tmp_path: Path) -> None:
    for base in (load_decoder(folder), quantize_(load_decoder(folder), blocksize=32)):
        attach(base, LoRAConfig(rank=2, alpha=4, target=["q_proj", "o_proj"], target_parameters=BOTH))
        for parameter in adapter_parameters(base).values():
            nn.init.normal_(parameter, 0, 0.1)
        save_adapter(base, tmp_path / "adapter")
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        state = dense.state_dict()
        for path, module in base.named_modules():
            if isinstance(module, Module4bit):
                own = path.replace(".base", "")
                state[own if own in state else f"{own}.weight"].copy_(module.dequantize())
        peer = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter", is_trainable=True)
        wanted, found = peer(IDS).logits, base(IDS)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
        own_grads = torch.autograd.grad(found.square().mean(), list(adapter_parameters(base).values()))
        its = {n: p for n, p in peer.named_parameters() if p.requires_grad}
        its_grads = dict(zip(its, torch.autograd.grad(wanted.square().mean(), list(its.values())), strict=True))
        for (name, _), grad in zip(adapter_parameters(base).items(), own_grads, strict=True):
            path, _, matrix = name.rpartition(".")
            parent, _, leaf = path.rpartition(".")
            place = path if "experts" not in path else parent + (".base_layer" if leaf == "gate_up_proj" else "")
            other = its_grads[f"base_model.model.{place}.{matrix}.default.weight"]
            assert (grad - other).norm() <= 1e-4 * other.norm(), name


def test_experts_load_in_4_bits_and_the_router_stays_dense(folder: Path, tmp_path: Path) -> None:
    model = load_decoder(folder, quant_type="nf4", blocksize=32)
    experts = model.model.layers[0].mlp.experts
    assert {type(part).__name__ for part in experts._modules.values()} == {"NF4Parameter"}
    assert (
        type(model.model.layers[0].mlp.gate).__name__ == "Router"
        and model.model.layers[0].mlp.gate.weight.is_floating_point()
    )
    same = quantize_(load_decoder(folder), blocksize=32)
    assert torch.equal(model(IDS), same(IDS))
    save_model(model, tmp_path)
    assert torch.equal(load_decoder(tmp_path)(IDS), model(IDS))


def test_pieces_of_experts_that_are_one_too_many_or_one_too_few_are_refused_by_name(tmp_path: Path) -> None:
    """Also an expert whose number is spelled in another way, a second naming, and a piece beside the whole."""
    folder = tmp_path / "base"
    theirs("mixtral").save_pretrained(folder)
    file, (home, names) = folder / "model.safetensors", ("model.layers.1.block_sparse_moe", ["w1", "w2", "w3"])
    whole = load_file(file)

    def refused(tensors: dict[str, Tensor], culprit: str) -> None:
        save_file(tensors, file)
        with pytest.raises(InputError, match=re.escape(culprit)):
            load_decoder(folder)

    for name in names:
        piece = f"{home}.experts.1.{name}.weight"
        other = piece.replace("block_sparse_moe", "mlp")
        for more in (piece.replace(".1.w", ".01.w"), piece.replace(".1.w", ".\u0661.w"), other):
            refused(whole | {more: -whole[piece]}, "1 unknown: ")
        refused({name: tensor for name, tensor in whole.items() if name != piece}, f"{home}.experts.2.{name}.weight")
    save_file(whole, file)
    save_model(load_decoder(folder), tmp_path / "fused")
    refused(load_file(tmp_path / "fused" / "model.safetensors") | {piece: whole[piece]}, f"1 unknown: {piece}")


def test_the_block_equals_a_loop_over_experts() -> None:
    """Every gradient, in float64 and bfloat16; experts without tokens, one token, all experts at once, none."""
    torch.manual_seed(0)
    spec = read_spec({"model_type": "qwen3_moe", **QWEN, "hidden_act": "silu", "num_experts_per_tok": 2})
    experts = Decoder(spec).model.layers[0].mlp.experts.double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    for index in (
        torch.tensor([[0, 3], [3, 0], [3, 4]]),
        torch.tensor([[2, 1]]),
        torch.arange(5).expand(4, 5),
        torch.zeros(0, 2, dtype=torch.int64),
    ):
        x, weights = (
            torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((len(index), 32), index.shape)
        )
        total = torch.zeros_like(x)
        for e in range(5):
            token, choice = torch.where(index == e)
            gate, up = (x[token] @ experts.gate_up_proj[e].T).chunk(2, -1)
            y = (nn.functional.silu(gate) * up) @ experts.down_proj[e].T
            total = total.index_add(0, token, y * weights[token, choice, None])
        inputs = [x, weights, *experts.parameters()]
        found = experts(x, index, weights)
        both = [torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for y in (found, total)]
        for a, b in zip((found, *both[0]), (total, *both[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        rounded = experts.bfloat16()(x.bfloat16(), index, weights.bfloat16())
        experts.double()
        torch.testing.assert_close(rounded.double(), total, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step must be 1"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers must be empty"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok must be at most the 5 experts"),
        ({"num_experts": 10**9}, "num_experts must be a whole number"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act must be 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window must be false"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_spec({"model_type": "qwen3_moe", **QWEN, **change})
