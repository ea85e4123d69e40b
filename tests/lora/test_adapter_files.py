"""Adapter files: what is written is what is read back, to the byte, in any dtype and for any names."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import DiskError, InputError, NumericError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig
from fourbit.lora.identity import base_identity
from fourbit.lora.layer import adapter_layers, adapter_parameters, adapters_of
from fourbit.lora.peft_files import adapter_state, load_adapter, load_adapter_state, save_adapter
from fourbit.lora.quantize import quantize_

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A = f"{PREFIX}mlp.up_proj.lora_A.weight"
Make = Callable[..., nn.ModuleDict]


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = dict(load_file(folder / WEIGHTS))
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def randomised(model: nn.Module) -> nn.Module:
    """With LoRA of rank 1 on every layer, at random."""
    attach(model, LoRAConfig(rank=1))
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter)
    return model


def same_adapters(left: nn.Module, right: nn.Module) -> bool:
    a, b = adapter_state(left), adapter_state(right)
    scales = [{n: (m.rank, m.scale) for n, m in adapters_of(model).items()} for model in (left, right)]
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and scales[0] == scales[1]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"rslora": True, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 2.5}}]
)
def test_round_trip(tmp_path: Path, settings: dict[str, object], quantized: bool, base: Make, adapted: Make) -> None:
    model = adapted(**settings)
    save_adapter(model, tmp_path / "new" / "folder")
    fresh = base()
    if quantized:
        quantize_(fresh)
    told: list[str] = []
    assert load_adapter(fresh, tmp_path / "new" / "folder", tell=told.append) == ["mlp.up_proj", "mlp.down_proj"]
    assert len(told) == quantized
    assert same_adapters(model, fresh)
    trainable = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"mlp.{layer}.adapters.default.lora_{half}" for layer in ("up_proj", "down_proj") for half in "AB"
    }


def test_what_is_written(tmp_path: Path, adapted: Make) -> None:
    save_adapter(adapted(dropout=0.25, rank_pattern={"up_proj": 3}), tmp_path, base_model="some/base")
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **base_identity(adapted()).metadata()}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert shapes == {
        f"{PREFIX}mlp.down_proj.lora_A.weight": [2, 10],
        f"{PREFIX}mlp.down_proj.lora_B.weight": [6, 2],
        f"{PREFIX}mlp.up_proj.lora_A.weight": [3, 6],
        f"{PREFIX}mlp.up_proj.lora_B.weight": [10, 3],
    }
    raw = json.loads((tmp_path / CONFIG).read_text())
    wanted = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/base"}
    wanted |= {"lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": False, "alpha_pattern": {}, "bias": "none"}
    wanted |= {"target_modules": ["down_proj", "up_proj"], "fan_in_fan_out": False, "init_lora_weights": True}
    wanted |= {"inference_mode": True}
    ranks = {"r": raw.pop("r"), "rank_pattern": raw.pop("rank_pattern")}
    assert raw == {**wanted, "modules_to_save": None}
    assert ranks in ({"r": 2, "rank_pattern": {"up_proj": 3}}, {"r": 3, "rank_pattern": {"down_proj": 2}})


def test_equal_adapters_give_equal_bytes(tmp_path: Path, adapted: Make) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    save_adapter(adapted(rank_pattern={"up_proj": 3}), one)
    time.sleep(0.01)
    reordered = adapted(rank_pattern={"down_proj": 2}, rank=3)
    load_adapter_state(reordered, dict(reversed(adapter_state(adapted(rank_pattern={"up_proj": 3})).items())))
    save_adapter(reordered, two)
    save_adapter(reordered, two)  # over itself
    for name in (CONFIG, WEIGHTS):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrapped", [compiled, nn.DataParallel, lambda model: compiled(nn.DataParallel(model))])
def test_wrappers_leave_no_trace(tmp_path: Path, wrapped: Callable, base: Make, adapted: Make) -> None:
    plain, model = adapted(), adapted()
    save_adapter(plain, tmp_path / "plain")
    model["mlp"] = compiled(model["mlp"])
    save_adapter(wrapped(model), tmp_path / "wrapped")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    fresh = wrapped(base())
    assert load_adapter(fresh, tmp_path / "plain") == ["mlp.up_proj", "mlp.down_proj"]
    assert same_adapters(plain, fresh)
    assert attach(wrapped(base()), LoRAConfig(rank=2, target="mlp.up_proj")) == ["mlp.up_proj"]


@pytest.mark.parametrize(
    "prefix", [f"{PREFIX}_orig_mod.", f"_orig_mod.{PREFIX}", f"{PREFIX}module.", f"module.{PREFIX}"]
)
def test_files_with_wrappers_names_load(tmp_path: Path, prefix: str, base: Make, adapted: Make) -> None:
    model = adapted()
    save_adapter(model, tmp_path)
    save_file(
        {prefix + key.removeprefix(PREFIX): t for key, t in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS
    )
    fresh = base()
    load_adapter(fresh, tmp_path)
    assert same_adapters(model, fresh)


def test_another_base_is_refused_unless_forced(tmp_path: Path, base: Make, adapted: Make) -> None:
    save_adapter(adapted(), tmp_path)
    other = base()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    with pytest.raises(InputError, match=r"was trained on another base.*force=True"):
        load_adapter(other, tmp_path)
    assert not adapter_layers(other)
    with pytest.warns(UserWarning, match="goes on by force"):
        load_adapter(other, tmp_path, force=True)
    save_adapter(other, tmp_path)  # on the base that it was loaded on by force
    told: list[str] = []
    load_adapter(other, tmp_path, tell=told.append)
    assert not told


def test_the_base_s_name_leads_there_from_any_folder(
    tmp_path: Path, adapted: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for name, kept in (("m", str(tmp_path / "m")), ("hub/name", "hub/name"), ("m.gguf", None), ("", None)):
        save_adapter(adapted(), tmp_path / "a", base_model=name)
        assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype, base: Make, adapted: Make) -> None:
    model = adapted(dtype=dtype)
    save_adapter(model, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {dtype}
    for asked, got in ((torch.float32, torch.float32), (None, dtype), (torch.bfloat16, torch.bfloat16)):
        fresh = base()
        load_adapter(fresh, tmp_path, dtype=asked)
        assert {parameter.dtype for parameter in adapter_parameters(fresh).values()} == {got}
        for mine, theirs in zip(adapter_parameters(fresh).values(), adapter_parameters(model).values(), strict=True):
            assert torch.equal(mine, theirs.to(got))


words = ["lora", "lora_A", "lora_B", "weight", "lora_A_weight", "base_layer", "base_model", "model", "a", "0"]
segments = st.sampled_from(words)
paths = st.lists(segments, min_size=1, max_size=4).map(".".join)


@given(st.lists(paths, min_size=1, max_size=6), st.booleans())
def test_names_that_look_like_keys_survive(
    tree: Callable[[list[str]], nn.Module], tmp_path_factory: pytest.TempPathFactory, names: list[str], prefixed: bool
) -> None:
    """As tensors, with PEFT's prefix or without, and in files."""
    model, fresh, third = randomised(tree(names)), randomised(tree(names)), tree(names)
    state = {key if prefixed else key.removeprefix(PREFIX): value for key, value in adapter_state(model).items()}
    load_adapter_state(fresh, state)
    assert same_adapters(model, fresh)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    assert load_adapter(third, folder) == list(adapters_of(model))
    assert same_adapters(model, third)


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("names", [["base_model.model.a"], ["base_model.model.a", "a"], ["a", "base_model.model.b"]])
def test_a_path_that_starts_like_the_prefix(
    tree: Callable[[list[str]], nn.Module], tmp_path: Path, names: list[str], prefixed: bool
) -> None:
    model, fresh = randomised(tree(names)), tree(names)
    save_adapter(model, tmp_path)
    if not prefixed:
        state = load_file(tmp_path / WEIGHTS)
        save_file({key.removeprefix(PREFIX): value for key, value in state.items()}, tmp_path / WEIGHTS)
    load_adapter(fresh, tmp_path)
    assert same_adapters(model, fresh)


