"""Plans: forms by hand or under a budget, the 4-bit folder that comes of them, and what its report says."""

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourbit
from fourbit.errors import InputError
from fourbit.lora.linear4bit import NF4Embedding, NF4Linear
from fourbit.lora.quantize import Form, quantize_
from fourbit.models.load import load_model
from fourbit.models.plan import BESIDE, REPORT, Choice, choose, quantize_checkpoint, read_plan

UP, HEAD, EMBED = "model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens"


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heavy tails in one layer, which so loses most in 4 bits."""
    from shutil import copytree

    folder = copytree(tiny_folder, tmp_path_factory.mktemp("plan") / "base")
    held = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    held[f"{UP}.weight"] = torch.randn_like(held[f"{UP}.weight"]) ** 5
    save_file(held, folder / "model.safetensors")
    return folder


def test_a_plan_by_hand(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(
        json.dumps(
            {
                r"layers\.0\..*": None,
                "up_proj": {"quant_type": "fp4", "blocksize": 32, "double_quant": False},
                "lm_head": {},
            }
        )
    )
    plan = read_plan(tmp_path / "plan.json")
    assert plan == {r"layers\.0\..*": None, "up_proj": Form("fp4", 32, False), "lm_head": Form()}
    chosen = quantize_checkpoint(base, tmp_path / "q", Form(blocksize=128), plan=plan, dtype=torch.float32)
    model, _ = fourbit.load(tmp_path / "q")
    dense, _ = fourbit.load(base)
    for path, choice in chosen.items():
        layer, weight = model.get_submodule(path), dense.get_submodule(path).weight
        if path.startswith("model.layers.0."):
            assert choice.form is None and torch.equal(layer.weight, weight)
            continue
        form = Form("fp4", 32, False) if "up_proj" in path else Form() if path in (HEAD, EMBED) else Form(blocksize=128)
        assert choice.form == form == (layer.quant_type, layer.blocksize, layer.double_quant)
        error = (layer.dequantize() - weight).norm() / weight.norm()
        assert choice.relative_error == pytest.approx(error.item(), rel=1e-4)
        stored = sum(p.nbytes for p in layer.stored_parameters().values())
        assert stored <= choice.bytes <= stored + BESIDE
    report = json.loads((tmp_path / "q" / REPORT).read_text())
    assert report.keys() == chosen.keys() and report[UP]["relative_error"] == chosen[UP].relative_error
    again = quantize_checkpoint(base, tmp_path / "r", plan=read_plan(tmp_path / "q" / REPORT), dtype=torch.float32)
    assert again == chosen
    for file in ("model.safetensors", "config.json", REPORT):
        assert (tmp_path / "r" / file).read_bytes() == (tmp_path / "q" / file).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_embeddings_in_4_bits(
    oracle: Callable[..., Any], tiny_folder: Path, tmp_path: Path, tied: bool
) -> None:
    from shutil import copyfile

    oracle(hidden_size=64, num_attention_heads=4, tie_word_embeddings=tied, vocab_size=400).save_pretrained(
        tmp_path / "b"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(tiny_folder / name, tmp_path / "b" / name)
    plan: dict[str, Form | None] = {"lm_head": Form()} if tied else {"lm_head": Form(), "embed_tokens": Form("fp4", 32)}
    quantize_checkpoint(tmp_path / "b", tmp_path / "q", plan=plan)
    model, _ = fourbit.load(tmp_path / "q")
    assert isinstance(model.lm_head, NF4Linear) and isinstance(model.model.embed_tokens, NF4Embedding)
    assert (model.lm_head.packed is model.model.embed_tokens.packed) == tied == model.spec.tie_word_embeddings
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found = model(ids)
        torch.testing.assert_close(found, fourbit.dequantize(model)(ids), rtol=1e-4, atol=1e-4)


def test_a_budget_is_kept_and_used_where_it_helps_most(base: Path, tmp_path: Path) -> None:
    least = quantize_checkpoint(base, tmp_path / "256", Form(blocksize=256), dtype=torch.float32)
    whole = size(tmp_path / "256")
    worst = max(least, key=lambda path: least[path].relative_error)
    assert worst == UP
    seen = [least]
    for more in (25_000, 45_000, 90_000):
        folder = tmp_path / str(more)
        seen.append(quantize_checkpoint(base, folder, budget=whole + more, dtype=torch.float32))
        assert size(folder) <= whole + more
        assert sum(c.loss for c in seen[-1].values()) <= sum(c.loss for c in seen[-2].values())
    assert seen[1][UP].bytes > least[UP].bytes
    plan = {"up_proj": Form("fp4", 4096)}  # what a plan names keeps its form
    held = quantize_checkpoint(base, tmp_path / "held", plan=plan, budget=whole + 90_000, dtype=torch.float32)
    assert held[UP].form == Form("fp4", 4096) and not (tmp_path / "no").exists()
    with pytest.raises(InputError, match=r"budget must be at least [0-9,]+ bytes, .* got 1,000") as error:
        quantize_checkpoint(base, tmp_path / "no", budget=1000, dtype=torch.float32)
    fewest = int(str(error.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    quantize_checkpoint(base, tmp_path / "fewest", budget=fewest, dtype=torch.float32)
    assert size(tmp_path / "fewest") <= fewest  # the file as the disk has it, its header too
    assert not (tmp_path / "no").exists()


def test_a_tied_head_that_the_file_has_too_takes_no_bytes(base: Path, tmp_path: Path) -> None:
    """Where it is the embedding, in the dtype that is written; another one does."""
    least, held = list[str](), load_file(base / "model.safetensors")
    for name, head in (("one", {}), ("both", {f"{HEAD}.weight": 1.0}), ("other", {f"{HEAD}.weight": 2.0})):
        shutil.copytree(base, tmp_path / name)
        save_file(
            held | {own: held[f"{EMBED}.weight"] * by for own, by in head.items()},
            tmp_path / name / "model.safetensors",
        )
        with pytest.raises(InputError) as error:
            quantize_checkpoint(tmp_path / name, tmp_path / "q", budget=1000)
        least.append(str(error.value))
    assert least[0] == least[1] != least[2]


def test_choices_are_the_best_under_many_budgets() -> None:
    """Against all combinations: never more than one layer's step of error above the best, and exact at hull budgets."""
    torch.manual_seed(0)
    for trial in range(20):
        choices = {}
        for path in "abc":
            sizes, errors = (
                torch.randint(1, 100, (4,)).sort().values.tolist(),
                torch.rand(4).sort().values.flip(0).tolist(),
            )
            choices[path] = [Choice("nf4", 64, True, s, e, 100) for s, e in zip(sizes, errors, strict=True)]
        for budget in range(sum(min(c.bytes for c in own) for own in choices.values()), 300, 7):
            found = choose(choices, budget)
            assert found == choose(dict(reversed(choices.items())), budget), trial
            fits = [some for some in product(*choices.values()) if sum(c.bytes for c in some) <= budget]
            best = min(sum(c.loss for c in some) for some in fits)
            step = max(own[0].loss - own[-1].loss for own in choices.values())
            assert sum(c.bytes for c in found.values()) <= budget
            assert best - 1e-9 <= sum(c.loss for c in found.values()) <= best + step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"up_proj": {"bits": 4}}', "plan.json: 'up_proj': unknown setting 'bits'|'bits'"),
        ('{"up_proj": 4}', "'up_proj'"),
        ('{"up_proj": {"quant_type": "int4"}}', "quant_type must be one of"),
        ('{"up_proj": {"blocksize": 48}}', "blocksize must be a power of two"),
        ('{"(": null}', r"plan.json: a key.*regular expression"),
        ('{"nope_proj": null}', r"plan key 'nope_proj' matches none of the .* layers"),
        ('{"up_proj": null, "up_proj": {}}', "stands there twice"),
        ('{"embed_tokens": {}, "lm_head": null}', "'lm_head' shares its weight with .*embed_tokens'.* another form"),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_bad_plan_is_one_clear_error(tiny_folder: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=message):
        quantize_checkpoint(tiny_folder, tmp_path / "q", plan=read_plan(tmp_path / "plan.json"))
    assert not (tmp_path / "q").exists()


