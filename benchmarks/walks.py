"""How many files one crosses to follow a thing through the package: `python -m benchmarks.walks [--functions]`.

Nobody counts by hand: each walk is run, and a profiler sees which functions of the package run on the way.

- **--lr to the update.** `fourbit sft` runs two steps in this process, with a learning rate that is no other number. A
  function has the rate *in hand* where it is a local (as a float, a one-element tensor or the text of the command
  line), an item or attribute of a local, or one of such an item (`self.config.lr`). It is *on the way* if the update
  happens inside its call (a weight is another one when it returns) and it, or a function that it calls on the way,
  has the rate in hand; or if it hands the rate back to a function on the way. Who only looks, to log or to check, is
  beside it.
- **a chat row to the loss** and **a preference pair to the loss.** One JSONL row is read (`load_rows`), laid out by a
  trainer (`micro_batches`, `begin`) and has its loss taken (`sums`); every file whose functions run counts, in order
  of first calls. Tokenizer and model are toys outside the package, and what the toy's adapter does inside its
  forward pass is the model's affair and is not counted. A child process counts as the file that it runs.

Only functions count: importing a module is not a step of the walk, and neither are methods that dataclasses generate.
By this count the first house crossed 10, 15 and 24 files (13, 17 and 22 had been counted by reading).
`--functions` names them. The last line printed is JSON; exit code 1 when a walk crosses more files than its limit.
"""

import argparse
import contextlib
import inspect
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fourbit.models.protocol import CausalLM

from . import CHECKOUT

RATE = 3.1415927e-3
LIMITS = {"--lr to the update": 9, "a chat row to the loss": 27, "a preference pair to the loss": 28}
FIRST_HOUSE = {"--lr to the update": 10, "a chat row to the loss": 15, "a preference pair to the loss": 24}
PROTOCOL = "models/protocol.py"  # what a toy inherits is its own affair
OUTSIDE = ("tests", "benchmarks", "examples", "build", ".venv")
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"  # noqa: E501
SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")


@dataclass
class Walk:
    """Files of the package in the order in which they were met, each with the functions that ran."""

    files: dict[str, list[str]] = field(default_factory=dict)

    def meet(self, file: str, function: str) -> None:
        functions = self.files.setdefault(file, [])
        if function not in functions:
            functions.append(function)


@cache
def file_of(code: CodeType) -> str | None:
    """The package's file that this function stands in; None for what is no function of the package."""
    path = Path(code.co_filename).resolve()  # of what was generated: <string>, which is nowhere
    is_function = (
        path.is_file() and code.co_name != "<module>" and code.co_flags & inspect.CO_OPTIMIZED
    )  # not a class' body
    return relative(path) if is_function else None


def relative(path: Path) -> str | None:
    """The path below the package, None outside of it (and in what only lies beside it)."""
    if not path.is_relative_to(CHECKOUT) or path.relative_to(CHECKOUT).parts[0] in OUTSIDE:
        return None
    return str(path.relative_to(CHECKOUT))


@contextlib.contextmanager
def profiled(profile: Callable[[FrameType, str, Any], None]) -> Iterator[None]:
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


# --lr to the update.


def rate_walk(folder: Path) -> Walk:
    """Runs `fourbit sft` on a model made in `folder`."""
    from fourbit.cli.main import main

    write_model(folder / "model")
    (folder / "rows.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    arguments = ["sft", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--lr", str(RATE)]
    arguments += ["--out", str(folder / "run"), "--schedule", "constant", "--warmup", "0", "--steps", "2"]
    arguments += ["--checkpointing", "products"]
    walk, weight = RateWalk(), Weight()
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: weight.found(optimizer))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), profiled(walk.profile(weight)):
        code = main(arguments)
    handle.remove()
    if code != 0 or weight.value() == weight.start:
        raise RuntimeError(f"fourbit sft ended in {code}:\n{said.getvalue()}")
    return walk.walk()


