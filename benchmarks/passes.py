"""What a training step moves through a GPU's memory beside its products: launches and bytes by op, without a GPU.

    python -m benchmarks.passes [--config config.json] [--tokens 8192] [--rank 16] [--json]

A decoder of the Spec in 4 bits (8B Llama by default) with LoRA on every linear makes one step on fake tensors, which
take the path of CUDA (kernels/launch.py); every op is counted. One layer is what a model of two has more than a model
of one; the head is the loss of all tokens; a step is all layers, the head and what happens once.

Counted: of each kernel and each op of torch's the tensors that it reads and those that it writes, each once, in MB of
10^6 bytes; what an op overwrites in place counts twice. Whether a cache holds some of it is not asked. Views, fresh
memory and shapes cost nothing. Apart from the passes stand attention and the products with frozen weights, with all
that they read and write, the sum that a product adds to included. LoRA's products, which read or write one wide matrix
each and multiply next to nothing, are passes.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.kernels.dispatch import force_path
from fourbit.models.decoder import Decoder
from fourbit.models.families import read_spec
from fourbit.models.spec import Rope, Spec
from fourbit.trainer.losses.tokens import token_scores

LLAMA_8B = Spec(128256, 4096, 14336, 32, 32, 8, 128, rope=Rope(500000.0))
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"}
ROWS_OF = {  # not all of what is given is read
    "embedding",
    "index_select",
    "gather",
    "index",
    "scatter_add_",
    "embedding_dense_backward",
}
ONLY_WRITTEN = {"copy_", "zero_", "fill_"}


@dataclass
class Moved:
    """Launches, and bytes read and written."""

    launches: float = 0
    bytes: float = 0

    def add(self, other: "Moved", times: float = 1) -> None:
        self.launches += times * other.launches
        self.bytes += times * other.bytes


@dataclass
class Count:
    """What was counted, by direction and op; passes are what is neither a frozen product nor attention."""

    ops: dict[tuple[str, str], Moved] = field(default_factory=lambda: defaultdict(Moved))

    def plus(self, other: "Count", times: float = 1) -> "Count":
        both = Count()
        for count, factor in ((self, 1.0), (other, times)):
            for key, moved in count.ops.items():
                both.ops[key].add(moved, factor)
        return both

    def total(self, *, passes: bool = True, way: str = "") -> Moved:
        """All launches of a direction or of both; with `passes` the bytes of passes alone."""
        total = Moved()
        for (direction, op), moved in self.ops.items():
            if way in ("", direction):
                total.add(Moved(moved.launches, 0 if passes and op in ("products", "attention") else moved.bytes))
        return total


class Counter(TorchDispatchMode):
    """Hears every op and adds up what it moves, under `way`."""

    def __init__(self, rank: int, tokens: int) -> None:
        super().__init__()
        self.count, self.way, self.narrow, self.tokens = Count(), "forward", 3 * rank, tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        given = [(a, func._schema.arguments[i]) for i, arg in enumerate(args) for a in _tensors(arg)]
        given += [(a, next(x for x in func._schema.arguments if x.name == k)) for k, v in (kwargs or {}).items()
                  for a in _tensors(v)]  # fmt: skip
        ours = name == "launched"
        if ours or not _free(name, func, [a for a, _ in given], made):
            op = args[0].removesuffix("_kernel") if ours else self._called(name, given)
            self.count.ops[self.way, op].add(Moved(1, _bytes(name, given, made)))
        return made

    def _called(self, name: str, given: list[Any]) -> str:
        if "attention" in name or "attn" in name:
            return "attention"
        if name not in PRODUCTS:
            return name.strip("_")
        a, b = [x for x, argument in given if argument.name in ("mat1", "mat2", "self", "batch1", "batch2")][-2:]
        m, k, n = (*a.shape[-2:], b.shape[-1])
        if min(m, k, n) > self.narrow:
            return "products"
        if k <= self.narrow:
            return "lora: s B, grad_s A"
        return "lora: gradients of A, B" if k == self.tokens else "lora: x A, g B"


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def _free(name: str, func: Any, given: list[Tensor], made: Any) -> bool:
    """Views, fresh memory, questions."""
    if func._schema.is_mutable:
        return False
    made, own = _tensors(made), {x.untyped_storage()._cdata for x in given}
    return "empty" in name or all(x.untyped_storage()._cdata in own for x in made)


def _bytes(name: str, given: list[Any], made: Any) -> int:
    if name in ROWS_OF:
        return 2 * sum(x.nbytes for x in _tensors(made)) if not name.endswith("_") else 3 * given[1][0].nbytes
    if name.startswith("new_") or name.endswith("_like"):
        return sum(x.nbytes for x in _tensors(made))
    own = {x.untyped_storage()._cdata for x, _ in given}
    total = sum(x.nbytes for x in _tensors(made) if x.untyped_storage()._cdata not in own)
    for x, argument in given:
        written = argument.alias_info is not None and argument.alias_info.is_write
        total += x.nbytes * (2 if written and argument.name != "out" and name not in ONLY_WRITTEN else 1)
    return total


class Flash(TorchFunctionMode):
    """Attention as CUDA does it: meta tensors would take the definition, with a matrix of all pairs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args[:3], 0.0, kwargs.get("is_causal", False), scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


