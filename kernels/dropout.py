"""Dropout whose mask is a function of the place and a seed, so that nothing is stored and every path drops the same;
and other draws of its generator.

The generator is Philox 4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), the
fewest that pass BigCrush. Its counter is (column // 8, row, 0, 0) and its key the 64-bit seed; the 128 bits of one call
serve eight neighbouring columns, 16 bits each, in the order of memory (word 0 low half, word 0 high half, word 1 ...).
So the keep probability is rounded to a multiple of 1/65536, and survivors are scaled by the exact inverse of what it
became. The seed is a tensor, drawn where x lies: checkpointing repeats it with the generator's state, and a CUDA graph
can redraw it without a word to the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 7
LEVELS = 1 << 16  # of the keep probability
CHUNK = 1 << 16  # generator calls at a time on a CPU: 512 KB for each word of the state; fewer cost more overhead
_LOW = (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)  # what each round adds to the key


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator: int64, 0-d, and never seen by the host."""
    return torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)


def keep_level(dropout: float) -> int:
    """How many of 65,536 draws keep an element: 1 - dropout rounded, not none nor all. ValueError outside (0, 1)."""
    if not 0 < dropout < 1:
        raise ValueError(f"dropout must lie between 0 and 1, got {dropout!r}")
    return min(max(round((1 - dropout) * LEVELS), 1), LEVELS - 1)


def keep_scale(dropout: float) -> float:
    """What survivors are multiplied by: the inverse of the rounded keep probability."""
    return LEVELS / keep_level(dropout)


def keep_mask(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """bool of `shape` (rows, columns) on the seed's device: which elements dropout with probability p keeps."""
    rows, columns = shape
    groups = -(-columns // 8)
    level = keep_level(p) - LEVELS // 2  # 16 bits are compared as signed numbers, the type torch has
    mask = torch.empty(rows, groups, 8, dtype=torch.bool, device=seed.device)
    keys = _keys(seed)
    pieces = -(-rows * groups // CHUNK) if seed.device.type == "cpu" else 1
    step = -(-rows // max(pieces, 1)) or 1
    for start in range(0, rows, step):
        part = mask[start : start + step]
        words = torch.empty(*part.shape[:2], 4, dtype=torch.int32, device=seed.device)
        counters = torch.arange(start, start + len(part), device=seed.device).unsqueeze(1)  # [rows, 1]
        for i, word in enumerate(_philox(torch.arange(groups, device=seed.device).unsqueeze(0), counters, keys)):
            words[..., i] = word
        torch.lt(words.view(torch.int16), level, out=part)
    return mask.view(rows, groups * 8)[:, :columns]


def draw_halves(first: int, groups: int, row: Tensor, seed: Tensor) -> Tensor:
    """The 16-bit draws, 0 to 65535, of `groups` calls from counter (first, row) on, as in memory: int32 [8 * groups].

    row and seed: 0-d int64 on one device."""
    counters = torch.arange(first, first + groups, device=seed.device).unsqueeze(0)
    words = torch.stack(torch.broadcast_tensors(*_philox(counters, row.view(1, 1), _keys(seed))), dim=-1)
    return torch.stack([words & (LEVELS - 1), (words >> 16) & (LEVELS - 1)], dim=-1).to(torch.int32).view(-1)


def uniform(counters: Tensor, seeds: Tensor) -> Tensor:
    """A number in [0, 1) each, float64 [B] of 53 bits, of counters (n, 0, 0, 0) and seeds as keys, both int64 [B]."""
    first, second, *_ = _philox(counters.unsqueeze(0), torch.zeros_like(counters).unsqueeze(0), _keys(seeds))
    return (((first & _LOW) << 21) | ((second & _LOW) >> 11)).squeeze(0).double() * 2.0**-53


def _keys(seed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two key words of each round, as int64."""
    low, high = seed & _LOW, (seed >> 32) & _LOW
    return [((low + i * _STEPS[0]) & _LOW, (high + i * _STEPS[1]) & _LOW) for i in range(ROUNDS)]


def _philox(c0: Tensor, c1: Tensor, keys: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words that counter (c0 [1, G], c1 [R, 1], 0, 0) gives, each the low half of an int64."""
    c2 = c3 = torch.zeros_like(c0[:, :1])
    for k0, k1 in keys:
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the low 64 bits, which are all of them
        c0, c1 = _mix(b, c1, k0), b
        c2, c3 = _mix(a, c3, k1), a
    return c0, c1, c2, c3


def _mix(product: Tensor, other: Tensor, key: Tensor) -> Tensor:
    """The high half of a 64-bit product, xor other, xor key; in place where sizes allow, as memory is what it costs."""
    high = product >> 32
    mixed = high.bitwise_xor_(other) if high.shape == other.shape else high ^ other
    return mixed.bitwise_xor_(key).bitwise_and_(_LOW)