class Weight:
    """A number that the run trains, once the optimizer has shown it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.start: float | None = None

    def found(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.tensors:
            self.tensors = [p for group in optimizer.param_groups for p in group["params"][:2]]  # A and B of a layer
            self.start = self.value()

    def value(self) -> float | None:
        return sum(tensor.detach().sum().item() for tensor in self.tensors) if self.tensors else None


@dataclass
class Call:
    """What a call of one of the package's functions did with the rate."""

    caller: int | None  # the nearest call of the package around it, by its number
    code: CodeType
    before: float | None  # the weight, when it began
    updates: bool = False  # the weight changed inside
    holds: bool = False  # and the rate was in hand here, or in what was called inside
    returns: bool = False  # handed it back


class RateWalk:
    """All calls of the package's functions, and which are on the way."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.open: dict[int, int] = {}  # a frame's id -> the number of its call

    def profile(self, weight: Weight) -> Callable[[FrameType, str, Any], None]:
        def profile(frame: FrameType, event: str, result: Any) -> None:
            if event not in ("call", "return") or file_of(frame.f_code) is None:
                return
            if event == "call":
                self.open[id(frame)] = len(self.calls)
                self.calls.append(Call(self._caller(frame), frame.f_code, weight.value()))
            elif (number := self.open.pop(id(frame), None)) is not None:
                call = self.calls[number]
                changed = weight.value() != (weight.start if call.before is None else call.before)
                call.updates, call.returns = changed, in_hand(result)
                call.holds = call.holds or (changed and any(in_hand(value) for value in frame.f_locals.values()))
                if call.holds and call.caller is not None:
                    self.calls[call.caller].holds = True

        return profile

    def _caller(self, frame: FrameType) -> int | None:
        around = frame.f_back
        while around is not None and id(around) not in self.open:
            around = around.f_back
        return None if around is None else self.open[id(around)]

    def walk(self) -> Walk:
        walk, on_the_way = Walk(), list[bool]()
        for call in self.calls:  # a caller comes before those it calls
            on_the_way.append(
                (call.updates and call.holds) or (call.returns and call.caller is not None and on_the_way[call.caller])
            )
            file = file_of(call.code)
            if on_the_way[-1] and file is not None:
                walk.meet(file, call.code.co_qualname)
        return walk


def in_hand(value: Any, deep: int = 2) -> bool:
    """Whether this is the rate, has it as an item or attribute, or has such a one."""
    if is_rate(value):
        return True
    if deep == 0:
        return False
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, list | tuple):
        inside = list(value[:100])
    elif type(value).__module__.startswith("fourbit.") and not isinstance(value, nn.Module):
        inside = list(getattr(value, "__dict__", {}).values())
    else:
        return False
    return any(in_hand(item, deep - 1) for item in inside)


def is_rate(value: Any) -> bool:
    if isinstance(value, str):
        return value in (str(RATE), f"--lr={RATE}")
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point() or value.device.type != "cpu":
            return False
        return abs(value.item() - RATE) < 1e-6 * RATE
    return isinstance(value, float) and value == RATE


# A row to its loss.

CHAT = [{"role": "user", "content": "Where is my parcel?"}, {"role": "assistant", "content": "On its way."}]
PAIR = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Who knows?"}]}


def row_walk(folder: Path, kind: type, config: Any, row: dict[str, Any]) -> Walk:
    """One row through a trainer of this kind, whose other rows do not count."""
    import fourbit
    from fourbit.data.encode import load_rows

    torch.manual_seed(0)
    model = Toy()
    fourbit.attach(model, fourbit.LoRAConfig(rank=2, alpha=4, target=["mix"]))
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    trainer = kind(model, Bytes(), train=str(path), config=config)
    walk = Walk()
    with profiled(rows_profile(walk)):
        dataset = load_rows(config, trainer.tokenizer, [path], trainer.kind)
        trainer.train_set = dataset
        batches = trainer.micro_batches(dataset, [0], "auto")
        trainer.begin(dataset, batches)
        trainer.sums(batches[0])
    for file, what in CHILDREN.items():
        if file.startswith("data/"):  # what the models' files were opened in has ended
            walk.meet(file, what)
    return walk


def rows_profile(walk: Walk) -> Callable[[FrameType, str, Any], None]:
    inside: list[FrameType] = []  # the toy's forward pass, while it lasts

    def profile(frame: FrameType, event: str, result: Any) -> None:
        if frame.f_code is Toy.hidden.__code__ and event in ("call", "return"):
            inside.append(frame) if event == "call" else inside.pop()
        elif event == "call" and not inside and (file := file_of(frame.f_code)) not in (None, PROTOCOL):
            walk.meet(file, frame.f_code.co_qualname)

    return profile


CHILDREN: dict[str, str] = {}  # files that this process has started as processes of their own


def hear_of_children(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook. A child lives on, and later rows go to it too, so what was heard once stays."""
    if event != "subprocess.Popen":
        return
    for word in map(str, arguments[1]):
        for path in (Path(word), CHECKOUT / f"{word.removeprefix('fourbit.').replace('.', '/')}.py"):
            if re.fullmatch(r"[\w./-]+", word) and path.is_file() and (file := relative(path.resolve())) is not None:
                CHILDREN[file] = "a process of its own"