def test_a_costly_pattern_leaves_it_to_names_that_look_like_keys(
    tree: Callable[[list[str]], nn.Module], tmp_path: Path
) -> None:
    names = ["lora_A.q", "x.lora_B.lora_A", "x.lora_B.w"]
    model, fresh = tree(names), tree(names)
    attached = attach(model, LoRAConfig(rank=1, target=names[:2]))
    save_adapter(model, tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**raw, "target_modules": "(.*)*!"}))
    assert load_adapter(fresh, tmp_path) == attached
    assert same_adapters(model, fresh)


def test_keys_without_the_prefix_or_some_of_them(tmp_path: Path, base: Make, adapted: Make) -> None:
    model = adapted()
    for which in (slice(None), slice(0, 2)):
        save_adapter(model, tmp_path)

        def strip(tensors: dict[str, Tensor], which: slice = which) -> None:
            for key in sorted(tensors)[which]:
                tensors[key.removeprefix(PREFIX)] = tensors.pop(key)

        edit_weights(tmp_path, strip)
        fresh = base()
        load_adapter(fresh, tmp_path)
        assert same_adapters(model, fresh)


def test_a_copy_of_an_unchanged_base_weight_is_ignored(folder: Path, base: Make, adapted: Make) -> None:
    """PEFT saves the output head's own weight beside its adapter."""
    copies = {f"{PREFIX}lm_head.base_layer.weight": base()["lm_head"].weight.detach().clone()}
    copies[f"{PREFIX}embed.weight"] = base()["embed"].weight.detach().clone()
    edit_weights(folder, lambda tensors: tensors.update(copies))
    fresh = base()
    load_adapter(fresh, folder)
    assert same_adapters(adapted(), fresh)


