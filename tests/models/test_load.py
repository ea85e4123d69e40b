"""Loading: weights in the right places, dense or in 4 bits, and every wrong file refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fourbit import nf4
from fourbit.errors import EnvironmentProblem, InputError
from fourbit.lora.linear4bit import NF4Linear
from fourbit.models.decoder import Decoder
from fourbit.models.generate import generate
from fourbit.models.load import load, load_decoder

Oracle = Callable[..., Any]
IDS = torch.arange(60).view(2, 30)
DECODER_LINEARS = 3 * 7
CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def save(oracle: Oracle, tmp_path: Path) -> Callable[..., Path]:
    """`save("bias", shard="20KB")`: an oracle's checkpoint, written by transformers."""

    def write(kind: str | None = None, *, shard: str = "1GB", **shape: Any) -> Path:
        folder = tmp_path / "model"
        oracle(kind, **shape).save_pretrained(folder, max_shard_size=shard)
        return folder

    return write


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def linears(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module) is kind}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@torch.no_grad()
def test_dense_equals_the_oracle(oracle: Oracle, kind: str, save: Callable[..., Path], shard: str) -> None:
    folder = save(kind, shard=shard)
    assert len(list(folder.glob("*.safetensors"))) > 1 or shard == "1GB"
    model = load_decoder(folder)
    assert not model.training and model.source == str(folder)
    expected = oracle(kind).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(IDS), oracle(kind)(IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(save: Callable[..., Path], stored: torch.dtype, dtype: torch.dtype) -> None:
    folder = save("bias")
    edit_weights(folder, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    expected = load_file(folder / "model.safetensors")
    model = load_decoder(folder, dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype)), name


@pytest.mark.parametrize("quant_type, double_quant", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("kind_of_model", ["bias", "tied", "gqa 4:1"])
@pytest.mark.parametrize("shard", ["1GB", "10KB"])  # 10 KB: a weight and its bias in different files
def test_decoder_linears_are_quantised(
    oracle: Oracle, save: Callable[..., Path], quant_type: str, double_quant: bool, kind_of_model: str, shard: str
) -> None:
    folder = save(kind_of_model, shard=shard)
    model = load_decoder(folder, quant_type=quant_type, double_quant=double_quant, dtype=torch.bfloat16)
    dense = oracle(kind_of_model).state_dict()
    found = linears(model, NF4Linear)
    assert len(found) == DECODER_LINEARS and list(linears(model, nn.Linear)) == ["lm_head"]
    for name, linear in found.items():
        packed, absmax, *_ = nf4.quantize(dense[f"{name}.weight"], quant_type=quant_type)
        assert torch.equal(linear.packed, packed), name
        assert (linear.nested_absmax is not None) == double_quant
        assert linear.absmax.dtype == (torch.uint8 if double_quant else torch.float32)
        if not double_quant:
            assert torch.equal(linear.absmax, absmax), name
        if linear.bias is not None:
            assert torch.equal(linear.bias, dense[f"{name}.bias"].bfloat16()) and not linear.bias.requires_grad
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind_of_model == "tied")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(model.get_parameter(name), dense[name].bfloat16())
    assert all(not tensor.is_meta for tensor in model.state_dict().values())


def test_quantised_logits_equal_those_of_the_decoded_weights(oracle: Oracle, save: Callable[..., Path]) -> None:
    quantised = load_decoder(save("bias"), quant_type="nf4")
    theirs = oracle("bias")
    with torch.no_grad():
        for name, linear in linears(quantised, NF4Linear).items():
            theirs.get_parameter(f"{name}.weight").copy_(linear.dequantize(torch.float32))
        expected = theirs(IDS).logits
        assert (quantised(IDS) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float32, "meta")])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_torchs_default_dtype_and_device_change_nothing(
    tiny_folder: Path, quant_type: str | None, dtype: torch.dtype, device: str
) -> None:
    """Neither what is loaded nor what is answered, from caches that fork."""
    made = []
    for own, where in ((torch.float32, "cpu"), (dtype, device)):
        torch.set_default_dtype(own)
        try:
            with torch.device(where):
                model, _ = load(tiny_folder, quant_type=quant_type, dtype=torch.float32)
                answers = generate(model, [[5, 1, 2, 3], [5, 1, 4]], max_new_tokens=4)
        finally:
            torch.set_default_dtype(torch.float32)
        made.append((answers, model.state_dict()))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(value, made[0][1][name]) for name, value in made[1][1].items())


