"""Checkpoints of 8-bit floats: decoded on the way, with every kind of scale; others are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourbit.errors import InputError
from fourbit.models.float8 import check_quantization
from fourbit.models.hf import SINGLE, iter_tensors, tensor_shapes
from fourbit.models.load import load_decoder

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
SCALES: dict[str, Any] = {  # of a weight [out, in]: the scales' shape, what they are called, the config
    "one": ((), "weight_scale", COMPRESSED),
    "one, in a list": ((1,), "weight_scale", COMPRESSED),
    "a row": ((-1,), "weight_scale", COMPRESSED),
    "a row, as a column": ((-1, 1), "weight_scale", {"quant_method": "fbgemm_fp8"}),
    "a block": ((2, 3), "weight_scale_inv", DEEPSEEK),
    "a small block": ((3, 9), "weight_scale_inv", DEEPSEEK | {"weight_block_size": [64, 32]}),
}


def folder_of(path: Path, tensors: dict[str, Tensor], how: Any, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / SINGLE)
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return path


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", SCALES)
def test_weights_are_values_times_scales(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """A last block may be a part of one: 130 rows, 260 columns."""
    shape, name, how = SCALES[kind]
    torch.manual_seed(0)
    weight = torch.randn(130, 260).to(dtype)
    scale = torch.rand([130 if size == -1 else size for size in shape]) + 0.1
    block = how.get("weight_block_size", [128, 128])
    expected = torch.empty(130, 260)
    for i in range(130):
        for j in range(0, 260, 4):  # one scale for each: blocks are multiples of four
            place = {0: (), 1: (i % max(1, scale.numel()),), 2: (i // block[0], j // block[1])}[scale.ndim]
            own = scale.view(-1)[i] if scale.numel() == 130 else scale[place]
            expected[i, j : j + 4] = weight[i, j : j + 4].float() * own
    extra = {"a.input_scale": torch.ones(1), "k_scale": torch.ones(1), "norm.weight": torch.ones(3)}
    folder = folder_of(tmp_path, {"a.weight": weight, f"a.{name}": scale, **extra}, how)
    assert tensor_shapes(folder) == {"a.weight": (130, 260), "norm.weight": (3,)}
    found = dict(iter_tensors(folder))
    assert found.keys() == {"a.weight", "norm.weight"} and torch.equal(found["a.weight"], expected)


def test_values_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    for scale, name in ((torch.rand(2, 3), "weight_scale_inv"), (torch.rand(2, 3).bfloat16(), "weight_scale")):
        weight = torch.randn(256, 384).to(E4M3)
        theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
        folder = folder_of(tmp_path, {"a.weight": weight, f"a.{name}": scale}, DEEPSEEK)
        assert torch.equal(dict(iter_tensors(folder))["a.weight"], theirs)


@pytest.mark.parametrize(
    ("tensors", "how", "message"),
    [
        ({}, DEEPSEEK, r"model\.safetensors: tensor 'a\.weight' is of F8_E4M3, and needs one 'a\.weight_scale'"),
        ({"a.weight_scale": 1, "a.weight_scale_inv": 1}, DEEPSEEK, "needs one 'a.weight_scale'"),
        (
            {"a.weight_scale_inv": 7},
            DEEPSEEK,
            r"'a\.weight' has scales \[7\], and needs 1, \[8, 1\] or \[1, 1\] of them",
        ),
        ({"a.weight_scale": 1}, DEEPSEEK | {"weight_block_size": [0, 128]}, "weight_block_size of two whole numbers"),
        ({"a.weight_scale": 1}, {"quant_method": "gptq"}, "quantization_config must be absent.*'gptq'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, int], how: Any, message: str) -> None:
    held = {"a.weight": torch.zeros(8, 16).to(E4M3)} | {name: torch.ones(size) for name, size in tensors.items()}
    with pytest.raises(InputError, match=message):
        list(iter_tensors(folder_of(tmp_path, held, how)))


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "mxfp4", "torchao", "bitnet", "modelopt", "quark"])
def test_other_quantisations_are_refused_by_name(method: str) -> None:
    with pytest.raises(InputError, match=f"c: quantization_config must be .*{method}"):
        check_quantization({"quantization_config": {"quant_method": method}}, "c")
    with pytest.raises(InputError, match="pack-quantized"):
        check_quantization({"quantization_config": COMPRESSED | {"format": "pack-quantized"}}, "c")


def test_a_model_in_8_bits_loads_dense_and_quantises(tiny_folder: Path, tmp_path: Path) -> None:
    held = load_file(tiny_folder / SINGLE)
    config = json.loads((tiny_folder / "config.json").read_text())
    stored, dense = dict(held), dict(held)
    for name in [name for name in held if "proj" in name]:
        scale = held[name].float().abs().amax(1, keepdim=True) / 448
        stored[name], stored[f"{name}_scale"] = (held[name] / scale).to(E4M3), scale
        dense[name] = stored[name].float() * scale
    folder = folder_of(tmp_path / "f8", stored, COMPRESSED, **config)
    plain = folder_of(tmp_path / "plain", dense, None, **config)
    for form in ({}, {"quant_type": "nf4"}):
        ours, expected = load_decoder(folder, **form), load_decoder(plain, **form)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))