def test_settings_without_effect_are_accepted(folder: Path, base: Make, adapted: Make) -> None:
    quiet = {"peft_version": "9.9", "auto_mapping": {"base_model_class": "X"}, "revision": "main", "loftq_config": {}}
    quiet |= {"megatron_core": "megatron.core", "qalora_group_size": 16, "use_dora": False, "new_list": []}
    quiet |= {"init_lora_weights": "gaussian", "ensure_weight_tying": False, "new_flag": False, "modules_to_save": []}
    empty = ("trainable_token_indices", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora")
    quiet |= dict.fromkeys((*empty, "exclude_modules", "layers_to_transform"))
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **quiet}))
    fresh = base()
    load_adapter(fresh, folder)
    assert same_adapters(adapted(), fresh)


def test_a_folder_reached_through_a_link_is_fine(tmp_path: Path, folder: Path, base: Make) -> None:
    (tmp_path / "link").symlink_to(folder)
    load_adapter(base(), tmp_path / "link")


def test_loading_onto_adapters_that_are_there(folder: Path, adapted: Make) -> None:
    model = adapted(seed=9, dtype=torch.bfloat16)
    load_adapter(model, folder)
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.bfloat16}
    for mine, theirs in zip(adapter_parameters(model).values(), adapter_parameters(adapted()).values(), strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("settings", "value", "message"),
    [
        ({"alpha": 7}, 0, "has rank 2, scale 3.5, the file rank 2, scale 3"),
        ({"rank": 3, "alpha": 9}, 0, "has rank 3, scale 3, the file rank 2, scale 3"),
        ({"target": ["up_proj"]}, 0, "on 'mlp.down_proj' the model has no adapter"),
        ({"target": "all-linear", "exclude": ["down_proj"]}, 0, "on 'mlp.down_proj' the model has no adapter"),
        ({"target": ["mlp.up_proj", "down_proj", "lm_head"]}, 0, "on 'lm_head' the model has .*, the file no adapter"),
        ({}, math.nan, "holds NaN"),
        ({"dtype": torch.float16}, 1e6, r"too large for torch\.float16"),
    ],
)
def test_adapters_that_are_there_and_differ_stay_what_they_were(
    folder: Path, adapted: Make, settings: dict[str, object], value: float, message: str
) -> None:
    edit_weights(folder, lambda tensors: tensors.update({A: torch.full((2, 6), float(value))}))
    model = adapted(**settings)
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    with pytest.raises(InputError, match=message):
        load_adapter(model, folder)
    assert all(torch.equal(value, before[key]) for key, value in adapter_state(model).items())


def test_load_adapter_state_is_strict_and_changes_nothing_on_error(adapted: Make) -> None:
    model = adapted()
    before = {key: value.clone() for key, value in adapter_state(model).items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    few = {key: value for key, value in state.items() if key != A}
    for broken in (few, {**state, "x": torch.zeros(1)}, {**state, A: torch.zeros(1)}):
        with pytest.raises(InputError, match="the adapter state: the adapter's tensors do not fit"):
            load_adapter_state(model, broken)
        assert all(torch.equal(value, before[key]) for key, value in adapter_state(model).items())
    load_adapter_state(model, state)
    assert all(not value.any() for value in adapter_state(model).values())


def test_adapter_state_is_live_and_sorted(adapted: Make) -> None:
    model = adapted()
    state = adapter_state(model)
    assert list(state) == sorted(state) and len(state) == 4
    adapters_of(model)["mlp.up_proj"].lora_A.data.zero_()
    assert not state[A].any() and not state[A].requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_adapter_is_not_saved(tmp_path: Path, bad: float, base: Make, adapted: Make) -> None:
    model = adapted()
    adapters_of(model)["mlp.up_proj"].lora_B.data[3, 1] = bad
    with pytest.raises(NumericError, match=r"mlp\.up_proj\.lora_B\.weight' holds NaN or infinity"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="carries no adapter 'default'"):
        save_adapter(base(), tmp_path)


def test_a_failed_save_leaves_the_old_files_and_no_litter(tmp_path: Path, folder: Path, adapted: Make) -> None:
    with pytest.raises(DiskError, match=r"could not write the adapter in .* It needs [\d,]+ bytes"):
        (tmp_path / "file").write_text("x")
        save_adapter(adapted(), tmp_path / "file" / "below")
    old = (folder / WEIGHTS).read_bytes()
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(InputError, match="is a link, a pipe, a device or a folder"):
        save_adapter(adapted(), folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == old
