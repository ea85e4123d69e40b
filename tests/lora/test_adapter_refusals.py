"""Adapter files that are broken, foreign or hostile: each is refused with a reason, and the model is what it was."""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourbit.errors import InputError
from fourbit.lora.attach import attach
from fourbit.lora.config import LoRAConfig, pattern_key
from fourbit.lora.layer import adapters_of
from fourbit.lora.peft_config import MOST_KEYS, MOST_STEPS, most_steps
from fourbit.lora.peft_files import adapter_state, load_adapter, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = f"{PREFIX}mlp.up_proj.lora_A.weight", f"{PREFIX}mlp.up_proj.lora_B.weight"
Make = Callable[..., nn.ModuleDict]
Refuses = Callable[[Path, str], None]


@pytest.fixture
def refuses(base: Make) -> Refuses:
    """Checks that loading a folder ends in an InputError with some text and leaves the model as it was."""

    def check(folder: Path, message: str) -> None:
        model = base()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(InputError, match=message):
            load_adapter(model, folder)
        assert not adapters_of(model) and all(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    return check


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = dict(load_file(folder / WEIGHTS))
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


UP = f"{PREFIX}mlp.up_proj"
EIGHT = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: None}, r"1 missing: base_model\.model\.mlp\.up_proj\.lora_A\.weight\. Is this the base"),
        ({A: None, B: None}, r"2 missing: .*up_proj\.lora_A.*up_proj\.lora_B"),
        ({f"{PREFIX}lm_head.lora_A.weight": torch.zeros(2, 6)}, r"1 unknown.*lm_head\.lora_A"),
        ({f"{PREFIX}x.lora_A.weight": torch.zeros(2, 6)}, r"1 unknown.*\.x\.lora_A"),
        ({f"{UP}.lora_magnitude_vector": torch.ones(10)}, "unknown.*magnitude"),
        ({f"{UP}.lora_B.bias": torch.ones(10)}, r"unknown.*lora_B\.bias"),
        ({f"{PREFIX}embed.lora_embedding_A": torch.ones(2, 5)}, "unknown.*lora_embedding_A"),
        ({A: torch.zeros(3, 6)}, r"1 of another shape: .*lora_A\.weight must be \[2, 6\], got \[3, 6\]"),
        ({B: torch.zeros(20)}, r"lora_B\.weight must be \[10, 2\], got \[20\]"),
        ({A: torch.zeros(2, 6, dtype=torch.int8)}, r"up_proj\.lora_A\.weight' must hold floats.*got I8"),
        ({A: torch.zeros(2, 6).to(EIGHT)}, "must hold floats.*got F8_E4M3"),
        ({A: torch.full((2, 6), math.nan)}, r"up_proj\.lora_A\.weight' holds NaN, infinity"),
        ({B: torch.full((10, 2), math.inf)}, r"up_proj\.lora_B\.weight' holds NaN, infinity"),
        ({A.removeprefix(PREFIX): torch.zeros(2, 6)}, "mean the same tensor"),
        ({f"{PREFIX}lm_head.weight": torch.zeros(5, 6)}, r"lm_head\.weight' is a whole weight"),
        (dict.fromkeys([A, B, A.replace("up", "down"), B.replace("up", "down")]), "4 missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tensors: dict[str, Tensor | None], message: str, folder: Path, refuses: Refuses
) -> None:
    found = load_file(folder / WEIGHTS) | tensors
    save_file({key: tensor for key, tensor in found.items() if tensor is not None}, folder / WEIGHTS)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be one of LORA, VERA, IA3, got 'LOHA'"),
        ({"peft_type": None}, "peft_type must be one of LORA, VERA, IA3, got None"),
        ({"r": None}, "the key 'r' is missing"),
        ({"target_modules": None}, "the key 'target_modules' is missing"),
        ({"r": "8"}, "rank must be a whole number, got '8'"),
        ({"r": 0}, "rank must be"),
        ({"lora_alpha": -1}, "alpha must be above 0 and finite, got -1"),
        ({"lora_alpha": [16]}, "alpha must be"),
        ({"lora_dropout": 2}, "dropout must be"),
        ({"use_rslora": "yes"}, "rslora must be true or false, got 'yes'"),
        ({"rank_pattern": ["up_proj"]}, "rank_pattern must be a mapping"),
        ({"rank_pattern": {"up_proj": 2.5}}, "rank_pattern must be a mapping of"),
        ({"alpha_pattern": {"up(": 2}}, "no regular expression"),
        ({"target_modules": 7}, "target must be one of text, a list"),
        ({"target_modules": "up_proj("}, "no regular expression"),
        ({"target_modules": ["q_proj"]}, "names no layer of this model"),
        ({"layers_to_transform": [9]}, r"with layers_to_transform=\[9\] names no layer of this model"),
        ({"target_modules": ["up_proj"]}, r"2 unknown.*down_proj\.lora_A"),
        ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, "2 unknown"),
        ({"layers_to_transform": [0], "target_modules": ".*proj"}, "layers_to_transform goes with a list"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a whole number or a list of them, got '1'"),
        ({"layers_to_transform": [0], "layers_pattern": [3]}, "layers_pattern must be a name or a list"),
        ({"r": 3}, r"must be \[3, 6\], got \[2, 6\]"),
        ({"r": 10**12}, "rank must be at most 2,147,483,647, got 1000000000000"),
        ({"rank_pattern": {"up_proj": 1}}, r"must be \[1, 6\], got \[2, 6\]"),
        ({"bias": "all"}, "3 missing: .*lm_head.bias.*up_proj.base_layer.bias"),
        ({"bias": "some"}, "bias must be one of none, all or lora_only, got 'some'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' rewrites the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "rewrites the base"),
        ({"init_lora_weights": ["x"]}, "rewrites the base"),
        ({"use_dora": True}, "2 missing: .*lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_bias=True is a PEFT feature"),
        ({"modules_to_save": ["lm_head"]}, r"2 missing: .*lm_head\.bias"),
        ({"modules_to_save": ["head"]}, "modules_to_save entry 'head' matches no module. Nearest: lm_head"),
        ({"peft_type": "fourbit.Scale"}, "kind fourbit.Scale, and layer= makes LORA: give load_adapter the layer"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"trainable_token_indices": [1]}, "1 missing: .*embed.token_adapter.trainable_tokens_delta"),
        ({"trainable_token_indices": ["x"]}, "train_tokens must be a list of whole numbers or"),
        ({"target_parameters": ["w"]}, "target_parameters entry 'w' matches no parameter"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
        ({"a_feature_of_2030": {"on": True}}, r"a_feature_of_2030=\{'on': True\} is a PEFT feature"),
    ],
)
def test_configs_that_mean_something_else_are_refused(
    changes: dict[str, object], message: str, folder: Path, refuses: Refuses
) -> None:
    edit_config(folder, **changes)
    refuses(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b"[" * 200_000, "must be JSON: .*(nest|recursion)"),
        (b'{"r": 2, "r": 3}', "the key 'r' stands there twice"),
        (b'{"r": "\xff"}', "must be UTF-8 text"),
        (b"9" * 10_000, "must be JSON"),
        (b" " * ((8 << 20) + 1), "must be at most 8,388,608 bytes, got 8,388,609"),
    ],
    ids=["empty", "open", "list", "deep", "twice", "latin1", "digits", "huge"],
)
def test_broken_configs(text: bytes, message: str, folder: Path, refuses: Refuses) -> None:
    (folder / CONFIG).write_bytes(text)
    refuses(folder, message)


