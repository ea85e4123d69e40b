"""What `fourbit plan`, and --dry-run of a training, print: bytes by part, what fits where, the best lever, time."""

from typing import Any

import torch
from torch.utils.benchmark import Timer

from ..errors import InputError, shown
from ..kernels.dispatch import memory_free
from ..trainer.config import KEPT, size_in_bytes
from ..trainer.planner import Case
from .load import planned
from .show import pairs, result

SIZES = (8, 12, 16, 24, 48, 80)  # of cards, in GiB


def show(options: Any, case: Case, tokens: float) -> int:
    """Print what a run over so many tokens takes; returns 0. Raises InputError for a memory that is no size."""
    (device, dtype), given = planned(options), getattr(options, "memory", None)
    here = device == "cpu" or torch.cuda.is_available()
    memory = size_in_bytes(given) if given else memory_free(torch.device(device)) if here else 24 << 30
    if not memory:
        raise InputError(f"memory must be a size such as 24GiB, got {shown(given)}")
    flops = getattr(options, "flops", None) or 4e14 * (not here)
    if not flops:
        product = Timer("a @ a", globals={"a": torch.ones(1024, 1024, dtype=getattr(torch, dtype), device=device)})
        flops = 2 * 1024**3 / product.blocked_autorange(min_run_time=0.1).median
    asked, plain = KEPT.get(case.config.checkpointing), case.forecast()
    words = [asked] * case.layers if asked else case.words(memory - plain.peak + plain.beside)
    found = case.mixed(words)
    easy = found.peak <= min(memory, SIZES[0] << 30) and "input" not in words  # then no way to less is looked for
    levers = {} if easy else {_flags(change): size for change, size in case.levers(words).items()}
    seconds = tokens / case.batch.tokens * found.flops / flops
    peaks = {"": found.peak} if easy else case.ways([asked or "products"] * case.layers)
    ways = {_flags(way) or "as it is": peak for way, peak in peaks.items()}
    least = f"does not fit: {min(ways.values()) / 2**30:.1f} GiB at least"
    fits = {f"{size} GiB": next((way for way in ways if ways[way] <= size << 30), least) for size in SIZES}
    layer = {word: case.forecast(word).layer for word in dict.fromkeys(words)}
    values = {"peak_bytes": found.peak, "parts": found.parts, "checkpointing": words, "layer_bytes": layer}
    values |= {"fits": fits, "saves": levers, "tokens": tokens, "seconds": seconds}
    lines = [(part, f"{size / 2**30:8.3f} GiB") for part, size in found.parts.items() if size]
    lines.append(("peak", f"{found.peak / 2**30:8.3f} GiB of {memory / 2**30:.1f}"))
    lines += [(f"{words.count(word)} layers", f"keep {word}: {size / 2**20:.1f} MiB") for word, size in layer.items()]
    lines += [("fits " + size, what) for size, what in fits.items()]
    lines += [("lever", f"{change} saves {size / 2**30:.2f} GiB") for change, size in [*levers.items()][:1]]
    more = ", answering not counted" * bool(case.answering)
    took = f"{seconds / 60:.1f} minutes of products for {tokens:,.0f} tokens at {flops:.2g} FLOP/s{more}"
    lines.append(("time", took))
    result(values, pairs(lines), as_json=options.json)
    return 0


def _flags(changes: str) -> str:
    return " ".join("--" + change.replace("_", "-").replace("=", " ") for change in changes.split())
