"""How much memory streaming a model into 4 bits takes: `python -m benchmarks.load_memory [--megabytes 1000]`.

Writes a random bf16 Llama as a sharded Hugging Face folder, loads it with NF4 in a fresh process and watches `RssAnon`
there (memory of its own; pages of mapped files do not count). The rule: the peak above the level after imports stays
under the finished model plus two dense tensors plus 100 MB. The last line printed is JSON; exit code 1 when over.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import CHECKOUT

MB = 1_000_000
SLACK = 100 * MB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the bf16 checkpoint")
    parser.add_argument("--quant-type", default="nf4", choices=["nf4", "fp4"])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the fresh process is told
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.quant_type)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        config = write_checkpoint(Path(name), options.megabytes * MB)
        command = [
            sys.executable,
            "-m",
            "benchmarks.load_memory",
            "--measure",
            name,
            "--quant-type",
            options.quant_type,
        ]
        answer = subprocess.run(command, cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True).stdout
        stored = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
    return report(stored, 2 * config["vocab_size"] * config["hidden_size"], json.loads(answer.splitlines()[-1]))


def report(stored: int, largest: int, result: dict[str, Any]) -> int:
    """Print the figures, for people and as one JSON line; 1 when the rule is broken."""
    limit = result["model_bytes"] + 2 * largest + SLACK
    rows = {
        "checkpoint, bf16": stored,
        "finished model": result["model_bytes"],
        "largest dense tensor": largest,
        "peak RssAnon above imports": result["peak_bytes"],
        "limit": limit,
    }
    for what, size in rows.items():
        print(f"{what:28} {size / MB:10.1f} MB")
    over = result["peak_bytes"] > limit
    print(f"{'over' if over else 'within'} the limit, loaded in {result['seconds']:.1f} s")
    print(json.dumps({**result, "checkpoint_bytes": stored, "largest_tensor_bytes": largest, "limit_bytes": limit}))
    return int(over)


def write_checkpoint(folder: Path, size: int) -> dict[str, Any]:
    """A random Llama of about `size` bytes in bf16, one shard a layer; returns its config."""
    import torch
    from safetensors.torch import save_file

    wide = size >= 500 * MB
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048 if wide else 512,
        "num_attention_heads": 16,
    }
    config |= {"intermediate_size": 5632 if wide else 1408, "num_key_value_heads": 4, "num_hidden_layers": 1}
    layer_bytes = sum(2 * rows * columns for rows, columns in layer_shapes(config).values())
    outside = 2 * 2 * config["vocab_size"] * config["hidden_size"]
    config["num_hidden_layers"] = max(1, round((size - outside) / layer_bytes))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for file, shapes in shards(config):
        tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        for tensor in tensors.values():
            tensor.normal_(std=0.02, generator=generator)
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return config


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A layer's linear weights."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {
        "q_proj": (hidden, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    return shapes | {f"mlp.{name}": shape for name, shape in mlp.items()}


def shards(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """File names with the names and shapes of their tensors."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "first.safetensors", {"model.embed_tokens.weight": (vocab, hidden)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    for i in range(config["num_hidden_layers"]):
        layer = layer_shapes(config) | norms
        yield f"layer-{i}.safetensors", {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    yield "last.safetensors", {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def measure(folder: Path, quant_type: str) -> dict[str, Any]:
    """Load in this process and return the peak of RssAnon above the level before, the model's bytes and the time."""
    import torch

    from fourbit.models.load import load_decoder

    before = rss_anon()
    with Watch() as watch:
        start = time.perf_counter()
        model = load_decoder(folder, quant_type=quant_type, dtype=torch.bfloat16)
        seconds = time.perf_counter() - start
    after = rss_anon() - before
    model_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return {
        "peak_bytes": watch.peak - before,
        "after_bytes": after,
        "model_bytes": model_bytes,
        "seconds": round(seconds, 2),
    }


class Watch:
    """The highest RssAnon of this process while the block runs, read every millisecond."""

    def __enter__(self) -> "Watch":
        self.peak = rss_anon()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, rss_anon())


def rss_anon() -> int:
    """Bytes of this process's anonymous resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no RssAnon line; this measurement needs Linux")


if __name__ == "__main__":
    sys.exit(main())
