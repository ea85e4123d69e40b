"""The mask of `dropout.keep_mask` inside a kernel: the same bits, made where a tile of x is read."""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)


@triton.jit
def keep_tile(seed, row, column, level, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: what is kept of the tile that starts at (row, column); 8 divides column and COLUMNS.

    `level` is dropout.keep_level - 32768, to be compared with 16 bits as a signed number. A thread's draws become the
    eight neighbours that it also loads, so the words are cut up without leaving their registers.
    """
    nothing = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    groups = nothing + (column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    counters = nothing + (row + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, groups, counters, nothing, nothing, n_rounds=ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)  # word 2 i + j at [:, :, i, j]
    halves = tl.join((words << 16) >> 16, words >> 16)  # sign-extended
    return tl.reshape(halves, (ROWS, COLUMNS)) < level