@contextmanager
def counting(rank: int, tokens: int) -> Iterator[Counter]:
    with FakeTensorMode(), Flash(), force_path("triton"), Counter(rank, tokens) as counter:
        yield counter


def fake(module: nn.Module) -> nn.Module:
    """The module of meta tensors, with fake ones in their place; inside a FakeTensorMode."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad
                )
    return module


def trunk(spec: Spec, layers: int, tokens: int, rank: int) -> Count:
    """Hidden states of one row of `tokens` and back, for the first layers of a Spec."""
    few = replace(spec, num_hidden_layers=layers, windows=spec.windows[:layers], vocab_size=256)
    with torch.device("meta"):
        model = Decoder(few).to(torch.bfloat16)
        fourbit.quantize_(model)
        fourbit.attach(model, fourbit.LoRAConfig(rank=rank, alpha=2 * rank))
    with counting(rank, tokens) as counter:
        fake(model).train()
        hidden = model.hidden(torch.empty(1, tokens, dtype=torch.int64, device="meta"))
        counter.way = "backward"
        hidden.backward(torch.empty_like(hidden))
    return counter.count


def head(spec: Spec, tokens: int, rank: int) -> Count:
    """The frozen head and the loss of all tokens, and back to the hidden states."""
    with counting(rank, tokens) as counter:
        weight, hidden = (
            torch.empty(n, spec.hidden_size, dtype=torch.bfloat16, device="meta") for n in (spec.vocab_size, tokens)
        )
        targets = torch.empty(tokens, dtype=torch.int64, device="meta")
        loss = -token_scores(weight, hidden.requires_grad_(), targets).logps.sum()
        counter.way = "backward"
        loss.backward()
    return counter.count


def parts(spec: Spec, tokens: int, rank: int) -> dict[str, Count]:
    one, two, loss = trunk(spec, 1, tokens, rank), trunk(spec, 2, tokens, rank), head(spec, tokens, rank)
    layer = two.plus(one, -1)
    return {"layer": layer, "head": loss, "step": one.plus(layer, spec.num_hidden_layers - 1).plus(loss)}


def table(name: str, count: Count) -> str:
    lines = [f"{name:28}{'launches':>10}{'MB':>12}"]
    for way in ("forward", "backward"):
        total = count.total(way=way)
        lines.append(f"{way:28}{total.launches:>10.0f}{total.bytes / 1e6:>12,.0f}")
        rows = [(op, moved) for (direction, op), moved in count.ops.items() if direction == way and moved.launches]
        for op, moved in sorted(rows, key=lambda row: -row[1].bytes):
            apart = " (apart)" * (op in ("products", "attention"))
            lines.append(f"  {op + apart:26}{moved.launches:>10.0f}{moved.bytes / 1e6:>12,.0f}")
    total = count.total()
    return "\n".join([*lines, f"{'passes, both ways':28}{total.launches:>10.0f}{total.bytes / 1e6:>12,.0f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a model's config.json; default: an 8B Llama")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="one line of JSON last")
    options = parser.parse_args()
    spec = read_spec(json.loads(options.config.read_text())) if options.config else LLAMA_8B
    found = parts(spec, options.tokens, options.rank)
    print("\n\n".join(table(name, count) for name, count in found.items()))
    if options.json:
        print(json.dumps({
            name: {way: {op: asdict(m) for (w, op), m in count.ops.items() if w == way and math.ceil(m.launches)}
                   for way in ("forward", "backward")}
            for name, count in found.items()
        }))  # fmt: skip


if __name__ == "__main__":
    main()
