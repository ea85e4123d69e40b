"""One table of the kinds of training, so that a promise that all of them make is tested once, for each."""

import json
import os
import signal
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fourbit
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.save import save_model
from fourbit.trainer.checkpoint import load_checkpoint
from fourbit.trainer.metrics import read_metrics
from fourbit.trainer.policy import PolicyTrainer
from fourbit.trainer.rewards import Rewards, each
from fourbit.trainer.rl_config import RLConfig

WORDS = ["ab", "c", "def", "gh", "i", "jkl", "m", "nopq", "rs", "t"]
TIMED = ("tokens_per_second", "rss_anon", "rollout_tokens_per_second")  # what two equal runs may differ in


@dataclass(frozen=True)
class Kind:
    """A kind of training, the fixture with its rows, and options under which it has all the state that it can have."""

    trainer: type
    config: type
    rows: str = "rows"
    options: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)  # for the trainer itself


def some_head(seed: int = 5) -> torch.Tensor:
    return torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))


def early(prompt: str, answer: str, row: dict[str, Any]) -> float:
    """A reward that no two answers of an untrained model share for long."""
    return sum(ord(letter) % 13 for letter in answer) / 13


DPO = Kind(fourbit.DPOTrainer, fourbit.DPOConfig, "pairs")
DISTILL = Kind(fourbit.DistillTrainer, fourbit.DistillConfig, "rows", {"divergence": "jsd", "sft_weight": 0.1})
SHORT = {"max_new_tokens": 5, "group_size": 3, "rollouts_ahead": 2, "updates": 2, "temperature": 0.7, "kl": 0.1}
POLICY = Kind(PolicyTrainer, RLConfig, "rows", SHORT, {"rewards": Rewards({"early": (1.0, each(early))})})
KINDS = {
    "sft": Kind(fourbit.SFTTrainer, fourbit.SFTConfig),
    **{name: replace(DPO, options={"loss": (name,)}) for name in ("sigmoid", "ipo", "orpo", "bco", "simpo")},
    **{name: replace(DPO, rows="judged", options={"loss": (name,)}) for name in ("kto", "bco-unpaired")},
    "apo-zero-unpaired": replace(DPO, rows="judged", options={"loss": ("apo-zero-unpaired",)}),
    "reward": Kind(fourbit.RewardTrainer, fourbit.RewardConfig, "pairs", {"center": 0.1}, {"head": some_head()}),
    **{name: replace(POLICY, options=SHORT | {"loss": name}) for name in ("grpo", "rloo", "ppo")},
    "distill from the base": replace(DISTILL, more={"teacher": None}),
    "distill from another model": replace(DISTILL, more={"teacher": "wide"}, options=DISTILL.options | {"top_k": 20}),
}


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Ragged answers; some begin alike, so that trunks reach into them."""
    rows = [{"prompt": f"say {w}", "chosen": w * 3, "rejected": w * 2 + "x" * i} for i, w in enumerate(WORDS)]
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def judged(tmp_path_factory):
    rows = [
        {"prompt": f"say {w}", "completion": w * 3 if i % 3 else "no", "label": i % 3 > 0} for i, w in enumerate(WORDS)
    ]
    return write_lines(tmp_path_factory.mktemp("judged") / "judged.jsonl", rows)


@pytest.fixture(scope="session")
def wide_folder(tiny_folder, tmp_path_factory):
    """A teacher of another width and depth with the same tokenizer, its output head not tied."""
    model, tokenizer = fourbit.load(tiny_folder)
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, head_dim=12, tie_word_embeddings=False)
    torch.manual_seed(3)
    wide = Decoder(read_spec({**model.spec.config, **sizes}))
    for parameter in wide.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("wide")
    save_model(wide, folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def adapted():
    """A function: a model with an adapter; with b_seed that of an earlier training, whose B is not zero."""

    def make(folder, *, quant_type="nf4", dtype=torch.float32, b_seed=None, **lora):
        model, tokenizer = fourbit.load(folder, quant_type=quant_type, dtype=dtype)
        lora = fourbit.LoRAConfig(**({"rank": 4, "alpha": 8} | lora))
        fourbit.attach(model, lora, dtype=dtype, seed=b_seed or 0)
        if b_seed is not None:
            generator = torch.Generator().manual_seed(b_seed)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model, tokenizer

    return make


def built(adapted, kind, folder, rows, out, *, val=None, **options):
    """A trainer; options are those of its config, and of `adapted` and of the trainer itself."""
    loaded = {k: options.pop(k) for k in ("quant_type", "dtype", "b_seed", "dropout", "target", "rank") if k in options}
    more = kind.more | {k: options.pop(k) for k in ("head", "teacher", "adapter", "rewards") if k in options}
    model, tokenizer = adapted(folder, **loaded)
    config = kind.config(out=str(out), **({"batch_size": 4, "lr": 1e-2, "epochs": 2} | kind.options | options))
    return kind.trainer(model, tokenizer, train=rows, val=val, config=config, **more)


@pytest.fixture(scope="module")
def trainer_for(request, adapted):
    """`built` for the trainer and the config that the test file names."""
    return partial(built, adapted, Kind(request.module.TRAINER, request.module.CONFIG))


@pytest.fixture
def make(request, adapted, tiny_folder, wide_folder, tmp_path):
    """A function: the trainer of a kind by name, on the tiny model."""

    def trainer(name, out=tmp_path, *, rows=None, val=None, adapted=adapted, **options):
        kind = KINDS[name]
        if (kind.more | options).get("teacher") == "wide":
            options["teacher"], _ = fourbit.load(
                wide_folder, quant_type="nf4", dtype=options.get("dtype", torch.float32)
            )
        rows = rows or request.getfixturevalue(kind.rows)
        val = request.getfixturevalue(kind.rows if kind.rows != "rows" else "val_rows") if val is True else val
        return built(adapted, kind, tiny_folder, rows, out, val=val, **options)

    return trainer


class Stop:
    """Sends this process a signal once a step has been recorded: the polite way to end a run."""

    def __init__(self, step):
        self.step = step

    def show(self, record):
        if record["step"] == self.step and "loss" in record:
            self.step = None  # once: a second one would end the process
            os.kill(os.getpid(), signal.SIGINT)

    def message(self, text): ...

    def close(self): ...


@pytest.fixture(scope="session")
def stopping():
    """A function: a display for `train` that ends the run once this step has been recorded."""
    return lambda step: lambda total, start: Stop(step)


def history(out):
    """Every record of a run but for what its speed was."""
    return [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="session")
def assert_same_runs():
    """A function: two runs ended with the same bits in all that their checkpoints and files hold."""

    def check(a, b, step):
        tensors, states = zip(
            *(load_checkpoint(out / "checkpoints" / f"step-{step:06d}") for out in (a, b)), strict=True
        )
        for state in states:
            state["config"].pop("out"), state["config"].pop("resume")
        assert states[0] == states[1]
        assert {g: set(t) for g, t in tensors[0].items()} == {g: set(t) for g, t in tensors[1].items()}
        for group, members in tensors[0].items():
            for name, tensor in members.items():
                other = tensors[1][group][name]
                assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), f"{group}/{name}"
                same = torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (tensor, other)))
                assert same, f"{group}/{name}: off by {(tensor.double() - other.double()).abs().max()}"
        files = [{path.name: path.read_bytes() for path in out.glob("*.safetensors")} for out in (a, b)]
        assert files[0] and files[0] == files[1]
        assert history(a) == history(b)

    return check
