"""transformers.Trainer and TRL's trainers over our layers and optimizers: docs/other-trainers.md's snippets, run."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fourbit

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

PAGE = (Path(__file__).parents[2] / "docs" / "other-trainers.md").read_text()
SETTINGS = {"logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}


def snippets(heading: str) -> list[str]:
    """The code under a heading of the page."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


class Bench:
    """A namespace in which the page's snippets run, on a model of a second."""

    def __init__(self, folder: Path, out: Path, **settings: Any) -> None:
        self.out, quiet = out, {"bf16": False, "gradient_checkpointing": False}
        torch.manual_seed(0)
        self.names: dict[str, Any] = {
            "model": transformers.LlamaForCausalLM.from_pretrained(folder),
            "tokenizer": transformers.PreTrainedTokenizerFast.from_pretrained(folder),
            "out": str(out),
            "settings": SETTINGS | quiet | settings,
        }
        for heading in ("The model", "Checkpoints that hold what trains, not the base"):
            self.run(heading)

    def run(self, heading: str, which: slice = slice(None)) -> None:
        for snippet in snippets(heading)[which]:
            exec(compile(snippet, heading, "exec"), self.names)  # noqa: S102  # our own page

    @property
    def model(self) -> nn.Module:
        return self.names["model"]

    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.names["trainer"].state.log_history if "loss" in entry]

    def check(self, steps: int = 6) -> None:
        """The loss fell; checkpoints hold the adapter, and no more."""
        assert len(self.losses()) == steps and self.losses()[-1] < self.losses()[0]
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for checkpoint in (f"checkpoint-{steps // 2}", f"checkpoint-{steps}"):
            saved = load_file(self.out / checkpoint / "model.safetensors")
            assert {*saved} == {*trained}
        assert all(torch.equal(saved[name], p) for name, p in trained.items())


def rows() -> list[dict[str, torch.Tensor]]:
    drawn = torch.randint(0, 256, (16, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_transformers_trainer_trains_saves_the_adapter_and_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    bench = Bench(tiny_folder, tmp_path)
    bench.names["rows"] = rows()
    bench.run("transformers.Trainer")
    bench.check()
    again = Bench(tiny_folder, tmp_path)
    trainer = transformers.Trainer(
        again.model, bench.names["args"], train_dataset=rows(), optimizers=(again.names["optimizer"], None)
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(again.model, bench.model)
    fresh = transformers.LlamaForCausalLM.from_pretrained(tiny_folder)
    fourbit.quantize_(fresh)
    fourbit.load_adapter(fresh, tmp_path / "checkpoint-6")
    assert equal(fresh, bench.model)


def test_transformers_trainer_is_a_loop_of_ones_own(tiny_folder: Path, tmp_path: Path) -> None:
    """All rows in one batch, so that their order does not matter; the rate stays."""
    options = {
        "per_device_train_batch_size": 16,
        "max_steps": 4,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    bench, own = Bench(tiny_folder, tmp_path), Bench(tiny_folder, tmp_path)
    args = transformers.TrainingArguments(str(tmp_path), **(bench.names["settings"] | options))
    transformers.Trainer(bench.model, args, train_dataset=rows(), optimizers=(bench.names["optimizer"], None)).train()
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    optimizer = own.names["optimizer"]
    for _ in range(4):
        own.model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(own.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(bench.model.parameters(), own.model.parameters(), strict=True)
    assert max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs if a.requires_grad) < 1e-6


@pytest.mark.slow
def test_trls_sft_trainer(tiny_folder: Path, tmp_path: Path) -> None:
    datasets, bench = pytest.importorskip("datasets"), Bench(tiny_folder, tmp_path)
    pytest.importorskip("trl")
    turns = lambda i: [{"role": "user", "content": "ab" * i}, {"role": "assistant", "content": "cdcdcd"}]
    bench.names["chats"] = datasets.Dataset.from_list([{"messages": turns(i)} for i in range(1, 17)])
    bench.run("trl.SFTTrainer")
    bench.check()


@pytest.mark.slow
def test_trls_dpo_trainer_needs_no_second_model(tiny_folder: Path, tmp_path: Path) -> None:
    """The reference computed before the first step, a copy of the model, and our base without its adapter are one."""
    trl, datasets, found = pytest.importorskip("trl"), pytest.importorskip("datasets"), []
    prompts = [{"prompt": "ab" * i, "chosen": "cdcdcd", "rejected": "xyxy"} for i in range(1, 17)]
    for name in ("precomputed", "copied"):
        bench = Bench(tiny_folder, tmp_path / name)
        bench.names["pairs"] = datasets.Dataset.from_list(prompts)
        if name == "precomputed":
            bench.run("trl.DPOTrainer", slice(1))
            assert bench.names["trainer"].ref_model is None
            bench.check()
        else:
            args = trl.DPOConfig(
                bench.names["out"], max_steps=6, per_device_train_batch_size=4, **bench.names["settings"]
            )
            bench.names["trainer"] = trl.DPOTrainer(
                bench.model,
                ref_model=copy.deepcopy(bench.model),
                args=args,
                train_dataset=bench.names["pairs"],
                processing_class=bench.names["tokenizer"],
                optimizers=(bench.names["optimizer"], None),
            )
            bench.names["trainer"].train()
        assert bench.losses()[0] == pytest.approx(0.6931, abs=1e-4)
        found.append(bench.losses())
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    bench.names["batch"] = {"input_ids": torch.arange(6)[None]}
    bench.run("trl.DPOTrainer", slice(1, 2))
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_folder)
    fourbit.quantize_(base)
    assert torch.equal(bench.names["reference"], base(**bench.names["batch"]).logits)


def test_the_other_snippets_run(tiny_folder: Path, tmp_path: Path) -> None:
    bench = Bench(tiny_folder, tmp_path)
    bench.names["torch"] = torch
    bench.run("Averages of weights")
    trained = [p for p in bench.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(bench.names["average"].module, trained, strict=True))
