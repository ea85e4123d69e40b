"""Which way a matrix product goes: decode inside the product, or decode first and multiply after.

`table.json` holds, for each GPU architecture, the ceilings of one GPU of that kind, the fused kernel's configuration by
number of rows, and what `python -m benchmarks.tune` measured. A measured point decides for its shape. Elsewhere a cost
model does: bytes against bandwidth, instructions against issue slots, operations against the matrix units. It needs no
tuning run, and it is only as good as its assumptions.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

BYTES_PER_PARAMETER = 0.516  # NF4 in blocks of 64, double quantised: 4.127 bits
FUSED_EFFICIENCY = 0.6  # of the matrix rate that a fused kernel is taken to reach
LAUNCH = 2e-6  # seconds that one more launch costs

FORMS = ("addmm", "augmented", "fused")  # of base + LoRA: see kernels/lora.py


class Plan(NamedTuple):
    """path "fused" with the kernel's configuration, or "decode" and None."""

    path: str
    config: dict[str, Any] | None


class Size(NamedTuple):
    """Of the product x [M, K] times W^T, W [N, K]."""

    M: int
    N: int
    K: int


DECODE = Plan("decode", None)


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """The dispatch table, by architecture."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("table.json").read_text())
    return found


def entry(architecture: str) -> dict[str, Any] | None:
    """The table's entry for "sm_90" and the like: its own, or that of the next older GPU of the same generation.

    A GPU inherits only from its own generation (the tens of its number): configurations lean on what that has in
    shared memory. None for GPUs that are not listed.
    """
    if not architecture:
        return None
    number = _number(architecture)
    older = [name for name in table() if _number(name) // 10 == number // 10 and _number(name) <= number]
    return table()[max(older, key=_number)] if older else None


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_"))


@lru_cache(maxsize=4096)
def linear(architecture: str, dtype: str, size: Size) -> Plan:
    """The quicker way for a 4-bit product that the fused kernel can do; `dtype` as in "bfloat16"."""
    known = entry(architecture)
    if known is None:
        return DECODE
    point = _measured(known, {"op": "linear", "dtype": dtype, "N": size.N, "K": size.K}, size.M)
    if point is not None:
        return Plan("fused", point["config"]) if point["fused_us"] <= point["decode_us"] else DECODE
    config = next((row for row in known["fused"] if row["M"] >= size.M), None)
    if config is None or fused_seconds(known, size, config) > decode_seconds(known, size):
        return DECODE
    return Plan("fused", config)


@lru_cache(maxsize=4096)
def lora(architecture: str, dtype: str, M: int, rows: tuple[int, ...], K: int, rank: int) -> str:
    """The form of base + LoRA for projections of `rows` outputs each that share x [M, K]; `rank` is the sum of theirs.

    "fused" where that is the way of every base product; else the form that moves fewer bytes.
    """
    known = entry(architecture)
    if known is None:
        return "addmm"
    point = _measured(known, {"op": "lora", "dtype": dtype, "N": list(rows), "K": K, "rank": rank}, M)
    if point is not None:
        return min((form for form in FORMS if f"{form}_us" in point), key=lambda form: float(point[f"{form}_us"]))
    if all(linear(architecture, dtype, Size(M, N, K)).path == "fused" for N in rows):
        return "fused"
    return "augmented" if _augmented_seconds(known, M, rows, K, rank) < _addmm_seconds(known, M, rows, K) else "addmm"


def _measured(known: dict[str, Any], key: dict[str, Any], M: int) -> dict[str, Any] | None:
    """The measured point for this shape with the fewest rows from M up: what wins there wins with fewer rows too."""
    points = [p for p in known["measured"] if p["M"] >= M and all(p.get(name) == value for name, value in key.items())]
    return min(points, key=lambda p: int(p["M"]), default=None)


def fused_seconds(known: dict[str, Any], size: Size, config: dict[str, Any]) -> float:
    """The fused kernel: each tile of BM rows decodes the weight again, and decoding hides behind traffic only.

    A configuration's `instructions` a parameter stand for what bounds its loop: SASS instructions, or cycles of shared
    memory in the same unit, whichever is more. Tests hold the former to it; the latter are reckoned.
    """
    M, N, K = size
    tiles = ceil(M / config["BM"])
    traffic = BYTES_PER_PARAMETER * N * K / known["copy_bandwidth"]
    decoding = tiles * N * K * config["instructions"] / known["issue_rate"]
    products = 2 * tiles * config["BM"] * N * K / (FUSED_EFFICIENCY * known["matmul_rate"])
    return float(max(traffic, decoding + products))


def decode_seconds(known: dict[str, Any], size: Size) -> float:
    """Decode to 16 bits, then the vendor's product, which reads the dense weight."""
    M, N, K = size
    decoding = (BYTES_PER_PARAMETER + 2) * N * K / known["copy_bandwidth"]
    product = max(2 * M * N * K / known["matmul_rate"], 2 * (N * K + M * K + M * N) / known["copy_bandwidth"])
    return float(decoding + product + LAUNCH)


def _addmm_seconds(known: dict[str, Any], M: int, rows: Sequence[int], K: int) -> float:
    """What LoRA adds: x read once more, every y written and read once more (16 bits each)."""
    return float((2 * M * K + 4 * M * sum(rows)) / known["copy_bandwidth"])


def _augmented_seconds(known: dict[str, Any], M: int, rows: Sequence[int], K: int, rank: int) -> float:
    """What LoRA adds: x read and written once more, and `rank` more columns in every product."""
    return float(4 * M * K / known["copy_bandwidth"] + 2 * M * sum(rows) * rank / known["matmul_rate"])
