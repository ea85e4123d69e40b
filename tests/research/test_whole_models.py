"""Whole models on disk, dense or in 4 bits, of any class; transformers and bitsandbytes open them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as safetensors_load
from safetensors.torch import save_model as safetensors_save
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fourbit
from fourbit.errors import InputError, NumericError

IDS = torch.arange(24).view(2, 12) % 61
FORMS = {"nf4": {}, "nf4, one level": {"double_quant": False}, "fp4": {"quant_type": "fp4", "blocksize": 128}}


def llama(seed: int = 0, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attention_bias=True, **more)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(t, two[n]) and t.dtype == two[n].dtype for n, t in one.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_transformers_and_bitsandbytes_open_our_folder(form: dict[str, object], tmp_path: Path) -> None:
    ours = fourbit.quantize_(llama(), **form)
    fourbit.save_model(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    packed = {name: part for name, part in ours.named_modules() if isinstance(part, fourbit.NF4Linear)}
    assert len(packed) == 14
    for name, layer in packed.items():
        own = theirs.get_submodule(name).weight
        assert type(own).__name__ == "Params4bit"
        assert torch.equal(own.data.flatten(), layer.packed.flatten()), name
    assert type(theirs.lm_head) is nn.Linear
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-3)
    again = fourbit.load_model(llama(1), tmp_path)  # a dense module gets the file's layers
    assert same_tensors(again, ours) and torch.equal(logits(again), logits(ours))
    fourbit.save_model(again, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_we_open_theirs(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fourbit.load_model(llama(1), tmp_path / "theirs")
    name = "model.layers.1.mlp.up_proj"
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(ours.get_submodule(name).packed.flatten(), stored[f"{name}.weight"].flatten())
    assert torch.equal(ours.get_submodule(name).absmax.flatten(), stored[f"{name}.weight.absmax"].flatten())
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", [None, *FORMS.values()], ids=["dense", *FORMS])
def test_our_own_folders_open_as_they_are(tiny_folder: Path, tmp_path: Path, form: dict[str, object] | None) -> None:
    model, tokenizer = fourbit.load(tiny_folder, **({"quant_type": "nf4"} | form if form is not None else {}))
    fourbit.save_model(model, tmp_path, tokenizer, shard_bytes=40_000)
    again, _ = fourbit.load(tmp_path)
    assert same_tensors(again, model) and torch.equal(logits(again), logits(model))
    if form is None:
        return
    same, _ = fourbit.load(tmp_path, **{"quant_type": "nf4"} | form)
    assert same_tensors(same, model)
    with pytest.raises(InputError, match=r"is in 4 bits already, as .*: give quant_type=None"):
        fourbit.load(tmp_path, quant_type="nf4", blocksize=32)


class Net(nn.Module):
    """Tied weights, a buffer that is saved, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 64), nn.Linear(64, 61, bias=False)
        self.norm, self.inner = nn.BatchNorm1d(64), nn.Linear(64, 64)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.norm(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.inner(h))


@pytest.mark.parametrize("quantized", [False, True])
def test_any_module(tmp_path: Path, quantized: bool) -> None:
    model = Net()
    model(IDS)  # moves the running statistics
    model = fourbit.quantize_(model.bfloat16()) if quantized else model
    fourbit.save_model(model, tmp_path)
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")  # held once
    with torch.device("meta"):
        empty = Net()
    for fresh in (Net().bfloat16() if quantized else Net(), empty):
        assert fourbit.load_model(fresh, tmp_path) is fresh
        assert same_tensors(fresh, model) and fresh.head.weight is fresh.embed.weight
        assert torch.equal(logits(fresh.eval()), logits(model.eval()))
    assert isinstance(fresh.inner, fourbit.NF4Linear) == quantized


def test_a_classifier_of_transformers(tmp_path: Path) -> None:
    def bert(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
        return BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=1)).eval()

    model = fourbit.quantize_(bert(0))
    fourbit.save_model(model, tmp_path)
    assert torch.equal(logits(fourbit.load_model(bert(1), tmp_path)), logits(model))


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = fourbit.quantize_(llama())
    fourbit.save_model(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    whole = load_file(file)
    up = "model.layers.0.mlp.up_proj.weight"
    text = f"{up}.quant_state.bitsandbytes__nf4"
    other = torch.frombuffer(bytearray(json.dumps({"quant_type": "nf4"}).encode()), dtype=torch.uint8)
    for change, message in (
        ({up: None}, "is no 4-bit weight as bitsandbytes writes it"),
        ({up: whole[up][:-1].contiguous()}, "is no 4-bit weight as bitsandbytes writes it"),
        ({text: other}, "is no 4-bit weight as bitsandbytes writes it: 'shape'"),
        ({f"{up}.quant_map": torch.zeros(16)}, "of the codes of nf4"),
        ({f"{up}.absmax": whole[f"{up}.absmax"].float()}, "is no 4-bit weight"),
        ({"extra": torch.ones(1)}, "1 unknown: extra"),
        ({"lm_head.weight": None}, r"1 missing: lm_head\.weight"),
        ({"lm_head.weight": torch.ones(3)}, r"lm_head\.weight must be \[61, 64\], got \[3\]"),
    ):
        save_file({n: t for n, t in (whole | change).items() if t is not None}, file)
        fresh = llama(1)
        with pytest.raises(InputError, match=message):
            fourbit.load_model(fresh, tmp_path / "m")
        assert same_tensors(fresh, llama(1))
    save_file(whole, file)
    with torch.device("meta"):
        empty = llama()
    with pytest.raises(InputError, match=r"No file holds the buffers model\.rotary_emb\.inv_freq"):
        fourbit.load_model(empty, tmp_path / "m")
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    for act in (lambda: fourbit.save_model(model, tmp_path / "n"), lambda: fourbit.load_model(model, tmp_path / "m")):
        with pytest.raises(InputError, match=r"carries an adapter, which is no part of a whole model"):
            act()
    assert not (tmp_path / "n").exists()
    fourbit.remove_adapter(model, "default")  # as advised
    fourbit.save_model(model, tmp_path / "n")
    saved = load_file(tmp_path / "n" / "model.safetensors")
    assert saved.keys() == whole.keys() and all(torch.equal(tensor, saved[name]) for name, tensor in whole.items())
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"lm_head\.weight"):
        fourbit.save_model(model, tmp_path / "n")


