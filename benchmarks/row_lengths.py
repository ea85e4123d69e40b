"""Memory of a bf16 run on the CPU beside the number of different row lengths: it should be flat after some 50 steps.

    python -m benchmarks.row_lengths [--steps 160] [--dtype float32] [--as-they-are]

Trains a LoRA adapter of a random NF4 decoder on rows of random lengths and prints RssAnon above the level after the
first step. --as-they-are: rows are not padded to buckets, which is what it was before. --simulate: products are done by
oneDNN in fp32, for CPUs that cannot multiply bf16 (it then does none of them). The last line is JSON.
"""

import argparse
import json
import random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fourbit
from fourbit.data.batch import Encoded, Example, micro_batches
from fourbit.kernels import attention, chunked_head, dispatch
from fourbit.lora.quantize import quantize_
from fourbit.models import decoder
from fourbit.models.spec import Spec
from fourbit.trainer.losses.tokens import batch_token_scores
from fourbit.trainer.memory import memory_used

SPEC = Spec(2048, 256, 768, 2, 4, 2, 64)  # small: what is kept for a shape hardly depends on its widths


class OneDNN(TorchDispatchMode):
    """Products in fp32 by oneDNN, which by itself gets those in bf16 only; it too keeps what it made for a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            self.shapes.add((tuple(args[0].shape), args[1].shape[1]))
            a, b = args[0].contiguous(), args[1].T.contiguous()
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return function(*args, **(kwargs or {}))


def rows(count: int, draw: random.Random) -> list[Any]:
    """Examples of 40 to 300 tokens, a quarter of them trained."""
    found = []
    for i in range(count):
        size = draw.randint(40, 300)
        ids = [draw.randrange(SPEC.vocab_size) for _ in range(size)]
        found.append((i, Example((Encoded(ids, [j > 3 * size // 4 for j in range(size)], "", ""),))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--as-they-are", action="store_true")
    parser.add_argument("--simulate", action="store_true")
    args = parser.parse_args()
    narrow = torch.empty(0, dtype=torch.bfloat16)
    if args.as_they_are or args.simulate:
        for module in (attention, chunked_head, decoder):
            module.bucketed = lambda n, x: n if args.as_they_are else dispatch.bucketed(n, narrow)
    torch.manual_seed(0)
    model = decoder.Decoder(SPEC)
    quantize_(model)
    fourbit.attach(model, fourbit.LoRAConfig(rank=8, alpha=16))
    dtype = torch.float32 if args.simulate else getattr(torch, args.dtype)
    for p in model.parameters():
        if p.is_floating_point() and not p.requires_grad:
            p.data = p.data.to(dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    draw, mode, level, course = random.Random(0), OneDNN(), 0, dict[int, float]()
    for step in range(1, args.steps + 1):
        for batch in micro_batches(rows(4, draw), packing=True, micro_batch="auto", token_budget=512, pad_id=0):
            with mode if args.simulate else torch.enable_grad():
                batch_token_scores(model, batch).logps.sum().backward()
        for p in trained:
            p.grad = None
        used = memory_used(torch.device("cpu"))[1]
        level = level or used
        if step % 10 == 0:
            course[step] = round((used - level) / 2**20, 1)
            print(f"step {step:4}  RssAnon above the first step's {course[step]:8.1f} MiB", flush=True)
    print(json.dumps({**vars(args), "mib": course, "shapes": len(mode.shapes)}))


if __name__ == "__main__":
    main()
