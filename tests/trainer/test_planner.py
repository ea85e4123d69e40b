"""Forecasts of memory beside what real steps of the same models keep."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.cli.main import give_memory_back, main
from fourbit.data.batch import Encoded, Example, pack
from fourbit.lora.attach import KINDS
from fourbit.models.decoder import Decoder
from fourbit.models.foreign import as_causal_lm
from fourbit.models.spec import Spec
from fourbit.trainer import heard, planner
from fourbit.trainer.loop import cross_entropy
from fourbit.trainer.planner import Case
from fourbit.trainer.step import Sums

SPEC = Spec(301, 48, 96, 5, 4, 2, 12)
LENGTHS = (70, 41, 96)


class Alive(TorchDispatchMode):
    """Bytes of storages that ops have made and that are alive."""

    def __init__(self, there: list[Any]) -> None:
        super().__init__()
        self.sizes = {x.untyped_storage()._cdata: 0 for x in there if isinstance(x, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(made):
            if isinstance(x, Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes()
                finalize(storage, self.sizes.pop, key)
        return made


def model_of(quant: str | None = None, full: bool = False, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SPEC).to(dtype)
    if quant:
        fourbit.quantize_(model, quant)
    if full:
        model.requires_grad_()
    else:
        fourbit.attach(model, fourbit.LoRAConfig(rank=4))
    return model.train()


def case_of(model: Any, **options: Any) -> Case:
    rows = [Encoded([3 + k] * n, [i >= n // 2 for i in range(n)]) for k, n in enumerate(LENGTHS)]  # nothing in common
    batch = pack([(i, Example((row,))) for i, row in enumerate(rows)])
    return Case(model, batch, fourbit.SFTConfig(out="none", **options), sizes=LENGTHS)


def kept(model: Any, batch: Any) -> int:
    """What a real forward pass keeps for backward, of storages that are alive after it."""
    with Alive([*model.parameters(), *model.buffers(), *vars(batch).values()]) as alive:
        loss = cross_entropy(model, batch).loss
        found = sum(alive.sizes.values())
    loss.backward()
    model.zero_grad()
    return found


@pytest.mark.parametrize("keep", ["all", "products", "input"])
@pytest.mark.parametrize("how", [{"quant": "nf4"}, {}, {"full": True}, {"dtype": torch.bfloat16}])
def test_what_a_layer_keeps_is_what_a_step_keeps(how: dict[str, Any], keep: Any) -> None:
    model = model_of(**how)
    case = case_of(model)
    few, more = (case._step(keep, n)[1] for n in (2, 3))
    model.checkpointing = keep
    kept(model, case.batch)  # tables that are made once
    measured = kept(model, case.batch)
    assert measured == pytest.approx(few + 3 * (more - few), rel=0.02)
    assert case.forecast(keep).layer == more - few


@pytest.mark.parametrize("how", [{"quant": "nf4"}, {"full": True}])
def test_layers_that_were_not_traced_take_what_those_do_that_were(
    how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = case_of(model_of(**how)).forecast()
    monkeypatch.setattr(planner, "FEW", (98, 99))
    whole = case_of(model_of(**how)).forecast()
    assert few.flops == pytest.approx(whole.flops)
    assert few.peak == pytest.approx(whole.peak, rel=0.01)
    tensors = [*model_of(**how).parameters()]
    assert sum(few.parts[p] for p in ("base", "scales", "adapter")) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("apart", [False, True])
def test_two_passes_of_which_few_layers_hide_the_second(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    """Of few layers the head of the first pass takes most, of many the end of the second, beside the first one's graph
    or, as PPO's, after it."""

    def twice(model: Any, batch: Any) -> Any:
        found = cross_entropy(model, batch)
        again = lambda: model.hidden(batch.input_ids, batch.position_ids, batch.spans).square().mean()
        return found._replace(rest=lambda: Sums(again())) if apart else found._replace(loss=found.loss + again())

    spec = replace(SPEC, vocab_size=1501, num_hidden_layers=12)
    monkeypatch.setattr(sys.modules[__name__], "SPEC", spec)
    make = lambda: replace(case_of(model_of("nf4")), sums=twice).forecast()
    few = make()
    monkeypatch.setattr(planner, "FEW", (98, 99))
    whole = make()
    assert few.parts["activations"] == pytest.approx(whole.parts["activations"], rel=0.02)
    assert few.peak == pytest.approx(whole.peak, rel=0.02)