def test_nothing_of_the_file_is_needed_afterwards(save: Callable[..., Path]) -> None:
    folder = save("bias")
    model = load_decoder(folder)
    before = model(IDS)
    (folder / "model.safetensors").write_bytes(b"")  # a map of the file would now be gone
    shutil.rmtree(folder)
    assert torch.equal(model(IDS), before)
    assert ".safetensors" not in Path("/proc/self/maps").read_text()


def test_harmless_extras_are_ignored(oracle: Oracle, save: Callable[..., Path]) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        for owner in ("model.layers.0.self_attn", "model"):
            tensors[f"{owner}.rotary_emb.inv_freq"] = torch.ones(4)

    folder = edit_weights(save("tied"), add)
    torch.testing.assert_close(load_decoder(folder)(IDS), oracle("tied")(IDS).logits, rtol=0, atol=1e-4)


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
HEADS: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {  # what the config says, and what the file holds
    "tied, the embedding alone": ({"tie_word_embeddings": True}, lambda held: held.pop(HEAD)),
    "tied, the head alone": ({"tie_word_embeddings": True}, lambda held: held.pop(EMBEDDING)),
    "tied, both the same": ({"tie_word_embeddings": True}, lambda held: held.update({HEAD: held[EMBEDDING].clone()})),
    "tied, both, that differ": ({"tie_word_embeddings": True}, lambda held: None),
    "untied, both the same": ({}, lambda held: held.update({HEAD: held[EMBEDDING].clone()})),
    "no word, both": ({"tie_word_embeddings": ...}, lambda held: None),
}


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("case", HEADS)
@torch.no_grad()
def test_a_head_is_what_transformers_makes_of_config_and_file(
    save: Callable[..., Path], case: str, quant_type: str | None
) -> None:
    from transformers import LlamaForCausalLM

    changes, edit = HEADS[case]
    folder = edit_config(edit_weights(save(), edit), **changes)
    theirs, model = LlamaForCausalLM.from_pretrained(folder), load_decoder(folder, quant_type=quant_type)
    torch.testing.assert_close(model.lm_head.weight, theirs.lm_head.weight, rtol=0, atol=0)
    torch.testing.assert_close(model.model.embed_tokens.weight, theirs.model.embed_tokens.weight, rtol=0, atol=0)
    if quant_type is None:
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=0, atol=1e-4)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.spec.tie_word_embeddings == (case.startswith("tied") and "differ" not in case)


