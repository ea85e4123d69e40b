"""The derived tables against the published numbers, in fp32 and exactly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fourbit.kernels import codes
from fourbit.kernels.codes import code_for, dynamic_code, fp4_code, nf4_code, pair_table

PUBLISHED_NF4 = [  # QLoRA, arXiv 2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
PUBLISHED_FP4 = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25]  # magnitudes of codes 0..7


def test_nf4_is_the_published_table() -> None:
    assert nf4_code().tolist() == torch.tensor(PUBLISHED_NF4).tolist()


def test_fp4_is_the_published_table_twice_with_two_positive_zeros() -> None:
    magnitudes = torch.tensor(PUBLISHED_FP4)
    assert torch.equal(fp4_code(), torch.cat([magnitudes, -magnitudes]))
    assert not fp4_code()[[0, 8]].signbit().any()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bit_tables_equal_bitsandbytes(oracle: Any, quant_type: str) -> None:
    assert torch.equal(code_for(quant_type), oracle.functional.get_4bit_type(quant_type, device="cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_equal_bitsandbytes(oracle: Any, signed: bool) -> None:
    assert torch.equal(dynamic_code(signed), oracle.functional.create_dynamic_map(signed))


def test_dynamic_maps_hold_the_published_landmarks() -> None:
    signed, unsigned = dynamic_code(True), dynamic_code(False)
    for table in (signed, unsigned):
        assert table.shape == (256,) and table.dtype == torch.float32 and bool((table.diff() > 0).all())
    assert signed[127] == 0 and unsigned[0] == 0 and signed[255] == unsigned[255] == 1
    assert signed[0] == torch.tensor(-0.99296874) and torch.equal(signed[128:255], -signed[:127].flip(0))
    torch.testing.assert_close(signed[128], torch.tensor(5.5e-7), rtol=1e-6, atol=0)


def test_nf4_codes_are_used_about_equally_by_normal_weights() -> None:
    """What the quantiles are for: over blocks of 64 no code is starved (the end points mark a block's maximum)."""
    blocks = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    share = (scaled.view(-1, 1) - nf4_code()).abs().argmin(1).bincount(minlength=16) / scaled.numel()
    assert share.min() > 0.01 and share.max() < 0.12


def test_tables_are_made_once_and_an_unknown_type_is_refused() -> None:
    assert code_for("nf4") is code_for("nf4", "cpu") and dynamic_code() is dynamic_code(True)
    with pytest.raises(ValueError, match="quant_type must be 'nf4' or 'fp4', got 'int4'"):
        code_for("int4")


MAKES = [
    *(partial(code_for, name) for name in ("nf4", "fp4")),
    dynamic_code,
    partial(pair_table, "nf4", torch.bfloat16),
]


@pytest.mark.parametrize("make", MAKES)
def test_tables_do_not_depend_on_where_they_are_first_asked_for(make: Callable[[], Tensor]) -> None:
    """A loader may build its model on the meta device, with bf16 as default dtype, in inference mode."""
    want = make().clone()
    codes._kept.cache_clear()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.inference_mode():
            table = make()
    finally:
        torch.set_default_dtype(default)
    assert table.device.type == "cpu" and not table.is_inference() and torch.equal(table, want)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_entry_of_a_pair_table_is_a_byte_of_two_codes(quant_type: str, dtype: torch.dtype) -> None:
    """The high nibble's value in the low half, as a kernel takes it apart."""
    table = pair_table(quant_type, dtype)
    bits = 8 * dtype.itemsize
    half = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert table.shape == (256,) and table.dtype == {4: torch.int64, 2: torch.int32}[dtype.itemsize]
    byte = torch.arange(256)
    for part, nibble in ((table, byte >> 4), (table >> bits, byte & 15)):
        assert torch.equal(part.to(half).view(dtype), code_for(quant_type)[nibble].to(dtype))
    assert pair_table(quant_type, dtype, "cpu") is table