MIXTURE = replace(SPEC, num_experts=4, num_experts_per_tok=2)


def decoder_of(spec: Spec) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(spec)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("spec", [SPEC, MIXTURE], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", [*KINDS, "full"])
def test_every_kind_of_adapter_and_of_layer_is_foreseen(kind: str, spec: Spec, device: str) -> None:
    """Of five layers, which a forecast of fewer stands for."""
    for quant in {"lora": ("nf4", None), "full": (None,)}.get(kind, ("nf4",)):
        model = decoder_of(spec)
        if quant:
            fourbit.quantize_(model, quant)
        if kind != "full":
            rank = {} if kind == "ia3" else {"rank": 4}
            fourbit.attach(model, fourbit.LoRAConfig(kind=kind, target="all-linear", **rank))
        case = replace(case_of(model.train()), device=device)
        assert case.forecast("input" if quant else "products").peak > 0


def test_experts_are_foreseen_as_if_each_had_as_many_tokens() -> None:
    model = decoder_of(MIXTURE)
    fourbit.attach(model, fourbit.LoRAConfig(rank=4))
    case = case_of(model.train())
    assert kept(model, case.batch) == pytest.approx(case._step("products", None)[1], rel=0.05)


def test_a_forecast_that_fails_costs_no_run(tiny_folder, rows, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]  # fixtures
    def fail(*args: Any) -> None:
        raise NotImplementedError("no such kernel on meta")

    model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=2))
    config = fourbit.SFTConfig(out=str(tmp_path / "run"), steps=1)
    trainer = fourbit.SFTTrainer(model, tokenizer, train=rows, config=config)
    monkeypatch.setattr("fourbit.trainer.fit.memory_free", lambda device: 1 << 20)
    monkeypatch.setattr(Case, "forecast", fail)
    assert trainer.train(display=None).steps == 1
    assert trainer.foreseen == "memory: not foreseen (NotImplementedError: no such kernel on meta)"
    assert trainer.foreseen_bytes() == 0


def test_of_a_model_of_transformers_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=301, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = as_causal_lm(transformers.LlamaForCausalLM(config))
    fourbit.attach(model, fourbit.LoRAConfig(rank=4))
    case = case_of(model.train())
    assert case.layers == 1
    assert kept(model, case.batch) == pytest.approx(case._step("products", None)[1], rel=0.05)


@pytest.mark.parametrize(("keep", "device"), [("input", "cpu"), ("products", "cuda"), ("host", "cuda")])
def test_a_case_takes_the_same_bytes_each_time_and_never_less_than_none(keep: Any, device: str) -> None:
    model = model_of("nf4")
    one, two = (replace(case_of(model), device=device, _found={}).forecast(keep) for _ in range(2))
    assert one == two
    assert min(size for parts in one.phases.values() for size in parts.values()) >= 0
    for phase in ("forward", "backward"):
        assert one.phases[phase]["activations"] > 0
    assert one.phases["update"]["activations"] < one.phases["forward"]["activations"]


def test_as_few_layers_as_needed_run_again() -> None:
    case = case_of(model_of("nf4"))
    rich, lean = case.forecast("products"), case.forecast("input")
    room = (rich.beside + 2 * lean.beside) // 3
    words = case.words(room)
    again = words.count("input")
    assert 0 < again < case.layers and words == ["input"] * again + ["products"] * (case.layers - again)
    assert case.mixed(words).beside <= room
    assert case.mixed(["input"] * (again - 1) + ["products"] * (case.layers - again + 1)).beside > room
    assert case.words(rich.beside) == ["products"] * case.layers
    assert case.words(0) == ["input"] * case.layers
    assert set(Case(case.model, case.batch, case.config, device="cuda", sizes=LENGTHS).words(0)) == {"host"}