def test_a_config_that_forgets_to_tie_is_told_and_the_advice_works(save: Callable[..., Path]) -> None:
    folder = edit_config(save("tied"), tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"1 missing: lm_head.weight.* needs tie_word_embeddings true"):
        load_decoder(folder)
    load_decoder(edit_config(folder, tie_word_embeddings=True))


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def extra(name: str, *shape: int) -> Callable[[Any], Any]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def without(*names: str) -> Callable[[Any], Any]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(part in name for part in names)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *((without(name), f"1 missing: {name}") for name in (Q_PROJ, "lm_head.weight", "model.embed_tokens.weight")),
        (extra("model.layers.3.mlp.up_proj.weight", 2), "1 unknown: model.layers.3.mlp.up"),
        (extra("model.layers.00.mlp.up_proj.weight", 2), "1 unknown: model.layers.00.mlp.up"),
        (extra("model.layers.0.self_attn.q_proj.bias", 48), "1 unknown: .*q_proj.bias"),
        (extra(Q_PROJ, 47, 48), r"must be \[48, 48\], got \[47, 48\]"),
        (extra("model.norm.weight", 1, 48), r"must be \[48\], got \[1, 48\]"),
        (without("mlp"), "9 missing: .*; \\.\\.\\."),
        (without(""), "30 missing"),
    ],
)
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_tensors_that_do_not_fit_are_named(
    save: Callable[..., Path], edit: Callable[[Any], Any], message: str, quant_type: str | None
) -> None:
    with pytest.raises(InputError, match=message):
        load_decoder(edit_weights(save(), edit), quant_type=quant_type)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 98}, r"lm_head.weight must be \[98, 48\], got \[97, 48\]"),
        ({"num_hidden_layers": 4}, "9 missing: model.layers.3"),
        ({"num_hidden_layers": 2}, "9 unknown: model.layers.2"),
        ({"attention_bias": True}, "12 missing: model.layers.0.self_attn.k_proj.bias"),
        ({"num_key_value_heads": 1}, r"k_proj.weight must be \[12, 48\], got \[24, 48\]"),
        ({"intermediate_size": 85}, "of another shape"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    ],
)
def test_configs_that_do_not_fit_are_refused(save: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_decoder(edit_config(save(), **changes))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_refused_by_name(
    save: Callable[..., Path], bad: float, name: str, quant_type: str | None, dtype: torch.dtype
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = bad
        tensors[name] = tensors[name].to(dtype)

    with pytest.raises(InputError, match=name):
        load_decoder(edit_weights(save(), spoil), quant_type=quant_type)


def test_a_weight_too_large_for_fp16_is_refused(save: Callable[..., Path]) -> None:
    folder = edit_weights(save(), lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load_decoder(folder)
    with pytest.raises(InputError, match=r"model\.norm\.weight.*1e[+]06, too large for torch\.float16"):
        load_decoder(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("model", lambda path: None, "does not exist"),
        ("model", lambda path: path.write_text("x"), "is a file"),
        ("model", lambda path: path.mkdir(), "config.json"),
        ("model.bin", lambda path: path.write_bytes(b"x"), "can run code"),
    ],
)
def test_paths_that_are_no_model(tmp_path: Path, name: str, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(InputError, match=message):
        load_decoder(tmp_path / name)
    with pytest.raises(InputError, match="tokenizer.json" if message == "config.json" else message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quant_type": "nf5"}, InputError, "quant_type must be 'nf4' or 'fp4', got 'nf5'"),
        ({"dtype": torch.int8}, InputError, "dtype must be .* got torch.int8"),
        ({"device": "gpu"}, InputError, "got 'gpu'"),
        ({"device": "cuda"}, EnvironmentProblem, "no CUDA device"),
    ],
)
def test_impossible_arguments(
    arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        load_decoder("anywhere", **arguments)


@pytest.mark.parametrize("kind", ["tied", "gqa 1:1"])
def test_progress_is_told_after_each_tensor(save: Callable[..., Path], kind: str) -> None:
    folder, seen = save(kind), list[tuple[int, ...]]()
    load_decoder(folder, quant_type="nf4", progress=lambda *now: seen.append(now))
    count, size = len(load_file(folder / "model.safetensors")), (folder / "model.safetensors").stat().st_size
    assert [now[0] for now in seen] == list(range(1, count + 1)) and {now[1] for now in seen} == {count}
    assert seen == sorted(seen) and seen[-1][2:] == (size, size) and 0 < seen[0][2] < size


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: reads /proc/self/status")
def test_peak_is_the_model_and_about_one_tensor() -> None:
    """Loading into 4 bits, in a small run of `benchmarks.load_memory`."""
    command = [sys.executable, "-m", "benchmarks.load_memory", "--megabytes", "150"]
    run = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert 140e6 < result["checkpoint_bytes"] < 160e6
    # 40 MB for the allocator and the code tables; the whole checkpoint would be 150 MB, one fp32 copy 66
    assert result["peak_bytes"] < result["model_bytes"] + result["largest_tensor_bytes"] + 40e6, run.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_on_cuda_the_same_weights(save: Callable[..., Path], quant_type: str | None) -> None:
    folder = save("bias")
    here, there = (load_decoder(folder, quant_type=quant_type, device=device) for device in ("cpu", "cuda"))
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        assert b.is_cuda and torch.equal(a, b.cpu()), name
    torch.testing.assert_close(there(IDS.cuda()).cpu(), here(IDS), rtol=0, atol=1e-3)
    assert isinstance(there, Decoder)
