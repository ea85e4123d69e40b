"""A base's identity: the same however it is loaded and wrapped, told apart from other forms of it and from others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.identity import BaseIdentity, base_identity
from fourbit.lora.quantize import quantize_

FORMS = {"none": None, "nf4": ("nf4", True), "nf4-nodq": ("nf4", False), "fp4": ("fp4", True)}


def small(seed=0, width=32, form="none", dtype=torch.float32, scale=1.0):
    torch.manual_seed(seed)
    block = {"up_proj": nn.Linear(width, 2 * width), "down_proj": nn.Linear(2 * width, width)}
    parts = {"embed": nn.Embedding(7, width), "norm": nn.LayerNorm(width), "mlp": nn.ModuleDict(block)}
    model = nn.ModuleDict(parts | {"lm_head": nn.Linear(width, 7, bias=False)}).to(torch.bfloat16)  # as files are
    model["lm_head"].weight = model["embed"].weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    if FORMS[form]:
        code, double = FORMS[form]
        quantize_(model, code, double_quant=double)
    return model.to(dtype)


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("form", FORMS)
def test_it_depends_on_neither_dtype_nor_adapters_nor_wrappers(form):
    model = small(form=form)
    known = base_identity(model)
    assert known.quant == form
    assert base_identity(small(form=form, dtype=torch.bfloat16)) == known
    assert base_identity(small(form=form, dtype=torch.float64)) == known
    attach(model, LoRAConfig(rank=2), dtype=torch.bfloat16)
    assert base_identity(model) == known
    for wrapped in (compiled(model), nn.DataParallel(model), compiled(nn.DataParallel(model))):
        assert base_identity(wrapped) == known
    model["mlp"]["up_proj"] = compiled(model["mlp"]["up_proj"])
    assert base_identity(model) == known


def test_a_float16_model_differs_from_none_that_it_may_be():
    known, half = base_identity(small()), base_identity(small(dtype=torch.float16))
    assert not half.is_other_base(known) and not half.difference(known)
    assert base_identity(small(1, dtype=torch.float16)).is_other_base(known)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([8, 24, 64]), st.sampled_from([*FORMS]), st.sampled_from([*FORMS]))
def test_forms_of_one_base_are_no_other_base_and_other_bases_are(seed, width, trained, used):
    known, here = base_identity(small(seed, width, trained)), base_identity(small(seed, width, used))
    assert not here.is_other_base(known)
    assert (here.difference(known) == "") == (trained == used)
    assert base_identity(small(seed + 100, width, used)).is_other_base(known)


def test_what_was_trained_further_is_told():
    known, model = base_identity(small(form="nf4")), small()
    with torch.no_grad():
        model["mlp"]["up_proj"].weight += 1e-2 * torch.randn(64, 32)  # as a merged adapter does: norms stay
    here = base_identity(quantize_(model))
    assert not here.is_other_base(known)
    assert "slightly other weights of this base" in here.difference(known)
    with torch.no_grad():
        model["norm"].weight += 0.01
    assert "slightly other weights" in base_identity(model).difference(here), "norms alone"
    assert base_identity(quantize_(small(100))).is_other_base(here)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_rounds_otherwise_is_no_other_base(form):
    """Float32 through float16 to bfloat16 is not float32 to bfloat16, in norms too."""

    def kept(*dtypes):
        torch.manual_seed(0)
        parts = {"up_proj": nn.Linear(64, 64), "norm": nn.LayerNorm(64)}
        nn.init.normal_(parts["norm"].weight, 1, 0.2)
        model = nn.ModuleDict(parts)
        for dtype in (*dtypes, torch.float32):
            model = model.to(dtype)
        return base_identity(quantize_(model, FORMS[form][0], double_quant=FORMS[form][1]) if FORMS[form] else model)

    known, here = kept(), kept(torch.float16)
    assert known.vectors != here.vectors and not here.is_other_base(known)
    assert "slightly other weights of this base" in here.difference(known)
    assert kept(torch.bfloat16).vectors == known.vectors


def test_a_block_size_of_its_own_is_named():
    assert base_identity(quantize_(small(), blocksize=128)).quant == "nf4 in blocks of 128"


def test_a_file_that_says_nothing_has_none(tmp_path):
    known = base_identity(small())
    for metadata, said in ((known.metadata(), known), ({}, None)):
        save_file({"a": torch.ones(1)}, tmp_path / "a", metadata | {"format": "pt"})
        assert BaseIdentity.read(tmp_path / "a") == said