@pytest.mark.slow
def test_a_long_text_of_an_8b_model_fits_24_gb() -> None:
    """32,768 tokens in one row: with layers' inputs on the card, and within 12 GB where they wait in host memory."""
    with torch.device("meta"):
        model = Decoder(Spec(128256, 4096, 14336, 32, 32, 8, 128)).to(torch.bfloat16)
    fourbit.quantize_(model, "nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=16))
    row, config = Encoded([3] * 32768, [i >= 16384 for i in range(32768)]), fourbit.SFTConfig(out="none")
    case = Case(model, pack([(0, Example((row,)))]), config, device="cuda", sizes=(32768,))
    assert case.forecast("products").peak > 90e9 and case.forecast("host").peak < 12e9
    words = case.words(24 * 10**9 - case.forecast("host").peak + case.forecast("host").beside)
    assert case.mixed(words).peak < 24e9 and {*words} == {"products", "input"}


def test_every_change_that_is_named_saves_about_what_is_said() -> None:
    case = case_of(model_of(full=True), full=True)
    levers = case.levers(["products"] * 5)
    assert [*levers.values()] == sorted(levers.values(), reverse=True)
    ways = case.ways(["products"] * 5)
    assert [*ways][:2] == ["", "optimizer=adamw8bit"] and ways[""] == case.forecast().peak == max(ways.values())
    assert [*ways][-1] == "checkpointing=on micro_batch=1 optimizer=adamw8bit"
    assert ways["checkpointing=on"] == case.forecast("input").peak
    eighth = case_of(model_of(full=True), full=True, optimizer="adamw8bit").forecast("products")
    saved = case.forecast("products").parts["optimizer"] - eighth.parts["optimizer"]
    assert levers["optimizer=adamw8bit"] == pytest.approx(saved, rel=0.5)  # small tensors keep 32 bits


@contextmanager
def free(size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr("fourbit.trainer.fit.memory_free", lambda device: size)
        yield


def test_a_run_that_may_not_fit_recomputes_in_smaller_passes_and_says_so(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=4))
    config = fourbit.SFTConfig(out=str(tmp_path / "run"), steps=1)
    trainer = fourbit.SFTTrainer(model, tokenizer, train=rows, config=config)
    assert trainer.recomputes() == "products" and not trainer.foreseen
    before = trainer.token_budget
    with free(10, monkeypatch):
        assert trainer.recomputes() == ["input", "input"]
    assert trainer.token_budget < before and "may not fit" in trainer.foreseen
    assert max(case_sizes := trainer.case().sizes) <= 2 * trainer.token_budget and case_sizes


def test_a_large_layer_is_dense_for_a_moment_while_it_is_loaded() -> None:
    dense = 2 * SPEC.hidden_size * SPEC.intermediate_size * 4  # in fp32, and the next is read beside it
    case = case_of(model_of("nf4"))
    loading = case.forecast().phases["loading"]
    assert loading["base"] == case.forecast().parts["base"] + dense and not loading["activations"]
    assert case_of(model_of()).forecast().phases["loading"]["base"] == case_of(model_of()).forecast().parts["base"]


def test_layers_run_again_before_state_waits_and_its_pages_get_what_is_left(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "PAGE_BYTES", 1024)
    model, tokenizer = fourbit.load(tiny_folder, quant_type=None)
    config = fourbit.SFTConfig(out=str(tmp_path / "run"), steps=1, full=True, optimizer="paged-adamw")
    trainer: Any = fourbit.SFTTrainer(model, tokenizer, train=rows, config=config)
    trainer.device = torch.device("cuda")  # as the planner sees it; nothing runs there
    case, state = trainer.case(), 8 * sum(p.numel() for p in model.parameters())
    rich, lean = (case.forecast(word).beside - 2048 for word in ("products", "host"))
    for room, words, cap in ((rich + state, {"products"}, state), (lean + state, {"host"}, state),
                             (lean + state // 2, {"host"}, state // 2)):  # fmt: skip
        with free(-(-room * 5 // 4), monkeypatch):
            found = trainer.recomputes()
        assert {*found} == words or words == {"host"}, (room, found)
        assert trainer.run.optimizer.cap >= cap - 8
    assert trainer.run.optimizer.cap < state


def test_tokens_of_a_step_are_those_that_it_runs(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "alike.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": "the same long beginning " * 5 + str(i), "completion": "yes"}) + "\n"
            for i in range(16)
        )
    )
    model, tokenizer = fourbit.load(tiny_folder, quant_type="nf4")
    fourbit.attach(model, fourbit.LoRAConfig(rank=4))
    trainer = fourbit.SFTTrainer(model, tokenizer, train=data, config=fourbit.SFTConfig(out=str(tmp_path / "run")))
    whole = sum(len(example.parts[0].ids) for example in trainer.train_set.examples) / 2
    foretold = trainer.tokens_a_step()
    result = trainer.train(display=None)
    assert foretold == result.tokens / result.steps < whole / 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_peak_is_told_apart_from_what_was_there_before() -> None:
    before = torch.ones(64 << 20)  # 256 MiB
    del before
    peak, passing = planner.peak_from_now(torch.device("cpu")), torch.ones(16 << 20)
    del passing
    assert peak() == pytest.approx(64 << 20, rel=0.1)


def test_a_run_ends_with_its_peak_beside_what_was_foreseen(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = list[int]()
    monkeypatch.setattr("fourbit.cli.main.give_memory_back", told.append)
    common = ["sft", "--model", str(tiny_folder), "--data", str(rows), "--steps", "1", "--rank", "4"]
    assert main([*common, "--out", str(tmp_path / "a"), "--checkpointing", "on"]) == 0 and not told
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))
    assert re.fullmatch(r"memory +\d+\.\d\d GiB beside the weights at the peak, 0\.\d\d foreseen", line)
    monkeypatch.setattr("fourbit.cli.main.OURS", True)
    assert main([*common, "--out", str(tmp_path / "b"), "--checkpointing", "products", "--json"]) == 0 and not told
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["peak_bytes"] > 0 and found["foreseen_bytes"] > planner.FRAMEWORK["cpu"]
    assert main([*common, "--out", str(tmp_path / "c"), "--checkpointing", "on"]) == 0 and told == [heard.MAPPED[1]]
    assert inspect.signature(give_memory_back).parameters["size"].default == heard.MAPPED[0]


def test_plan_and_dry_run_print_it_and_write_nothing(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(tiny_folder), "--data", str(rows), "--out", str(tmp_path / "run"), "--json"]
    assert main(["plan", *common, "--memory", "24GiB", "--flops", "1e9"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert main(["sft", *common, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"] == planned["parts"]
    assert planned["peak_bytes"] == sum(planned["parts"].values()) and planned["fits"]["8 GiB"] == "as it is"
    assert planned["seconds"] > 0 and not (tmp_path / "run").exists()
    assert main(["plan", "--model", str(tiny_folder), "--device", "cuda", "--max-length", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["framework"] == planner.FRAMEWORK["cuda"]
    assert main(["plan", *common, "--memory", "much"]) == 2
    assert "24GiB" in capsys.readouterr().err


def test_the_other_trainings_foresee_and_write_nothing(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    made = ({"prompt": f"say {i}", "chosen": "yes " * i, "rejected": "no " * (i + 2)} for i in range(1, 13))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in made))
    common = ["--model", str(tiny_folder), "--out", str(tmp_path / "run"), "--rank", "4", "--dry-run", "--json"]
    teacher = ["--teacher", str(tiny_folder), "--sft-weight", "0.5"]
    for words in (
        ["dpo"],
        ["dpo", "--loss", "simpo"],
        ["reward"],
        ["distill", *teacher],
        ["distill", *teacher, "--teacher-quant", "none"],
    ):
        data = rows if words[0] == "distill" else pairs
        assert main([*words, "--data", str(data), *common]) == 0, words
        found = json.loads(capsys.readouterr().out)["parts"]
        assert found["activations"] > 0 and found["adapter"] > 0 and not (tmp_path / "run").exists(), words


def test_fake_tensors_do_not_outlive_a_forecast() -> None:
    model = model_of("nf4")
    case_of(model).forecast()
    assert all(type(p) is nn.Parameter for p in model.parameters())


aten = torch.ops.aten
ASKED: list[tuple[Any, Any]] = [
    (aten.mul.Tensor, lambda x, y: (x, y)),
    (aten.add.Tensor, lambda x, y: (x, y[..., :1])),
    (aten.where.self, lambda x, y: (x > 0, x, y)),
    (aten.eq.Scalar, lambda x, y: (x, 1)),
    (aten.pow.Tensor_Scalar, lambda x, y: (x, 2.0)),
    (aten.silu.default, lambda x, y: (x,)),
    (aten.bitwise_not.default, lambda x, y: (x.int(),)),
    (aten.cat.default, lambda x, y: ([x, x.new_empty(0), y], -1)),
    (aten.stack.default, lambda x, y: ([x, y], -2)),
    (aten.linalg_vector_norm.default, lambda x, y: (x, 2, [-1], True)),
    (aten.linalg_vector_norm.default, lambda x, y: (y,)),
    (aten.empty_like.default, lambda x, y: (x,)),
    (aten.sum.dim_IntList, lambda x, y: (x, [0])),
    (partial(aten.clone.default, memory_format=torch.contiguous_format), lambda x, y: (x,)),
]


@pytest.mark.parametrize(
    "laid", [lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[::2]]
)
@pytest.mark.parametrize("number", range(len(ASKED)))
def test_shapes_without_the_compiler_are_those_that_torch_finds(number: int, laid: Any) -> None:
    func, arguments = ASKED[number]
    how = func.keywords if isinstance(func, partial) else {}
    func = func.func if isinstance(func, partial) else func
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        x, y = (laid(torch.empty(4, 6, 5, dtype=dtype, device="meta")) for dtype in dtypes)
        args = arguments(x, y)
        got, wanted = heard.on_meta(func, args, how), func(*args, **how)
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride()), (func, dtypes)


def test_a_forecast_imports_no_compiler_and_takes_the_same_with_it() -> None:
    """A training command foresees before it trains, and would pay for the import in each run."""
    here = "import sys; sys.path.insert(0, 'tests/trainer'); import test_planner as t\n"
    last = "print(t.case_of(t.model_of('nf4')).forecast('products').phases, 'torch._dynamo' in sys.modules)"
    said = []
    for before in ("", "import torch._dynamo\n"):
        code = here + before + last
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
        said.append(done.stdout.strip().rsplit(" ", 1))
    (alone, without), (beside, there) = said
    assert (without, there) == ("False", "True") and alone == beside


def test_ops_that_return_nothing_are_heard_and_not_done() -> None:
    """torch's foreach ops write into gradients, of memory that a forecast leaves untouched."""
    known = torch.ones(3)
    with heard.Storages(10, False, 1 << 20) as seen:
        unknown = torch.empty(1 << 17)
        torch._foreach_mul_([known, unknown], 2.0)
    assert known.tolist() == [1, 1, 1] and unknown.untyped_storage()._cdata in seen.unknown


def test_a_result_is_kept_by_torchs_default_dtype_too() -> None:
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with heard.Storages(10, False, 1 << 20):
                made.append(torch.zeros(1 << 17).dtype)
        finally:
            torch.set_default_dtype(torch.float32)
    assert made == [torch.float32, torch.bfloat16]