sys.addaudithook(hear_of_children)


class Toy(CausalLM):
    """The least that a trainer may ask of a model, on torch alone."""

    vocab_size, hidden_size, source = 256 + len(SPECIAL), 16, "toy"

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.vocab_size, self.hidden_size)
        self.mix = nn.Linear(self.hidden_size, self.hidden_size)
        self.lm_head = nn.Linear(self.hidden_size, self.vocab_size, bias=False)

    def hidden(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, T, hidden_size]"""
        states: Tensor = self.mix(self.embedding(input_ids))
        return states

    def new_cache(self) -> Any:
        raise NotImplementedError("a toy writes nothing")

    def settings(self) -> dict[str, Any]:
        return {"model_type": "toy"}


class Bytes:
    """A tokenizer whose tokens are bytes and three special ones."""

    chat_template, bos_token, eos_token = TEMPLATE, None, "<|end|>"
    bos_id, eos_id, pad_id, stop_ids = None, 258, 256, (258,)
    named_tokens, special_tokens = {"eos_token": "<|end|>"}, SPECIAL

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets, at = list[int](), list[tuple[int, int]](), 0
        for piece in re.findall("|".join(map(re.escape, SPECIAL)) + "|.", text, flags=re.S):
            here = [256 + SPECIAL.index(piece)] if piece in SPECIAL else list(piece.encode())
            ids, offsets, at = ids + here, offsets + [(at, at + len(piece))] * len(here), at + len(piece)
        return ids, offsets

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def write_model(folder: Path) -> None:
    """A random Llama of two small layers with a byte tokenizer, as a Hugging Face folder."""
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from .load_memory import layer_shapes

    folder.mkdir()
    config = {"model_type": "llama", "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (259, 32), "model.norm.weight": (32,)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (32,))
    for i in range(2):
        layer: dict[str, tuple[int, ...]] = {**layer_shapes(config), **norms}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def walks() -> dict[str, Walk]:
    """All three, by name."""
    import fourbit

    found = {}
    for name in LIMITS:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            if name.startswith("--lr"):
                found[name] = rate_walk(folder)
            elif "pair" in name:
                found[name] = row_walk(folder, fourbit.DPOTrainer, fourbit.DPOConfig(out=made), PAIR)
            else:
                found[name] = row_walk(folder, fourbit.SFTTrainer, fourbit.SFTConfig(out=made), {"messages": CHAT})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--functions", action="store_true", help="name the functions that count in each file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = walks()
    for name, walk in found.items():
        print(f"{name}: {len(walk.files)} files (limit {LIMITS[name]}; the first house crossed {FIRST_HOUSE[name]})")
        for file, functions in walk.files.items():
            print(f"  {file:32} {', '.join(functions)}" if options.functions else f"  {file}")
        print()
    print(json.dumps({name: {"files": list(walk.files), "limit": LIMITS[name]} for name, walk in found.items()}))
    return int(any(len(walk.files) > LIMITS[name] for name, walk in found.items()))


if __name__ == "__main__":
    sys.exit(main())