def test_weights_that_lie_transposed(tiny_folder: Path, tmp_path: Path) -> None:
    """GPT-2's linear layers are [in, out] in files: they are quantised as `quantize_` does it, the square ones too."""
    from shutil import copyfile

    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=1)
    ).eval()
    gpt2.save_pretrained(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copyfile(tiny_folder / name, tmp_path / "b" / name)
    chosen = quantize_checkpoint(tmp_path / "b", tmp_path / "q", dtype=torch.float32)
    weight = gpt2.transformer.h[0].attn.c_proj.weight.detach().clone()
    quantize_(gpt2)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        for model in (fourbit.load(tmp_path / "q")[0], fourbit.load(tmp_path / "b", quant_type="nf4")[0]):
            assert torch.equal(model(ids), gpt2(ids).logits)
        empty = quantize_(GPT2LMHeadModel(gpt2.config)).eval()  # takes a file's dense weights, and its 4-bit ones
        assert torch.equal(load_model(empty, tmp_path / "b")(ids).logits, gpt2(ids).logits)
        for _ in range(2):
            assert torch.equal(load_model(empty, tmp_path / "q")(ids).logits, gpt2(ids).logits)
        assert torch.equal(load_model(empty, tmp_path / "b")(ids).logits, gpt2(ids).logits)
        model, tokenizer = fourbit.load(tmp_path / "q")
        fourbit.save_model(fourbit.dequantize(model), tmp_path / "dense", tokenizer)
        dense = GPT2LMHeadModel.from_pretrained(tmp_path / "dense", dtype=torch.float32)
        torch.testing.assert_close(dense(ids).logits, gpt2(ids).logits)
    error = (gpt2.transformer.h[0].attn.c_proj.dequantize().t() - weight).norm() / weight.norm()
    assert chosen["transformer.h.0.attn.c_proj"].relative_error == pytest.approx(error.item(), rel=1e-4)


def test_what_cannot_be_quantised_is_refused(base: Path, tmp_path: Path) -> None:
    quantize_checkpoint(base, tmp_path / "q")
    with pytest.raises(InputError, match="is in 4 bits already: give what it was made from"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "r")
    with pytest.raises(InputError, match="the folder"):
        quantize_checkpoint(base, base)
    broken = load_file(base / "model.safetensors")
    broken[f"{UP}.weight"][0, 0] = torch.nan
    (tmp_path / "b").mkdir()
    for file in base.iterdir():
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    save_file(broken, tmp_path / "b" / "model.safetensors")
    with pytest.raises(InputError, match=rf"'{UP}\.weight'.* must be finite"):
        quantize_checkpoint(tmp_path / "b", tmp_path / "r")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [None, 330_000])
def test_transformers_and_bitsandbytes_open_mixed_folders(base: Path, tmp_path: Path, budget: int | None) -> None:
    from transformers import AutoModelForCausalLM

    plan = {"down_proj": Form("nf4", 32, False), r"layers\.0\.self_attn\.q_proj": None, "o_proj": Form("fp4", 128)}
    quantize_checkpoint(base, tmp_path, plan=plan, budget=budget, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map={"": "cpu"})
    ours, _ = fourbit.load(tmp_path)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-3)
    for path, part in ours.named_modules():
        if isinstance(part, NF4Linear):
            state = theirs.get_submodule(path).weight.quant_state
            assert (state.quant_type, state.blocksize, state.nested) == (
                part.quant_type,
                part.blocksize,
                part.double_quant,
            )
