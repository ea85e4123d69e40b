"""Up to how many rows of x a 4-bit weight is decoded inside the product, and in which tiles: one line a GPU.

More rows decode the weight first. `python -m benchmarks.tune` measures where the ways meet, and prints BORDER's line.
"""

from typing import NamedTuple

BORDER: dict[str, int] = {}  # architecture -> rows of x, as measured; nothing has been measured yet
SAFE = 32  # elsewhere: decoding first moves five times the bytes, so that few rows cannot lose by much
STEP = 64  # columns of W that the kernel takes at a time: rows of packed bytes then start at 32-byte sectors
LARGEST = 1 << 32  # values of a weight whose bytes a 31-bit offset can address


class Tile(NamedTuple):
    """What one program of the kernel for few rows multiplies, and what it takes of a multiprocessor."""

    rows: int  # of x
    stages: int  # of the pipeline
    copies: int  # of the look-up table in shared memory
    programs: int  # that run on a multiprocessor at a time: K is split until they are that many
    columns: int = 256  # rows of W, which are columns of y
    warps: int = 8


SMALL = (Tile(8, 3, 16, 2), Tile(16, 3, 16, 2), Tile(32, 3, 16, 1))  # for 99 KB of shared memory
TILES = {  # by rows of x, ascending
    "sm_80": (Tile(8, 4, 32, 2), Tile(16, 3, 32, 1), Tile(32, 3, 16, 1)),
    "sm_86": SMALL,
    "sm_89": SMALL,
    "sm_90": (Tile(8, 4, 16, 2), Tile(16, 4, 32, 1), Tile(32, 3, 32, 1)),
    "sm_100": (Tile(8, 4, 16, 2), Tile(16, 4, 16, 2), Tile(32, 3, 16, 2)),
    "sm_120": SMALL,
}


def border(architecture: str) -> int:
    """The most rows of x for which "sm_90" and the like decode inside the product."""
    return BORDER.get(architecture, SAFE)


def tile_for(architecture: str, rows: int) -> Tile:
    """The tile for this many rows of x; GPUs that are not listed take the smallest."""
    tiles = TILES.get(architecture, SMALL)
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