def test_layers_of_gpt2_and_wrapped_models(tmp_path: Path) -> None:
    """Conv1D keeps its dense weight [in, out]; a 4-bit one is [out, in], as in every file."""

    def gpt2(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=64, n_layer=1, n_head=4)).eval()

    dense = gpt2(0)
    fourbit.save_model(torch.compile(dense, backend="eager"), tmp_path / "dense")
    model = fourbit.quantize_(gpt2(0))
    fourbit.save_model(model, tmp_path / "4bit")
    for folder, wanted in (("dense", dense), ("4bit", model)):
        fresh = gpt2(1)
        fourbit.load_model(torch.compile(fresh, backend="eager"), tmp_path / folder)
        assert same_tensors(fresh, wanted) and torch.equal(logits(fresh), logits(wanted))
    fresh = fourbit.quantize_(gpt2(1))  # bytes are replaced by bytes, and what the optimizer holds stays where it was
    place = fresh.lm_head.weight.data_ptr()
    assert (
        same_tensors(fourbit.load_model(fresh, tmp_path / "4bit"), model) and fresh.lm_head.weight.data_ptr() == place
    )


def test_a_layer_that_is_held_twice(tmp_path: Path) -> None:
    def twice() -> nn.Module:
        inner = nn.Linear(64, 64)
        return nn.Sequential(inner, nn.ReLU(), inner)

    model = fourbit.quantize_(twice())
    fourbit.save_model(model, tmp_path)
    assert not any(name.startswith("2.") for name in load_file(tmp_path / "model.safetensors"))
    with torch.device("meta"):
        empty = twice()
    for fresh in (twice(), empty):
        assert same_tensors(fourbit.load_model(fresh, tmp_path), model) and fresh[0] is fresh[2]


def test_a_bare_layer(tmp_path: Path) -> None:
    layer = fourbit.NF4Linear.from_weight(torch.randn(64, 64), torch.ones(64))
    fourbit.save_model(layer, tmp_path)
    for fresh in (nn.Linear(64, 64), fourbit.NF4Linear(64, 64)):
        assert same_tensors(fourbit.load_model(fresh, tmp_path), layer)


def test_a_head_that_is_no_longer_tied_is_said_to_be_none(tmp_path: Path, tiny_folder: Path) -> None:
    theirs = llama(tie_word_embeddings=True)
    ours, tokenizer = fourbit.load(tiny_folder)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    for model, more in ((theirs, ()), (ours, (tokenizer,))):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)  # as `merge` leaves it
        fourbit.save_model(model, tmp_path, *more)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
        assert torch.equal(again.get_input_embeddings().weight, model.model.embed_tokens.weight)
    assert torch.equal(logits(fourbit.load(tmp_path)[0]), logits(ours))


def test_values_that_the_module_cannot_hold(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    fits = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    for bias, message in (
        (torch.ones(2, dtype=torch.int64), r"'bias' holds torch\.int64, and this model has torch\.float16 there"),
        (torch.tensor([1.0, torch.nan]), r"'bias' holds NaN or infinity"),
        (torch.tensor([1.0, 1e6]), r"'bias' holds 1e\+06, too large for torch\.float16"),
    ):
        save_file(fits | {"bias": bias}, file)
        with pytest.raises(InputError, match=message):
            fourbit.load_model(nn.Linear(2, 2).half(), tmp_path)
    save_file(fits, file)
    layer = fourbit.load_model(nn.Linear(2, 2).half(), tmp_path)
    assert layer.weight.dtype == torch.float16 and bool((layer.weight == 1).all())


def test_every_tensor_owns_its_storage(tmp_path: Path, tiny_folder: Path) -> None:
    """So safetensors itself saves our models, with adapters and after steps of our optimizer."""
    model, _ = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    optimizer = fourbit.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
    safetensors_save(model, str(tmp_path / "all.safetensors"))
    fresh, _ = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.attach(fresh, fourbit.LoRAConfig(rank=2))
    safetensors_load(fresh, str(tmp_path / "all.safetensors"))
    assert same_tensors(fresh, model) and torch.equal(logits(fresh.eval()), logits(model.eval()))


def test_a_folder_without_a_tokenizer_says_how_it_gets_one(tmp_path: Path, tiny_folder: Path) -> None:
    model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.save_model(model, tmp_path)
    with pytest.raises(
        InputError,
        match=r"needs tokenizer\.json or tokenizer\.model, found none\..*save_model writes that of its third arg",
    ):
        fourbit.load(tmp_path)
    fourbit.save_model(model, tmp_path, tokenizer)
    assert same_tensors(fourbit.load(tmp_path)[0], model)