LIMITS = [
    ({"target_modules": r".*\.q_proj"}, ["0.q_proj", "1.q_proj"]),
    ({"target_modules": r"model\.layers\.1\.q_proj|model\.layers\.1\.v_proj"}, ["1.q_proj", "1.v_proj"]),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, ["0.q_proj"]),
    ({"target_modules": ["q_proj", "model.layers.1.v_proj"], "layers_to_transform": 0}, ["0.q_proj", "1.v_proj"]),
    ({"target_modules": ["v_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"}, ["1.v_proj"]),
    ({"target_modules": "all-linear", "exclude_modules": ".*layers.1.*"}, ["0.q_proj", "0.v_proj"]),
    ({"target_modules": ["v_proj", "q_proj"], "exclude_modules": r".*\.v_proj"}, ["0.q_proj", "1.q_proj"]),
]


@pytest.mark.parametrize(("settings", "meant"), LIMITS)
def test_tensors_beyond_the_layers_that_the_config_means(
    tree: Callable[[list[str]], nn.Module], tmp_path: Path, settings: dict[str, object], meant: list[str]
) -> None:
    """PEFT would leave out an extra layer, and start a missing one anew: either computes something else."""
    paths = [f"model.layers.{index}.{leaf}" for index in (0, 1) for leaf in ("q_proj", "v_proj")]
    meant = [f"model.layers.{name}" for name in meant]
    other = next(path for path in paths if path not in meant)
    for carried, message in ((meant, ""), ([*meant, other], "2 unknown"), (meant[1:] or [other], "2 missing")):
        model = tree(paths)
        attach(model, LoRAConfig(rank=1, target=carried))
        save_adapter(model, tmp_path)
        edit_config(tmp_path, **settings)
        with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
            assert load_adapter(tree(paths), tmp_path) == meant


def test_broken_weights(folder: Path, refuses: Refuses) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    broken = [whole[:cut] for cut in range(0, len(whole), len(whole) // 20)] + [whole + b"\0", b"\0" * 64, b"\xff" * 64]
    broken.append((1 << 62).to_bytes(8, "little") + whole[8:])
    for data in broken:
        (folder / WEIGHTS).write_bytes(data)
        refuses(folder, "is no valid safetensors file")


def test_missing_files(tmp_path: Path, folder: Path, refuses: Refuses) -> None:
    refuses(tmp_path / "absent", "is no folder")
    refuses(tmp_path, "holds no adapter_config.json")
    folder.rename(tmp_path / "default")
    refuses(tmp_path, "PEFT puts an adapter that has a name into a subfolder: try default")
    (tmp_path / "default" / WEIGHTS).rename(tmp_path / "default" / "adapter_model.bin")
    refuses(tmp_path / "default", r"holds no adapter_model\.safetensors\. Its adapter_model\.bin is a pickle")


def test_a_pickle_is_never_opened(tmp_path: Path, folder: Path, base: Make, refuses: Refuses) -> None:
    """Neither beside the weights nor in their place."""
    canary = tmp_path / "canary"
    bomb = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    (folder / "adapter_model.bin").write_bytes(bomb)
    load_adapter(base(), folder)
    (folder / WEIGHTS).write_bytes(bomb)
    refuses(folder, "is no valid safetensors file")
    (folder / WEIGHTS).unlink()
    refuses(folder, "is a pickle")
    assert not canary.exists()


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_only_regular_files_of_the_folder_itself(
    tmp_path: Path, name: str, folder: Path, base: Make, refuses: Refuses
) -> None:
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    file = folder / name
    file.unlink()
    file.symlink_to(elsewhere / name)
    refuses(folder, "is a link out of its folder")
    file.unlink()
    os.mkfifo(file)
    refuses(folder, "must be a regular file")
    file.unlink()
    file.mkdir()
    refuses(folder, "must be a regular file")
    file.rmdir()
    file.symlink_to("/dev/zero")
    refuses(folder, "is a link out of its folder")
    file.unlink()
    (elsewhere / name).rename(folder / "inside")
    file.symlink_to("inside")  # a link that stays in the folder is fine
    load_adapter(base(), folder)
    cache = tmp_path / "models--a--b"  # and so is one into the blob store of a Hugging Face cache
    snapshot = Path(shutil.copytree(folder, cache / "snapshots" / "1"))
    (cache / "blobs").mkdir()
    (snapshot / name).rename(cache / "blobs" / "0abc")
    (snapshot / name).symlink_to("../../blobs/0abc")
    load_adapter(base(), snapshot)


def test_a_file_is_compared_before_anything_is_made_for_it(
    folder: Path, adapted: Make, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what a config claims without tensors for it, and of what the model has already."""
    made: list[str] = []
    monkeypatch.setattr("fourbit.lora.peft_files.install", lambda *_, **__: made.append("attached"))
    edit_config(folder, rank_pattern={"up_proj": 5})
    refuses(folder, r"must be \[5, 6\], got \[2, 6\]")
    edit_config(folder, rank_pattern={"up_proj": 2**31 - 1})  # 51 GB
    refuses(folder, r"mlp\.up_proj\.lora_A\.weight must be \[2147483647, 6\], got \[2, 6\]")
    edit_config(folder, r=2**31 - 1, target_modules=["up_proj", "lm_head"])
    refuses(folder, r"lm_head\.lora_A\.weight|up_proj\.lora_A\.weight must be")
    edit_config(folder, r=2, target_modules=["up_proj", "down_proj"])
    edit_config(folder, rank_pattern={})
    load_adapter(adapted(seed=3), folder)
    assert not made


def test_patterns_made_to_hang(folder: Path, base: Make, adapted: Make, refuses: Refuses) -> None:
    """A target that cannot be trusted gives way to the tensors' own names; a rank or alpha pattern is refused."""
    hostile = "((m|l|p)+[a-z_.]*)*!"
    start, fresh = time.process_time(), base()
    edit_config(folder, target_modules=hostile)
    load_adapter(fresh, folder)
    wanted = adapter_state(adapted())
    assert all(torch.equal(value, wanted[key]) for key, value in adapter_state(fresh).items())
    for field in ("rank_pattern", "alpha_pattern"):
        edit_config(folder, **{"rank_pattern": {}, "alpha_pattern": {}, field: {hostile: 1}})
        refuses(folder, f"{field} may take very long to match, above all")
    edit_config(folder, rank_pattern={}, alpha_pattern={})
    edit_weights(folder, lambda tensors: tensors.pop(A))
    refuses(folder, "1 missing")
    assert time.process_time() - start < 5


def test_patterns_of_very_many_keys(folder: Path, base: Make, refuses: Refuses) -> None:
    keys = [f"model.layers.{index}.self_attn.q_proj" for index in range(MOST_KEYS + 1)]
    for field in ("rank_pattern", "alpha_pattern"):
        edit_config(folder, **{"rank_pattern": {}, "alpha_pattern": {}, field: dict.fromkeys(keys, 1)})
        refuses(folder, f"{field} must have at most 4,096 keys, got 4,097")
    most = [dict.fromkeys(keys[1:], 1), dict.fromkeys((f"^{key}" for key in keys[1:]), 1)]
    edit_config(folder, rank_pattern=most[0], alpha_pattern=most[1])
    load_adapter(base(), folder)  # all are compiled, and stay so
    start = time.process_time()
    assert not any(pattern_key(patterns, f"{NAME}{layer}") for layer in range(100) for patterns in most)
    assert time.process_time() - start < 5


NAME = "model.layers.11.self_attn.q_proj.model.layers.11.self_attn.q_proj"
HONEST = ["q_proj", "^model.layers.0.self_attn.q_proj", r"model\.layers\.(0|1|2)\.(self_attn|mlp)\.(q|k|v)_proj"]
HONEST += [r"layers\.\d+\.self_attn\.[qk]_proj", r".*layers\.1\.mlp\..*", r"a\)*b\+", "k_proj|v_proj", "(?:a|b)c", ""]
HOSTILE = ["(a+)+$", "(a|a)*!", r"(\w+\.?){2,}!", "(?:a|b|ab)+!", "(?x)(a+) # a comment\n +!", "(?#a comment)q_proj"]
HOSTILE += [
    "a|" * (MOST_STEPS // 64),
    "(.*)(.*)(.*)(.*)!",
    "a?" * 40 + "a" * 40,
    "(a|a)" * 40 + "!",
    "(?:.?){1,40}!",
    ".*" * 100,
]


def test_a_bound_on_the_steps_of_a_pattern() -> None:
    """Honest ones pass, those that could run without end do not, and the worst that passes is quick."""
    assert [pattern for pattern in HONEST if most_steps(pattern) > MOST_STEPS] == []
    assert [pattern for pattern in HOSTILE if most_steps(pattern) <= MOST_STEPS] == []
    start = time.monotonic()
    for pattern in (".*.*!", "[a-z]*.*!", "(.|a)" * 8 + ".*!", "(.|a)" * 14 + "!"):
        assert most_steps(pattern) <= MOST_STEPS
        assert pattern_key([pattern] * (MOST_STEPS // most_steps(pattern)), NAME) is None
        assert pattern_key([pattern], "a" * 64) is None
    assert time.monotonic() - start < 5
